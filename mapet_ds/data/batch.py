"""What a loader hands to the run: two views of one crop, where they stand in the run, and the draw made for them.

Imports no torch: loader workers import this room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from mapet_ds.draws import Place

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class View(NamedTuple):
    """What a view is to look like."""

    size: int
    """Side in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    strong: bool = False
    """Colours changed by data.strong; the teacher's view only."""


class Draw(NamedTuple):
    """The random decisions for one micro-batch, functions of (seed, step, slot)."""

    mask: Tensor | None
    """bool [B, L], True = hidden from the student, hence predicted; None where nothing is hidden."""
    order: Tensor | None
    """long [B, L], rank of each patch in its image's permutation, 0 first; None where nothing is permuted."""
    keep: Tensor
    """float [B, decisions], uniforms of the stochastic depth decisions, two a block."""

    def to(self, device: torch.device) -> Draw:
        """The same on a device. The host waits for nothing."""
        return Draw(*(None if x is None else x.to(device, non_blocking=True) for x in self))


class Batch(NamedTuple):
    """One micro-batch of a rank. Images lie on the loader's device, float32; index and draw on the CPU."""

    images: Tensor | None
    """[B, 3, S, S] the student's view."""
    teacher_images: Tensor | None
    """[B, 3, T, T] the same crop for the teacher."""
    index: Tensor
    """[B] long: place in the index."""
    place: Place
    draw: Draw | None = None
    """None where the loader was given nothing to draw with."""

    def to(self, device: torch.device) -> Batch:
        """The same with images and draw on `device`; the index stays on the CPU."""
        images, teacher_images, draw = (
            x if x is None else x.to(device) for x in (self.images, self.teacher_images, self.draw)
        )
        return self._replace(images=images, teacher_images=teacher_images, draw=draw)


class DrawsAhead:
    """An iterator of the draws at these places, `ahead` of which a thread makes while the rank trains.

    draw: called with step, first slot and number of slots. Drawing takes NumPy 17 to 41 ms for 256 images on one core
    (docs/log.md), for which a GPU would wait between two steps.
    """

    def __init__(
        self, draw: Callable[[int, int, int], Draw], places: Iterator[Place], slots: int, ahead: int
    ) -> None:
        self._draw, self._places, self._slots = draw, places, slots
        self._thread = ThreadPoolExecutor(1, "draws")
        self._begun: deque[Future[Draw]] = deque()
        for _ in range(ahead):
            self._begin()

    def _begin(self) -> None:
        self._begun.append(self._thread.submit(self._draw, *next(self._places), self._slots))

    def __next__(self) -> Draw:
        self._begin()
        return self._begun.popleft().result()

    def close(self) -> None:
        """Stop drawing."""
        self._thread.shutdown(cancel_futures=True)
