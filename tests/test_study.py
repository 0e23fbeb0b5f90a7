"""A study: its document, its arithmetic, its table, and a tiny one from end to end."""

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from forked import ENVIRONMENT
from line import make_line, write_classes

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.config.shipped import STUDIES, shipped_names
from mapet_ds.config.study import load_study, words
from mapet_ds.errors import ConfigError
from mapet_ds.planning.study import (
    Row,
    Work,
    counted,
    equal_flops,
    equal_time,
    fitted,
    lasting,
    load_row,
    rows,
    stored,
)
from mapet_ds.results.report.study import Outcome, comma_separated, markdown, page, table

sys.path.insert(0, str(REPOSITORY / "tools"))
import study as program
from studies.checks import check_unchanged
from studies.jobs import Job, record, subset
from studies.runs import Runs

DOCUMENT = {
    "recipe": "demo_cpu",
    "engine": "zero2_cpu",
    "settings": {"train.epochs": 2, "data.threads": 2},
    "runs": {
        "mapet": {},
        "mae": {"objective": "mae", "data.threads": 3},
        "hidden": {"mapet": {"hidden_share": 1}},
    },
    "data": {"train": "/images", "count": 640},
}


WORK = Work(steps=100, parameters=7, flops_per_image=3.0, flops=3.0 * 100 * 8, disk=1.0)


def write(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**DOCUMENT, **changes}, sort_keys=False))
    return path


@pytest.fixture
def study(tmp_path):
    return load_study(write(tmp_path))


