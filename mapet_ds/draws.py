"""All randomness of a run, as pure functions of (seed, step, slot).

A slot is a place in the global batch, 0 .. global_batch_size - 1, on whatever rank. Nothing here holds a
state, so a resumed run, at any number of ranks, draws what the uninterrupted one drew. NumPy's Philox makes
all numbers: loader workers import this module, and torch's generators differ between CPU and GPU.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """The purpose of a stream of random numbers, a part of its key. A new number would change runs."""

    ORDER = 0
    CROP = 1
    JITTER = 2
    PERMUTATION = 3
    DEPTH = 4
    CODEBOOK = 5
    INITIALISATION = 6
    MASK = 7
    STRONG = 8
    AUGMENT = 9
    MIX = 10
    LABELS = 11


def uniforms(
    seed: int, purpose: Purpose, step: int, first_slot: int, slots: int, width: int
) -> NDArray[np.float64]:
    """[slots, width] uniforms in [0, 1) for consecutive slots of a step.

    Each slot owns ceil(width / 4) blocks of four 64-bit numbers of the stream keyed (seed, purpose) at this
    step, so a row depends on its own slot alone. Every call for a purpose must have the same width.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Philox-4x64-10.
    """
    blocks = -(-width // 4)
    counter = np.array([first_slot * blocks, 0, step, 0], dtype=np.uint64)
    key = np.array([seed, purpose], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(counter=counter, key=key))
    return generator.random((slots, 4 * blocks))[:, :width]


def generator_seeds(seed: int, purpose: Purpose, step: int, slot: int) -> list[int]:
    """Three seeds of 32 bits for the generators of libraries, which know nothing of slots."""
    return (uniforms(seed, purpose, step, slot, 1, 3)[0] * 2**32).astype(np.int64).tolist()


def _ranks(numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """[slots, n] the rank of each number in its row, 0 for the smallest. Equal numbers keep their order."""
    by_rank = np.argsort(numbers, axis=1, kind="stable")
    ranks = np.empty_like(by_rank)
    np.put_along_axis(ranks, by_rank, np.arange(numbers.shape[1])[None], axis=1)
    return ranks


def permutations(seed: int, step: int, first_slot: int, slots: int, num_patches: int) -> NDArray[np.int64]:
    """[slots, L] `order`: the rank of each patch in a uniform random permutation, from 0."""
    return _ranks(uniforms(seed, Purpose.PERMUTATION, step, first_slot, slots, num_patches))


BLOCK_TRIES = 120


def block_masks(
    seed: int, step: int, first_slot: int, slots: int, grid: int, num_hidden: int, min_block: int, exact: bool
) -> NDArray[np.bool_]:
    """[slots, L] BEiT's masks, True = hidden: rectangles of `min_block` patches or more hide `num_hidden`.

    Rectangles have an aspect of 0.3 .. 1 / 0.3. As published, a mask is done after ten rectangles in a row
    that don't fit, with somewhat fewer patches (but one at least). `exact` fills it up with single random
    patches.

    Source: Bao et al., BEiT, arXiv 2106.08254, algorithm 1.
    """
    patches = grid * grid
    numbers = uniforms(seed, Purpose.MASK, step, first_slot, slots, 4 * BLOCK_TRIES + patches)
    tries, fill = numbers[:, : 4 * BLOCK_TRIES].reshape(slots, BLOCK_TRIES, 4), numbers[:, 4 * BLOCK_TRIES :]
    masks = np.zeros((slots, grid, grid), dtype=bool)
    failed, place = np.zeros(slots, dtype=int), np.arange(grid)

    # One try of all masks at a time: a rectangle is kept where it hides something new and not too much.
    for t in range(BLOCK_TRIES):
        room = num_hidden - masks.sum(axis=(1, 2))
        active = (room > 0) & (failed < 10)
        if not active.any():
            break
        area = min_block + (np.maximum(room, 0) - min_block) * tries[:, t, 0]
        aspect = 0.3 ** (1 - 2 * tries[:, t, 1])
        height = np.rint(np.sqrt(area * aspect)).astype(int)
        width = np.rint(np.sqrt(area / aspect)).astype(int)
        top = (tries[:, t, 2] * (grid - height + 1)).astype(int)[:, None]
        left = (tries[:, t, 3] * (grid - width + 1)).astype(int)[:, None]
        rows = (place >= top) & (place < top + height[:, None])
        columns = (place >= left) & (place < left + width[:, None])
        rectangle = rows[:, :, None] & columns[:, None, :]
        new = (rectangle & ~masks).sum(axis=(1, 2))
        fits = active & (height < grid) & (width < grid) & (new > 0) & (new <= room)
        masks[fits] |= rectangle[fits]
        failed = np.where(fits, 0, failed + active)

    # A loss needs one patch at least.
    masks = masks.reshape(slots, patches)
    empty = ~masks.any(axis=1)
    masks[empty, fill[empty].argmin(axis=1)] = True
    return _ranks(np.where(masks, -1.0, fill)) < num_hidden if exact else masks


def cell_masks(
    seed: int, step: int, first_slot: int, slots: int, grid: int, cell: int, share: float
) -> NDArray[np.bool_]:
    """[slots, L] masks, True = hidden: ceil(share * cells) random cells of `cell` x `cell` patches.

    Source: ConMIM's released settings (arXiv 2205.09616): 37 of 49 cells of 2 x 2, 148 of 196 patches.
    """
    cells = (grid // cell) ** 2
    numbers = uniforms(seed, Purpose.MASK, step, first_slot, slots, cells)
    hidden = (_ranks(numbers) < math.ceil(share * cells)).reshape(slots, grid // cell, grid // cell)
    return hidden.repeat(cell, axis=1).repeat(cell, axis=2).reshape(slots, grid * grid)


class Place(NamedTuple):
    """The place of a rank's micro-batch in a run."""

    step: int
    first_slot: int


