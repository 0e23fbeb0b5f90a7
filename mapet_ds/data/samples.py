"""The source of samples, called by DALI in a rank or its workers: the image that is due, and its crop.

Everything here is a function of (seed, step, slot). Nothing imports torch or DALI, because loader workers
import this module.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapet_ds import draws
from mapet_ds.config.objectives import StrongViewConfig
from mapet_ds.config.sections import Config, DataConfig
from mapet_ds.data.formats import BadImage, inspect, smallest_jpeg
from mapet_ds.data.index import Images, Index
from mapet_ds.data.orientation import orientation_alone
from mapet_ds.errors import DataError


class Crop(NamedTuple):
    """The part of an image that both views show, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


CROP_TRIES = 10
CROP_NUMBERS = 4 * CROP_TRIES + 1
JITTER_NUMBERS = 3
STRONG_NUMBERS = 9
STRONG_VALUES = 6
UNBLURRED = 0.01
"""A sigma in pixels that changes no pixel: the neighbour's weight is exp(-5000). DALI refuses 0."""
SOLARIZE_FROM, NEVER = 128, 256
"""Grey levels from which pixels are inverted."""
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
"""Names of a data set's parts, which are taken for classes where the folder above them is named."""


def central_square(width: int, height: int) -> Crop:
    """The largest central square of an image, the crop of the published MaPeT tokens."""
    side = min(width, height)
    return Crop((height - side) // 2, (width - side) // 2, side, side, False)


def random_crop(width: int, height: int, numbers: NDArray[np.float64], data: DataConfig) -> Crop:
    """Draws a crop as torchvision's RandomResizedCrop does (ten tries, then a central one), and a flip.

    numbers: [CROP_NUMBERS] uniforms in [0, 1).

    Source: Szegedy et al. 2015 (the crop); torchvision.transforms.RandomResizedCrop.get_params (the details).
    """
    (low_scale, high_scale), (low_ratio, high_ratio) = data.crop_scale, data.crop_ratio
    *tries, flip_number = numbers.tolist()
    flip = flip_number < data.flip
    for k in range(0, 4 * CROP_TRIES, 4):
        area = width * height * (low_scale + (high_scale - low_scale) * tries[k])
        ratio = low_ratio * (high_ratio / low_ratio) ** tries[k + 1]
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(tries[k + 2] * (height - h + 1)), int(tries[k + 3] * (width - w + 1)), h, w, flip)
    w = max(1, min(width, round(height * high_ratio)))
    h = max(1, min(height, round(width / low_ratio)))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip)


def strong_values(numbers: NDArray[np.float64], strong: StrongViewConfig) -> NDArray[np.float32]:
    """[slots, 6] values of the strong view, of which a grey one has a saturation of 0.

    They are: factors of brightness, contrast and saturation, the turn of the hue in degrees, the sigma of the
    blur in pixels, and the grey level from which pixels are inverted.

    numbers: [slots, STRONG_NUMBERS] uniforms in [0, 1).

    Source: ConMIM's released settings (Yi et al., arXiv 2205.09616).
    """
    shares = strong.jitter_share, strong.grey_share, strong.blur_share, strong.solarize_share
    jittered, grey, blurred, solarized = (numbers[:, :4] < shares).T
    jitter = np.where(jittered[:, None], (2 * numbers[:, 4:8] - 1) * strong.jitter, 0)
    jitter[grey, 2:] = -1, 0
    low, high = strong.blur_sigma
    sigma = np.where(blurred, low + (high - low) * numbers[:, 8], 0)
    factors, hue = np.maximum(1 + jitter[:, :3], 0), 360 * jitter[:, 3]
    level = np.where(solarized, SOLARIZE_FROM, NEVER)
    return np.column_stack([factors, hue, np.maximum(sigma, UNBLURRED), level]).astype(np.float32)


class Sample(NamedTuple):
    """The sample at one place of a micro-batch."""

    data: bytes
    """The encoded image."""
    size: tuple[int, int]
    """Width and height of the whole image, pixels."""
    crop: Crop
    jitter: NDArray[np.float64]
    """Factors of brightness, contrast and saturation."""
    strong: NDArray[np.float32]
    """The strong view's `strong_values`."""
    index: int
    passed_over: int
    """Number of unreadable samples that it stands in for."""


