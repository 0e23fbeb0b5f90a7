"""The batch that a loader gives to a run: two views of one crop, their place in the run, and their draw.

Nothing here imports torch, because loader workers import this folder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from mapet_ds.draws import Place

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The host waits for nothing: it copies to a GPU from pinned memory."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


def unnormalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images [..., 3, H, W] as values in [0, 1], float32, on the CPU. The host waits for a GPU."""
    images = images.float().cpu()
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images * scale + shift).clamp(0, 1)


class View(NamedTuple):
    """The look of a view."""

    size: int
    """Side in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    strong: bool = False
    """Whether data.strong changes its colours; the teacher's view only."""


class Draw(NamedTuple):
    """The random decisions for one micro-batch, functions of (seed, step, slot)."""

    mask: Tensor | None
    """bool [B, L], True = hidden from the student, hence predicted; None where nothing is hidden."""
    order: Tensor | None
    """long [B, L], the rank of each patch in its image's permutation, from 0; None without one."""
    keep: Tensor
    """float [B, 2 * blocks], the uniforms in [0, 1) that decide about stochastic depth, two a block."""

    def to(self, device: torch.device) -> Draw:
        """Copies the draw to a device. The host waits for nothing."""
        mask, order = (x if x is None else to_device(x, device) for x in self[:2])
        return Draw(mask, order, to_device(self.keep, device))


class Batch(NamedTuple):
    """One micro-batch of a rank. Images are float32 on the loader's device; index and draw are on the CPU."""

    images: Tensor | None
    """[B, 3, S, S], the student's view, normalised."""
    teacher_images: Tensor | None
    """[B, 3, T, T], the same crop for the teacher."""
    index: Tensor
    """long [B], the place of each image in the index."""
    place: Place
    """The step and the slot of the first image."""
    draw: Draw | None = None
    """None where the loader has no function to draw with."""

    def to(self, device: torch.device) -> Batch:
        """Copies images and draw to `device`; the index stays on the CPU. The host waits for nothing."""
        images, teacher_images = (x if x is None else to_device(x, device) for x in self[:2])
        draw = None if self.draw is None else self.draw.to(device)
        return self._replace(images=images, teacher_images=teacher_images, draw=draw)


class DrawsAhead:
    """An iterator of the draws at these places. A thread makes `ahead` of them while the rank trains.

    Drawing for 256 images takes NumPy 1 to 9 ms of a core (docs/log.md), for which a GPU would wait.

    draw: called with step, first slot and number of slots.
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
        """Stops the thread."""
        self._thread.shutdown(cancel_futures=True)
