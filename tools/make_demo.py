"""Render a small labelled JPEG set and train a small CLIP on it, so that everything can be tried without a download.

    python tools/make_demo.py runs/demo

writes runs/demo/train/<shape>/*.jpg, runs/demo/val/<shape>/*.jpg and runs/demo/teacher/, which open_clip loads as
`local-dir:runs/demo/teacher`. A class is a shape; its colour, size, place, angle and background are drawn at random and
tell nothing about it. The CLIP learns from captions such as "a large red star on a striped green background" with
open_clip's own loss. A folder that already holds the same set is used as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from mapet_ds.config import ConfigError

Points = list[tuple[float, float]]

COLOURS = {
    "red": (214, 40, 40), "orange": (245, 140, 30), "yellow": (240, 215, 60), "green": (50, 160, 70),
    "blue": (45, 95, 210), "purple": (130, 60, 170), "white": (240, 240, 240), "black": (25, 25, 25),
}  # fmt: skip
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "noisy")
IMG_SIZE = 128
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMG_SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def _regular(corners: int, inner: float = 1.0) -> Points:
    """Corners of a regular polygon on the unit circle; with inner < 1, of a star with so many points."""
    count = corners if inner == 1 else 2 * corners
    radii = [1.0 if i % 2 == 0 else inner for i in range(count)]
    return [(r * math.sin(2 * math.pi * i / count), -r * math.cos(2 * math.pi * i / count)) for i, r in enumerate(radii)]


# Outline of each class inside the unit circle, y down; what is cut out of it follows.
SHAPES: dict[str, tuple[Points, Points]] = {
    "circle": (_regular(40), []),
    "ring": (_regular(40), [(0.6 * x, 0.6 * y) for x, y in _regular(40)]),
    "crescent": (_regular(40), [(0.85 * x + 0.45, 0.85 * y) for x, y in _regular(40)]),
    "triangle": (_regular(3), []),
    "square": ([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], []),
    "star": (_regular(5, inner=0.4), []),
    "cross": (
        [(-0.28, -1), (0.28, -1), (0.28, -0.28), (1, -0.28), (1, 0.28), (0.28, 0.28),
         (0.28, 1), (-0.28, 1), (-0.28, 0.28), (-1, 0.28), (-1, -0.28), (-0.28, -0.28)], [],
    ),
    "hourglass": ([(-0.8, -1), (0.8, -1), (-0.8, 1), (0.8, 1)], []),
}  # fmt: skip


def _background(rng: np.random.Generator, kind: str, width: int, height: int, colour: np.ndarray) -> np.ndarray:
    """[height, width, 3] float: a pattern of the colour and of a darker or lighter one."""
    other = np.clip(colour + rng.choice([-1, 1]) * rng.uniform(15, 40), 0, 255)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 24)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    share = {
        "plain": lambda: u / np.abs(u).max(),
        "striped": lambda: np.sin(2 * math.pi * u / period) > 0,
        "checkered": lambda: (np.sin(2 * math.pi * u / period) > 0) ^ (np.sin(2 * math.pi * v / period) > 0),
        "dotted": lambda: np.hypot(u % period - period / 2, v % period - period / 2) < period / 4,
        "noisy": lambda: rng.random((height, width)),
    }[kind]()
    return colour + (other - colour) * np.asarray(share, dtype=np.float32)[..., None]


def render(rng: np.random.Generator, shape: str) -> tuple[Image.Image, str]:
    """One picture of the shape, 80 to 200 pixels a side, and its caption."""
    width = int(rng.integers(80, 201))
    height = int(np.clip(width * rng.uniform(0.7, 1.4), 80, 200))
    colour, behind = rng.choice(list(COLOURS), 2, replace=False)
    kind = str(rng.choice(BACKGROUNDS))
    pixels = _background(rng, kind, width, height, 0.5 * np.array(COLOURS[behind], dtype=np.float32) + 64)
    side = min(width, height)
    large = bool(rng.random() < 0.5)
    radius = side * (rng.uniform(0.4, 0.46) if large else rng.uniform(0.32, 0.38))
    room = side / 2 - radius
    cx, cy = width / 2 + rng.uniform(-room, room), height / 2 + rng.uniform(-room, room)
    angle = rng.uniform(-0.3, 0.3)
    mask = Image.new("L", (2 * width, 2 * height))
    for points, fill in zip(SHAPES[shape], (255, 0), strict=True):
        if points:
            x, y = np.array(points).T * radius
            turned = np.stack([cx + x * math.cos(angle) - y * math.sin(angle), cy + x * math.sin(angle) + y * math.cos(angle)])
            ImageDraw.Draw(mask).polygon([tuple(p) for p in (2 * turned.T).tolist()], fill=fill)
    cover = np.asarray(mask.reduce(2), dtype=np.float32)[..., None] / 255
    pixels = pixels * (1 - cover) + np.array(COLOURS[colour]) * cover
    pixels = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    caption = f"a {colour} {shape}"
    return Image.fromarray(pixels), str(caption)


def write_images(folder: Path, images: int, seed: int) -> dict[Path, str]:
    """Renders the set into folder/<shape>/, the classes in turn; captions by path."""
    rng = np.random.default_rng(seed)
    captions = {}
    for number in range(images):
        shape = list(SHAPES)[number % len(SHAPES)]
        image, caption = render(rng, shape)
        path = folder / shape / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=int(rng.integers(75, 96)))
        captions[path] = caption
    return captions


def load_views(paths: list[Path], size: int) -> Tensor:
    """[n, 3, size, size] in 0..1: the central squares."""
    views = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for view, path in zip(views, paths, strict=True):
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            view[:] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255


def normalise(views: Tensor) -> Tensor:
    return (views - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def training_batches(views: Tensor, tokens: Tensor, steps: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, each image flipped with probability 1/2 and shifted by up to 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    margin = views.shape[-1] - IMG_SIZE
    for _ in range(steps):
        index = torch.randperm(len(views), generator=generator)[:batch]
        top, left, flips = torch.randint(margin + 1, (3, batch), generator=generator)
        crops = torch.stack([
            views[i, :, y : y + IMG_SIZE, x : x + IMG_SIZE].flip(-1) if flip % 2 else views[i, :, y : y + IMG_SIZE, x : x + IMG_SIZE]
            for i, y, x, flip in zip(index.tolist(), top.tolist(), left.tolist(), flips.tolist(), strict=True)
        ])  # fmt: skip
        yield normalise(crops), tokens[index]


def train_teacher(captions: dict[Path, str], steps: int, seed: int) -> torch.nn.Module:
    """A small CLIP, trained on images and captions with open_clip's loss."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL)
    tokens = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(list(captions.values()))
    views = load_views(list(captions), IMG_SIZE + 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    loss_fn, start = ClipLoss(), time.monotonic()
    for step, (images, text) in enumerate(training_batches(views, tokens, steps, 64, seed), start=1):
        loss = loss_fn(*model(images, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 1 or step % 25 == 0 or step == steps:
            print(f"  step {step:4d} of {steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def zero_shot_accuracy(model: torch.nn.Module, paths: list[Path]) -> float:
    """Share of the images whose nearest caption "a <shape>" names their folder."""
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    text = model.encode_text(tokenizer([f"a {shape}" for shape in SHAPES]), normalize=True)
    image = model.encode_image(normalise(load_views(paths, IMG_SIZE)), normalize=True)
    found = (image @ text.T).argmax(1).tolist()
    return sum(list(SHAPES)[i] == path.parent.name for i, path in zip(found, paths, strict=True)) / len(paths)


def main() -> None:
    t0=time.time()
    out=Path(sys.argv[1]); 
    caps = write_images(out/"train", 1500, 0); val=write_images(out/"val", 400, 1)
    print("rendered", time.time()-t0)
    model = train_teacher(caps, int(sys.argv[2]), 0)
    print("zs", zero_shot_accuracy(model, list(val)), time.time()-t0)
    torch.save(model.state_dict(), out/"model.pt")

if __name__ == "__main__":
    main()
