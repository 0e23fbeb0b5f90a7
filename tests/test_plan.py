"""tools/plan.py: each line that it prints, what it learns from measurements, and what it refuses."""

import json
import re
import sys

import pytest
from forked import start

from mapet_ds.config.sections import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
import plan as program

RECIPES = REPOSITORY / "mapet_ds/recipes"


@pytest.fixture
def plan(capsys):
    """The program in this process, which remembers what it has counted: status, output and complaint."""

    def run(*words, recipe="mapet_vitb16"):
        status = program.main([str(word) for word in ("--config", RECIPES / f"{recipe}.yaml", *words)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def as_json(plan):
    def run(*words, **options):
        status, printed, complaint = plan(*words, "--json", **options)
        assert status == 0, complaint
        return json.loads(printed)

    return run


def test_the_command():
    done = start(sys.executable, "tools/plan.py", "--config", RECIPES / "saim_vitb16.yaml", "--gpu", "h100")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "PREDICTED for saim, vit_base_patch16_224: 1 x 8 H100, ZeRO-2, 2048 images a step\n"
    )


def numbers(line):
    """Those of a line, in its order."""
    return [float(word.replace(",", "")) for word in re.findall(r"\d[\d,]*\.?\d*", line)]


@pytest.fixture
def page(plan, as_json):
    """Lines by their first word, and the figures that they must show, of one and the same plan."""
    words = ("--gpu", "h100", "--nodes", "8")
    status, printed, _ = plan(*words)
    assert status == 0
    return printed.splitlines(), as_json(*words)


def line_of(lines, name):
    found = [line for line in lines if re.match(rf" *{name}  ", line)]
    assert len(found) == 1, name
    return found[0]


def test_what_is_counted_is_printed(page):
    lines, found = page[0], page[1]["predicted"]
    assert lines[0] == "PREDICTED for mapet, vit_base_patch16_224: 8 x 8 H100, ZeRO-2, 2048 images a step"
    assert numbers(line_of(lines, "trainable parameters")) == [92_117_504] == [found["parameters"]]
    assert numbers(line_of(lines, "GFLOP an image")) == [246.2, 241.6, 507.0, 32, 0.0, 32, 26.3]
    shown = {"student": 246.2, "student_minimum": 241.6, "teacher": 507.0, "tf32": 26.3}
    counted = found["gflop_per_image"]
    assert {name: round(counted[name], 1) for name in shown} == shown
    assert counted["recomputed"] == counted["fp32"] == 0
    micro = line_of(lines, "micro-batch")
    assert numbers(micro) == [32, 1, found["largest_micro_batch_size"], 32]
    assert micro.endswith("; give the run train.micro_batch_size=32"), "the recipe's is 128"


def test_what_is_recomputed_is_printed(plan):
    _, printed, _ = plan("--gpu", "h100", "train.grad_checkpointing=true", recipe="saim_vitb16")
    products = (
        24 * 2 * 196 * (4 + 4) * 768**2 + 12 * 4 * 2 * 196**2 * 768
    )  # of its blocks, but for each one's last
    assert "give the run" not in printed, "the micro-batch is the recipe's"
    found = numbers(line_of(printed.splitlines(), "GFLOP an image"))[2]
    assert found == pytest.approx(products / 1e9, rel=0.01)
    assert f"and {found:.1f} recomputed," in printed


def test_memory_and_time_are_printed(page):
    lines, found = page[0], page[1]["predicted"]
    for name, size in found["memory_gib"].items():
        if size < 0.005:  # not worth a line
            continue
        assert numbers(line_of(lines, name)) == [pytest.approx(size, abs=0.005)]
    seconds, step = found["step_seconds"], line_of(lines, "step")
    for name, value in seconds.items():
        printed = re.search(rf"{name} ([\d.]+)", step) if name != "total" else re.search(r"([\d.]+) ms", step)
        assert (float(printed[1]) if printed else 0) == pytest.approx(1e3 * value, abs=0.051)


def test_the_run_is_printed(page):
    lines, found = page[0], page[1]["predicted"]
    speed = found["images_per_second"]
    shown = numbers(line_of(lines, "speed"))
    assert shown == [round(speed), round(speed / 64), pytest.approx(100 * found["mfu"], abs=0.051)]
    assert found["mfu"] == pytest.approx(246.2e9 * speed / (64 * 989e12), rel=0.001)
    assert numbers(line_of(lines, "input")) == [round(speed / 8 * 110 / 1e3)]
    hours = found["hours"]
    assert hours == pytest.approx(found["steps"] * found["step_seconds"]["total"] / 3600)
    steps = -(-300 * 1_281_167 // 2048)
    shown = numbers(line_of(lines, "run"))
    assert shown == [
        steps,
        pytest.approx(hours, abs=0.051),
        pytest.approx(hours / 24, abs=0.051),
        round(64 * hours),
    ]
    share = found["step_seconds"]["teacher"] / found["step_seconds"]["total"]
    assert re.fullmatch(rf"binds +teacher, {share:.0%} of the step", line_of(lines, "binds"))


def test_changes_and_scaling_are_printed(page):
    lines, found = page
    changes = [
        re.fullmatch(r"  change: (.*): ([\d,]+) images/s \(bound ([\d,]+)\)", line)
        for line in lines
        if "change:" in line
    ]
    assert {match[1]: numbers(match[2])[0] for match in changes} == {
        words: round(speed) for words, speed in found["changes"].items()
    }
    assert {match[1]: numbers(match[3])[0] for match in changes} == {
        words: round(speed) for words, speed in found["bounds"].items()
    }
    assert any(
        words.startswith("teacher.name=ViT-B-16-quickgelu teacher.img_size=224") for words in found["changes"]
    )
    assert any(words.startswith("tokenizer.ids=FOLDER") for words in found["changes"])
    rows = [line for line in lines if re.match(r" +\d+ +\d+ x \d+", line)]
    assert [row["gpus"] for row in found["scaling"]] == [2**i for i in range(11)]
    for row, line in zip(found["scaling"], rows, strict=True):
        shown = [
            row["gpus"],
            row["micro_batch_size"],
            row["grad_accum_steps"],
            round(row["images_per_second"]),
        ]
        rest = [100 * row["efficiency"], row["hours"], row["gpu_hours"]]
        assert numbers(line) == shown + [pytest.approx(value, abs=0.51) for value in rest]
        assert line.endswith(row["binds"])


def test_the_bound_is_printed_apart(page):
    """Its parts add up, no share of a GPU is in it, and the prediction is slower."""
    lines, found = page[0], page[1]["predicted"]["bound"]
    seconds, speed = found["step_seconds"], found["images_per_second"]
    parts = [*seconds["student"].values(), *seconds["target"].values(), seconds["update"]]
    assert seconds["total"] == pytest.approx(sum(parts)) == pytest.approx(2048 / speed)
    shown = numbers(line_of(lines, "BOUND, computed"))
    predicted = page[1]["predicted"]["images_per_second"]
    percent = [pytest.approx(100 * found["mfu"], abs=0.051), pytest.approx(100 * predicted / speed, abs=0.51)]
    assert shown == [round(speed), round(speed / 64), *percent] and predicted < speed
    for name in ("student", "target"):
        kinds = [*seconds[name].values()]
        share = sum(kinds) / seconds["total"]
        printed = numbers(line_of(lines, name))
        assert printed[:2] == [
            pytest.approx(1e3 * sum(kinds), abs=0.051),
            pytest.approx(100 * share, abs=0.51),
        ]
        assert printed[2:] == [
            *(pytest.approx(1e3 * kind, abs=0.051) for kind in kinds),
            found["kernels"][name],
        ]
    changes = [line for line in lines if line.startswith("  with ")]
    assert [numbers(line.rpartition(":")[2])[0] for line in changes] == [
        round(x) for x in found["changes"].values()
    ]
    assert min(found["changes"].values()) > speed
    assert "989 TFLOP/s of the data sheet and memory at 3350 GB/s" in "".join(lines)


def test_what_can_not_run_stands_in_the_table(plan):
    _, printed, _ = plan("--gpu", "h100", recipe="conmim_vits16")
    assert "    64  64 GPUs leave 32 of 2048 images a step to each: at most 32 GPUs." in printed.splitlines()


def test_what_a_plan_rests_on_is_printed(page):
    lines, found = page
    printed = lines[lines.index("Assumptions") + 1 :]
    assert printed == [f"- {line}" for line in found["assumptions"]]
    assert printed == [
        "- H100: 989 bf16 and 66.9 fp32 TFLOP/s, 3350 GB/s memory, 450 GB/s NVLink each way "
        "(NVIDIA's data sheet, SXM, dense), 79.1 GiB",
        "- attained: student 0.20, teacher 0.20 of that, fp32 0.70, TF32, half as fast as bf16, 0.50; "
        "ASSUMED, not yet measured (--calibrate)",
        "- links at 0.8 and memory at 0.7 of their data sheet; rings, whose slowest link is 400 Gbit/s of a "
        "node; 10 us a hop",
        "- gradients are summed behind the backward pass where overlap_comm is on (stages 2, 3), weights "
        "gathered in the open",
        "- a micro-step takes at least 15 ms: the host launches its kernels",
        "- 1281167 images (--images), a file of 110 kB each (ImageNet-1k's mean)",
        "- a node reads 2 GB/s, and a GPU's loader prepares 2000 images/s, while the GPU computes",
        "- memory: 1.5 GiB of contexts, 1 GiB for DALI, 79% of the GPU usable; activations as in eager mode "
        "(torch.compile keeps up to a sixth less, of ConMIM's half)",
    ]


def test_a_plan_says_what_it_leaves_out(as_json):
    assert "teacher.ahead" not in "".join(as_json("--gpu", "h100")["assumptions"])
    said = "".join(as_json("--gpu", "h100", "teacher.ahead=true")["assumptions"])
    assert "teacher.ahead: the memory of teacher and student at once" in said


SMALL = ["--nodes", "2", "train.micro_batch_size=8"]
ADVICE = [
    ("saim_vitb16", ["--nodes", "2"], "--nodes 4"),
    ("saim_vitb16", ["train.grad_checkpointing=true"], "train.grad_checkpointing=false"),
    ("saim_vitb16", ["--nodes", "8", "--link_gbit", "5"], "twice the link (--link_gbit)"),
    ("mvp_vitb16", SMALL, "--engine ds_configs/zero1.json (sums gradients once an update)"),
    ("mvp_vitb16", SMALL, "train.micro_batch_size=128"),
    (
        "mapet_vitb16",
        ["--storage_gbyte_s", "0.05"],
        "twice the storage rate: local disks, or shards (tools/make_shards.py)",
    ),
    ("conmim_vits16", [], "a loader twice as fast: data.workers, data.threads, smaller files"),
]


@pytest.mark.parametrize(("recipe", "words", "change"), ADVICE)
def test_advice_is_better_than_what_it_replaces(as_json, recipe, words, change):
    found = as_json("--gpu", "h100", *words, recipe=recipe)
    assert found["changes"][change] > found["predicted"]["images_per_second"]


LINE = {
    "hardware": {"gpu": "NVIDIA H100 80GB HBM3"},
    "settings": {"model": "vit_base_patch16_224", "teacher": "RN50x64"},
}


def line(kind, **entries):
    return json.dumps(
        LINE
        | {"settings": LINE["settings"] | {"benchmark": kind, "batch_size": 128, "dtype": "bf16"}}
        | entries
    )


def test_calibration_replaces_what_is_assumed(as_json, tmp_path):
    path = tmp_path / "benchmark.json"
    step = line("step", objective="mapet", seconds={"step": {"median": 0.1}})
    milliseconds = {"teacher_bf16": 1.0, "assign_fp32": 1.5, "assign_bf16": 0.5}
    teacher = line("assign", ms_per_image={name: {"median": value} for name, value in milliseconds.items()})
    path.write_text(f"{step}\n{teacher}\n")
    found = as_json("--gpu", "h100", "--calibrate", path)
    seconds = found["predicted"]["step_seconds"]
    assert seconds["student"] == pytest.approx(2 * 0.1)  # two micro-steps of 128
    assert seconds["teacher"] == pytest.approx(0.256, rel=0.05)
    assert seconds["assignment"] == pytest.approx(0.128)
    said = "".join(found["assumptions"])
    assert str(path) in said and "; the rest ASSUMED" in said
    assert f"fp32 {2 * 196 * 8192 * 4096 / 1.5e-3 / 66.9e12:.3g}" in said


def test_a_loader_and_a_teacher_are_learnt(as_json, tmp_path):
    path = tmp_path / "benchmark.json"
    views = {
        name: {"images_per_second": {"ours": {"median": speed}}}
        for name, speed in (("one_view", 900), ("two_views", 70))
    }
    teacher = line("teacher", teacher="RN50x64", bf16={"images_per_second": {"median": 1000.0}})
    path.write_text(f"{line('loader', **views)}\n{teacher}\n")
    found = as_json("--gpu", "h100", "--calibrate", path)
    assert found["predicted"]["step_seconds"]["teacher"] == pytest.approx(0.256)
    assert found["predicted"]["images_per_second"] == pytest.approx(8 * 70)
    assert found["predicted"]["binds"] == "input"
    alone = as_json("tokenizer.ids=FOLDER", "--gpu", "h100", "--calibrate", path)
    assert alone["predicted"]["images_per_second"] <= 8 * 900
    assert "prepares 900 images/s" in "".join(alone["assumptions"])


def test_a_measured_run_sets_the_speed_of_the_whole_step(as_json, tmp_path):
    path = tmp_path / "train.json"
    measured = {
        "ranks": 2,
        "objective": "mapet",
        "dtype": "torch.bfloat16",
        "images_per_second": {"train": {"median": 600.0}},
    }
    path.write_text(line("train", **measured))
    found = as_json("--gpu", "h100", "--nodes", "1", "--gpus_per_node", "1", "--calibrate", path)
    assert found["predicted"]["images_per_second"] == pytest.approx(300, rel=0.001)


@pytest.fixture
def refused(plan):
    def run(says, *words):
        status, _, complaint = plan(*words)
        assert status == 2
        assert says in complaint

    return run


def test_calibration_refuses_what_would_mislead(refused, tmp_path):
    path = tmp_path / "lines.json"
    for text, says in [
        (line("step", hardware={"gpu": None}), "measured on a CPU"),
        (line("step", hardware={"gpu": "NVIDIA A100-SXM4-80GB"}), "not on an H100"),
        (line("step"), "lacks an entry"),
        (line("bad"), "found no line about this recipe"),
        ("no JSON", "does not hold lines"),
        ("[1]", "does not hold lines"),
    ]:
        path.write_text(text)
        refused(says, "--gpu", "h100", "--calibrate", path)
    refused("absent.json", "--gpu", "h100", "--calibrate", tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "v100"], "--gpu v100 is not known; there are: a100-40"),
        (
            ["--gpu", "h100", "--gpus_per_node", "7"],
            "train.global_batch_size = 2048 can't be divided among 7 GPUs",
        ),
        (["--gpu", "h100", "--engine", "absent.json"], "absent.json can't be read"),
        (["--gpu", "h100", "teacher.img_size=224"], "grid is 7 x 7"),
        (["--gpu", "h100", "objective=dino"], "objective = dino is not known"),
        (["--gpu", "h100", "train.micro_batch_size=100"], "train.micro_batch_size = 100 does not divide"),
    ],
)
def test_mistakes_are_sentences(refused, words, says):
    refused(says, *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--nodes", "0"], "0 must be at least 1"), (["--link_gbit", "nan"], "nan must be above 0")],
)
def test_numbers_are_positive(plan, capsys, words, says):
    with pytest.raises(SystemExit):
        plan("--gpu", "h100", *words)
    assert says in capsys.readouterr().err