NOTHING = Sample(
    data=smallest_jpeg(), size=(1, 1), crop=Crop(0, 0, 1, 1, False), jitter=np.ones(JITTER_NUMBERS),
    strong=np.ones(STRONG_VALUES, np.float32), index=-1, passed_over=0,
)  # fmt: skip
"""Stands where there is no sample. It is an image, because other bytes can crash DALI 2.4.0."""


class _Draws(NamedTuple):
    """The random decisions for one micro-batch."""

    micro_step: int
    first: int
    """Number, in the run, of its first sample."""
    indices: list[int]
    """The index that is due at each place."""
    crops: NDArray[np.float64]
    jitter: NDArray[np.float64]
    strong: NDArray[np.float32]


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class SampleSource:
    """The samples of one rank, a function of micro-step and place in the micro-batch, without a state.

    `micro_step` counts from the start of the run, over all steps. The next place of the order stands in for a
    sample that can't be read. A sample known to be bad is not read again, with the same result.
    """

    def __init__(
        self, config: Config, index: Index, rank: int, world_size: int, first_micro_step: int = 0,
        bad: Collection[int] = (), jitter: bool = True, strong: bool = False, in_order: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.index, self.bad = config, index, frozenset(bad)
        self.jitter, self.strong = jitter, strong
        self.rank, self.world_size, self.first_micro_step = rank, world_size, first_micro_step
        order = draws.IndexOrder if in_order else draws.SampleOrder
        self.order = order(len(index), config.seed, config.data.shuffle_window)
        self._drawn: _Draws | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"rank_process": os.getpid()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Runs in a worker, which gets its source pickled, and ends it when the rank has ended.

        DALI 2.4.0 leaves that to the rank, so that the workers of a killed rank would stay for ever.
        """
        vars(self).update(state)
        threading.Thread(target=_end_with, args=(state["rank_process"],), daemon=True).start()

    def __call__(self, info: Any) -> tuple[NDArray, ...]:
        """Gives DALI's external_source bytes, anchor, shape, mirror and (index, passed over) of a sample.

        The three factors of the jitter and the six values of the strong view follow where they are in use.

        Where `sample` raises, it gives NOTHING, whose index is -1. DALI would lose the type of an error on
        its way from a worker, so the loader asks again to get the error.
        """
        try:
            sample = self.sample(self.first_micro_step + info.iteration, info.idx_in_batch)
        except DataError:
            sample = NOTHING
        top, left, height, width, flip = sample.crop
        return (
            np.frombuffer(sample.data, np.uint8),
            np.array((top, left), np.int32),
            np.array((height, width), np.int32),
            np.array(flip, np.int32),
            np.array((sample.index, sample.passed_over), np.int64),
            *(sample.jitter.astype(np.float32).reshape(JITTER_NUMBERS, 1) if self.jitter else ()),
            *(sample.strong.reshape(STRONG_VALUES, 1) if self.strong else ()),
        )

    def sample(self, micro_step: int, i: int) -> Sample:
        """Reads and inspects the i-th sample of a micro-batch.

        Raises:
            DataError: the storage fails, or more than data.max_bad_share of the data set is unreadable.
        """
        drawn, upright = self._draw(micro_step), self.config.data.exif_orientation
        for tries, index in enumerate(self._candidates(drawn, i)):
            if index not in self.bad:
                try:
                    data = self.index.read(index)
                    width, height = inspect(data, upright)
                    data = orientation_alone(data) if upright else data
                    break
                except BadImage:
                    pass
        crop = central_square(width, height)
        if self.config.data.crop == "random":
            crop = random_crop(width, height, drawn.crops[i], self.config.data)
        return Sample(data, (width, height), crop, drawn.jitter[i], drawn.strong[i], index, tries)

    def passed_over(self, micro_step: int, i: int, number: int) -> list[int]:
        """The first `number` indices that were due at the i-th place of a micro-batch."""
        return list(itertools.islice(self._candidates(self._draw(micro_step), i), number))

    def _candidates(self, drawn: _Draws, i: int) -> Iterator[int]:
        return candidates(self.config, self.index, self.order, drawn.first + i, drawn.indices[i])

    def _draw(self, micro_step: int) -> _Draws:
        """Everything random of one micro-batch, kept until another one is asked for."""
        if self._drawn is not None and self._drawn.micro_step == micro_step:
            return self._drawn
        config, slots = self.config, self.config.train.micro_batch_size
        step, slot = config.place(micro_step, self.rank, self.world_size)

        # The samples that are due, which may lie in several epochs.
        first = step * config.train.global_batch_size + slot
        epochs, places = np.divmod(np.arange(first, first + slots), len(self.index))
        due = [self.order.epoch_places(e, places[epochs == e]) for e in range(epochs[0], epochs[-1] + 1)]

        # Their crops and colours.
        crops = draws.uniforms(config.seed, draws.Purpose.CROP, step, slot, slots, CROP_NUMBERS)
        jitter = draws.uniforms(config.seed, draws.Purpose.JITTER, step, slot, slots, JITTER_NUMBERS)
        factors = np.maximum(1 + config.data.color_jitter * (2 * jitter - 1), 0)
        numbers = draws.uniforms(config.seed, draws.Purpose.STRONG, step, slot, slots, STRONG_NUMBERS)
        strong = strong_values(numbers, config.data.strong)
        self._drawn = _Draws(micro_step, first, np.concatenate(due).tolist(), crops, factors, strong)
        return self._drawn


def holds_splits(index: Index) -> bool:
    """Whether the folders of a data set are named like its parts (train, val) instead of like classes."""
    return bool(index.classes) and {name.lower() for name in index.classes} <= SPLITS


def doubts(config: Any, index: Index) -> Iterator[str]:
    """Yields a sentence where a run can learn from the images of `data.train`, but hardly as it was meant."""
    batch, root = config.train.global_batch_size, index.root
    if batch > len(index):
        yield (
            f"train.global_batch_size = {batch}, but data.train = {root} has {len(index)} images: each comes "
            f"{batch / len(index):.1f} times in a step, and an epoch is less than one. Lower the batch."
        )
    if holds_splits(index):
        yield (
            f"data.train = {root} holds the folders {' and '.join(index.classes)}: the run learns from all "
            f"of them. data.train={root}/{index.classes[0]} keeps the others out."
        )


def candidates(config: Any, index: Images, order: draws.SampleOrder, n: int, due: int) -> Iterator[int]:
    """Yields the index that is due as sample n, then those that stand in for it.

    Raises:
        DataError: so many are asked for that more than data.max_bad_share must be unreadable.
    """
    passed: list[int] = []
    while True:
        passed.append(order.after(n, len(passed)) if passed else due)
        yield passed[-1]
        check_bad(config, index, passed)


def check_bad(config: Any, index: Images, bad: Collection[int], section: str = "data.") -> None:
    """Stops a run with too many unreadable images: more than data.max_bad_share, rounded up, or all.

    section: what stands before `max_bad_share` where the user sets it; "--" where there is no run.

    Raises:
        DataError: it names the number, what is allowed, and some of the images.
    """
    allowed = min(math.ceil(config.data.max_bad_share * len(index)), len(index) - 1)
    bad = list(dict.fromkeys(bad))
    if len(bad) <= allowed:
        return
    some, of_run = ", ".join(index.path(i) for i in bad[:3]), section == "data."
    learnt = " A run that has learnt from others than are there now needs a new run_dir."
    if changed := sum(map(index.has_changed, bad)):
        raise DataError(
            f"Unreadable images: at least {len(bad)} of {len(index)}, and {changed} of these have changed "
            f"since they were listed; among them {some}. Put back what was there, or start the same "
            f"command again: it lists anew.{learnt * of_run}"
        )
    raise DataError(
        f"Unreadable images: at least {len(bad)} of {len(index)}, more than the {allowed} that "
        f"{section}max_bad_share = {config.data.max_bad_share} allows; among them {some}. "
        "tools/check_images.py lists them all. Raise the share, or mend the data"
        f"{' and start in a new run_dir' * of_run}."
    )


class Unreadable(Collection[int]):
    """The images that a rank has found unreadable, each told of once. It holds those known before, too."""

    def __init__(self, config: Any, index: Images, known: Collection[int]) -> None:
        self._config, self._index = config, index
        self._known, self._new = set(known), list[tuple[int, str]]()

    def __contains__(self, i: object) -> bool:
        return i in self._known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, bad: Iterable[tuple[int, str]]) -> None:
        """Adds images by their place in the index, with the reason.

        Raises:
            DataError: see `check_bad`.
        """
        new = {i: reason for i, reason in bad if i not in self._known}
        self._known |= new.keys()
        self._new += new.items()
        if new:
            check_bad(self._config, self._index, [*new, *self._known])

    def take(self) -> list[tuple[int, str]]:
        """(place in the index, reason) of the images that were added since the last call."""
        new, self._new = self._new, []
        return new
