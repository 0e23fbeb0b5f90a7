"""finetune.py by the user's own commands: exact resume, other ranks, a timm model, mistakes as sentences."""

import json
import shutil
import subprocess
import time

import psutil
import pytest
import timm
import torch
import yaml
from forked import ENVIRONMENT, start
from line import command, losses, steps, write_classes
from PIL import Image
from safetensors.torch import load_file
from test_export import write_checkpoint

from mapet_ds.config.sections import REPOSITORY, ModelConfig
from mapet_ds.results.export import export_timm

MODEL = ModelConfig(
    name="vit_tiny_patch16_224", img_size=32, patch_size=8,
    args={"depth": 3, "embed_dim": 32, "num_heads": 2}, layer_scale=None
)  # fmt: skip

BAD_TRAIN, BAD_VAL = "train/b/001.png", "val/a/003.png"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """16 steps of 8 images, of 45 and 26 for evaluation, one of each bad; an export of random weights."""
    folder = tmp_path_factory.mktemp("finetune")
    write_classes(folder / "train", 45, 0)
    write_classes(folder / "val", 26, 1)
    for path in (folder / BAD_TRAIN, folder / BAD_VAL):
        path.write_bytes(path.read_bytes()[:-30])
    write_checkpoint(folder / "pretrained", MODEL)
    export_timm(folder / "pretrained", folder / "timm")
    values = {
        "model": {"path": str(folder / "timm"), "drop_path": 0.2, "ema": 0.8},
        "data": {"train": str(folder / "train"), "val": str(folder / "val")},
        "optim": {"lr": 4e-3, "layer_decay": 0.7, "warmup_epochs": 0.5, "clip_grad": 1.0},
        "train": {"epochs": 2.8, "global_batch_size": 8, "micro_batch_size": 4},
        "checkpoint": {"every_steps": 4}, "log": {"every_steps": 1, "progress": False},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def finetune(recipe, ranks, *overrides, **options):
    return start(*command(recipe, ranks, *overrides, program="tools/finetune.py", **options))


@pytest.fixture(scope="module")
def straight(recipe):
    run_dir = recipe.parent / "straight"
    done = finetune(recipe, 2, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fresh are fc_norm, head." in done.stdout
    (run_dir / "said").write_text(done.stderr)
    return run_dir


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_evaluates_after_each_epoch(straight):
    assert (straight / "DONE").read_text() == "16 steps\n"
    evaluated = [line for line in records(straight) if "val_top1" in line]
    assert [line["step"] for line in evaluated] == [6, 12, 16], "an epoch is 5.6 steps"
    assert all(line["val_images"] == 25 for line in evaluated), (
        "each once but the unreadable one, though 26 don't divide evenly"
    )
    assert evaluated[-1]["val_loss"] < evaluated[0]["val_loss"]
    results = json.loads((straight / "results.json").read_text())
    assert results["val_top1"] == evaluated[-1]["val_top1"]
    assert results.keys() >= {"val_top5", "classes", "seed", "start"}


def test_unreadable_images_cost_only_themselves(recipe, straight):
    """The one of training is replaced and listed, the one of validation left out and named."""
    listed = (straight / "quarantine.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in listed] == [str(recipe.parent / BAD_TRAIN)]
    assert records(straight)[-1]["quarantined"] == 1
    assert (
        f"left out of the evaluation: 1 of 26, e.g. {recipe.parent / BAD_VAL}: "
        in (straight / "said").read_text()
    )


def assert_timm_finds_the_same(recipe, run_dir):
    """By timm alone and an ordinary loop over the files; gives the model."""
    model = timm.create_model(f"local-dir:{run_dir}/timm", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    hits, loss, paths = 0, 0.0, sorted({*(recipe.parent / "val").rglob("*.png")} - {recipe.parent / BAD_VAL})
    with torch.no_grad():
        for path in paths:
            logits = model(transform(Image.open(path))[None])[0]
            label = "abc".index(path.parent.name)
            hits += int(logits.argmax() == label)
            loss -= logits.log_softmax(0)[label].item() / len(paths)
    results = json.loads((run_dir / "results.json").read_text())
    assert 100 * hits / len(paths) == pytest.approx(results["val_top1"])
    assert loss == pytest.approx(results["val_loss"], rel=1e-5)
    return model


def test_timm_loads_the_moving_average_and_finds_the_same_accuracy(recipe, straight):
    model = assert_timm_finds_the_same(recipe, straight)
    last = max((straight / "checkpoints").iterdir())
    weights, average = load_file(last / "model.safetensors"), load_file(last / "target.safetensors")
    assert torch.equal(average["vit.head.weight"], model.head.weight)
    assert not torch.equal(average["vit.head.weight"], weights["vit.head.weight"])


def test_timm_loads_the_weights_themselves_and_finds_the_same_accuracy(recipe):
    """Under ZeRO-3, where each evaluated batch is gathered; no moving average, the class token's head."""
    run_dir, more = recipe.parent / "whole", ["model.ema=null", "model.pool=token", "train.epochs=0.6"]
    done = finetune(recipe, 2, f"run_dir={run_dir}", *more, engine="ds_configs/zero3_cpu.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(losses(run_dir)) == [1, 2, 3, 4]
    assert_timm_finds_the_same(recipe, run_dir)


@pytest.fixture(scope="module")
def killed(recipe):
    """A run on two ranks that was killed after a checkpoint."""
    run_dir = recipe.parent / "killed"
    words = command(recipe, 2, f"run_dir={run_dir}", program="tools/finetune.py")
    process = psutil.Popen(
        words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while steps(run_dir) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    everyone = [*process.children(recursive=True), process]  # ranks outlive their launcher, and would save
    for each in everyone:
        each.kill()
    psutil.wait_procs(everyone)
    assert not (run_dir / "DONE").exists()
    return run_dir


def test_killed_and_started_again_is_the_same_run(recipe, straight, killed):
    run_dir = recipe.parent / "again"
    shutil.copytree(killed, run_dir)
    done = finetune(recipe, 2, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Continuing" in done.stdout
    assert losses(run_dir) == losses(straight)
    ends = [max((folder / "checkpoints").iterdir()) for folder in (run_dir, straight)]
    for file in ("model", "optimizer", "target"):
        one, other = (load_file(end / f"{file}.safetensors") for end in ends)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), file


def test_another_number_of_ranks_and_stage_goes_on_with_the_same_run(recipe, straight, killed):
    run_dir = recipe.parent / "elastic"
    shutil.copytree(killed, run_dir)
    done = finetune(
        recipe, 1, f"run_dir={run_dir}", "train.micro_batch_size=8", engine="ds_configs/zero3_cpu.json"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Continuing" in done.stdout
    assert losses(run_dir) == pytest.approx(losses(straight), rel=1e-4)
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (run_dir, straight))
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
