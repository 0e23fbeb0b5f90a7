"""Labelled images for evaluation: read, decoded by Pillow, each counted once, on any number of ranks."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet_ds.config.running import RunConfig
from mapet_ds.data.formats import BadImage, exif_orientation, inspect
from mapet_ds.data.index import Images, Index
from mapet_ds.data.kinds import EXAMPLES, summary
from mapet_ds.data.samples import check_bad, holds_splits
from mapet_ds.errors import DataError
from mapet_ds.launch import Ranks

Bad = list[tuple[int, str]]
"""Place in the index and reason of images that are unreadable."""
LOOKED_AT = 32
"""Images of a validation set that are looked for among those of training."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright."""


class EvaluationBatch(NamedTuple):
    """One batch of a rank, on the CPU."""

    images: Tensor
    """float32 [B, 3, S, S], normalised."""
    label: Tensor
    """long [B]; -1 for an image that doesn't count: it is unreadable, or fills up a rank's share."""
    bad: Bad
    """The unreadable images of this batch."""


def decode(data: bytes, upright: bool = False) -> Image.Image:
    """Decodes an image by Pillow to the RGB that DALI gives in pre-training.

    16 bits become 8 over the whole range. CMYK is inverted where Adobe's marker says so. Transparency and
    colour profiles are left out. Departure: of 16-bit colours Pillow reads the high byte, where DALI rounds,
    so that they may be one level apart.

    upright: as for `inspect`.

    Raises:
        BadImage: its structure is damaged, or Pillow can't decode it.
    """
    inspect(data, upright)
    try:
        with Image.open(io.BytesIO(data)) as image:
            turn = TURNS.get(exif_orientation(data)) if upright else None
            if image.format == "TIFF":
                image.getexif()[ExifTags.Base.Orientation] = 1  # Pillow would turn it by itself
            if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
                rgb = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
            elif image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
                rgb = ImageChops.invert(image).convert("RGB")  # Pillow always inverts
            else:
                rgb = image.convert("RGB")
            return rgb if turn is None else rgb.transpose(turn)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"its structure is whole, but it can't be decoded: {error}") from error


class Batches(Dataset):
    """A data set whose items are a rank's whole batches, so that a worker makes all of one.

    A DataError is an item too, because it would leave a worker as a traceback.
    """

    def batch(self, number: int) -> Any:
        """Makes the batch of this number."""
        raise NotImplementedError

    def __getitem__(self, number: int) -> Any:
        try:
            return self.batch(number)
        except DataError as error:
            return error


class EvaluationBatches(Batches):
    """A rank's share of a data set. Every rank has the same number of batches, of the same sizes."""

    def __init__(
        self, config: Any, index: Images, transform: Callable[[Image.Image], Tensor], rank: int,
        world_size: int,
    ) -> None:  # fmt: skip
        self.index, self.transform, self.rank, self.world_size = index, transform, rank, world_size
        self.batch_size, self.upright = config.train.micro_batch_size, config.data.exif_orientation
        self.share = math.ceil(len(index) / world_size)

    def __len__(self) -> int:
        return math.ceil(self.share / self.batch_size)

    def batch(self, number: int) -> EvaluationBatch:
        """Reads and decodes the images of a batch, which lie `world_size` apart in the index."""
        bad: Bad = []
        images, labels = [], []
        for i in range(number * self.batch_size, min((number + 1) * self.batch_size, self.share)):
            place = i * self.world_size + self.rank
            image, label = Image.new("RGB", (1, 1)), -1
            if place < len(self.index):
                try:
                    image = decode(self.index.read(place), self.upright)
                    label = self.index.label(place)
                except BadImage as reason:
                    bad.append((place, str(reason)))
            images.append(self.transform(image))
            labels.append(label)
        return EvaluationBatch(torch.stack(images), torch.tensor(labels), bad)


def served(
    dataset: Batches, numbers: Iterator[int] | range, workers: int, ranks: Ranks, start_method: str = "spawn"
) -> Iterator[Any]:
    """Yields the batches of these numbers in order. Workers make them ahead.

    start_method: of the workers. "spawn" suits a rank with an engine; "fork" spares each worker its imports.

    Raises:
        DataError: a batch could not be made.
    """
    loader = DataLoader(
        dataset, batch_size=None, sampler=numbers, num_workers=workers,
        pin_memory=ranks.device.type == "cuda", multiprocessing_context=start_method if workers else None,
    )  # fmt: skip
    for item in loader:
        if isinstance(item, DataError):
            raise item
        yield item


