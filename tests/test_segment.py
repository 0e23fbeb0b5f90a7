"""segment.py by the user's own commands: figures no split changes, exact resume, a program, bad masks."""

import base64
import dataclasses
import io
import itertools
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from forked import start
from images import png16
from line import command, losses, steps
from PIL import Image
from safetensors.torch import load_file
from test_export import write_checkpoint
from test_finetune import MODEL
from test_metrics import read_tensorboard
from test_report import Page
from torch import nn

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_labelled
from mapet_ds.config.running import total_steps
from mapet_ds.config.sections import REPOSITORY, ModelConfig
from mapet_ds.config.segment import MaskedDataConfig, SegmentationConfig, SegmentationEvaluateConfig
from mapet_ds.data.formats import BadImage
from mapet_ds.data.index import open_index
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.launch import Ranks
from mapet_ds.results.export import export_timm
from mapet_ds.segmentation.evaluation import Predictor, confusion, figures_of, window_starts
from mapet_ds.segmentation.export import export_segmenter
from mapet_ds.segmentation.finished import evaluation_settings, open_segmenter
from mapet_ds.segmentation.heads import DPT, four_blocks
from mapet_ds.segmentation.judging import Judging
from mapet_ds.segmentation.loader import Augmentation, MaskedBatches, WholeImages, resized
from mapet_ds.segmentation.masks import VOID, Masks, _paired, classes_of, known_classes
from mapet_ds.segmentation.norm import GroupedBatchNorm
from mapet_ds.segmentation.segmenter import Segmenter
from mapet_ds.segmentation.task import FIGURES
from mapet_ds.training.metrics import token_colours
from mapet_ds.training.optim import learning_rate
from tools import report

RECIPES = sorted((REPOSITORY / "mapet_ds/recipes").glob("segment_*.yaml"))
RANKS = Ranks(0, 0, 1, torch.device("cpu"), None)
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]], np.uint8)
"""Of the three classes; a fourth is named and occurs nowhere."""


