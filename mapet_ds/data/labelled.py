"""Labelled images as they are evaluated: read, decoded by Pillow, each counted once, on any number of ranks."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet_ds.config.sections import RunConfig
from mapet_ds.data.formats import BadImage, inspect
from mapet_ds.data.index import Index, Selection
from mapet_ds.data.samples import allowed_bad, too_many_bad
from mapet_ds.errors import DataError
from mapet_ds.launch import Ranks

Bad = list[tuple[int, str]]
"""Place in the index and reason of images that are unreadable."""


class EvaluationBatch(NamedTuple):
    images: Tensor
    """float32 [B, 3, S, S], normalised."""
    label: Tensor
    """long [B]; -1 where there is nothing to count: the image is unreadable, or fills up the last batch."""
    bad: Bad


def decode(data: bytes) -> Image.Image:
    """The RGB image, EXIF orientation ignored, as in pre-training.

    Raises:
        BadImage: its structure is damaged, or Pillow can't decode it.
    """
    inspect(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"its structure is whole, but it can't be decoded: {error}") from error


class Batches(Dataset):
    """An item is a whole batch of a rank, so that a worker makes all of it; or the DataError that was met, which would leave a
    worker as a traceback."""

    def __getitem__(self, number: int) -> Any:
        try:
            return self.batch(number)
        except DataError as error:
            return error


class EvaluationBatches(Batches):
    """A rank's share of a data set, in as many batches on each rank."""

    def __init__(
        self,
        config: RunConfig,
        index: Index | Selection,
        transform: Callable[[Image.Image], Tensor],
        rank: int,
        world_size: int,
    ) -> None:
        self.index, self.transform, self.rank, self.world_size = index, transform, rank, world_size
        self.batch_size = config.train.micro_batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.index) / (self.world_size * self.batch_size))

    def batch(self, number: int) -> EvaluationBatch:
        bad: Bad = []
        images, labels = [], []
        for i in range(number * self.batch_size, (number + 1) * self.batch_size):
            place = i * self.world_size + self.rank
            image, label = Image.new("RGB", (1, 1)), -1
            if place < len(self.index):
                try:
                    image, label = decode(self.index.read(place)), self.index.label(place)
                except BadImage as reason:
                    bad.append((place, str(reason)))
            images.append(self.transform(image))
            labels.append(label)
        return EvaluationBatch(torch.stack(images), torch.tensor(labels), bad)


def served(dataset: Batches, numbers: Iterator[int] | range, workers: int, ranks: Ranks) -> Iterator[Any]:
    """The batches of these numbers in order, made ahead by workers.

    Raises:
        DataError: one that is among them.
    """
    loader = DataLoader(
        dataset, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=ranks.device.type == "cuda",
        multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip
    for item in loader:
        if isinstance(item, DataError):
            raise item
        yield item


def report_unreadable(config: RunConfig, index: Index | Selection, bad: Bad, ranks: Ranks) -> None:
    """Say which images an evaluation has left out; `bad` are this rank's. Every rank must call it.

    Raises:
        DataError: more than data.max_bad_share of them, on every rank.
    """
    found = sorted(each for rank in ranks.gather(bad) for each in rank)
    if len(found) > allowed_bad(config, index):
        raise too_many_bad(config, index, [i for i, _ in found])
    if found and ranks.rank == 0:
        i, reason = found[0]
        says = f"Unreadable and left out of the evaluation: {len(found)} of {len(index)}, e.g. {index.path(i)}: {reason}."
        print(says, file=sys.stderr, flush=True)


def check_classes(train: Index, val: Index, section: str = "data", num_classes: int | None = None) -> None:
    """Refuse data whose labels can't be learnt, named by the section of the two knobs. Every rank may call it.

    Raises:
        DataError: images without a label, a class without images, classes that differ, another number of them than
            data.num_classes.
    """
    for name, index in ((f"{section}.train", train), (f"{section}.val", val)):
        labels = index.labels()
        if (unlabelled := np.flatnonzero(labels < 0)).size:
            raise DataError(
                f"{name}: {unlabelled.size} of {len(index)} images have no label, e.g. {index.path(int(unlabelled[0]))}. Put "
                "images into a sub-folder for each class, or a .cls beside each image of a tar shard."
            )
        present = np.bincount(labels, minlength=len(index.classes))
        empty = [
            index.classes[i] for i in np.flatnonzero(present[: len(index.classes)] == 0)
        ] + index.empty_folders()
        if empty or len(present) > len(index.classes):
            what = (
                f"class {', '.join(empty[:5])} has no image"
                if empty
                else f"label {len(present) - 1} names no class"
            )
            raise DataError(
                f"{name} = {index.root}: {what}. Add images, or take the class out of training and validation."
            )
    if differing := sorted(set(train.classes) ^ set(val.classes)):
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise DataError(
            f"{train.root} and {val.root} must have the same classes; only in one of them: {', '.join(differing[:5])}{more}."
        )
    if train.classes != val.classes:
        raise DataError(
            f"{train.root} and {val.root} number the same classes differently; pack both by the same order."
        )
    if num_classes not in (None, len(train.classes)):
        raise DataError(
            f"data.num_classes = {num_classes}, but {train.root} has {len(train.classes)} classes "
            f"({', '.join(train.classes[:3])}, ...). Name the whole data set, or set data.num_classes=null."
        )
    if len(train.classes) < 2:
        raise DataError(f"{train.root} has one class only: there is nothing to tell apart.")