def report_unreadable(
    config: RunConfig, index: Images, bad: Bad, ranks: Ranks, section: str = "data."
) -> None:
    """Prints on rank 0 how many images an evaluation has left out. Every rank must call it with its own.

    section: as for `check_bad`.

    Raises:
        DataError: on every rank, where more than data.max_bad_share of the images are unreadable.
    """
    all_bad = sorted(image for rank in ranks.gather(bad) for image in rank)
    check_bad(config, index, [i for i, _ in all_bad], section)
    if all_bad and ranks.rank == 0:
        count, (i, reason) = f"{len(all_bad)} of {len(index)}", all_bad[0]
        message = f"Unreadable and left out of the evaluation: {count}, e.g. {index.path(i)}: {reason}."
        print(message, file=sys.stderr, flush=True)


def shared_images(train: Index, val: Index) -> tuple[list[int], int]:
    """Places in `val` of images that are in `train` byte for byte, and the number of those looked at.

    At most LOOKED_AT of `val` are, evenly spaced, and each is compared with as many of its length.
    """
    places = np.unique(np.linspace(0, len(val) - 1, LOOKED_AT).astype(int)).tolist()
    if train.fingerprint == val.fingerprint:
        return places, len(places)
    lengths, shared = train.lengths(), []
    for place in places:
        alike = np.flatnonzero(lengths == val.lengths()[place])[:LOOKED_AT].tolist()
        with contextlib.suppress(BadImage):
            data = val.read(place)
            if any(train.read(i) == data for i in alike):
                shared.append(place)
    return shared, len(places)


def check_apart(train: Index, val: Index, section: str, ranks: Ranks, refuse: bool = False) -> None:
    """Says on rank 0 where images of `val` are in `train`, too. Every rank must call it.

    Raises:
        DataError: with `refuse`, on every rank, where all that were looked at are.
    """

    def look() -> None:
        shared, looked_at = shared_images(train, val)
        if not shared:
            return
        sentence = (
            f"{section}val = {val.root}: {len(shared)} of {looked_at} images that were looked at are in "
            f"{section}train, too, byte for byte, e.g. {val.path(shared[0])}. Images that were learnt from "
            "can't judge what was learnt: name others."
        )
        if refuse and len(shared) == looked_at:
            raise DataError(sentence)
        print(f"WARNING: {sentence}", file=sys.stderr, flush=True)

    ranks.from_first(look)


def _check_labels(name: str, index: Index) -> None:
    """Refuses images without a label, and labels without images or without a name."""
    labels, classes = index.labels(), index.classes
    if holds_splits(index):
        folders = " and ".join(classes)
        raise DataError(
            f"{name} = {index.root}: its folders {folders} are parts of a data set, no classes. Name one of "
            f"them, e.g. {index.root}/{classes[0]}."
        )
    if (unlabelled := np.flatnonzero(labels < 0)).size:
        unread = {kind: found for kind, found in index.noted.items() if kind.startswith("labels ")}
        raise DataError(
            f"{name}: {unlabelled.size} of {len(index)} images have no label, e.g. "
            f"{index.path(int(unlabelled[0]))}. Put images into a sub-folder for each class, or a .cls "
            "beside each image of a tar shard, with a whole number from 0 on or the name of a class."
            + (f" There are {summary(unread, EXAMPLES)}." if unread else "")
        )
    counts = np.bincount(labels, minlength=len(classes))
    empty = [classes[i] for i in np.flatnonzero(counts[: len(classes)] == 0)] + index.empty_folders()
    if empty or len(counts) > len(classes):
        unnamed = f"label {len(counts) - 1} names no class"
        problem = f"class {', '.join(empty[:5])} has no image" if empty else unnamed
        if empty == ["0"] and classes == [*map(str, range(len(classes)))] and index.shards:
            raise DataError(
                f"{name} = {index.root}: class 0 has no image, and labels go up to {len(classes) - 1}: the "
                ".cls of its shards are probably counted from 1. Count them from 0, in both sets."
            )
        raise DataError(
            f"{name} = {index.root}: {problem}. Add images, or take the class out of training and validation."
        )


def check_classes(train: Index, val: Index, section: str = "data.", num_classes: int | None = None) -> None:
    """Refuses data whose labels can't be learnt. Every rank may call it.

    section: what stands before `train` and `val` where they are named, for the sentences.

    Raises:
        DataError: images have no label, a class has no images, the two sets have different classes, or their
            number is not data.num_classes.
    """
    _check_labels(f"{section}train", train)
    _check_labels(f"{section}val", val)
    if differing := sorted(set(train.classes) ^ set(val.classes)):
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise DataError(
            f"{train.root} and {val.root} must have the same classes; only in one of them: "
            f"{', '.join(differing[:5])}{more}."
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