# ---- The document.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recipee": "demo_cpu"}, "recipee .* is not a knob; did you mean recipe?"),
        ({"recipe": "demo_cpa"}, "The recipe demo_cpa can't be read: .* Did you mean demo_cpu?"),
        ({"runs": {"a": {"recipe": "mae_vitb61"}}}, "runs.a: The recipe .* Did you mean mae_vitb16?"),
        ({"equal": ["steps", "time"], "at_once": 2}, "at_once = 2 runs side by side have no speed"),
        ({"runs": {"a": {"mapet.permutee": True}}}, "runs.a: mapet.permutee .* did you mean mapet.permute?"),
        ({"runs": {}}, "runs is empty"),
        ({"runs": {"a/b": {}}}, "'a/b' can't be a row"),
        ({"baseline": "beit"}, "baseline = beit is no row of runs; there are mapet, mae, hidden."),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] must name each value once"),
        ({"equal": ["stepps"]}, "equal.0 = .*stepps"),
        ({"equal": ["time", "flops"]}, "time without steps"),
        ({"measure": {"finetune": {"labels": 10}}}, "measure.finetune.recipe is empty"),
        ({"measure": {"finetune": {"recipe": "finetune_mae"}}}, "Did you mean finetune_mae_vitb16?"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_document_is_a_sentence(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_study(write(tmp_path, **changes))


def test_a_study_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(
        ConfigError, match=r"The study cifar10_cp can't be read: .*Did you mean cifar10_cpu\?"
    ):
        load_study("cifar10_cp")


@pytest.mark.parametrize("name", shipped_names(STUDIES))
def test_shipped_studies_can_be_read(name):
    study = load_study(name, ["data.count=1000"])
    assert study.seeds == [0, 1, 2] and len(list(rows(study))) >= len(study.runs)


def test_settings_become_what_a_user_would_write():
    settings = {"a.b": None, "c": {"d": True, "e": [0.1, 1]}, "f": "x", "g": "{out}/y"}
    assert words(settings, out="/o") == ["a.b=null", "c.d=true", "c.e=[0.1, 1]", "f=x", "g=/o/y"]


def test_rows_cross_tokenizers_where_ids_are_predicted(tmp_path):
    tokenizers = {"small": {"tokenizer.vocab_size": 64}, "large": {"tokenizer.vocab_size": 128}}
    study = load_study(write(tmp_path, tokenizers=tokenizers))
    titles = [row.title for row in rows(study)]
    assert titles == ["mapet, small", "mapet, large", "mae", "hidden, small", "hidden, large"]
    config = load_row(study, Row("hidden", "small"), tmp_path, seed=3)
    assert (config.tokenizer.vocab_size, config.mapet.hidden_share, config.seed) == (64, 1, 3)
    assert load_row(study, Row("mae"), tmp_path, 0).data.threads == 3, "a row's own settings win"


def test_codebooks_and_ids_are_shared_where_they_are_the_same(tmp_path):
    tokenizers = {"small": {"tokenizer.vocab_size": 64}, "other": {"tokenizer.path": "/own"}}
    study = load_study(write(tmp_path, tokenizers=tokenizers, store_ids=True))
    small = fitted(study, Row("mapet", "small"), tmp_path)
    assert small and small == fitted(study, Row("hidden", "small"), tmp_path)
    assert fitted(study, Row("mapet", "other"), tmp_path) is None, "its document names one"
    assert fitted(study, Row("mae"), tmp_path) is None and stored(study, Row("mae"), tmp_path) is None
    ids = stored(study, Row("mapet", "small"), tmp_path)
    assert ids and ids == stored(study, Row("hidden", "small"), tmp_path)
    assert ids != stored(study, Row("mapet", "other"), tmp_path)
    other = dataclasses.replace(study, data=dataclasses.replace(study.data, train="/others"))
    assert fitted(other, Row("mapet", "small"), tmp_path) != small, "other images give another codebook"
    assert stored(other, Row("mapet", "other"), tmp_path) != stored(study, Row("mapet", "other"), tmp_path)
    turned = dataclasses.replace(study, settings={"data.exif_orientation": True})
    assert stored(turned, Row("mapet", "other"), tmp_path) != stored(study, Row("mapet", "other"), tmp_path)
    inside = load_study(write(tmp_path, settings={"teacher.name": "local-dir:{out}/teacher"}))
    first, moved = (fitted(inside, Row("mapet"), tmp_path / name) for name in "ab")
    assert first and moved and first.name == moved.name, "a study's folder may be moved"
    random = dataclasses.replace(study, settings={"data.crop": "random"})
    assert stored(random, Row("mapet", "small"), tmp_path) is None, "crops differ from epoch to epoch"


def test_rows_that_would_share_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'mapet, s', equal steps, and 'mapet_s', equal steps, would share"):
        Runs(
            load_study(
                write(tmp_path, runs={"mapet": {}, "mapet_s": {"objective": "mae"}}, tokenizers={"s": {}})
            ),
            tmp_path,
        )
    with pytest.raises(ConfigError, match="would share the folder mae_equal_flops"):
        runs = {"mae": {"objective": "mae"}, "mae_equal_flops": {"objective": "mae"}}
        Runs(load_study(write(tmp_path, runs=runs, equal=["steps", "flops"])), tmp_path)
    Runs(
        load_study(
            write(
                tmp_path,
                runs={"mae": {"objective": "mae"}, "mae_s": {"objective": "mae"}},
                tokenizers={"s": {}},
            )
        ),
        tmp_path,
    )


# ---- Images, checks, changes.


def test_a_subset_takes_what_an_index_takes_and_is_of_one_source(tmp_path):
    for source, letter in (("one", "a"), ("two", "a"), ("two", "b")):
        (folder := tmp_path / source / letter).mkdir(parents=True)
        for name in (".DS_Store", "0.txt", "1.jpg", "2.jpg"):
            (folder / name).touch()
    (tmp_path / "one" / ".cache").mkdir()
    subset(str(tmp_path / "one"), 2, out := tmp_path / "images")
    assert sorted(path.name for path in out.glob("*/*")) == ["1.jpg", "2.jpg"]
    subset(str(tmp_path / "one"), 2, out)
    for source, number in (("two", 2), ("one", 1)):
        with pytest.raises(ConfigError, match="holds other images"):
            subset(str(tmp_path / source), number, out)
    with pytest.raises(ConfigError, match="has 2 images; 3 of each class"):
        subset(str(tmp_path / "one"), 3, tmp_path / "more")


def small(folder, **changes):
    """A study of one row that needs no teacher, and the folders of its images."""
    for name in ("train", "val", "others"):
        (folder / name).mkdir(exist_ok=True)
    data = {"train": str(folder / "train"), "val": str(folder / "val"), "count": 640}
    changes = {"runs": {"mae": {"objective": "mae"}}, "seeds": [0], "data": data, **changes}
    return write(folder, **changes)


def runs_of(path, out, *overrides):
    """What a study would run, counted as if every row took the same."""
    runs = Runs(load_study(path, overrides), out)
    runs.own = dict.fromkeys(runs.rows, WORK)
    runs.count()
    return runs


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["measure.linear.solvr=x"], "measure.linear: unrecognized arguments: --solvr"),
        (["measure.knn.k=many"], "measure.knn: argument --k: invalid int value"),
        (["runs.mvp.optim.warmup_epochs=3"], "runs.mvp: optim.warmup_epochs = 3.0 leaves nothing"),
        (["runs.mvp.train.micro_batch_size=48"], "runs.mvp: train.global_batch_size = 64 is not a multiple"),
        (["runs.mvp.evaluate.val=/nowhere"], "runs.mvp: evaluate.val = /nowhere is not a folder"),
    ],
)
def test_checks_come_before_what_is_prepared(tmp_path, monkeypatch, overrides, sentence):
    monkeypatch.setattr(Runs, "prepare", lambda self: pytest.fail("it has begun"))
    # Teacher and evaluate.train are not there yet, and no mistake: `prepare` makes them.
    settings = {"train.epochs": 2, "optim.warmup_epochs": 1, "teacher.name": "local-dir:{out}/demo/teacher"}
    settings |= {"evaluate.train": "{out}/demo/train", "evaluate.val": "{val}"}
    path = small(
        tmp_path, prepare=["make_demo {out}/demo"], settings=settings, runs={"mvp": {"objective": "mvp"}}
    )
    arguments = program.parse([str(path), "--out", str(tmp_path / "out"), *overrides])
    with pytest.raises(ConfigError, match=sentence):
        program.work(arguments, load_study(path, overrides))


