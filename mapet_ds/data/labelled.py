"""Labelled images for fine-tuning, augmented by timm, in the exact order and by the exact draws of a run.

timm's transforms draw from Python's, NumPy's and torch's generators. Here these are seeded anew from (seed, step, slot) before
each image, so that ranks, micro-batches and workers change nothing.
"""

from __future__ import annotations

import io
import itertools
import math
import random
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import timm.data
import torch
import torch.distributed as dist
from PIL import Image
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet_ds.config.sections import RunConfig
from mapet_ds.draws import Purpose, SampleOrder, first_slot, generator_seeds
from mapet_ds.config.finetune import FinetuneConfig, LabelledDataConfig
from mapet_ds.data.formats import BadImage, inspect
from mapet_ds.data.index import DataError, Index, Selection
from mapet_ds.launch import Ranks
from mapet_ds.data.samples import allowed_bad, candidates, too_many_bad

Bad = list[tuple[int, str]]
"""Place in the index and reason of images that are unreadable."""


class LabelledBatch(NamedTuple):
    """One micro-batch of a rank."""

    images: Tensor
    """float32 [B, 3, S, S], normalised, mixed."""
    target: Tensor
    """float32 [B, classes], each row sums to 1."""
    index: Tensor
    """long [B]: place in the index."""
    bad: Bad
    """What was passed over on the way."""

    def to(self, device: torch.device) -> LabelledBatch:
        return self._replace(images=self.images.to(device, non_blocking=True), target=self.target.to(device, non_blocking=True))


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


