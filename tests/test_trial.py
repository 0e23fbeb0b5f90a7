"""tools/trial.py: how steps are run, judged, recorded and passed over; each command is one that exists."""

import json
import sys

import pytest

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_method
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import UserError

sys.path.insert(0, str(REPOSITORY / "tools"))
import benchmark
import plan
import trial as program
from trials import cluster, gpu, runner, tables
from trials.runner import Step, Trial

SETUP = {"gpu": "", "torch": "2"}
LINE = {
    "hardware": {"gpu": "NVIDIA H100 80GB HBM3"}, "objective": "mapet",
    "settings": {"benchmark": "step", "model": "vit_base_patch16_224", "batch_size": 128, "dtype": "bf16"},
    "seconds": {"step": {"median": 0.1, "min": 0.09, "max": 0.12}},
    "breakdown": {"unexplained": 0.25, "parts": {"mlp": {
        "share": 0.75, "gflop": 12.5, "flop_per_byte": 99.5, "tflops": 400.0, "share_of_ceiling": 0.5,
    }}},
}  # fmt: skip
"""What tools/benchmark.py prints of a step on a GPU, as far as it is read here."""


def says(text, code=0):
    """A command that prints, and ends with a code."""
    return [sys.executable, "-c", f"import sys; print({text!r}); sys.exit({code})"]


def verdicts(records):
    return {record["step"]: record["verdict"] for record in records}


@pytest.fixture
def trial(tmp_path):
    return Trial(tmp_path / "trial", SETUP)


def test_steps_leave_lines_logs_and_verdicts(trial, capfd):
    steps = [
        Step("good", [says("first"), says(json.dumps({"speed": 2.5}))]),
        Step(
            "bad",
            [[sys.executable, "-c", "import sys; print('The disk is full.', file=sys.stderr); sys.exit(3)"]],
        ),
        Step("silent", [says("")]),
        Step("elsewhere", [says("never")], lacks="there is no GPU"),
        Step("later", [says("x")], after=("good", "bad")),
    ]
    records = trial.run(steps)
    assert verdicts(records) == {
        "good": "passed", "bad": "FAILED", "silent": "FAILED", "elsewhere": "left out", "later": "left out",
    }  # fmt: skip
    good, bad, silent, elsewhere, later = records
    assert good["figures"] == {"speed": 2.5} and good["setup"] == trial.setup
    assert bad["reason"] == "exit code 3: The disk is full."
    assert silent["reason"] == "it printed nothing"
    assert elsewhere["reason"] == "there is no GPU" and later["reason"] == "bad has not passed"
    assert [json.loads(line) for line in trial.lines.read_text().splitlines()] == records
    log = (trial.folder / "logs/good.log").read_text()
    assert "first" in log and '{"speed": 2.5}' in log
    shown = runner.report(records, trial.folder, trial.folder / "page.md")
    assert "1 passed, 2 FAILED, 2 left out" in shown
    assert all(record["reason"] in shown for record in records)


def test_one_step_stands_in_for_another(trial):
    later = Step("later", [says("{}")], after=("second",))
    for code, expected in ((0, "left out"), (1, "passed")):
        first = Step("first", [says("{}", code)])
        second = Step("second", [says("{}")], unless="first")
        found = Trial(trial.folder / str(code), SETUP).run([first, second, later])
        assert [record["verdict"] for record in found[1:]] == [expected, "passed"]
    assert found[0]["verdict"] == "FAILED"  # and is not forgotten


def test_the_reason_is_the_ranks_not_the_launchers(tmp_path):
    log = tmp_path / "log"
    rank = "$ one\nolder\n$ torchrun x.py\nThe codebook is not there.\n"
    torchrun = "E1128 17:09:26 23280 torch/distributed/elastic/api.py:1002] failed (exitcode: 2)\n"
    log.write_text(f"{rank}{torchrun}Traceback ...\n======\n")
    assert runner.reason_in(log) == "The codebook is not there."
    log.write_text(f"{rank}pdsh@n1: n2: ssh exited with exit code 1\n")
    assert runner.reason_in(log) == "The codebook is not there."
    log.write_text("$ silent\n")
    assert runner.reason_in(log) == "it said nothing"


