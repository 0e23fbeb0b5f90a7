"""Render a small labelled JPEG set and train a small CLIP on it, so that all can be tried without a download.

    python tools/make_demo.py OUT
    python tools/make_demo.py OUT --images DIR

The first command writes OUT/train/<pattern>/*.jpg, OUT/val/<pattern>/*.jpg, OUT/captions.tsv and
OUT/teacher/, which open_clip loads as `local-dir:OUT/teacher`. A class is a pattern. Its two colours, scale,
angle, place and noise are drawn at random and tell nothing about it. The CLIP learns from captions such as
"dark stripes" with open_clip's own loss. A folder that already holds the same set is used as it is.

The second one trains such a CLIP on your own labelled images, DIR/train/<class>/ and DIR/val/<class>/, with
the captions "a photo of a <class>".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.loss import ClipLoss
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mapet_ds.data.formats import BadImage
from mapet_ds.data.kinds import SUFFIXES
from mapet_ds.data.labelled import decode
from mapet_ds.errors import DataError
from mapet_ds.files import staged
from mapet_ds.terminal import answer, number, option_parser

IMG_SIZE = 64
SIDES = (80, 200)
"""Least and most pixels of a picture's sides."""
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMG_SIZE, "layers": [1, 2, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
SETTINGS: dict[str, Any] = {
    "images": {"train": 1500, "val": 400},
    "teacher_steps": 250,
    "batch_size": 64,
    "seed": 0,
    "model": MODEL,
}

Field = NDArray[np.float64]

# Each pattern is a function of rotated coordinates u, v, in periods: True where the first colour shows.
PATTERNS: dict[str, Callable[[Field, Field], NDArray[np.bool_]]] = {
    "stripes": lambda u, v: u % 1 < 0.5,
    "checks": lambda u, v: (u % 1 < 0.5) ^ (v % 1 < 0.5),
    "dots": lambda u, v: np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.33,
    "rings": lambda u, v: np.abs(np.hypot(u % 1 - 0.5, v % 1 - 0.5) - 0.3) < 0.11,
    "grid": lambda u, v: (u % 1 < 0.25) | (v % 1 < 0.25),
    "zigzag": lambda u, v: (u + np.abs(v % 1 - 0.5)) % 1 < 0.5,
    "bricks": lambda u, v: ((u % 1) < 0.14) | ((v + 0.5 * (np.floor(u) % 2)) % 1 < 0.14),
    "plusses": lambda u, v: (
        ((np.abs(u % 1 - 0.5) < 0.12) & (np.abs(v % 1 - 0.5) < 0.36))
        | ((np.abs(v % 1 - 0.5) < 0.12) & (np.abs(u % 1 - 0.5) < 0.36))
    ),
}


def render(rng: np.random.Generator, pattern: str, sides: Sequence[int] = SIDES) -> tuple[Image.Image, str]:
    """One picture of the pattern, with least and most pixels a side, and its caption."""
    width = int(rng.integers(sides[0], sides[1] + 1))
    height = int(np.clip(width * rng.uniform(0.7, 1.4), sides[0], sides[1]))
    dark, light = rng.uniform(10, 100, 3), rng.uniform(140, 245, 3)
    tone, front, back = ("dark", dark, light) if rng.random() < 0.5 else ("light", light, dark)
    side = min(width, height)
    period, angle = side / rng.uniform(3.5, 6.5), rng.uniform(0, math.pi)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + rng.random()
    v = (y * math.cos(angle) - x * math.sin(angle)) / period + rng.random()
    shown = PATTERNS[pattern](u, v)[..., None]
    pixels = np.where(shown, front, back) + rng.normal(0, 8, (height, width, 3))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image, f"{tone} {pattern}"


def write_images(folder: Path, images: int, seed: int) -> dict[Path, str]:
    """Renders the set into folder/<pattern>/, the classes in turn; gives the captions by path."""
    rng = np.random.default_rng(seed)
    captions = {}
    for i in range(images):
        pattern = list(PATTERNS)[i % len(PATTERNS)]
        image, caption = render(rng, pattern, SETTINGS.get("sides", SIDES))
        path = folder / pattern / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=int(rng.integers(75, 96)))
        captions[path] = caption
    return captions


def photo_captions(folder: Path) -> dict[Path, str]:
    """A caption for each image of a folder with a sub-folder per class; other files are passed over."""
    paths = sorted(path for path in folder.glob("*/*") if os.fsencode(path.suffix[1:]).lower() in SUFFIXES)
    if not paths:
        wanted = "--images wants DIR/train/<class>/ and DIR/val/<class>/"
        raise DataError(f"{folder} holds no sub-folders with images: {wanted}.")
    return {path: f"a photo of a {path.parent.name}" for path in paths}


def load_views(paths: list[Path], size: int) -> Tensor:
    """The central squares of images as [n, 3, size, size] in 0..1."""
    views = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for view, path in zip(views, paths, strict=True):
        try:
            image = decode(path.read_bytes())
        except (OSError, BadImage) as reason:
            hint = "tools/check_images.py lists all such"
            raise DataError(f"{path} can't be read: {reason}. {hint}.") from reason
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        view[:] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255


