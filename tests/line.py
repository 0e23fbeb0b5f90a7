"""A small line for the programs' tests: images, a tiny teacher, a codebook, a recipe, the user's commands."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from forked import TORCHRUN, free_port, start
from PIL import Image
from timm.models import save_for_hf
from towers import write_tower

_codebooks: dict[str, bytes] = {}
"""Settings of `make_line` -> the codebook, which is the same wherever the line stands."""
IMAGES = 45  # 5.6 steps of 8 an epoch: a run passes an epoch's end in the middle of a batch


def make_line(folder: Path, **data: object) -> Path:
    """The recipe of a run of 12 steps, beside all that it names; `data` replaces settings of that section."""
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        width, height = generator.integers(40, 120, 2)
        blocks = generator.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        path = folder / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(path)
    write_tower(folder / "teacher", "vit")
    recipe = {
        "run_dir": str(folder / "run"),
        "model": {
            "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8,
            "args": {"depth": 3, "embed_dim": 32, "num_heads": 2},
        },
        "data": {"train": str(folder / "train"), "crop": "random", "flip": 0.5, "threads": 1, **data},
        "teacher": {"name": f"local-dir:{folder}/teacher", "img_size": 64},
        "tokenizer": {"path": str(folder / "codebook.safetensors"), "vocab_size": 16,
                      "redo": 1, "iterations": 5},
        "optim": {"lr": 2e-3, "warmup_epochs": 0.5},
        "train": {"epochs": 2, "global_batch_size": 8, "micro_batch_size": 4},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1, "images_every_steps": 4, "progress": False},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    codebook, views = folder / "codebook.safetensors", json.dumps(data)
    if views in _codebooks:
        codebook.write_bytes(_codebooks[views])
    else:
        done = start(sys.executable, "tools/fit_codebook.py", "--config", path)
        assert done.returncode == 0, done.stderr
        _codebooks[views] = codebook.read_bytes()
    return path


def write_classes(
    folder: Path, number: int, seed: int, classes: str = "abc", noise: int = 120, tint: int = 120
) -> None:
    """Noise, up to so bright, with a tint of a class: one folder each."""
    generator = np.random.default_rng(seed)
    for i in range(number):
        c = i % len(classes)
        blocks = generator.integers(0, noise, (6, 5, 3), dtype=np.uint8)
        blocks[..., c % 3] += np.uint8(tint)
        path = folder / classes[c] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks).resize((40, 48), Image.Resampling.BICUBIC).save(path)


def write_judged(folder: Path) -> None:
    """36 training and 18 validation images of three classes, and a small ViT's export with random weights."""
    write_classes(folder / "train", 36, 0, noise=220, tint=12)
    write_classes(folder / "val", 18, 1, noise=220, tint=12)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    data = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    save_for_hf(model, folder / "timm", safe_serialization=True, data_config=data)


def command(
    recipe: Path,
    ranks: int,
    *overrides: str,
    engine: str = "ds_configs/zero2_cpu.json",
    program: str = "mapet_ds/pretrain.py",
) -> list[str]:
    """The user's own, under torchrun; plain python for one rank."""
    launcher = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launcher, program, "--config", str(recipe), "--deepspeed_config", engine]
    return [*words, *overrides]


def by_deepspeed(recipe: Path, *overrides: str) -> list[str]:
    """The user's own on two ranks under the deepspeed launcher."""
    program = str(Path(sys.executable).parent / "deepspeed")
    return [
        program,
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        *command(recipe, 1, *overrides)[1:],
    ]


def pretrain(recipe: Path, ranks: int, *overrides: str, **options: str) -> subprocess.CompletedProcess:
    return start(*command(recipe, ranks, *overrides, **options))


def steps(run_dir: Path) -> int:
    """Lines that a run has written so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; asserts that no step is there twice."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)
    return found
