"""Evaluation in pre-training moves no loss, knows no ranks, and finds what tools/evaluate.py finds."""

import json
import shutil

import pytest
import torch
import yaml
from forked import start
from line import command, losses, write_classes
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check
from mapet_ds.data.index import Selection, open_index
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.results.collapse import collapse_figures
from mapet_ds.results.export import export_timm
from mapet_ds.results.features import FEATURES, chosen, features, unit_length
from mapet_ds.results.online_probe import LEARNING_RATES, OnlineProbe
from mapet_ds.results.probe import knn, linear_sgd, load_timm
from mapet_ds.training.checkpoint import newest

BAD = "val/b/004.png"
FIGURES = (
    "knn_accuracy_percent", "knn_accuracy_percent_token", "knn_accuracy_percent_both", "effective_rank",
    "feature_cosine", "linear_accuracy_percent",
)  # fmt: skip
FAINT = {"noise": 200, "tint": 20}
"""Classes that are told apart mostly."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """12 steps of 8, an evaluation each third; one validation image is unreadable."""
    folder = tmp_path_factory.mktemp("online")
    write_classes(folder / "train", 60, 0, **FAINT)
    write_classes(folder / "val", 33, 1, **FAINT)
    (folder / BAD).write_bytes((folder / BAD).read_bytes()[:-30])
    values = {
        "objective": "saim", "run_dir": str(folder / "run"),
        "model": {
            "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "layer_scale": None,
            "args": {"depth": 3, "embed_dim": 32, "num_heads": 2},
        },
        "data": {"train": str(folder / "train"), "crop": "random", "threads": 1},
        "conmim": {"bn_group": 4, "projector_dim": 32, "momentum": 0.5},
        "optim": {"lr": 4e-3, "warmup_epochs": 0.1},
        "train": {"epochs": 1.6, "global_batch_size": 8, "micro_batch_size": 4},
        "checkpoint": {"every_steps": 3}, "log": {"every_steps": 1, "progress": False},
        "evaluate": {
            "train": str(folder / "train"), "val": str(folder / "val"), "every_epochs": 0.4, "max_images": 48
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def pretrain(recipe, ranks, name, *overrides, stage=3):
    run_dir = recipe.parent / name
    done = start(
        *command(recipe, ranks, f"run_dir={run_dir}", *overrides, engine=f"ds_configs/zero{stage}_cpu.json")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir, done


def evaluations(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "knn_accuracy_percent" in line}
    return {step: tuple(line[name] for name in FIGURES) for step, line in found.items()}


@pytest.fixture(scope="module")
def straight(recipe):
    return pretrain(recipe, 1, "straight")[0]


@pytest.fixture(scope="module")
def resumed(recipe):
    """Half of the run without any evaluation, the rest with them on two ranks; both under ZeRO-3."""
    run_dir, _ = pretrain(recipe, 1, "resumed", "train.stop_at_step=6", "evaluate.train=", "evaluate.val=")
    assert evaluations(run_dir) == {}
    _, done = pretrain(recipe, 2, "resumed")
    assert f"left out of the evaluation: 1 of 33, e.g. {recipe.parent / BAD}: " in done.stderr
    return run_dir


def test_evaluations_move_no_loss_and_a_resumed_run_has_the_same_lines(straight, resumed):
    expected, found = losses(straight), losses(resumed)
    assert [found[step] for step in range(1, 7)] == [expected[step] for step in range(1, 7)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert list(evaluations(straight)) == [3, 6, 9, 12]
    assert list(evaluations(resumed)) == [9, 12]
    for step, figures in evaluations(resumed).items():  # weights are equal but for rounding; an image is 3 %
        assert figures == pytest.approx(evaluations(straight)[step], abs=7)
    assert len(set(evaluations(straight).values())) > 1


@pytest.mark.parametrize("run", ["straight", "resumed"])
def test_one_rank_finds_again_what_one_or_two_found_and_no_generator_moves(
    recipe, run, request, alone, tmp_path
):
    run_dir, config = request.getfixturevalue(run), load_config(recipe)
    before, said = torch.get_rng_state(), []
    probe = OnlineProbe(config, open_index(config.data.train, tmp_path / "index"), tmp_path, alone)
    found = probe(newest(run_dir).load("model").items(), said.append)
    assert tuple(found.values()) == pytest.approx(evaluations(run_dir)[12], rel=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert "evaluating batch 11 of 12" in said and "evaluating batch 8 of 9" in said


def figures_of(exported, recipe, tmp_path):
    """By torchvision's ImageFolder and the probes, on the images that the online evaluation chooses."""
    values = load_config(recipe).evaluate
    for split, source in (("train", values.train), ("val", values.val)):
        index = open_index(source, tmp_path / f"index_{split}")
        selected = Selection(index, values.max_images)
        for i in range(len(selected)):
            if not selected.path(i).endswith(BAD):
                name = tmp_path / split / "abc"[selected.label(i)] / f"{i:03}.png"
                name.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(selected.path(i), name)
    assert len(list((tmp_path / "train").rglob("*.png"))) == 48
    model, sets = load_timm(exported), []
    transform = create_transform(**resolve_model_data_config(model))
    for split in ("train", "val"):
        folder = ImageFolder(tmp_path / split, transform)
        sets.append(features(model, DataLoader(folder, 7), torch.device("cpu"), kinds=("token", "mean")))

    def judged(feature):
        return [each for vectors, labels in sets for each in (chosen(vectors, feature, [0]), labels)]

    neighbours = []
    for feature in FEATURES:
        train, train_labels, val, val_labels = judged(feature)
        neighbours.append(knn(unit_length(train), train_labels, unit_length(val), val_labels))
    collapse = collapse_figures(judged("mean")[2])
    return (
        *neighbours,
        *collapse.values(),
        linear_sgd(*judged("mean"), LEARNING_RATES, batch_norm=True).accuracy,
    )