def train_transform(data: LabelledDataConfig, model_data: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: crop, flip, RandAugment, normalisation, erasing.

    model_data: what timm.data.resolve_model_data_config gives for the model.
    """
    return timm.data.create_transform(
        model_data["input_size"], is_training=True, scale=data.crop_scale, hflip=data.flip, color_jitter=None,
        auto_augment=data.rand_augment, interpolation="bicubic", mean=model_data["mean"], std=model_data["std"],
        re_prob=data.erasing, re_mode="pixel",
    )  # fmt: skip


def _seed_generators(seed: int, purpose: Purpose, step: int, slot: int) -> None:
    python, numpy, own = generator_seeds(seed, purpose, step, slot)
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(own)


class Batches(Dataset):
    """An item is a whole batch of a rank, so that a worker makes all of it; or the DataError that was met, which would leave a
    worker as a traceback."""

    def __getitem__(self, number: int) -> LabelledBatch | EvaluationBatch | DataError:
        try:
            return self.batch(number)
        except DataError as error:
            return error


class TrainBatches(Batches):
    """A rank's micro-batches by their number, counted from the start of the run over all steps.

    Slots 2k and 2k + 1 are mixed with each other. Departure: one weight a pair, timm's "pair" mode with the neighbour as
    partner; released programs draw one a micro-batch, which then would depend on the number of ranks.
    """

    def __init__(
        self, config: FinetuneConfig, index: Index, transform: Callable[[Image.Image], Tensor], rank: int, world_size: int,
        bad: Collection[int],
    ) -> None:  # fmt: skip
        self.config, self.index, self.transform, self.bad = config, index, transform, frozenset(bad)
        self.rank, self.world_size = rank, world_size
        self.order = SampleOrder(len(index), config.seed)
        data = config.data
        self.mixup = timm.data.Mixup(
            data.mixup, data.cutmix, label_smoothing=data.label_smoothing, num_classes=len(index.classes)
        )  # fmt: skip

    def batch(self, micro_step: int) -> LabelledBatch:
        slots = self.config.train.micro_batch_size
        step, micro = divmod(micro_step, self.config.grad_accum_steps(self.world_size))
        first = first_slot(micro, self.rank, self.world_size, slots)
        bad: Bad = []
        images, indices = zip(*(self._sample(step, slot, bad) for slot in range(first, first + slots)))
        images, labels = torch.stack(images), torch.tensor([self.index.label(i) for i in indices])
        return LabelledBatch(images, self._mix(step, first, images, labels), torch.tensor(indices), bad)

    def _sample(self, step: int, slot: int, bad: Bad) -> tuple[Tensor, int]:
        n = step * self.config.train.global_batch_size + slot
        for index in candidates(self.config, self.index, self.order, n, self.order(n)):
            if index not in self.bad:
                try:
                    image = decode(self.index.read(index))
                    break
                except BadImage as reason:
                    bad.append((index, str(reason)))
        _seed_generators(self.config.seed, Purpose.AUGMENT, step, slot)
        return self.transform(image), index

    def _mix(self, step: int, first: int, images: Tensor, labels: Tensor) -> Tensor:
        """Mix the images of the slots from `first` on in place; their target [B, classes]."""
        data = self.config.data
        if not data.mixup and not data.cutmix:
            return mixup_target(labels, len(self.index.classes), smoothing=data.label_smoothing)
        target = []
        for i in range(0, len(images), 2):
            _seed_generators(self.config.seed, Purpose.MIX, step, first + i)
            target.append(self.mixup(images[i : i + 2], labels[i : i + 2])[1])
        return torch.cat(target)


class EvaluationBatches(Batches):
    """A rank's share of a data set, in as many batches on each rank."""

    def __init__(
        self, config: RunConfig, index: Index | Selection, transform: Callable[[Image.Image], Tensor], rank: int, world_size: int
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


class TrainLoader:
    """An endless iterator of micro-batches from a step on; an unreadable image is replaced, remembered and reported."""

    def __init__(
        self, config: FinetuneConfig, index: Index, transform: Callable[[Image.Image], Tensor], ranks: Ranks, first_step: int,
        bad: Collection[int],
    ) -> None:  # fmt: skip
        self._config, self._index = config, index
        self._bad, self._new_bad = set(bad), Bad()
        dataset = TrainBatches(config, index, transform, ranks.rank, ranks.world_size, bad)
        first = first_step * config.grad_accum_steps(ranks.world_size)
        self._batches = served(dataset, itertools.count(first), config.data.workers, ranks)

    def __next__(self) -> LabelledBatch:
        """
        Raises:
            DataError: the storage fails, or more than data.max_bad_share of the data set is unreadable.
        """
        batch = next(self._batches)
        new = {index: reason for index, reason in batch.bad if index not in self._bad}
        self._bad |= new.keys()
        self._new_bad += new.items()
        if new and len(self._bad) > allowed_bad(self._config, self._index):
            raise too_many_bad(self._config, self._index, [*new, *self._bad])
        return batch

    def new_bad(self) -> Bad:
        """What this rank found unreadable since it was last asked."""
        found, self._new_bad = self._new_bad, []
        return found

    def close(self) -> None:
        """End the workers."""
        self._batches.close()
        self._index.close()


def report_unreadable(config: RunConfig, index: Index | Selection, bad: Bad, ranks: Ranks) -> None:
    """Say which images an evaluation has left out; `bad` are this rank's. Every rank must call it.

    Raises:
        DataError: more than data.max_bad_share of them, on every rank.
    """
    everyone: list[Bad] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(everyone, bad, group=ranks.control)
    found = sorted(each for rank in everyone for each in rank)
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
        empty = [index.classes[i] for i in np.flatnonzero(present[: len(index.classes)] == 0)] + index.empty_folders()
        if empty or len(present) > len(index.classes):
            what = f"class {', '.join(empty[:5])} has no image" if empty else f"label {len(present) - 1} names no class"
            raise DataError(f"{name} = {index.root}: {what}. Add images, or take the class out of training and validation.")
    if differing := sorted(set(train.classes) ^ set(val.classes)):
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise DataError(
            f"{train.root} and {val.root} must have the same classes; only in one of them: {', '.join(differing[:5])}{more}."
        )
    if train.classes != val.classes:
        raise DataError(f"{train.root} and {val.root} number the same classes differently; pack both by the same order.")
    if num_classes not in (None, len(train.classes)):
        raise DataError(
            f"data.num_classes = {num_classes}, but {train.root} has {len(train.classes)} classes "
            f"({', '.join(train.classes[:3])}, ...). Name the whole data set, or set data.num_classes=null."
        )
    if len(train.classes) < 2:
        raise DataError(f"{train.root} has one class only: there is nothing to tell apart.")