def test_a_trial_goes_on_where_it_stopped(trial, tmp_path):
    counter = tmp_path / "counter"
    count = [sys.executable, "-c", f"open({str(counter)!r}, 'a').write('x'); print('{{}}')"]
    fails = Step("fails", [says("", 1)])
    steps = [Step("counted", [count]), fails, Step("more", [count], after=("counted",))]
    assert verdicts(trial.run(steps)) == {"counted": "passed", "fails": "FAILED", "more": "passed"}
    with trial.lines.open("a") as file:
        file.write('{"step": "cut off')
    mended = [steps[0], Step("fails", [says("{}")]), steps[2]]
    again = Trial(trial.folder, SETUP)
    again.lines.write_text(again.lines.read_text() + "\n")
    assert set(verdicts(again.run(mended)).values()) == {"passed"}
    assert counter.read_text() == "xx"  # what had passed is not done again
    for setup in (SETUP | {"torch": "3"}, SETUP | {"gpu": "NVIDIA H200"}):
        Trial(trial.folder, setup).run(mended)
    assert counter.read_text() == "xxxxxx"


def test_some_steps_alone_keep_what_the_others_have_measured(trial):
    steps = [
        Step("first", [says('{"speed": 1}')], calibrates=True),
        Step("second", [says('{"speed": 2}')], calibrates=True, after=("first",)),
        Step("third", [says("{}")]),
    ]
    assert list(verdicts(trial.run(steps, only=["first"]))) == ["first"]
    second = steps[1]._replace(commands=[["echo", lambda known: json.dumps(known["first"])]])
    records = Trial(trial.folder, SETUP).run([steps[0], second, steps[2]], only=["second"])
    assert verdicts(records) == {"first": "passed", "second": "passed"}
    assert (trial.folder / "calibration.jsonl").read_text() == '{"speed": 1}\n' * 2


def test_an_unknown_step_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the program leaves it, and the test's end comes back
    with pytest.raises(UserError, match="--only speed: there is no such step; there are machine, tests,"):
        program.try_all(program.parse(["gpu", str(tmp_path), "--cpu", "--only", "speed"]))


def test_another_commit_is_another_setup(trial, monkeypatch):
    step = Step("step", [says('{"speed": 1}')])
    trial.run([step])
    monkeypatch.setattr(runner, "commit", lambda: "another")
    assert Trial(trial.folder, SETUP).passed() == {}


def test_a_step_that_takes_too_long_is_ended_with_its_ranks(trial, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "LIMIT", 1)
    told = tmp_path / "told"
    script = f"trap 'touch {told}; exit 1' TERM; sleep 60 > /dev/null & wait"
    (record,) = trial.run([Step("slow", [["bash", "-c", script]])])
    assert (record["verdict"], record["reason"]) == ("FAILED", "it took longer than 1 s")
    assert told.exists()  # a launcher has the chance to end its ranks


def test_what_an_earlier_try_left_goes_first(trial, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/old").touch()
    trial.run([Step("step", [["mkdir", tmp_path / "run"]], figures=lambda _: {}, fresh=(tmp_path / "run",))])
    assert list((tmp_path / "run").iterdir()) == []


def test_figures_that_are_not_as_they_must_be_fail_a_step(trial):
    def judge(printed):
        raise runner.Failed("the loss has not fallen")

    steps = [
        Step("judged", [says("x")], figures=judge),
        Step("absent", [says("x")], figures=lambda _: {}["loss"]),
    ]
    judged, absent = trial.run(steps)
    assert judged["reason"] == "the loss has not fallen"
    assert absent["reason"].startswith("it left no figures: KeyError")


def write_metrics(folder, losses, last=None):
    folder.mkdir(parents=True)
    lines = [{"step": i + 1, "loss": loss, "images_per_second": 9.0 + i} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_judged_by_its_losses(tmp_path):
    falls = write_metrics(tmp_path / "falls", [4.0, 3.0, 2.0, 1.0])
    figures = gpu.training(falls, 4)
    assert figures["loss"] == {"first": 4.0, "last": 1.0}
    assert figures["images_per_second"] == {"median": 11.0, "min": 10.0, "max": 12.0}  # without the warm-up
    rises = write_metrics(tmp_path / "rises", [1.0, 1.0, 2.0, 2.0])
    assert gpu.training(rises, 4, learns=False)["steps"] == 4
    for folder, steps, reason in [
        (falls, 5, "the run ended at step 4 of 5"),
        (rises, 4, "the loss has not fallen: 1.0000 at the start"),
        (write_metrics(tmp_path / "nan", [1.0, float("nan")]), 2, "a loss is not finite"),
    ]:
        with pytest.raises(runner.Failed, match=reason):
            gpu.training(folder, steps)
    assert gpu.same_losses(falls, falls) == {"equal_losses": 4, "last_step": 4}
    with pytest.raises(runner.Failed, match="at step 1 the straight run has loss 4.0, the resumed one 1.0"):
        gpu.same_losses(falls, rises)


H100 = gpu.Machine("NVIDIA H100 80GB HBM3", 8, 79.1, 64)
CPU = gpu.Machine("", 0, 0.0, 2)


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"), ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
     ("NVIDIA H200", 139.8, "h200"), (H100.gpu, 79.2, "h100"), ("NVIDIA L4", 22.0, "")],
)  # fmt: skip
def test_the_plan_knows_the_gpu(name, gib, known):
    assert gpu.Machine(name, 1, gib, 8).plan_name == known


