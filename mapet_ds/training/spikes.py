"""Undoing a jump of the loss: back to a checkpoint from before, and past the samples that may have caused it.

Those are the samples of the log window whose mean jumped, and of the last window before it from which the
run learnt. A step's loss is from before its update, and a rise in a window's last steps hardly shows in its
mean. RUN/rollbacks.json keeps the jumps, so that a run which is started again passes over the same steps.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from mapet_ds.config.running import RunConfig
from mapet_ds.errors import RunError
from mapet_ds.files import write_whole
from mapet_ds.launch import Ranks

WINDOWS = 20
"""The usual loss is the median of this many log windows."""
FEWEST = 5
"""Before so many of them there is no usual loss, and nothing is called a jump."""


class Rollback(NamedTuple):
    """A jump of the loss, by which steps first .. last - 1 are passed over: nothing is learnt from them."""

    first: int
    last: int
    loss: float
    """The mean of the later one of their log windows."""
    usual: float


class SpikeGuard:
    """A judge of the mean loss of each log window, by those before it.

    Every rank must build one, and give it the same records. `passed_over` has the steps from whose samples
    the run must not learn.
    """

    def __init__(self, config: RunConfig, folder: Path, ranks: Ranks) -> None:
        self._config, self._folder, self._ranks = config, folder, ranks
        self._path = folder / "rollbacks.json"
        text = ranks.from_first(lambda: self._path.read_text() if self._path.exists() else "[]")
        try:
            self.rollbacks = [Rollback(**each) for each in json.loads(text)]
            self.passed_over = {step for each in self.rollbacks for step in range(each.first, each.last)}
        except (ValueError, TypeError) as error:
            cure = "restore it, or remove it to learn from all steps"
            raise RunError(f"{self._path} is damaged ({error}): {cure}.") from error
        self._usual: list[float] = []
        self._window_before = 0

    def recall(self, step: int) -> None:
        """Takes the losses up to a step from RUN/metrics.jsonl, as an uninterrupted run would remember them.

        Every rank must call it.
        """
        self._usual, self._window_before = self._ranks.from_first(lambda: self._seen(step))

    def _seen(self, step: int) -> tuple[list[float], int]:
        """The usual losses up to a step, and the step at which the window before it began."""
        path, window = self._folder / "metrics.jsonl", self._config.log.every_steps
        text = path.read_text() if path.exists() else ""
        usual, before, end = [], 0, 0
        for line in (json.loads(line) for line in text.splitlines() if line.endswith("}")):
            if line["step"] > step:
                break
            if (loss := line.get("loss")) is not None:
                before = end
                if math.isfinite(loss) and line["step"] - end == window:
                    usual.append(loss)
            end = line["step"]
        if end != step:  # a line was lost, most likely that of a whole window
            before = max(0, step - window)
        return usual[-WINDOWS:], before

    def judge(self, first: int, record: dict[str, Any]) -> Rollback | None:
        """The jump, already on disk, if the record of steps first .. record["step"] - 1 shows one; else None.

        Every rank must call it, with every record. A loss that is not finite is no jump, because its steps
        were left out (run.Run). Nor is a part of a window, which a pause makes.

        Raises:
            RunError: the loss has jumped too often, or the jump can't be noted.
        """
        loss, factor = record.get("loss"), self._config.train.spike_factor
        if loss is None:
            return None
        before, self._window_before = self._window_before, first
        if not math.isfinite(loss) or record["step"] - first != self._config.log.every_steps:
            return None
        usual = statistics.median(self._usual) if len(self._usual) >= FEWEST else math.inf
        if factor is None or not loss > factor * usual:
            self._usual = [*self._usual, loss][-WINDOWS:]
            return None

        # It is a jump.
        jump = Rollback(before, record["step"], loss, usual)
        self.rollbacks.append(jump)
        self.passed_over.update(range(jump.first, jump.last))
        if len(self.rollbacks) > self._config.train.max_rollbacks:
            raise RunError(
                f"The loss has jumped {len(self.rollbacks)} times, more than train.max_rollbacks allows: now "
                f"to {loss:.4g} before step {jump.last}, usually {usual:.4g}; {self._path} has those before. "
                "Passing over samples does not help: lower optim.lr or optim.clip_grad in a new run_dir, go "
                "on from a copy of an older checkpoint, or raise train.spike_factor if such jumps are usual."
            )
        self._ranks.from_first(self._write)
        return jump

    def _write(self) -> None:
        try:
            write_whole(self._path, json.dumps([each._asdict() for each in self.rollbacks], indent=1))
        except OSError as error:
            problem = f"The loss jumped, and that could not be noted in {self._path}: {error}"
            raise RunError(f"{problem}. Start again with room.") from error
