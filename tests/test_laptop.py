"""Exports, imports and evaluations run where DALI, DeepSpeed and open_clip are not installed."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import MODELS, write_checkpoint
from test_published import checkpoint as published
from test_published import wrapped

from mapet_ds.config.sections import REPOSITORY

ABSENT = ("nvidia.dali", "deepspeed", "open_clip")
BLOCKED = (
    "import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.argv = sys.argv[1:]; "
    "sys.path.insert(0, 'tools'); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run(program, *words):
    """What a program prints where the three can't be imported."""
    command = [sys.executable, "-c", BLOCKED.format(absent=ABSENT), program, *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_block_holds():
    with pytest.raises(AssertionError, match="import of deepspeed halted"):
        run(REPOSITORY / "mapet_ds/training/engine.py")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laptop")
    write_checkpoint(folder / "run", MODELS["registers"])
    assert "largest difference" in run("tools/export_timm.py", folder / "run", folder / "timm")
    return folder / "timm"


def test_an_export_is_evaluated(tmp_path, exported):
    generator = np.random.default_rng(0)
    for split, label, i in itertools.product(("train", "val"), ("dark", "light"), range(12)):
        pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8) + 120 * (label == "light")
        path = tmp_path / split / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    folders = ["--train", tmp_path / "train", "--val", tmp_path / "val"]
    words = ["--workers", 0, "--json"]
    figures = json.loads(run("tools/evaluate.py", "all", "--model", exported, *folders, *words))
    assert figures["train_images"] > 0 and figures["classes"] > 1


def test_an_export_becomes_onnx(tmp_path, exported):
    pytest.importorskip("onnxruntime", reason="ONNX is optional: pip install -e '.[onnx]'")
    assert "features" in run("tools/export_onnx.py", exported, tmp_path / "vit.onnx")


def test_a_published_checkpoint_is_imported(tmp_path):
    tensors = published("mapet", False, width=192, depth=2, patch=4, grid=4)
    torch.save(wrapped("mapet", False, tensors), tmp_path / "published.pth")
    words = ["--method", "mapet", tmp_path / "published.pth", tmp_path / "timm"]
    assert "vit_tiny_patch16_224" in run("tools/import_weights.py", *words)