def filled(words, figures=None):
    return [str(word(figures) if callable(word) else word) for word in words]


def accepted(words):
    """Whether the program that a command starts takes its arguments; gives what it is."""
    name = next(word for word in words if word.endswith(".py"))
    rest = words[words.index(name) + 1 :]
    if name == "tools/benchmark.py":
        arguments = benchmark.parse(rest)
        load_config(REPOSITORY / arguments.config, arguments.overrides)
        return arguments.benchmark
    if name == "tools/plan.py":
        plan.parse(rest)
    elif "--config" in rest:
        config = load_config(REPOSITORY / rest[rest.index("--config") + 1], [w for w in rest if "=" in w])
        check_method(config)
    return name


@pytest.mark.parametrize("machine", [H100, H100._replace(gpus=1), CPU], ids=["8 GPUs", "1 GPU", "CPU"])
def test_every_command_is_one_that_exists(machine, tmp_path, monkeypatch):
    out = tmp_path / "my trial"
    (out / "data").mkdir(parents=True)
    (out / "data/teacher").symlink_to(write_teacher(tmp_path))
    steps, seen = gpu.steps(machine, out), []
    for i, step in enumerate(steps):
        assert set(step.after) <= {each.name for each in steps[:i]}, step.name
        ran = {accepted(filled(words)) for words in step.commands if "pytest" not in words}
        seen += ran
    assert {"machine", "step", "teacher", "loader", "bad", "index", "assign", "train", "scaling"} <= set(seen)
    assert {"checkpoint", "allreduce", "storage", "tools/plan.py", "mapet_ds/pretrain.py"} <= set(seen)
    lacking = {step.name for step in steps if step.lacks}
    alone = {"teacher_sharded", "allreduce"} | ({"scaling"} if machine.gpu else set())
    expected = alone if machine.gpus < 2 else set()
    assert lacking == expected | (set() if machine.gpu else {"tests", "plan"})


def write_teacher(tmp_path):
    """What the demo's teacher looks like to who reads its description."""
    import make_demo

    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": make_demo.MODEL, "preprocess_cfg": {}})
    )
    return folder


@pytest.mark.parametrize("absent", ["nvidia.dali", "faiss"])
def test_what_can_not_be_had_is_left_out_and_said(monkeypatch, tmp_path, absent):
    monkeypatch.setattr(gpu, "has", lambda module: module != absent)
    lacks = {step.name: step.lacks for step in gpu.steps(H100, tmp_path) if step.lacks}
    if absent == "faiss":
        assert lacks == {"codebook": "faiss is not installed"}  # another stands in for it
    else:
        assert "step" not in lacks and "teacher" not in lacks and "allreduce" not in lacks
        assert {"loader", "on_the_fly", "from_ids", "resume", "train"} <= set(lacks)
        assert lacks["train"] == "nvidia-dali is not installed, and no other loader trains"


