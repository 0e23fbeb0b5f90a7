"""A study: its document, its arithmetic, its table, and a tiny one from end to end."""

import csv
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import yaml
from forked import ENVIRONMENT
from line import make_line, write_classes

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
        ({"runs": {"a": {"mapet.permutee": True}}}, "runs.a: mapet.permutee .* did you mean mapet.permute?"),
        ({"runs": {}}, "runs is empty"),
        ({"runs": {"a/b": {}}}, "'a/b' can't be a row"),
        ({"baseline": "beit"}, "baseline = beit is no row of runs; there are mapet, mae, hidden."),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] must name each value once"),
        ({"equal": ["stepps"]}, "equal.0 = .*stepps"),
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
    random = dataclasses.replace(study, settings={"data.crop": "random"})
    assert stored(random, Row("mapet", "small"), tmp_path) is None, "crops differ from epoch to epoch"


# ---- Arithmetic.

WORK = Work(steps=100, parameters=7, flops_per_image=3.0, flops=3.0 * 100 * 8, disk=1.0)


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
