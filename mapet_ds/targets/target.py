"""What a target is: a function of a batch, without gradient, that says what is to be predicted for each patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from mapet_ds.data.batch import Batch, View


class Target(Protocol):
    """A function of a batch, without gradient."""

    teacher_view: View | None
    """The second view the loader must make; None for no second view."""
    dim: int
    """What there is for each patch: number of token ids, or width of a vector."""
    identity: dict[str, Any]
    """What a checkpoint must find unchanged at resume."""
    ahead: bool
    """Whether a batch's is asked for before the student has learnt from the batch before."""

    def __call__(self, batch: Batch) -> Tensor: ...

    def note(self, target: Tensor) -> None:
        """Called with each target that is learnt from, when its turn comes."""

    def after_step(self, weights: Iterable[tuple[str, Tensor]], progress: float) -> None:
        """Called after each update with the student's weights, of which all or none must be taken; progress: share of the
        run that is done."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, copied: it is written while training goes on."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave. Every rank must call it."""

    def metrics(self) -> dict[str, float]:
        """Figures since the last call; every rank must call it; the host waits for the GPU."""


class Constant:
    """What a target has that nothing moves."""

    ahead = False

    def note(self, target: Tensor) -> None:
        pass

    def after_step(self, weights: Iterable[tuple[str, Tensor]], progress: float) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state

    def metrics(self) -> dict[str, float]:
        return {}


def begin(target: Target, batch: Batch, stream: torch.cuda.Stream | None) -> Callable[[], Tensor]:
    """Start computing the target of a batch, on a stream of its own if one is given; what it gives is called for the target,
    which is then ordered with the current stream. Nothing makes the host wait."""
    if stream is None:
        made = target(batch)
        return lambda: made
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = target(batch)
    batch.teacher_images.record_stream(
        stream
    )  # their memory is the other stream's, which must not use it again too early
    done = stream.record_event()

    def take() -> Tensor:
        torch.cuda.current_stream().wait_event(done)
        made.record_stream(torch.cuda.current_stream())
        return made

    return take
