"""tools/fit_codebook.py through its own command, on a few JPEGs and a tiny CLIP."""

import errno
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import start
from PIL import Image
from towers import write_tower

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import TeacherConfig, TokenizerConfig
from mapet_ds.errors import ConfigError
from mapet_ds.targets import fitting
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import build_teacher

PROGRAM = str(Path(__file__).parent.parent / "tools" / "fit_codebook.py")
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """29 images of 16 patches each, so that no number of ranks divides them."""
    folder = tmp_path_factory.mktemp("codebook")
    (folder / "train").mkdir()
    generator = np.random.default_rng(0)
    for number in range(29):
        width, height = generator.integers(40, 120, 2)
        blocks = generator.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / "train" / f"{number}.jpg"
        )
    write_tower(folder / "vit", "vit")
    path = folder / "recipe.yaml"
    path.write_text(f"""
data: {{train: {folder}/train, device: cpu, crop: random, flip: 0.5}}
model: {{img_size: 32, patch_size: 8}}
teacher: {{name: "local-dir:{folder}/vit", img_size: 64}}
tokenizer: {{vocab_size: 16, points_per_centroid: 20, iterations: 5, redo: 2}}
train: {{micro_batch_size: 4}}
""")
    return path


def fit_codebook(recipe, *arguments, launcher=(sys.executable,)):
    return start(*launcher, PROGRAM, "--config", recipe, *arguments)


@pytest.fixture(scope="module")
def alone(recipe):
    """The codebook of one plain process, written over something else, and what was printed."""
    path = recipe.with_name("alone.safetensors")
    path.write_text("something else")
    done = fit_codebook(recipe, f"tokenizer.path={path}", "--overwrite")
    assert done.returncode == 0, done.stderr
    return path, done


def mebibytes(done):
    """Weights of the teacher on each rank, as printed."""
    return float(re.search(r"([\d.]+) MiB of weights on each rank", done.stdout)[1])


def test_the_codebook_is_of_this_recipe(recipe, alone):
    path, done = alone
    codebook = Codebook.load(path)
    teacher = build_teacher(
        TeacherConfig(name=f"local-dir:{recipe.parent}/vit", img_size=64), torch.device("cpu")
    )
    codebook.check(teacher.identity, load_config(recipe).data, 16)
    assert codebook.centroids.shape == (16, teacher.embed_dim)
    told = codebook.provenance
    assert told["points"] == "320"
    assert (
        f"16 codes, {told['dead_codes']} dead, perplexity {float(told['perplexity']):.1f}, inertia"
        in done.stdout
    )
    assert "320 of 464 patch features of 29 images, 64 wide" in done.stdout
    assert "8/8" in done.stderr  # the bar: 29 images in batches of 4
    assert "Traceback" not in done.stderr


def test_two_ranks_fit_the_same_codebook_with_a_sharded_teacher(recipe, alone):
    path = recipe.with_name("two.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = (*DEEPSPEED, f"--master_port={free.getsockname()[1]}")
    done = fit_codebook(
        recipe, f"tokenizer.path={path}", "teacher.shard=node", "log.progress=false", launcher=launcher
    )
    assert done.returncode == 0, done.stderr
    two, one = Codebook.load(path), Codebook.load(alone[0])
    assert two.sha256 == one.sha256
    assert two.provenance == one.provenance
    assert done.stdout.count("16 codes") == 1
    assert "batch/s" not in done.stderr
    assert mebibytes(done) < 0.6 * mebibytes(alone[1])


def test_a_codebook_is_not_replaced_unasked(recipe, alone):
    path, before = alone[0], alone[0].read_bytes()
    done = fit_codebook(recipe, f"tokenizer.path={path}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"tokenizer.path = {path} exists") and done.stderr.endswith(
        "say --overwrite.\n"
    )
    assert done.stderr.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "tokenizer.path is empty: name the file to write"),
        (["tokenizer.path=/tmp", "--overwrite"], "tokenizer.path = /tmp is a folder"),
        (["tokenizer.path=x", "tokenizer.vocabsize=5"], "is not a knob; did you mean tokenizer.vocab_size?"),
        (["tokenizer.path=x", "data.train=/nowhere"], "data.train = /nowhere is not a folder"),
        (["tokenizer.path=x", "teacher.img_size=128"], "The teacher's grid is 8 x 8"),
        (
            ["tokenizer.path=x", "teacher.name=local-dir:/nowhere"],
            "there is no /nowhere/open_clip_config.json",
        ),
    ],
)
def test_mistakes_are_sentences(recipe, arguments, sentence):
    done = fit_codebook(recipe, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_mistake_found_later_is_a_sentence_too(recipe, tmp_path):
    path = tmp_path / "codebook.safetensors"
    done = fit_codebook(recipe, f"tokenizer.path={path}", "tokenizer.vocab_size=465")
    assert done.returncode == 2
    assert (
        "tokenizer.vocab_size = 465, but 29 images have only 464 patches: use more images or set"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not path.exists()


def test_features_in_a_file_give_the_same_codebook(monkeypatch, tmp_path):
    points = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    codebooks = []
    for limit in (fitting.IN_MEMORY, points.nbytes - 1):
        monkeypatch.setattr(fitting, "IN_MEMORY", limit)
        rows = fitting._rows(*points.shape, tmp_path / "codebooks")
        assert isinstance(rows, np.memmap) == (limit < points.nbytes)
        rows[:] = points
        codebooks.append(fitting.fit(rows, TokenizerConfig(vocab_size=16, iterations=5, redo=2), seed=0))
    assert codebooks[0].sha256 == codebooks[1].sha256
    assert list((tmp_path / "codebooks").iterdir()) == []  # the file has no name, so nothing is left of it


def test_a_disk_without_room_for_the_features_is_a_sentence(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ConfigError, match=r"4194304 features of 4096 numbers need 64.0 GiB in .*: No space left"
    ):
        fitting._rows(8192 * 512, 4096, tmp_path)