def normalise(views: Tensor) -> Tensor:
    return (views - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def batches(
    views: Tensor, tokens: Tensor, steps: int, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields random batches of images and tokens, each moved by the same few pixels and flipped as one."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(views), (size,), generator=generator)
        top, left, flip = torch.randint(views.shape[-1] - IMG_SIZE + 1, (3,), generator=generator).tolist()
        crops = views[index, :, top : top + IMG_SIZE, left : left + IMG_SIZE]
        yield normalise(crops.flip(-1) if flip % 2 else crops), tokens[index]


def train_teacher(views: Tensor, captions: list[str]) -> open_clip.CLIP:
    """A small CLIP, trained on images [n, 3, S, S] in 0..1, S above IMG_SIZE, with open_clip's loss."""
    seed, steps, size = SETTINGS["seed"], SETTINGS["teacher_steps"], SETTINGS["batch_size"]
    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL)
    tokens = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(captions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    loss_fn, start = ClipLoss(), time.monotonic()
    for step, (images, text) in enumerate(batches(views, tokens, steps, size, seed), start=1):
        loss = loss_fn(*model(images, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 1 or step % 25 == 0 or step == steps:
            seconds = f"{time.monotonic() - start:.0f} s"
            print(f"  step {step:4d} of {steps}  loss {loss.item():.3f}  {seconds}", flush=True)
    return model.eval()


@torch.no_grad()
def zero_shot_accuracy(model: open_clip.CLIP, views: Tensor, captions: list[str]) -> float:
    """Percentage of the images whose nearest caption, of all that differ, is their own."""
    names = sorted(set(captions))
    text = model.encode_text(open_clip.SimpleTokenizer(context_length=16)(names), normalize=True)
    image = torch.cat([model.encode_image(normalise(part), normalize=True) for part in views.split(100)])
    nearest = [names[i] for i in (image @ text.T).argmax(1).tolist()]
    return 100 * sum(map(str.__eq__, nearest, captions)) / len(captions)


def save_teacher(model: torch.nn.Module, folder: Path) -> None:
    """Writes a folder that open_clip loads by the name local-dir:FOLDER."""
    folder.mkdir(exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = {"model_cfg": MODEL, "preprocess_cfg": {"size": IMG_SIZE, "mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))


def make(out: Path, images: Path | None) -> None:
    """Writes captions and teacher, and the images unless some are given.

    Raises:
        DataError: no labelled images there, or one that can't be read.
    """
    if images:
        captions = {split: photo_captions(images / split) for split in ("train", "val")}
    else:
        sizes = enumerate(SETTINGS["images"].items())
        captions = {split: write_images(out / split, n, SETTINGS["seed"] + i) for i, (split, n) in sizes}
        pairs = [pair for split in captions.values() for pair in split.items()]
        lines = [f"{path.relative_to(out)}\t{caption}\n" for path, caption in pairs]
        (out / "captions.tsv").write_text("".join(lines))
    total, classes = sum(map(len, captions.values())), len({path.parent.name for path in captions["train"]})
    print(
        f"{total} images of {classes} classes; training a CLIP on the captions of train/ (it has seen labels)"
    )

    # All images are read first, so that a bad one is named at once. Batches move those of train/ by 8 pixels.
    views = {
        name: load_views(list(split), IMG_SIZE + 8 * (name == "train")) for name, split in captions.items()
    }
    model = train_teacher(views["train"], list(captions["train"].values()))
    save_teacher(model, out / "teacher")
    val = list(captions["val"].values())
    accuracy = zero_shot_accuracy(model, views["val"], val)
    chance = f"of {len(set(val))} captions ({100 / len(set(val)):.1f} % by chance)"
    print(f"The CLIP finds the caption of {accuracy:.1f} % of val/, {chance}")


def make_once(arguments: argparse.Namespace) -> None:
    """Writes the demo set, unless the folder holds it already.

    Raises:
        DataError: the folder holds something else, or see `make`.
    """
    out = arguments.out
    SETTINGS["teacher_steps"] = arguments.teacher_steps
    if arguments.number:
        SETTINGS["images"] = {"train": arguments.number, "val": -(-arguments.number // 4)}
    if arguments.sides:
        SETTINGS["sides"] = arguments.sides
    if arguments.images:
        SETTINGS["images"] = str(arguments.images)
    done, settings = out / "demo.json", json.dumps(SETTINGS)
    if done.exists() and json.loads(done.read_text()) == json.loads(settings):
        print(f"{out} holds the demo set already.")
        return
    if out.exists() and any(out.iterdir()):
        what_to_do = "remove it, or name another folder"
        raise DataError(f"{out} is not empty and holds no demo set of these settings: {what_to_do}.")
    with staged(out) as folder:
        make(folder, arguments.images)
        (folder / done.name).write_text(settings)


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("out", type=Path)
    own = "labelled images to take instead of rendering some"
    parser.add_argument("--images", type=Path, metavar="DIR", help=own)
    steps, trained = SETTINGS["teacher_steps"], "batches the CLIP is trained on"
    parser.add_argument("--teacher_steps", type=number(int, 1), default=steps, help=trained)
    number_of = "training images to render, and a quarter as many for val/"
    parser.add_argument("--number", type=number(int, 8), metavar="N", help=number_of)
    sides = f"least and most pixels of a picture's sides; default {SIDES}"
    parser.add_argument("--sides", type=number(int, 16), nargs=2, metavar="PX", help=sides)
    arguments = parser.parse_args()
    return answer(lambda: make_once(arguments), writes=arguments.out)


if __name__ == "__main__":
    sys.exit(main())
