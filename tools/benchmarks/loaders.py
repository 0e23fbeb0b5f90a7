"""Images per second of the loader: beside other loaders, and where some images are unreadable."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.measuring import ALONE, Figures, circumstances, device_of, race, settings
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from mapet_ds.config.sections import Config
from mapet_ds.data.index import Index, open_index
from mapet_ds.errors import DataError

TEACHER_VIEW = (448, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Side, mean and std of the published teacher's view, the second one of `loader`."""


def ours(index: Index, views: list[Any], config: Config, device: torch.device) -> Iterator[Any]:
    """The package's loader: its index, its exact order, its crops."""
    from mapet_ds.data.batch import View
    from mapet_ds.data.loader import Loader

    second = View(*views[1]) if len(views) > 1 else None
    loader = Loader(config, index, student=True, teacher=second, **ALONE)
    with contextlib.closing(loader):
        yield from loader


def dali(
    index: Index, views: list[Any], config: Config, device: torch.device, whole: bool = False, **decoder: Any
) -> Iterator[Any]:
    """DALI's file reader, shuffle buffer and random crop; its outputs are not even copied.

    whole: the crop is cut out of the whole image instead of being decoded alone.
    decoder: further arguments of DALI's decoder.
    """
    from nvidia.dali import Pipeline, fn
    from nvidia.dali import types as dali_types

    types: Any = dali_types  # its constants are made at run time
    data, device_id = config.data, 0 if device.type == "cuda" else None
    sizes = (config.train.micro_batch_size, data.threads, device_id)
    with Pipeline(*sizes, prefetch_queue_depth=data.prefetch) as pipeline:
        files = [index.path(i) for i in range(len(index))]
        encoded, label = fn.readers.file(files=files, random_shuffle=True)
        decoder |= {"device": "cpu" if device_id is None else "mixed"}
        decoder |= {"output_type": types.RGB, "adjust_orientation": False}
        area = {"random_area": data.crop_scale, "random_aspect_ratio": data.crop_ratio, "num_attempts": 10}
        if whole:
            anchor, shape = fn.random_crop_generator(fn.peek_image_shape(encoded), **area)
            crop = fn.slice(fn.decoders.image(encoded, **decoder), anchor, shape, axes=[0, 1])
        else:
            crop = fn.decoders.image_random_crop(encoded, **decoder, **area)
        mirror, outputs = fn.random.coin_flip(probability=data.flip), []
        for side, mean, std in views:
            image: Any = fn.resize(crop, size=[side, side], interp_type=types.INTERP_CUBIC, antialias=True)
            scaled: Any = {"mean": [255 * m for m in mean], "std": [255 * s for s in std]}
            outputs.append(fn.crop_mirror_normalize(image, mirror=mirror, output_layout="CHW", **scaled))
        pipeline.set_outputs(*outputs, label)
    while True:
        yield pipeline.run()


class Images(Dataset):
    """Image files as torchvision's transforms see them: cropped once, each view resized from the crop."""

    def __init__(self, paths: list[str], views: list[Any], config: Config) -> None:
        self.paths, self.views, self.data = paths, views, config.data

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> list[Tensor]:
        with Image.open(self.paths[i]) as file:
            image: Any = file.convert("RGB")
        crop = RandomResizedCrop.get_params(image, list(self.data.crop_scale), list(self.data.crop_ratio))
        image = F.crop(image, *crop)
        if torch.rand(1) < self.data.flip:
            image = F.hflip(image)
        resized: list[Any] = [
            F.resize(image, [side] * 2, InterpolationMode.BICUBIC) for side, _, _ in self.views
        ]
        return [F.normalize(F.to_tensor(x), mean, std) for x, (_, mean, std) in zip(resized, self.views)]


def torchvision(index: Index, views: list[Any], config: Config, device: torch.device) -> Iterator[Any]:
    """torch's DataLoader with as many worker processes as the others have threads."""
    images = Images([index.path(i) for i in range(len(index))], views, config)
    # One permutation after another: no epoch ends within a measurement.
    order = RandomSampler(images, num_samples=10**6)
    options = {"num_workers": config.data.threads, "pin_memory": device.type == "cuda"}
    for batch in DataLoader(images, config.train.micro_batch_size, sampler=order, **options):
        yield [view.to(device, non_blocking=True) for view in batch]


OTHERS = {
    "dali": dali, "torchvision": torchvision, "dali_whole": partial(dali, whole=True),
    # An A100's or H100's JPEG decoder: how much of a batch it is given, and memory for it from the start.
    "dali_hw0": partial(dali, hw_decoder_load=0.0), "dali_hw1": partial(dali, hw_decoder_load=1.0),
    "dali_whole_hw1": partial(dali, whole=True, hw_decoder_load=1.0),
    "dali_preallocated": partial(dali, preallocate_width_hint=4096, preallocate_height_hint=4096),
}  # fmt: skip


def measure_loader(arguments: argparse.Namespace) -> Figures:
    """Our loader against --against on --data, with one view and with two."""
    device = device_of(arguments.device)
    same = ["data.crop=random", "data.flip=0.5", "data.color_jitter=0", "data.workers=0", "data.prefetch=2"]
    config = settings(arguments, *same)
    student = (config.model.img_size, config.data.mean, config.data.std)
    with tempfile.TemporaryDirectory() as cache:
        index = open_index(arguments.data, Path(cache) / "index")
        if not Path(index.path(0)).is_file():
            raise DataError(f"--data {arguments.data} holds shards: the other readers need image files.")
        others = {name: OTHERS[name] for name in arguments.against or ("dali", "torchvision")}

        def race_with(*views: Any) -> Figures:
            readers = {"ours": ours} | others
            made = {name: partial(read, index, views, config, device) for name, read in readers.items()}
            return race(arguments, made)

        one, two = race_with(student), race_with(student, TEACHER_VIEW)
    return circumstances(config, arguments) | {"images": len(index), "one_view": one, "two_views": two}


def measure_bad(arguments: argparse.Namespace) -> Figures:
    """Our loader on --data with one unreadable image more for every 19.

    Half of them are cut off; of the others only the decoder can tell.
    """
    from mapet_ds.data.loader import Loader

    same = ["data.crop=random", "data.color_jitter=0", "data.workers=0", "data.max_bad_share=0.1"]
    config = settings(arguments, *same)

    def batches(index: Index, bad: list[int]) -> Iterator[Any]:
        loader = Loader(config, index, student=True, teacher=None, **ALONE, bad=bad)
        with contextlib.closing(loader):
            yield from loader

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        good = open_index(arguments.data, folder / "good")
        (folder / "mixed/bad").mkdir(parents=True)
        os.symlink(Path(arguments.data).resolve(), folder / "mixed/good")
        for number in range(-(-len(good) // 19)):
            data = good.read(number)
            spoilt = data[: len(data) // 2] if number % 2 else data.replace(b"\xff\xdb", b"\xff\xe9")
            (folder / f"mixed/bad/{number}.jpg").write_bytes(spoilt)
        mixed = open_index(str(folder / "mixed"), folder / "index")
        bad = [i for i in range(len(mixed)) if "/bad/" in mixed.path(i)]
        contestants = {"known": (mixed, bad), "none": (good, []), "first_sight": (mixed, [])}
        found = race(arguments, {name: partial(batches, *which) for name, which in contestants.items()})
    return circumstances(config, arguments) | {"images": len(mixed), "bad": len(bad)} | found