def test_figures_go_to_the_page_and_calibrate_the_plan(trial, tmp_path, capsys):
    steps = [
        Step("step", [says(json.dumps(LINE))], calibrates=True),
        Step("other", [says(json.dumps({"images": 7, "backend": "nccl", "host": "n1"}))]),
        Step("left", [], lacks="it needs two GPUs"),
    ]
    records = trial.run(steps)
    page = tmp_path / "page.md"
    template = REPOSITORY / "docs/benchmarks.md"
    for _ in range(2):  # written again, it is the same
        tables.write_tables("gpu", records, page, template)
        text = page.read_text()
        assert text.count("### step") == 1
    before, _, after = template.read_text().partition("<!-- trial gpu: begin -->")
    assert text.startswith(before) and text.endswith(after.partition("<!-- trial gpu: end -->")[2])
    assert "| seconds, step | 0.1 (0.09 .. 0.12) |" in text
    assert "| mlp | 75.0% | 12.5 | 99.5 | 400 | 50% |" in text
    assert "| images | 7 |" in text and "| backend | nccl |" in text
    assert "| host |" not in text and sys.executable not in text  # the page names no hosts
    assert "Left out: it needs two GPUs" in text

    capsys.readouterr()
    words = ["--config", "mapet_ds/recipes/mapet_vitb16.yaml", "--gpu", "h100", "--json"]
    assert plan.main([*words, "--calibrate", str(trial.folder / "calibration.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"]["step_seconds"]["student"] == pytest.approx(0.2)  # two micro-steps of 128

    page.write_text("no markers")
    with pytest.raises(UserError, match="has no lines <!-- trial gpu: begin -->"):
        tables.write_tables("gpu", records, page, template)


def test_the_steps_of_a_cluster(tmp_path):
    recipe = "mapet_ds/recipes/mapet_vitb16.yaml"
    words = [
        "cluster",
        str(tmp_path),
        "--config",
        recipe,
        "--data",
        str(tmp_path),
        "--nodes",
        "4",
        "optim.lr=1e-3",
    ]
    steps = cluster.steps(program.parse(words), H100, tmp_path)
    sizes = {"1 MiB": {"bus_gbyte_s": {"median": 1.0}}, "256 MiB": {"bus_gbyte_s": {"median": 40.0}}}
    figures = {"storage": {"host_gbyte_s": {"median": 2.5}}, "allreduce": {"sizes": sizes}}
    by_ranks = {}
    for i, step in enumerate(steps):
        assert set(step.after) <= {each.name for each in steps[:i]}, step.name
        last = filled(step.commands[-1], figures)
        accepted(last)
        if last[1] == "slurm/ranks.sh":
            by_ranks[step.name] = int(last[2])
    one = {"one_node": 1, "allreduce_one_node": 1, "train": 1}
    assert by_ranks == one | dict.fromkeys(
        ["hosts", "weights_offline", "storage", "all_nodes", "allreduce"], 4
    )
    arguments = plan.parse(filled(steps[-1].commands[0], figures)[2:])
    assert (arguments.nodes, arguments.gpus_per_node, arguments.gpu) == (4, 8, "h100")
    assert arguments.storage_gbyte_s == 2.5
    assert arguments.link_gbit == pytest.approx(
        8 * 40 / 0.8
    )  # the adapters whose attained share was measured
    assert "optim.lr=1e-3" in arguments.overrides


def test_hosts_that_differ_are_named(tmp_path):
    words = [
        "cluster",
        str(tmp_path),
        "--config",
        "mapet_ds/recipes/mapet_vitb16.yaml",
        "--data",
        str(tmp_path),
    ]
    same = cluster.Cluster(program.parse([*words, "--gpus_per_node", "1"]), H100, tmp_path).same_hosts
    good = {"ranks": 2, "hosts": {"n1": 700.0, "n2": 690.0}, "hosts_differ_in": []}
    assert same(json.dumps(good)) == good
    with pytest.raises(runner.Failed, match="the hosts n1, n2 differ in driver"):
        same(json.dumps(good | {"hosts_differ_in": ["driver"]}))
    with pytest.raises(runner.Failed, match="1 ranks came"):
        same(json.dumps(good | {"ranks": 1}))


def test_a_host_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU on this host"):
        gpu.Machine.here(cpu=False)


@pytest.mark.drill
def test_the_whole_trial_on_a_cpu(tmp_path):
    """All that can run here passes; the same command does nothing again; the tables hold every benchmark."""
    from forked import start

    for repeated in (False, True):
        done = start(sys.executable, "tools/trial.py", "gpu", tmp_path, "--cpu", timeout=3600)
        assert done.returncode == 0, done.stdout
        assert "0 FAILED, 5 left out" in done.stdout
        assert ("passed before" in done.stdout) == repeated
    page = (tmp_path / "benchmarks.md").read_text()
    assert all(f"### {name}" in page for name in ("machine", "on_the_fly", "resume", "train", "scaling"))
    assert len((tmp_path / "calibration.jsonl").read_text().splitlines()) == 5
