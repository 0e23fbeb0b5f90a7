"""A loss that jumps is undone: back to a checkpoint from before, and past the samples of the steps in which it jumped.

RUN/rollbacks.json keeps what was found, so that a run which is started again passes over the same steps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from mapet_ds.checkpoint import checkpoint_folders
from mapet_ds.config import TrainConfig
from mapet_ds.index import DataError
from mapet_ds.launch import Ranks

WINDOWS = 20
"""Log windows whose median loss is the usual one."""
FEWEST = 5
"""Of them, before anything is called a spike."""


class Rollback(NamedTuple):
    """Steps first .. last - 1 are passed over: their samples are drawn, and nothing is learnt from them."""

    first: int
    last: int
    loss: float
    """Mean of those steps."""
    usual: float


class SpikeGuard:
    """Judges the mean loss of each log window against those before it. Every rank must build one, and ask it the same."""

    def __init__(self, config: TrainConfig, folder: Path, ranks: Ranks) -> None:
        self._config, self._folder, self._ranks = config, folder, ranks
        self._path = folder / "rollbacks.json"
        found: list[Any] = [None]
        if ranks.rank == 0:
            found = [json.loads(self._path.read_text()) if self._path.exists() else []]
        dist.broadcast_object_list(found, src=0, group=ranks.control)
        self.rollbacks = [Rollback(**each) for each in found[0]]
        self._usual: list[float] = []

    def passes_over(self, step: int) -> bool:
        """Whether nothing is to be learnt from the samples of a step."""
        return any(each.first <= step < each.last for each in self.rollbacks)

    def recall(self, step: int) -> None:
        """Take the usual losses up to a step from RUN/metrics.jsonl, as an uninterrupted run would remember them."""
        losses: list[Any] = [[]]
        path = self._folder / "metrics.jsonl"
        if self._ranks.rank == 0 and path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            finite = (line["loss"] for line in lines if line["step"] <= step and math.isfinite(line.get("loss", math.nan)))
            losses = [list(finite)[-WINDOWS:]]
        dist.broadcast_object_list(losses, src=0, group=self._ranks.control)
        self._usual = losses[0]

    def judge(self, first: int, record: dict[str, Any]) -> Rollback | None:
        """What to pass over, if the record of steps first .. record["step"] - 1 is a spike: already on disk, and checkpoints
        that have seen it are gone. Every rank must call it.

        A loss that is not finite is none: its steps were left out (run.Run).

        Raises:
            DataError: it is one too many.
        """
        loss, factor = record.get("loss"), self._config.spike_factor
        if loss is None or not math.isfinite(loss):
            return None
        usual = statistics.median(self._usual) if len(self._usual) >= FEWEST else math.inf
        if factor is None or not loss > factor * usual:
            self._usual = [*self._usual, loss][-WINDOWS:]
            return None
        found = Rollback(first, record["step"], loss, usual)
        self.rollbacks.append(found)
        if len(self.rollbacks) > self._config.max_rollbacks:
            raise DataError(
                f"The loss has jumped {len(self.rollbacks)} times, more than train.max_rollbacks allows: now to {loss:.4g} in "
                f"steps {first} to {found.last - 1}, usually {usual:.4g}; {self._path} has those before. It is not single samples, "
                "then: lower optim.lr or optim.clip_grad in a new run_dir, or raise train.spike_factor if such jumps are usual."
            )
        if self._ranks.rank == 0:
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(json.dumps([each._asdict() for each in self.rollbacks], indent=1))
            os.replace(partial, self._path)
            self.drop_stale()
        dist.barrier(self._ranks.control)
        return found

    def drop_stale(self) -> None:
        """Remove checkpoints that have learnt from steps that are passed over. For rank 0."""
        for path in checkpoint_folders(self._folder):
            try:
                run = json.loads((path / "run.json").read_text())
                learnt = set(range(run["step"])) - set(run["skipped"])
            except (OSError, ValueError, KeyError):
                continue  # damaged: passed over with a reason when it is its turn
            if any(not learnt.isdisjoint(range(each.first, each.last)) for each in self.rollbacks):
                shutil.rmtree(path)