def write_scenes(folder, number, seed):
    """Images of a few coloured areas, 52 x 40 and 36 x 44, their masks, and classes.txt."""
    generator = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(number):
        height, width = ((40, 52), (44, 36))[i % 2]
        cells = generator.integers(0, 3, (-(-height // 16), -(-width // 16)))
        ids = cells.repeat(16, axis=0).repeat(16, axis=1)[:height, :width].astype(np.uint8)
        noise = generator.integers(0, 40, (height, width, 3), dtype=np.uint8)
        Image.fromarray(COLOURS[ids] + noise).save(folder / f"images/{i:02}.png")
        ids[:3] = 255
        Image.fromarray(ids).save(folder / f"masks/{i:02}.png")
    (folder / "classes.txt").write_text("red\ngreen\nblue\nnever\n")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """12 steps of 8 images, of 21, and 7 for evaluation, one of each bad; an export of random weights."""
    folder = tmp_path_factory.mktemp("segment")
    write_scenes(folder / "train", 21, 0)
    write_scenes(folder / "val", 7, 1)
    for split in ("train", "val"):
        path = folder / split / "masks/05.png"
        path.write_bytes(path.read_bytes()[:-30])
    model = dataclasses.replace(MODEL, args={**MODEL.args, "depth": 4})
    write_checkpoint(folder / "pretrained", model)
    export_timm(folder / "pretrained", folder / "timm")
    values = {
        "model": {"path": str(folder / "timm"), "bn_group": 4},
        "data": {f"{split}{key}": f"{folder}/{split}/{kind}" for split in ("train", "val")
                 for key, kind in (("", "images"), ("_masks", "masks"))} | {"max_bad_share": 0.05},
        "optim": {"lr": 5e-3, "warmup_epochs": 0.5, "clip_grad": 1.0},
        "train": {"epochs": 4.57, "global_batch_size": 8, "micro_batch_size": 4},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 1, "images_every_steps": 5, "progress": False},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def settings(recipe, *overrides):
    return load_config(recipe, [f"run_dir={recipe.parent}/none", *overrides], SegmentationConfig)


def segment(recipe, ranks, *overrides, **options):
    return start(*command(recipe, ranks, *overrides, program="tools/segment.py", **options))


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(recipe):
    run_dir = recipe.parent / "straight"
    done = segment(recipe, 1, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "its weights, which stay as they are; a fresh head, linear." in done.stdout
    assert "left out of the evaluation: 1 of 7" in done.stderr
    assert "In no mask of data.val: never." in done.stderr
    return run_dir


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("red\ngreen\nred\n", "red stands there twice"), ("red\n\ngreen\n", "a line is empty")],
)
def test_a_name_of_each_class(tmp_path, text, sentence):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=sentence):
        classes_of(MaskedDataConfig(train_masks=str(tmp_path)))


def test_a_frozen_backbone_learns_and_is_judged(recipe, straight):
    evaluated = [line for line in records(straight) if "val_miou" in line]
    assert [line["step"] for line in evaluated] == [3, 6, 8, 11, 12], "an epoch is 2.6 steps"
    assert all(line["val_images"] == 6 for line in evaluated)
    assert evaluated[-1]["val_miou"] > max(60, evaluated[0]["val_miou"])
    results = json.loads((straight / "results.json").read_text())
    assert results["val_miou"] == evaluated[-1]["val_miou"]
    assert results["absent"] == ["never"] and results["classes"]["never"]["accuracy"] is None
    listed = (straight / "quarantine.tsv").read_text().splitlines()[1:]
    assert len(listed) == 1 and "its mask" in listed[0]

    board = read_tensorboard(straight)
    assert [event.step for event in board.Images("crop_classes_predicted")] == [5, 10]
    assert [event.step for event in board.Images("image_classes_predicted")] == [3, 6, 8, 11, 12]

    # The backbone's weights are those of the file.
    last = load_file(max((straight / "checkpoints").iterdir()) / "model.safetensors")
    source = load_file(recipe.parent / "timm/model.safetensors")
    assert all(torch.equal(last[f"vit.{name}"], tensor) for name, tensor in source.items())
    assert last.keys() == {f"vit.{name}" for name in source} | {
        "head.norm.weight", "head.norm.bias", "head.classifier.weight", "head.classifier.bias",
    }  # fmt: skip


def test_the_picture_is_of_the_first_images_true_and_predicted_classes(recipe, straight):
    """The same as one made of the segmenter that the run leaves; and void is grey."""
    config = settings(recipe)
    model = Segmenter(config, 4).eval()
    model.load_state_dict(load_file(straight / "segmenter/model.safetensors"))
    index, masks = masks_of(config, "val", straight)
    about = json.loads((straight / "segmenter/segmenter.json").read_text())
    judging = Judging(config, index, masks, (about["mean"], about["std"]), RANKS)
    predict = Predictor(model, config.evaluate, 4)
    expected = judging.picture(predict)
    event = read_tensorboard(straight).Images("image_classes_predicted")[-1]
    drawn = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.abs(drawn - 255 * expected.movedim(0, 2).numpy()).max() <= 1

    # Two pixels apart and on white lie 4 x 3 pictures of at most 44 x 52.
    assert drawn.shape == (4 * 46 + 2, 3 * 54 + 2, 3)
    item, inside = WholeImages(config.data, index, masks, *judging.normal, 0, 1)[0], np.s_[2:42, 2:54]
    image, truth, predicted = (drawn[:, 54 * i :][inside] / 255 for i in range(3))
    assert np.abs(image - np.asarray(Image.open(index.path(0))) / 255).max() < 0.01
    for shown, ids in ((truth, item.mask), (predicted, predict(item.image, item.mask.shape))):
        colours = (shown - 0.4 * image) / 0.6
        assert np.abs(colours - token_colours(ids.long()).numpy()).max() < 0.02
    assert np.ptp((truth - 0.4 * image)[:3], axis=2).max() < 0.02, "void has no colour"
    assert np.ptp((truth - 0.4 * image)[3:], axis=2).min() > 0.1


def test_the_report_of_a_run(recipe, straight, tmp_path, monkeypatch):
    shown = {}
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(straight / "config.yaml", early)
    for run_dir in (straight, early):
        out = tmp_path / "page.html"
        monkeypatch.setattr(sys, "argv", ["report.py", str(run_dir), "--out", str(out)])
        assert report.main() == 0
        shown[run_dir] = Page(out.read_text())
    page = shown[straight]
    results = json.loads((straight / "results.json").read_text())
    cells = [word for word in page.words["by-class"] if word.strip()]
    assert cells[:4] == ["class", "IoU, %", "accuracy, %", "pixels"]
    rows = {cells[i]: cells[i + 1 : i + 4] for i in range(4, len(cells), 4)}
    for name, values in results["classes"].items():
        figures = [f"{values[key]:.4g}" if values[key] is not None else "none" for key in ("iou", "accuracy")]
        assert rows[name] == [*figures, str(values["pixels"])]
    pictures = {a["alt"]: a["src"] for tag, a in page.elements if tag == "img"}
    newest = read_tensorboard(straight).Images("image_classes_predicted")[-1].encoded_image_string
    assert base64.b64encode(newest).decode() in pictures["Images of data.val, true and predicted classes"]
    assert len(pictures) == 2 and "Validation mIoU, %" in page.sections["curves"]
    assert f"val miou{results['val_miou']:.2f} %" in "".join(page.sections["summary"].split("\n"))
    assert "objectivesegmentation" in "".join(page.sections["summary"].split("\n"))
    assert "predictions" not in page.sections and "bn_group: 4" in page.sections["settings"]
    assert "has not evaluated itself yet" in shown[early].sections["classes"]


def snippet():
    text = (REPOSITORY / "docs/segmentation.md").read_text()
    return re.search(r"^```python\n(.*?segmenter\.pt2.*?)^```", text, re.M | re.S)[1]


def test_the_program_runs_without_this_repository(recipe, straight):
    """The documented lines, in a process of their own, give the run's figures."""
    lines = snippet().replace("/runs/b16_ade20k", str(straight)).replace('"street.jpg"', "path")
    once, loop = lines.split("\n\npixels", 1)
    masks = f"{recipe.parent}/val/masks"
    script = "import sys\nsys.modules.update(dict.fromkeys(['mapet_ds', 'timm', 'deepspeed']))\n"
    script += f"import numpy, pathlib\n{once}\nright = total = 0\n"
    script += f"for path in sorted(pathlib.Path('{recipe.parent}/val/images').iterdir()):\n"
    script += "    if path.stem == '05': continue\n"
    script += "".join(f"    {line}\n" for line in f"pixels{loop}".splitlines())
    script += f"    truth = torch.from_numpy(numpy.asarray(Image.open('{masks}/' + path.name)))\n"
    script += "    right += int((classes == truth).sum()); total += int((truth != 255).sum())\n"
    script += "print(100 * right / total)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    results = json.loads((straight / "results.json").read_text())
    assert float(done.stdout) == pytest.approx(results["val_pixel_accuracy"], abs=1e-9)


@pytest.fixture(scope="module")
def killed(recipe):
    """A run that was killed after a checkpoint."""
    run_dir = recipe.parent / "killed"
    done = start(*command(recipe, 1, f"run_dir={run_dir}", program="tests/killed_segment.py"))
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert steps(run_dir) == 6 and not (run_dir / "DONE").exists()
    return run_dir


def test_killed_and_started_again_is_the_same_run(recipe, straight, killed):
    run_dir = recipe.parent / "again"
    shutil.copytree(killed, run_dir)
    done = segment(recipe, 1, f"run_dir={run_dir}", "train.stop_at_step=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Continuing" in done.stdout
    whole = records(straight)[:8]
    figures = [[{k: v for k, v in line.items() if k in (*FIGURES, "grad_norm")} for line in lines]
               for lines in (records(run_dir), whole)]  # fmt: skip
    assert figures[0] == figures[1] and "val_miou" in whole[-1]
    for file in ("model", "optimizer", "target"):
        one, other = (
            load_file(folder / f"checkpoints/step_00000008/{file}.safetensors")
            for folder in (run_dir, straight)
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), file


def test_another_number_of_ranks_and_stage_goes_on_with_the_same_run(recipe, straight, killed):
    run_dir = recipe.parent / "elastic"
    shutil.copytree(killed, run_dir)
    done = segment(
        recipe, 2, f"run_dir={run_dir}", "train.stop_at_step=8", engine="ds_configs/zero3_cpu.json"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Continuing" in done.stdout
    expected = {step: loss for step, loss in losses(straight).items() if step <= 8}
    assert losses(run_dir) == pytest.approx(expected, rel=1e-4)


def test_two_ranks_find_the_figures_of_one_to_the_digit(recipe):
    """Of the same weights: the rate is too small to change any."""
    found = []
    for ranks in (1, 2):
        run_dir = recipe.parent / f"ranks_{ranks}"
        same = ["optim.lr=1e-30", "optim.warmup_lr=0", "optim.min_lr=0", "optim.warmup_epochs=0"]
        more = ["log.evaluate_every_epochs=0.3", "evaluate.flip=true", "evaluate.stride=11"]
        done = segment(recipe, ranks, f"run_dir={run_dir}", *same, *more, "train.stop_at_step=1")
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = records(run_dir)
        figures = {key: line[key] for key in line if key.startswith("val_") and key != "val_seconds"}
        found.append([figures, json.loads((run_dir / "classes.json").read_text())])
    assert found[0] == found[1]
    assert 0 < found[0][0]["val_miou"] < 100 and found[0][0]["val_images"] == 6


# A finished run on other data.


def judged(run_dir, *words):
    return start(sys.executable, "tools/segment.py", "--evaluate", run_dir, *words)


@pytest.fixture(scope="module")
def finished(recipe, straight):
    """The run elsewhere: what it learnt from, its checkpoints and the weights it began from are gone."""
    run_dir = recipe.parent / "finished"
    shutil.copytree(straight, run_dir, ignore=shutil.ignore_patterns("checkpoints", "index*"))
    (run_dir / "vit").mkdir()
    shutil.copy(recipe.parent / "timm/config.json", run_dir / "vit")
    config = (run_dir / "config.yaml").read_text()
    for split in ("train", "val"):
        config = config.replace(f"{recipe.parent}/{split}/", f"/nowhere/{split}/")
    (run_dir / "config.yaml").write_text(config.replace(f"{recipe.parent}/timm", f"{run_dir}/vit"))
    return run_dir


def test_a_finished_run_is_judged_on_other_images(recipe, straight, finished, tmp_path):
    """On its own it has the run's figures to the digit."""
    val = [f"data.val={recipe.parent}/val/images", f"data.val_masks={recipe.parent}/val/masks"]
    done = judged(finished, *val, "--out", tmp_path / "val.json")
    assert done.returncode == 0, done.stderr[-3000:]
    own = json.loads((straight / "results.json").read_text())
    found = json.loads((tmp_path / "val.json").read_text())
    shared = ("val_miou", "val_class_accuracy", "val_pixel_accuracy", "val_images", "classes", "absent")
    assert {key: found[key] for key in shared} == {key: own[key] for key in shared}
    assert f"mIoU {own['val_miou']:.2f} %" in done.stdout and re.search("never +IoU +none, 0", done.stdout)
    assert "left out of the evaluation: 1 of 7" in done.stderr

    # On others, whole and with mirror images.
    write_scenes(tmp_path / "more", 3, 7)
    more = [f"data.val={tmp_path}/more/images", f"data.val_masks={tmp_path}/more/masks"]
    words = [*more, "evaluate.mode=whole", "evaluate.flip=true"]
    done = judged(finished, *words, "--out", tmp_path / "more.json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "more.json").read_text())
    config = evaluation_settings(finished, words)
    model, (index, masks) = open_segmenter(config, 4), masks_of(config, "val", tmp_path)
    about = json.loads((finished / "segmenter/segmenter.json").read_text())
    images = WholeImages(config.data, index, masks, about["mean"], about["std"], 0, 1)
    predict, matrix = Predictor(model, config.evaluate, 1), torch.zeros(4, 4, dtype=torch.int64)
    for i in range(3):
        matrix += confusion(predict(images[i].image, images[i].mask.shape), images[i].mask, 4)
    assert found["val_miou"] == pytest.approx(figures_of(matrix).miou) and found["val_images"] == 3
    assert found["evaluate"]["mode"] == "whole" and found["masks"] == masks.fingerprint


def test_what_a_finished_run_can_not_be_judged_by_is_a_sentence(recipe, finished, killed, tmp_path):
    write_scenes(tmp_path / "more", 2, 7)
    folder = tmp_path / "more"
    more = [f"data.val={folder}/images", f"data.val_masks={folder}/masks"]

    def says(*words, run_dir=finished):
        with pytest.raises((ConfigError, DataError)) as caught:
            config = evaluation_settings(run_dir, words)
            known_classes(config.data, ["red", "green", "blue", "never"])
            open_segmenter(config, 4)
        return str(caught.value)

    assert "Name the run_dir of a run of segmentation that is done" in says(*more, run_dir=killed)
    assert "optim.lr can't differ from the run's. These can: data.val, " in says(*more, "optim.lr=1")
    assert says(more[0]).startswith("data.val_masks is empty: name the folder of the masks of data.val")
    assert says().count("/nowhere/val/images") == 1, "one sentence, and none of data.train"
    (folder / "classes.txt").write_text("red\ngreen\nblue\nnever\nmore\n")
    assert "has 5 classes, the segmenter 4: red, green, blue, never." in says(*more)
    (folder / "classes.txt").write_text("red\nblue\ngreen\nnever\n")
    assert "class 1 is blue, and the segmenter's is green; 2 of 4 differ" in says(*more)
    named = evaluation_settings(finished, more).data
    assert known_classes(named, ["0", "1", "2", "3"]).names == ["0", "1", "2", "3"], "a run without names"
    (folder / "classes.txt").unlink()
    write_checkpoint(tmp_path / "wide", dataclasses.replace(MODEL, args={**MODEL.args, "depth": 5}))
    export_timm(tmp_path / "wide", tmp_path / "timm")
    assert "tensors differ, e.g. vit.blocks.4" in says(*more, f"model.path={tmp_path}/timm")
    config = evaluation_settings(finished, more)
    names = ["red", "green", "blue", "never"]
    assert known_classes(config.data, names).names == names, "ids alone are the segmenter's"
    done = judged(finished, "--out", tmp_path / "no/a.json", *more)
    assert done.returncode == 2 and "name a file in a folder that is there" in done.stderr


# Figures.


def by_numpy(prediction, truth, num_classes):
    """The mean IoU in percent, class by class."""
    ious, counted = [], truth != VOID
    for c in range(num_classes):
        one, other = (prediction == c) & counted, truth == c
        if (one | other).any():
            ious.append((one & other).sum() / (one | other).sum())
    return 100 * np.mean(ious)


@pytest.mark.parametrize("seed", range(5))
def test_the_figures_are_those_of_torchmetrics_and_numpy(seed):
    classification = pytest.importorskip("torchmetrics.classification", reason="pip install -e '.[dev]'")
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, 6 + seed, (5, 40, 30), generator=generator)
    truth = torch.randint(-1, 4 + seed, (5, 40, 30), generator=generator)  # two classes are never true
    classes = 7 + seed  # one is neither true nor predicted
    found = figures_of(confusion(prediction, truth.short(), classes))
    assert found.miou == pytest.approx(by_numpy(prediction.numpy(), truth.numpy(), classes), abs=1e-9)
    options = {"num_classes": classes, "ignore_index": VOID}
    jaccard = classification.MulticlassJaccardIndex(**options)
    assert found.miou == pytest.approx(100 * jaccard(prediction, truth).item(), abs=1e-3)
    accuracy = classification.MulticlassAccuracy(**options, average="micro")
    assert found.pixel_accuracy == pytest.approx(100 * accuracy(prediction, truth).item(), abs=1e-3)
    recalls = classification.MulticlassAccuracy(**options, average="none")(prediction, truth).tolist()
    expected = [100 * r for r, own in zip(recalls, found.accuracy) if own is not None]
    assert [a for a in found.accuracy if a is not None] == pytest.approx(expected, abs=1e-3)
    assert found.iou[-1] is None and found.accuracy[-2] is None


def test_windows_cover_an_image():
    assert window_starts(32, 32, 21) == [0]
    assert window_starts(20, 32, 21) == [0]
    for length in range(33, 90):
        starts = window_starts(length, 32, 21)
        assert starts[-1] == length - 32 and starts == sorted({*starts})
        assert all(b - a <= 21 for a, b in itertools.pairwise(starts))


def segmenter(recipe, *overrides):
    return Segmenter(settings(recipe, *overrides), 4).eval()


def test_a_sliding_window_is_the_whole_image_where_one_covers_it(recipe):
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = segmenter(recipe, "evaluate.mode=whole")
    by_mode = [
        Predictor(model, SegmentationEvaluateConfig(mode=mode), 2).logits(image)
        for mode in ("slide", "whole")
    ]
    assert torch.equal(*by_mode)
    larger = torch.randn(3, 45, 50)
    predict = Predictor(model, SegmentationEvaluateConfig(stride=9), 2)
    one_by_one = Predictor(model, SegmentationEvaluateConfig(stride=9), 1)
    assert torch.allclose(predict.logits(larger), one_by_one.logits(larger), atol=1e-6)
    whole = Predictor(model, SegmentationEvaluateConfig(mode="whole"), 1)
    assert whole(larger, (90, 100)).shape == (90, 100)


def test_a_mirror_image_is_predicted_alike_with_flip(recipe):
    model, image = segmenter(recipe), torch.randn(3, 40, 44)
    predict = Predictor(model, SegmentationEvaluateConfig(flip=True), 4)
    mirrored = predict(image.flip(2), (40, 44)).flip(1)
    assert (predict(image, (40, 44)) == mirrored).float().mean() > 0.999  # but for rounding


# Heads.


def test_dpt_takes_whole_levels(recipe):
    pytest.importorskip("segmentation_models_pytorch", reason="pip install -e '.[segment]'")
    with pytest.raises(ConfigError, match="model.img_size = 48 is not a multiple of 32"):
        segmenter(recipe, "model.head=dpt", "model.img_size=48")


@pytest.mark.parametrize("head", ["linear", "dpt", "upernet"])
def test_a_head_gets_our_features_and_no_split_changes_its_loss(recipe, tmp_path, head):
    if head == "dpt":
        pytest.importorskip("segmentation_models_pytorch", reason="pip install -e '.[segment]'")
    if head == "upernet":
        pytest.importorskip("transformers", reason="pip install -e '.[segment]'")
    model = segmenter(recipe, f"model.head={head}", "model.frozen=false", "model.width=16").train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    truth = torch.randint(-1, 4, (8, 32, 32), generator=generator).short()

    # Its backbone is the export, and all that learns has a gradient.
    source = timm.create_model(f"local-dir:{recipe.parent}/timm", pretrained=True).state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.vit.state_dict().items())
    whole = model(images, truth, model.draw(0, 0, 8)).loss
    whole.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] in (
        [],
        ["vit.norm.weight", "vit.norm.bias"],
    )
    halves = [model(images[i : i + 4], truth[i : i + 4], model.draw(0, i, 4)).loss for i in (0, 4)]
    assert sum(halves).item() / 2 == pytest.approx(whole.item(), rel=1e-6)

    # Its program gives what it gives, for any number of images. (A run has shown it of the linear one.)
    if head == "linear":
        return
    export_segmenter(model.eval(), {"classes": []}, tmp_path / "out")
    program = torch.export.load(tmp_path / "out/segmenter.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(images[:5]), model.predict(images[:5]), atol=1e-4)


def test_all_blocks_learn_with_upernet_and_go_on_elsewhere(recipe):
    """From the checkpoint of its second step under ZeRO-3."""
    pytest.importorskip("transformers", reason="pip install -e '.[segment]'")
    more = ["model.head=upernet", "model.frozen=false", "model.width=16", "model.drop_path=0.3"]
    more += ["optim.layer_decay=0.7", "checkpoint.every_steps=2", "log.evaluate_every_epochs=9"]
    whole, part = recipe.parent / "upernet", recipe.parent / "upernet_part"
    for run_dir, stage in ((whole, "zero2"), (part, "zero3")):
        engine = f"ds_configs/{stage}_cpu.json"
        done = segment(recipe, 1, f"run_dir={run_dir}", *more, "train.stop_at_step=3", engine=engine)
        assert done.returncode == 0, done.stderr[-3000:]
        if run_dir == whole:
            shutil.copytree(whole, part)
            shutil.rmtree(part / "checkpoints/step_00000003")
    assert "at step 2 of" in done.stdout
    assert [*losses(whole)] == [1, 2, 3]
    assert losses(part) == pytest.approx(losses(whole), rel=1e-4)
    one, other = (
        load_file(run_dir / "checkpoints/step_00000003/target.safetensors") for run_dir in (whole, part)
    )
    assert one.keys() == other.keys() and "head.decoder.fpn_bottleneck.batch_norm.running_var" in one
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in one)


def test_patches_that_a_head_can_not_take_are_a_sentence():
    pytest.importorskip("segmentation_models_pytorch", reason="pip install -e '.[segment]'")
    vit = SimpleNamespace(patch_embed=SimpleNamespace(patch_size=(14, 14)), embed_dim=8, blocks=range(12))
    with pytest.raises(ConfigError, match="patches of 14 pixels"):
        DPT(vit, 4, 8)


def test_four_blocks_are_those_of_the_papers():
    assert four_blocks(12) == [3, 5, 7, 11] and four_blocks(24) == [7, 11, 15, 23]
    assert all(
        len({*four_blocks(depth)}) == 4 and four_blocks(depth)[-1] == depth - 1 for depth in range(4, 60)
    )
    with pytest.raises(ConfigError, match="has 3 blocks, and this head takes four"):
        four_blocks(3)


# Batches.


def masks_of(config, split, tmp_path):
    index = open_index(config.data.images_of(split), tmp_path / f"index_{split}")
    paths, fingerprint = _paired(config.data, split, index)
    return index, Masks(config.data.masks_of(split), paths, fingerprint, classes_of(config.data))


def test_a_batch_is_the_same_however_it_is_split(recipe, tmp_path):
    def by_slot(micro, world_size, step):
        config, slots = settings(recipe, f"train.micro_batch_size={micro}"), {}
        index, masks = masks_of(config, "train", tmp_path)
        augment = Augmentation(config.data, 32, (0.5,) * 3, (0.5,) * 3)
        for rank in range(world_size):
            dataset = MaskedBatches(config, index, masks, augment, rank, world_size, ())
            accum = config.grad_accum_steps(world_size)
            for number in range(step * accum, (step + 1) * accum):
                batch = dataset[number]
                for i, sample in enumerate(zip(batch.images, batch.target, batch.index)):
                    slots[batch.place.first_slot + i] = sample
        return [torch.stack(column) for column in zip(*(slots[slot] for slot in range(8)))]

    for step in (0, 2):
        whole, split = by_slot(8, 1, step), by_slot(2, 2, step)
        assert all(torch.equal(one, other) for one, other in zip(whole, split))
    images, masks, _ = whole
    assert images.shape == (8, 3, 32, 32) and masks.dtype == torch.int16
    assert {*masks.unique().tolist()} == {VOID, 0, 1, 2}


def test_image_and_mask_are_moved_together(recipe, tmp_path):
    """Where nothing changes colours, the class of a pixel can be read off its image."""
    config = settings(recipe, "data.distortion=false", "train.micro_batch_size=8")
    index, masks = masks_of(config, "train", tmp_path)
    augment = Augmentation(config.data, 32, (0.0,) * 3, (1.0,) * 3)
    dataset = MaskedBatches(config, index, masks, augment, 0, 1, ())
    batch, by_worker = dataset[0], pickle.loads(pickle.dumps(dataset))[0]
    assert torch.equal(batch.images, by_worker.images) and torch.equal(batch.target, by_worker.target)
    counted = batch.target >= 0
    likeliest = batch.images.argmax(dim=1)
    assert (likeliest[counted] == batch.target[counted]).float().mean() > 0.9  # areas' edges are blurred


def test_a_crop_avoids_what_one_class_fills():
    mask = np.zeros((64, 64), np.int16)
    mask[:, 40:] = 1
    data = MaskedDataConfig(resize=(1.0, 1.0), flip=0.0, distortion=False)
    augment = Augmentation(data, 32, (0.0,) * 3, (1.0,) * 3)
    shares = []
    for seed in range(30):
        torch.manual_seed(seed)
        _, cropped = augment(Image.new("RGB", (64, 64)), mask)
        shares.append(max((cropped == c).float().mean().item() for c in (0, 1)))
    assert sum(share > 0.75 for share in shares) <= 1


def test_short_and_long_side():
    def size(image, **given):
        return resized(image, MaskedDataConfig(**given))

    assert size((300, 400)) == [300, 400]
    assert size((300, 400), short_side=512) == [512, 683]
    assert size((100, 1000), short_side=512, long_side=2048) == [205, 2048]


# BatchNorm.


def test_grouped_statistics_are_batchnorms_and_no_split_changes_them():
    torch.manual_seed(0)
    norm, plain = GroupedBatchNorm(5, 1e-5, 4), nn.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    assert torch.equal(norm(x), plain(x))
    assert torch.allclose(0.1 * norm.seen[0][0], plain.running_mean)
    assert torch.allclose(0.9 + 0.1 * norm.seen[0][1], plain.running_var)
    norm.running_mean.copy_(plain.running_mean)
    norm.running_var.copy_(plain.running_var)
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    other = torch.randn(8, 5, 3, 3)
    assert torch.equal(norm.train()(other), torch.cat([norm(part) for part in other.split(4)]))
    assert norm.train()(other.bfloat16()).dtype == torch.bfloat16


# Masks that users have.


def paired(tmp_path, mask, size=(52, 40), **given):
    """One image, and what is read of its mask."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", size).save(tmp_path / "images/a.jpg")
    if isinstance(mask, bytes):
        (tmp_path / "masks/a.png").write_bytes(mask)
    else:
        mask.save(tmp_path / "masks/a.png")
    data = MaskedDataConfig(
        train=f"{tmp_path}/images", train_masks=f"{tmp_path}/masks", **{"num_classes": 4, **given}
    )
    index = open_index(data.train, tmp_path / "index")
    paths, fingerprint = _paired(data, "train", index)
    return Masks(data.train_masks, paths, fingerprint, classes_of(data)).read(0, size)


IDS = np.random.default_rng(0).integers(0, 4, (40, 52)).astype(np.uint8)


def palette():
    image = Image.fromarray(IDS, "P")
    image.putpalette([7, 7, 7, 9, 9, 9, 1, 2, 3, 200, 0, 0])
    return image


@pytest.mark.parametrize(
    "mask", [Image.fromarray(IDS), palette(), png16(IDS.astype(np.uint16), 0)], ids=["8", "palette", "16"]
)
def test_ids_are_read_as_they_are(tmp_path, mask):
    found = paired(tmp_path, mask)
    assert found.dtype == np.int16 and np.array_equal(found, IDS)


def test_void_and_zero_are_what_the_settings_say(tmp_path):
    ids = IDS.copy()
    ids[0] = 255
    found = paired(tmp_path, Image.fromarray(ids), reduce_zero_label=True, num_classes=3)
    assert (found[0] == VOID).all() and np.array_equal(found[1:], IDS[1:].astype(int) - 1)


def test_large_ids_of_16_bits_are_told(tmp_path):
    wide = np.full((40, 52), 3, np.uint16)
    wide[5, 5] = 40_000
    with pytest.raises(
        DataError, match="has the id 40000 in 1 pixels, but the 4 classes have the ids 0 to 3"
    ):
        paired(tmp_path, png16(wide, 0))


@pytest.mark.parametrize(
    ("mask", "given", "says"),
    [
        (Image.fromarray(IDS[:20]), {}, "is 52 x 20 pixels, its image 52 x 40"),
        (Image.fromarray(IDS), {"num_classes": 3}, "has the id 3 in .* the 3 classes have the ids 0 to 2"),
        (Image.fromarray(IDS).convert("RGB"), {}, r"holds colours \(RGB\)"),
        (Image.fromarray(IDS), {"num_classes": None}, "number of classes .* is not known"),
        (Image.fromarray(IDS), {"void_id": 3}, "void_id = 3 is the id of a class too, since 4 have"),
    ],
)
def test_a_mask_that_fits_nothing_is_a_sentence(tmp_path, mask, given, says):
    with pytest.raises(DataError, match=says):
        paired(tmp_path, mask, **given)


def test_a_damaged_mask_costs_its_image(tmp_path):
    with pytest.raises(BadImage, match=r"its mask .*a.png: "):
        paired(tmp_path, png16(IDS.astype(np.uint16), 0)[:-30])


def test_an_image_without_a_mask_is_a_sentence(recipe, tmp_path):
    shutil.copytree(recipe.parent / "val", tmp_path / "val")
    (tmp_path / "val/masks/03.png").unlink()
    config = settings(recipe, f"data.val={tmp_path}/val/images", f"data.val_masks={tmp_path}/val/masks")
    with pytest.raises(DataError, match="1 of 7 images have no mask, e.g. 03.png is not in"):
        masks_of(config, "val", tmp_path)


def test_an_image_that_is_all_void_adds_nothing(recipe):
    model = segmenter(recipe).train()
    images = torch.randn(4, 3, 32, 32)
    truth = torch.randint(0, 4, (4, 32, 32)).short()
    truth[2] = VOID
    loss = model(images, truth).loss
    others = [model.eval()(images[i : i + 1], truth[i : i + 1]).loss for i in range(4)]
    assert others[2] == 0 and loss.isfinite()
    assert not confusion(torch.zeros(32, 32).long(), truth[2], 4).any()


def test_masks_that_are_all_void_are_a_sentence(recipe, tmp_path):
    shutil.copytree(recipe.parent / "val", tmp_path / "val")
    for path in (tmp_path / "val/masks").iterdir():
        Image.new("L", Image.open(tmp_path / "val/images" / path.name).size, 255).save(path)
    folders = [f"data.val={tmp_path}/val/images", f"data.val_masks={tmp_path}/val/masks"]
    done = segment(
        recipe, 1, f"run_dir={tmp_path}/run", *folders, "train.epochs=0.3", "optim.warmup_epochs=0"
    )
    assert done.returncode == 2
    assert "every pixel is void, so nothing can be judged" in done.stderr


def test_releases_are_known_by_name(tmp_path):
    ade, cities = tmp_path / "ADEChallengeData2016", tmp_path / "cityscapes"
    for split, folder in (("train", "training"), ("val", "validation")):
        for kind, ending in (("images", "jpg"), ("annotations", "png")):
            path = ade / kind / folder / f"ADE_{split}_1.{ending}"
            path.parent.mkdir(parents=True)
            Image.fromarray((150 * (IDS > 2)).astype(np.uint8)).save(path)
        names = f"aachen/aachen_000000_{split}"
        for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            path = cities / kind / split / f"{names}_{ending}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray((IDS * 11).astype(np.uint8)).save(path)
        Image.new("L", (52, 40)).save(cities / "gtFine" / split / f"{names}_gtFine_instanceIds.png")
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(
        f"{i}\t0\t0\t0\t0\tname {i}\n" for i in range(150)
    )
    (ade / "objectInfo150.txt").write_text(table)

    found = {}
    for release, root in (("ade20k", ade), ("cityscapes", cities)):
        config = SegmentationConfig(data=MaskedDataConfig(release=release, train=str(root), val=str(root)))
        assert [rule for rule in config.rules() if "data." in rule] == []
        _, masks = masks_of(config, "val", tmp_path / release)
        found[release] = masks.read(0, (52, 40)), masks.classes.names
    ids, names = found["ade20k"]
    assert len(names) == 150 and names[7] == "name 7"
    assert np.array_equal(ids, np.where(IDS > 2, 149, VOID))
    ids, names = found["cityscapes"]
    assert len(names) == 19 and names[13] == "car"
    assert np.array_equal(ids, np.array([VOID, 2, 9, 18])[IDS])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_complete(recipe, tmp_path, path):
    words = [f"model.path={recipe.parent}/timm", f"run_dir={tmp_path}/run"]
    if "ade20k" in path.stem:
        for folder in ("images", "annotations"):
            for split in ("training", "validation"):
                (tmp_path / "ade" / folder / split).mkdir(parents=True)
        words += [f"data.train={tmp_path}/ade", f"data.val={tmp_path}/ade"]
    else:
        words += [f"data.{key}={value}" for key, value in vars(settings(recipe).data).items()
                  if key in ("train", "val", "train_masks", "val_masks")]  # fmt: skip
    check_labelled(load_config(path, words, SegmentationConfig), 1)
    head = path.read_text().split("model:\n")[0].replace("\\\n#", "")
    command = rf"tools/segment.py +--config mapet_ds/recipes/{path.name} "
    assert re.search(command, head), "its command stands at its head"


def test_published_settings():
    def published(name):
        config = load_config(
            REPOSITORY / f"mapet_ds/recipes/segment_{name}_ade20k.yaml", (), SegmentationConfig
        )
        assert (
            config.data.release == "ade20k" and config.evaluate.stride == 341 and config.model.img_size == 512
        )
        warmup = round(config.optim.warmup_epochs * 20_210 / 16)
        rate = config.optim.lr, config.optim.weight_decay, config.optim.layer_decay
        return total_steps(config, 20_210), warmup, *rate, config.model.frozen

    assert published("upernet_vitb16") == (160_000, 1500, 7e-4, 0.05, 0.65, False)
    assert published("linear_vitb16")[:4] == (40_000, 1500, 1e-3, 1e-4)
    config = load_config(RECIPES[-1], (), SegmentationConfig)
    assert learning_rate(0, config.optim, 1263.1, 160_000) == 7e-10
    assert learning_rate(159_999, config.optim, 1263.1, 160_000) == 0
    assert learning_rate(1500 + 79_250, config.optim, 1263.1, 160_001) == pytest.approx(3.5e-4)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train_masks=", "data.train_masks is empty"),
        ("data.val_masks=/nowhere", "data.val_masks = /nowhere: /nowhere is no folder"),
        ("data.val_masks={}/val/images", "lies inside data.val"),
        ("data.release=ade20k", "data.release = ade20k says where its masks lie"),
        ("data.classes=/nowhere", "data.classes = /nowhere is no file"),
        ("data.long_side=9", "data.long_side = 9 bounds"),
        ("data.resize=[2, 1]", "data.resize"),
        ("train.micro_batch_size=2", "is not a multiple of model.bn_group = 4"),
        ("model.path=/nowhere", "model.path = /nowhere is neither"),
        ("model.pool=avg", "is not a knob"),
    ],
)
def test_settings_are_refused_before_anything_starts(recipe, override, says):
    check_labelled(settings(recipe), 1)
    with pytest.raises(ConfigError, match=says):
        check_labelled(settings(recipe, override.format(recipe.parent)), 1)


def test_another_number_of_classes_than_names_is_a_sentence(recipe):
    data = dataclasses.replace(settings(recipe).data, num_classes=9)
    with pytest.raises(DataError, match="num_classes = 9, but 4 classes are named"):
        classes_of(data)


def test_relative_positions_want_windows(recipe, tmp_path):
    beit = ModelConfig(**{**vars(MODEL), "name": "beit_base_patch16_224"})
    write_checkpoint(tmp_path / "beit", beit)
    export_timm(tmp_path / "beit", tmp_path / "timm")
    model = segmenter(recipe, f"model.path={tmp_path}/timm", "model.img_size=64")
    predicted = Predictor(model, SegmentationEvaluateConfig(), 2)(torch.randn(3, 70, 90), (35, 45))
    assert predicted.shape == (35, 45)
    with pytest.raises(ConfigError, match="timm's Beit can't: take evaluate.mode=slide"):
        segmenter(recipe, f"model.path={tmp_path}/timm", "evaluate.mode=whole")


def test_whole_images_are_shared_out(recipe, tmp_path):
    config = settings(recipe)
    index, masks = masks_of(config, "val", tmp_path)
    shares = [WholeImages(config.data, index, masks, (0,) * 3, (1,) * 3, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2]
