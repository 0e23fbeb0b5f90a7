"""A loss that jumps is undone: back to a checkpoint from before, and past the samples that may have done it.

Those are the log window whose mean jumped and the one before from which something was learnt: a step's loss is from before its
update, and what rises in the last steps of a window hardly shows in its mean. RUN/rollbacks.json keeps what was found, so that
a run which is started again passes over the same.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from mapet_ds.config.sections import Config
from mapet_ds.errors import RunError
from mapet_ds.files import write_whole
from mapet_ds.launch import Ranks

WINDOWS = 20
"""Log windows whose median loss is the usual one."""
FEWEST = 5
"""Of them, before anything is called a spike."""


class Rollback(NamedTuple):
    """Steps first .. last - 1 are passed over: their samples are drawn, and nothing is learnt from them.

    loss: the mean of the later one of their log windows.
    """

    first: int
    last: int
    loss: float
    usual: float


class SpikeGuard:
    """Judges the mean loss of each log window against those before it. Every rank must build one, and ask it the same.

    passed_over: steps from whose samples nothing is to be learnt.
    """

    def __init__(self, config: Config, folder: Path, ranks: Ranks) -> None:
        self._config, self._folder, self._ranks = config, folder, ranks
        self._path = folder / "rollbacks.json"
        text = ranks.from_first(lambda: self._path.read_text() if self._path.exists() else "[]")
        try:
            self.rollbacks = [Rollback(**each) for each in json.loads(text)]
            self.passed_over = {step for each in self.rollbacks for step in range(each.first, each.last)}
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{self._path} is damaged ({error}): restore it, or remove it to learn from all steps."
            ) from error
        self._usual: list[float] = []
        self._window_before = 0

    def recall(self, step: int) -> None:
        """Take what was seen up to a step from RUN/metrics.jsonl, as an uninterrupted run would remember it."""
        self._usual, self._window_before = self._ranks.from_first(lambda: self._seen(step))

    def _seen(self, step: int) -> tuple[list[float], int]:
        """The usual losses up to a step, and where the window before it began."""
        path, window = self._folder / "metrics.jsonl", self._config.log.every_steps
        usual, before, end = [], 0, 0
        if path.exists():
            for line in map(
                json.loads, (text for text in path.read_text().splitlines() if text.endswith("}"))
            ):
                if line["step"] > step:
                    break
                if (loss := line.get("loss")) is not None:
                    before = end
                    usual += [loss] * (math.isfinite(loss) and line["step"] - end == window)
                end = line["step"]
        return usual[-WINDOWS:], before if end == step else max(
            0, step - window
        )  # a lost line was a window's, most likely

    def judge(self, first: int, record: dict[str, Any]) -> Rollback | None:
        """What to pass over, if the record of steps first .. record["step"] - 1 is a spike: already on disk. Every rank must
        call it, with every record.

        A loss that is not finite is none: its steps were left out (run.Run). No more is part of a window, which a pause makes.

        Raises:
            RunError: it is one too many, or can't be noted.
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
        found = Rollback(before, record["step"], loss, usual)
        self.rollbacks.append(found)
        self.passed_over.update(range(found.first, found.last))
        if len(self.rollbacks) > self._config.train.max_rollbacks:
            raise RunError(
                f"The loss has jumped {len(self.rollbacks)} times, more than train.max_rollbacks allows: now to {loss:.4g} before "
                f"step {found.last}, usually {usual:.4g}; {self._path} has those before. Passing over samples does not "
                "help: lower optim.lr or optim.clip_grad in a new run_dir, go on from a copy of an older checkpoint, or raise "
                "train.spike_factor if such jumps are usual."
            )
        self._ranks.from_first(self._write)
        return found

    def _write(self) -> None:
        try:
            write_whole(self._path, json.dumps([each._asdict() for each in self.rollbacks], indent=1))
        except OSError as error:
            says = f"The loss jumped, and that could not be noted in {self._path}: {error}"
            raise RunError(f"{says}. Start again with room.") from error