def first_slot(micro_step: int, rank: int, world_size: int, micro_batch_size: int) -> int:
    """First slot of a rank's micro-batch. Slots run over images, then ranks, then micro-steps."""
    return (micro_step * world_size + rank) * micro_batch_size


def _mix(x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """SplitMix64's 64-bit finaliser with a key: every input bit reaches every output bit."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


CHUNK = 256
"""Number of consecutive samples that stay in one window."""
ROUNDS = 8


@functools.lru_cache(maxsize=64)
def _order_keys(seed: int, epoch: int, slot: int) -> NDArray[np.uint64]:
    return (uniforms(seed, Purpose.ORDER, epoch, slot, 1, ROUNDS)[0] * 2.0**53).astype(np.uint64)


def _shuffled(places: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Maps places by a keyed bijection of 0 .. size - 1.

    It is a balanced Feistel network of eight rounds on the smallest even number of bits that holds `size`.
    Results outside 0 .. size - 1 go through it again (cycle walking), which keeps it a bijection.

    Source: Luby and Rackoff 1988 (Feistel); Black and Rogaway 2002 (cycle walking).
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    low = np.uint64((1 << int(half)) - 1)

    def encrypt(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & low)
        return (left << half) | right

    x = encrypt(places.astype(np.uint64))
    while (outside := x >= size).any():
        x[outside] = encrypt(x[outside])
    return x.astype(np.int64)


class SampleOrder:
    """The endless order of samples: each sample once an epoch, by a new keyed bijection every epoch.

    window: number of consecutive places whose samples come from as many chunks as they fill, rounded up to
        whole chunks; 0: the whole data set. Each epoch cuts the chunks, of CHUNK consecutive samples, from
        another sample on, going round at the end. It shuffles the chunks (a shorter last one stays last),
        then each window by itself. Every sample is equally likely at every place, as without a window.
    """

    def __init__(self, num_samples: int, seed: int, window: int = 0) -> None:
        assert num_samples > 0
        self.num_samples, self.seed = num_samples, seed
        self.window = -(-window // CHUNK) * CHUNK

    def epoch_places(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices of the samples at `places` (each 0 .. num_samples - 1) of one epoch's order."""
        if self.window:
            return self._windowed(epoch, places)
        return _shuffled(places, self.num_samples, _order_keys(self.seed, epoch, 0))

    def _windowed(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keys of slot 0 shuffle the chunks, slot 1 gives their first cut, slot 2 + w shuffles window w."""
        # Shuffle each window.
        n, numbers, shuffled = self.num_samples, places // self.window, np.empty_like(places)
        for number in np.unique(numbers).tolist():
            here, start = numbers == number, number * self.window
            keys = _order_keys(self.seed, epoch, 2 + number)
            shuffled[here] = start + _shuffled(places[here] - start, min(self.window, n - start), keys)

        # Shuffle the whole chunks.
        chunks, offsets = np.divmod(shuffled, CHUNK)
        whole = chunks < n // CHUNK
        chunks[whole] = _shuffled(chunks[whole], n // CHUNK, _order_keys(self.seed, epoch, 0))
        return (chunks * CHUNK + offsets + int(_order_keys(self.seed, epoch, 1)[0])) % n

    def __call__(self, n: int) -> int:
        """The index of the n-th sample of the run, n = step * global_batch_size + slot."""
        epoch, place = divmod(n, self.num_samples)
        return int(self.epoch_places(epoch, np.array([place]))[0])

    def after(self, n: int, tries: int) -> int:
        """The index that stands in for sample n when it and `tries` - 1 substitutes can't be read.

        It is at the next place of the same epoch's order, which goes round at its end.
        """
        epoch, place = divmod(n, self.num_samples)
        return int(self.epoch_places(epoch, np.array([(place + tries) % self.num_samples]))[0])


class IndexOrder(SampleOrder):
    """The order of the index, the same in every epoch."""

    def epoch_places(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return places