def test_what_a_figure_comes_from_may_not_change(tmp_path):
    """Images, teacher, tokenizer and options; what changes no figure may, and so may the study's place."""
    changes = {
        "measure": {"knn": {"k": 3}, "finetune": {"recipe": "finetune_cifar10_cpu"}},
        "teacher": True, "prepare": ["make_demo {out}/demo --images {train}"],
    }  # fmt: skip
    path, out = small(tmp_path, **changes), tmp_path / "out"
    runs = runs_of(path, out)
    jobs = [
        *runs.shared(),
        *runs.of_training(runs.base, 0),
        *(job for *_, own in runs.untrained() for job in own),
    ]
    for job in jobs:
        job.done.parent.mkdir(parents=True, exist_ok=True)
        if job.read:
            config = next(
                word for word in job.words if word.endswith((".yaml", "_cpu")) and "zero2" not in word
            )
            overrides = [word for word in job.words if "=" in word and not word.startswith("--")]
            settings = load_config(config, overrides, job.read)
            (job.done.parent / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
        job.done.touch()
        record(job, 0.0, 0.0)

    def changed(*overrides, place=out):
        with pytest.raises(ConfigError) as error:
            check_unchanged(runs_of(path, place, *overrides))
        return {line.partition(":")[0].strip() for line in str(error.value).splitlines() if " then, " in line}

    check_unchanged(runs_of(path, out, "settings.log.every_steps=7", "settings.data.workers=1"))
    assert changed(f"data.train={tmp_path / 'others'}") == {"data.train", "train", "command"}
    assert changed(f"data.val={tmp_path / 'others'}") == {"data.val", "val"}
    assert changed("settings.teacher.name=other") == {"teacher.name"}
    assert changed("settings.tokenizer.path=other") == {"tokenizer.path"}
    assert changed("measure.finetune.labels=10") == {"data.train"}
    assert changed("measure.knn.k=4") == {"k"}
    out.rename(tmp_path / "moved")
    check_unchanged(runs_of(path, tmp_path / "moved"))
    assert changed("measure.knn.k=4", place=tmp_path / "moved") == {"k"}


def test_one_run_alone_answers_for_itself(tmp_path, monkeypatch):
    """Its exit code is its own, whatever other rows lack; a name that is none is refused."""
    runs = {name: {"objective": "mae"} for name in ("mae", "lacking", "mvp")}
    settings = {"train.epochs": 2, "optim.warmup_epochs": 1}
    path = small(tmp_path, runs=runs, equal=["steps", "time"], settings=settings)
    reasons = {"mae_seed0": "", "mvp_seed0": "no disk"}

    def count(study, row, out):
        if row.name == "lacking":
            raise ConfigError("tokenizer.path = /nowhere")
        return WORK

    monkeypatch.setattr("studies.runs.counted", count)
    monkeypatch.setattr(Runs, "work_off", lambda self, folder, jobs: reasons[folder.name])

    def alone(name):
        arguments = program.parse([str(path), "--out", str(tmp_path / "out"), "--only", name])
        return program.work(arguments, load_study(path))

    monkeypatch.setattr(Runs, "prepare", lambda self: self.out.mkdir(exist_ok=True))
    assert alone("mae_seed0") == 0 and alone("mvp_seed0") == 1
    with pytest.raises(ConfigError, match="lacking_seed0: tokenizer.path = /nowhere"):
        alone("lacking_seed0")
    with pytest.raises(ConfigError, match="mvp_equal_time_seed0: the speed of its run of equal steps"):
        alone("mvp_equal_time_seed0")
    with pytest.raises(
        ConfigError, match="--only mea_seed0 is no run of this study; there are shared, mae_seed0"
    ):
        alone("mea_seed0")


MEETING = """
import pathlib, sys, time
mine, other, met = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
met.touch()
"""


def test_runs_side_by_side_meet_and_the_order_is_the_documents(tmp_path, monkeypatch):
    """Each of two runs waits for the other, so one after another they would never end."""
    names = ("first", "second")
    path = small(tmp_path, runs={name: {"objective": "mae"} for name in names}, at_once=2)
    runs = runs_of(path, tmp_path / "out")

    def meeting(self, row, seed):
        mine, other = (tmp_path / name for name in sorted(names, key=lambda name: name != row.name))
        folder = self.folder(row.folder, seed)
        command = [sys.executable, "-c", MEETING, *map(str, (mine, other, folder / "met"))]
        return [Job("meet", command, folder, folder / "met", {})]

    monkeypatch.setattr(Runs, "of_training", meeting)
    assert [(outcome.row, outcome.failed) for outcome in runs.outcomes()] == [(name, "") for name in names]
    costs = [json.loads((tmp_path / f"out/{name}_seed0/jobs.json").read_text())["meet"] for name in names]
    assert all(0 < cost["cpu_seconds"] < 600 for cost in costs)


def test_the_array_has_a_task_for_every_row(tmp_path):
    """Fresh weights and the teacher come last; only training is warned; a recipe's own tokenizer stays."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump({"tokenizer": {"name": "vqkd", "path": "/weights/vqkd.pth"}}))
    mae = {"objective": "mae", "tokenizer.path": ""}
    runs = {"mae": mae, "beit": {"recipe": str(recipe), "objective": "beit"}}
    path = small(tmp_path, runs=runs, untrained={}, teacher=True, cluster={}, equal=["steps", "time"])
    arguments = program.parse([str(path), "--out", str(out := tmp_path / "out"), "--slurm"])
    said = program.slurm(arguments, runs_of(path, out)).splitlines()
    assert [line.partition("array=")[2].partition(" ")[0] for line in said] == ["0", "0-1", "0-1", "2-3", ""]
    assert ["--signal=B:USR1@300" in line for line in said] == [False, True, False, False, False]
    assert said[3].endswith("study.sh untrained") and "beit_equal_time_seed0" in said[4]
    script = (out / "study.sh").read_text()
    assert "#SBATCH --signal" not in script and "--table\n" in script

    def task(number):
        """The script as SLURM runs it, but for what it would start."""
        body = script.partition("case ${1:?")[0] + 'echo "$CODEBOOK|${RUN_DIR##*/}|${settings[-1]}"'
        environment = {
            "PATH": os.environ["PATH"],
            "SLURM_SUBMIT_DIR": "/",
            "SLURM_ARRAY_TASK_ID": str(number),
        }
        done = subprocess.run(["bash", "-c", body], env=environment, capture_output=True, text=True)
        return done.stdout.strip()

    assert task(0) == "/dev/null|mae_seed0|tokenizer.path="
    assert task(1) == "/weights/vqkd.pth|beit_seed0|tokenizer.path=/weights/vqkd.pth"
    assert task(2) == "|untrained_seed0|" and task(3) == "|teacher_seed0|"


# ---- Arithmetic.


def test_equal_flops_are_equal_to_half_a_step():
    base = lasting(WORK, 731)
    for each in (0.7, 3.0, 11.3):
        work = WORK._replace(flops_per_image=each, flops=each * WORK.steps * 8)
        steps = equal_flops(work, base)
        assert abs(lasting(work, steps).flops - base.flops) <= 0.5 * each * 8
    assert equal_flops(WORK._replace(flops=1e9), WORK) == 1


def test_equal_time_is_the_baselines_time():
    assert equal_time(WORK, 4.0, WORK, 2.0) == 200  # 100 steps at 2 a second are 50 s


def test_counts_of_a_row_and_its_length(study, tmp_path):
    """FLOPs are those of planning, and so many steps are what the run will take."""
    from mapet_ds.planning.counting import student, target

    work, config = counted(study, Row("mae"), tmp_path), load_row(study, Row("mae"), tmp_path, 0)
    assert work.steps == math.ceil(2 * 640 / 64)
    goal = target(config)
    assert work.flops_per_image == student(config, 4).flops + goal.flops + goal.fp32_flops + goal.tf32_flops
    assert work.flops == work.flops_per_image * 20 * 64
    for steps in (1, 7, 333, 12345):
        epochs = load_row(study, Row("mae"), tmp_path, 0, steps).train.epochs
        assert math.ceil(epochs * 640 / 64) == steps


def test_a_plan_for_a_cluster_and_a_row_that_cannot_be_counted(tmp_path, capsys):
    """GPU-hours are plan.py's; the row without its teacher says so, and the others are planned."""
    rows = {"mae": {"objective": "mae"}, "deep": {"objective": "mae", "mae.decoder_depth": 4}, "mapet": {}}
    changes = {"seeds": [0, 1], "equal": ["steps", "flops", "time"], "cluster": {"gpus_per_node": 1}}
    path = write(tmp_path, runs=rows, **changes)
    program.work(program.parse([str(path), "--plan", "--out", str(tmp_path / "out")]), load_study(path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| mae | steps | 2 | 20 | ") and lines[3].startswith(
        "| deep | steps | 2 | 20 |"
    )
    shallow, deep = (float(line.split("|")[5]) for line in lines[2:4])
    assert lines[4].startswith(f"| deep | flops | 2 | {round(20 * shallow / deep)} | ")
    assert lines[5].startswith("| deep | time | 2 | as long as the baseline's |")
    assert lines[6].startswith("| mapet | not counted yet: teacher.name = local-dir:runs/demo/data/teacher")
    assert "6 runs of training" in lines[8] and "GPU-hours of h100, predicted" in lines[8]
    assert not (tmp_path / "out").exists(), "a plan writes nothing"


# ---- The table.


def outcomes(**by_row):
    return [
        Outcome(row, "steps", {"knn": value, "steps": 10})
        for row, values in by_row.items()
        for value in values
    ]


def test_mean_and_spread_are_numpys_and_a_difference_has_the_spread_of_both():
    base, other = [30.0, 31.0, 33.5], [36.0, 38.0, 37.0]
    lines = table(outcomes(base=base, other=other, near=[31.0, 32.0, 33.0], few=[50.0, 51.0]), "base")
    cells = {line.row: line.cells["steps", "knn"] for line in lines}
    assert cells["base"].mean == pytest.approx(np.mean(base))
    assert cells["base"].spread == pytest.approx(np.std(base, ddof=1)) and cells["base"].verdict == ""
    found = cells["other"]
    assert found.difference == pytest.approx(np.mean(other) - np.mean(base))
    assert found.margin == pytest.approx(np.hypot(np.std(base, ddof=1), np.std(other, ddof=1)))
    assert [cells[name].verdict for name in ("other", "near", "few")] == ["beyond", "within", "too few seeds"]
    text = markdown(lines, "base")
    assert "| other | 37.0 ± 1.0 (+5.5) | 10 |" in text and "(+0.5 ~)" in text and "(+19.0 ?)" in text
    written = list(csv.DictReader(comma_separated(lines).splitlines()))
    assert float(written[0]["spread"]) == cells["base"].spread and written[2]["verdict"] == "beyond"


def test_groups_stand_beside_each_other_and_each_has_its_own_baseline():
    runs = [*outcomes(base=[1.0], other=[2.0]), Outcome("base", "flops", {"knn": 1.0})]
    runs.append(Outcome("other", "flops", {"knn": 5.0, "cpu_hours": 0.5}))
    (_, other), head = table(runs, "base"), markdown(table(runs, "base"), "base").splitlines()[0]
    assert other.cells["flops", "knn"].difference == 4.0 and other.cells["steps", "knn"].difference == 1.0
    assert head == "| row | equal steps: k-NN % | steps | equal FLOPs: k-NN % | CPU-hours |"


def test_a_failed_run_is_a_row_that_says_why():
    lines = table(
        [*outcomes(base=[1.0]), Outcome("mae", "steps", {}, "mae_seed0, pretrain: no <room>")], "base"
    )
    text = markdown(lines, "base")
    assert "| mae | failed | " in text and "- mae failed: mae_seed0, pretrain: no <room>" in text
    assert "no &lt;room&gt;" in (html := page("s", lines, "base", "runs: {}")) and "<svg" in html
    assert "http" not in html.replace("http://www.w3.org", "").replace("http-equiv", ""), (
        "it needs nothing else"
    )


# ---- From end to end.


@pytest.mark.slow
def test_a_tiny_study(tmp_path, monkeypatch, capsys):
    """Two rows, of which one fails; the same command goes on; a changed setting is refused; SLURM's array.

    Its commands are whole programs, because what is proven is that they are launched so that they run.
    """
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    recipe, codebook = make_line(tmp_path, crop="center", flip=0.0), str(tmp_path / "codebook.safetensors")
    write_classes(tmp_path / "val", 6, 1, "ab")
    document = {
        "recipe": str(recipe), "engine": "zero2_cpu", "seeds": [0], "equal": ["steps", "flops"],
        "settings": {"train.epochs": 0.3, "optim.warmup_epochs": 0.1, "log.images_every_steps": 0},
        "runs": {"mapet": {"tokenizer.path": codebook}, "broken": {"tokenizer.path": "/nowhere"}},
        "data": {"train": str(tmp_path / "train"), "val": str(tmp_path / "val")},
        "measure": {"knn": {"k": 3}}, "cluster": {"gpus_per_node": 2},
    }  # fmt: skip
    path, out = tmp_path / "tiny.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(document, sort_keys=False))

    def study(*more):
        arguments = program.parse([str(path), "--out", str(out), *more])
        return program.work(arguments, load_study(arguments.document, arguments.overrides))

    # What contradicts itself is said before anything runs.
    with pytest.raises(ConfigError, match=r"runs.broken: optim.warmup_epochs = 3.0 leaves nothing"):
        study("runs.broken.optim.warmup_epochs=3")
    with pytest.raises(
        ConfigError, match=r"measure.finetune: train.global_batch_size = 64 is not a multiple"
    ):
        recipe_words = ["measure.finetune.recipe=finetune_cifar10_cpu"]
        study(*recipe_words, "measure.finetune.settings.train.micro_batch_size=48")
    assert not (out / "mapet_seed0").exists()

    # One row is there, the other says why not.
    assert study() == 1
    text, run = (out / "table.md").read_text(), out / "mapet_seed0"
    assert "| mapet | " in text and "| broken | failed |" in text
    assert "- broken failed: broken_seed0, pretrain: tokenizer.path = /nowhere is not a file" in text
    costs = json.loads((run / "jobs.json").read_text())
    assert costs["pretrain"]["cpu_seconds"] > 0 and costs["pretrain"]["settings"]["seed"] == 0
    row = next(csv.DictReader((out / "table.csv").read_text().splitlines()))
    knn = json.loads((run / "knn.json").read_text())
    assert (row["row"], float(row["mean"]), knn["k"]) == ("mapet", knn["knn_accuracy_percent"], 3)

    # What is done is not done again, and may not change.
    capsys.readouterr()
    assert study("--table") == 0 and "broken failed" not in capsys.readouterr().out
    assert study() == 1 and "mapet_seed0" not in capsys.readouterr().out
    assert json.loads((run / "jobs.json").read_text()) == costs
    with pytest.raises(ConfigError, match=r"pretrain:\n  optim.lr: 0.002 then, 0.003 now"):
        study("runs.mapet.optim.lr=3e-3")
    with pytest.raises(ConfigError, match=r"knn:\n  k: 3 then, 4 now"):
        study("measure.knn.k=4")

    # The plan knows the speed of the run that is done; the array has a task for each run.
    assert study("--plan", "cluster=null") == 0
    assert "No run is done of broken: their hours" in capsys.readouterr().out
    assert study("--slurm") == 0 and "--array=0-1 --dependency=afterok:$shared" in capsys.readouterr().out
    script = (out / "study.sh").read_text()
    assert f"0) export RECIPE={recipe} RUN_DIR={run} CODEBOOK={codebook} settings=(" in script
    assert subprocess.run(["bash", "-n", out / "study.sh"]).returncode == 0