def test_it_is_the_exported_momentum_teacher_that_is_evaluated(recipe, tmp_path):
    run_dir, _ = pretrain(recipe, 1, "conmim", "objective=conmim", "evaluate.every_epochs=99", stage=1)
    ((step, found),) = evaluations(run_dir).items()
    assert step == 12
    assert found == pytest.approx(
        figures_of(export_timm(run_dir, tmp_path / "timm").folder, recipe, tmp_path / "a")
    )
    student = export_timm(run_dir, tmp_path / "student", student=True).folder
    assert found != pytest.approx(figures_of(student, recipe, tmp_path / "b"))


def test_selections_are_even_and_whole_where_they_can_be(recipe, tmp_path):
    index = open_index(load_config(recipe).data.train, tmp_path)
    some, everything = Selection(index, 6), Selection(index, 600)
    assert [some.path(i) for i in range(6)] == [index.path(i) for i in (0, 10, 20, 30, 40, 50)]
    assert [everything.label(i) for i in range(len(everything))] == index.labels().tolist()
    assert some.read(5) == index.read(50)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "evaluate.val=",
            "evaluate.val is empty: name the folder of images, evaluate.val=/data/imagenet/val.",
        ),
        ("evaluate.train=/nowhere", "evaluate.train = /nowhere is not a folder that this host can see."),
        ("evaluate.every_epochs=0", "evaluate.every_epochs = 0"),
        ("run_dir={}/val/run", "lies inside evaluate.val"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe, override, says):
    with pytest.raises(ConfigError, match=says):
        check(load_config(recipe, [override.format(recipe.parent)]), 1)


@pytest.mark.parametrize(
    ("classes", "empty", "limit", "says"),
    [
        ("abd", "", 48, "must have the same classes; only in one of them: c, d."),
        ("ab", "c", 48, "evaluate.val = .*: class c has no image"),
        (
            "abc",
            "",
            39,
            "39 images of evaluate.train = .* are too few for 20 neighbours and 3 classes: .* at least 40",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(recipe, alone, tmp_path, classes, empty, limit, says):
    write_classes(tmp_path / "val", 6, 0, classes, **FAINT)
    if empty:
        (tmp_path / "val" / empty).mkdir()
    config = load_config(recipe, [f"evaluate.val={tmp_path}/val", f"evaluate.max_images={limit}"])
    with pytest.raises(DataError, match=says):
        OnlineProbe(config, open_index(config.data.train, tmp_path / "index"), tmp_path, alone)
