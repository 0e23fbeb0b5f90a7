"""The interface of a target, and how the next batch's target is begun while the student still trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from mapet_ds.config.sections import TeacherConfig
from mapet_ds.data.batch import Batch, View


class Target(Protocol):
    """A function of a batch, without gradient, that gives what is to be predicted for each patch.

    The methods below suit a target that no training step changes; another one overrides them.
    """

    teacher_view: View | None
    """The second view that the loader must make; None where no view is needed."""
    dim: int
    """The number of token ids, or the width of the vector of each patch."""
    identity: dict[str, Any]
    """What must be the same when a run resumes from a checkpoint."""
    ahead: bool = False
    """Whether a batch's target may be computed before the student has learnt from the batch before."""

    def __call__(self, batch: Batch) -> Tensor:
        """[B, L] or [B, L, C], patches row by row from the top left. Does not make the host wait."""
        ...

    def note(self, target: Tensor) -> None:
        """Called with each target that is learnt from, when its turn comes."""

    def after_step(self, weights: Iterable[tuple[str, Tensor]], progress: float) -> None:
        """Called after each update with the student's weights, of which it must take all or none.

        progress: share of the run that is done.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, as copies: it is written while training goes on."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from what `state_dict` gave. Every rank must call it."""
        assert not state

    def metrics(self) -> dict[str, float]:
        """Figures since the last call. Every rank must call it; the host waits for the GPU."""
        return {}


def teacher_dtype(config: TeacherConfig, device: torch.device) -> torch.dtype:
    """The type that a teacher computes in, as teacher.precision asks; "auto" is bf16 on a GPU, else fp32."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def begin(target: Target, batch: Batch, stream: torch.cuda.Stream | None) -> Callable[[], Tensor]:
    """Starts computing a batch's target; gives the function that returns it. The host waits for nothing.

    stream: a stream of its own for the work; the function orders the target with the stream that is current
    when it is called. None: the current stream does the work at once.
    """
    if stream is None:
        made = target(batch)
        return lambda: made
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = target(batch)
    assert batch.teacher_images is not None
    batch.teacher_images.record_stream(stream)  # else their memory could be used again too early
    done = stream.record_event()

    def take() -> Tensor:
        torch.cuda.current_stream().wait_event(done)
        made.record_stream(torch.cuda.current_stream())
        return made

    return take
