"""Labelled images, augmented in the exact order and by the exact draws of a run; for fine-tuning by timm.

Transforms of timm's and torchvision's draw from Python's, NumPy's and torch's generators. These are seeded
anew from (seed, step, slot) before each image, so that ranks, micro-batches and workers change nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from torch import Tensor

from mapet_ds.config.finetune import FinetuneConfig, LabelledDataConfig
from mapet_ds.data.batch import Draw, DrawsAhead, to_device
from mapet_ds.data.formats import BadImage
from mapet_ds.data.index import Index
from mapet_ds.data.labelled import Bad, Batches, decode, served
from mapet_ds.data.samples import Unreadable, candidates
from mapet_ds.draws import Place, Purpose, SampleOrder, generator_seeds
from mapet_ds.launch import Ranks


class LabelledBatch(NamedTuple):
    """One micro-batch of a rank."""

    images: Tensor
    """float32 [B, 3, S, S], normalised, mixed."""
    target: Tensor
    """Of classes float32 [B, classes], each row sums to 1; of masks int16 [B, S, S], -1 = void."""
    index: Tensor
    """long [B], the place of each image in the index."""
    bad: Bad
    """The unreadable images that others replace."""
    place: Place
    draw: Draw | None = None
    """None until the loader adds it."""

    def to(self, device: torch.device) -> LabelledBatch:
        """Copies images, target and draw to a device; index stays on the CPU. The host waits for nothing."""
        images, target = to_device(self.images, device), to_device(self.target, device)
        return self._replace(images=images, target=target, draw=self.draw and self.draw.to(device))


def train_transform(data: LabelledDataConfig, model_data: dict[str, Any]) -> Any:
    """timm's training transform of an image to a tensor: crop, flip, RandAugment, normalisation, erasing.

    model_data: as timm.data.resolve_model_data_config gives it for the model.
    """
    no_jitter: Any = None  # timm takes None, which its annotation leaves out
    return create_transform(
        model_data["input_size"], is_training=True, mean=model_data["mean"], std=model_data["std"],
        scale=data.crop_scale, hflip=data.flip, color_jitter=no_jitter, auto_augment=data.rand_augment,
        interpolation="bicubic", re_prob=data.erasing, re_mode="pixel",
    )  # fmt: skip


def _seed_generators(seed: int, purpose: Purpose, step: int, slot: int) -> None:
    python, numpy, own = generator_seeds(seed, purpose, step, slot)
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(own)


class Augmented(NamedTuple):
    """The samples of a micro-batch."""

    samples: list[Any]
    """What the transform made of each."""
    index: Tensor
    """long [B], the place of each in the index."""
    bad: Bad
    """The unreadable images that others replace."""
    place: Place


class AugmentedBatches(Batches):
    """A rank's micro-batches by their number, counted from the start of the run over all steps."""

    def __init__(
        self, config: Any, index: Index, transform: Callable[..., Any], rank: int, world_size: int,
        bad: Collection[int],
    ) -> None:  # fmt: skip
        self.config, self.index, self.transform, self.bad = config, index, transform, frozenset(bad)
        self.rank, self.world_size = rank, world_size
        self.order = SampleOrder(len(index), config.seed)

    def read(self, index: int) -> tuple[Any, ...]:
        """What the transform takes of the image at a place of the index.

        Raises:
            BadImage: it can't be read; another replaces it.
        """
        raise NotImplementedError

    def augmented(self, number: int) -> Augmented:
        """The samples of the micro-batch of this number, each by the draws of its own slot.

        Raises:
            DataError: the storage fails, or no image is left to replace an unreadable one.
        """
        place = step, first = self.config.place(number, self.rank, self.world_size)
        bad: Bad = []
        samples, indices = [], []
        for slot in range(first, first + self.config.train.micro_batch_size):
            sample, index = self._readable(step * self.config.train.global_batch_size + slot, bad)
            _seed_generators(self.config.seed, Purpose.AUGMENT, step, slot)
            samples.append(self.transform(*sample))
            indices.append(index)
        return Augmented(samples, torch.tensor(indices), bad, place)

    def _readable(self, n: int, bad: Bad) -> tuple[tuple[Any, ...], int]:
        """What is read of sample n of the run, or of the one that replaces it, and its place in the index."""
        for index in candidates(self.config, self.index, self.order, n, self.order(n)):
            if index not in self.bad:
                try:
                    return self.read(index), index
                except BadImage as reason:
                    bad.append((index, str(reason)))
        raise AssertionError("candidates raises before it ends")


class TrainBatches(AugmentedBatches):
    """Micro-batches of images with the targets of their classes.

    Slots 2k and 2k + 1 are mixed with each other. Departure: each pair draws its own weight, as in timm's
    "pair" mode with the neighbour as partner. Released programs draw one weight a micro-batch, and so depend
    on the number of ranks.
    """

    def __init__(
        self, config: FinetuneConfig, index: Index, transform: Callable[[Image.Image], Tensor], rank: int,
        world_size: int, bad: Collection[int],
    ) -> None:  # fmt: skip
        super().__init__(config, index, transform, rank, world_size, bad)
        data, classes = config.data, len(index.classes)
        self.mixup = Mixup(data.mixup, data.cutmix, label_smoothing=data.label_smoothing, num_classes=classes)

    def read(self, index: int) -> tuple[Image.Image]:
        return (decode(self.index.read(index), self.config.data.exif_orientation),)

    def batch(self, number: int) -> LabelledBatch:
        """The micro-batch of this number, without its draw. See `augmented`."""
        made = self.augmented(number)
        images, labels = (
            torch.stack(made.samples),
            torch.tensor([*map(self.index.label, made.index.tolist())]),
        )
        target = self._mix(*made.place, images, labels)
        return LabelledBatch(images, target, made.index, made.bad, made.place)

    def _mix(self, step: int, first: int, images: Tensor, labels: Tensor) -> Tensor:
        """Mixes the images of the slots from `first` on in place; gives their target [B, classes]."""
        data = self.config.data
        if not data.mixup and not data.cutmix:
            return mixup_target(labels, len(self.index.classes), smoothing=data.label_smoothing)
        target = []
        for i in range(0, len(images), 2):
            _seed_generators(self.config.seed, Purpose.MIX, step, first + i)
            target.append(self.mixup(images[i : i + 2], labels[i : i + 2])[1])
        return torch.cat(target)


class TrainLoader:
    """An endless iterator of micro-batches from a step on; another image replaces an unreadable one."""

    def __init__(
        self, dataset: AugmentedBatches, ranks: Ranks, first_step: int, draw: Callable[[int, int, int], Draw]
    ) -> None:
        config = dataset.config
        self._index, self._bad = dataset.index, Unreadable(config, dataset.index, dataset.bad)
        first = first_step * config.grad_accum_steps(ranks.world_size)
        self._batches: Any = served(dataset, itertools.count(first), config.data.workers, ranks)
        places = (config.place(number, ranks.rank, ranks.world_size) for number in itertools.count(first))
        self._draws = DrawsAhead(draw, places, config.train.micro_batch_size, ahead=1)

    def __next__(self) -> LabelledBatch:
        """The next micro-batch, with its draw.

        Raises:
            DataError: the storage fails, or more than data.max_bad_share of the data set is unreadable.
        """
        batch = next(self._batches)
        self._bad.add(batch.bad)
        return batch._replace(draw=next(self._draws))

    def new_bad(self) -> Bad:
        """(index, reason) of the images that this rank found unreadable since the last call."""
        return self._bad.take()

    def close(self) -> None:
        """Ends the workers."""
        self._batches.close()
        self._draws.close()
        self._index.close()
