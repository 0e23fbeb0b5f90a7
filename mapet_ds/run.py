"""The training loop: data -> target -> objective -> engine, step after step, resumed where it stopped.

The loop does not know what it trains: a Task brings data, target and objective (task.py).
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from mapet_ds.config.running import RunConfig, total_steps
from mapet_ds.data.quarantine import Quarantine
from mapet_ds.data.samples import doubts
from mapet_ds.errors import ConfigError, RunError, UserError
from mapet_ds.files import write_whole
from mapet_ds.launch import Ranks, StopRequest, claim, init_distributed, say_what_triton_lacks
from mapet_ds.objectives.objective import Loss
from mapet_ds.targets.target import begin
from mapet_ds.task import Task
from mapet_ds.training import checkpoint
from mapet_ds.training.engine import (
    build_engine,
    check_engine_config,
    forget_broken_calls,
    gather_state,
    scatter_state,
    set_learning_rate,
    student_weights,
)
from mapet_ds.training.metrics import Metrics
from mapet_ds.training.optim import learning_rate
from mapet_ds.training.record import check_versions, other_versions, versions, write_record
from mapet_ds.training.spikes import Rollback, SpikeGuard
from mapet_ds.training.trackers import Trackers
from mapet_ds.training.watchdog import GOING_BACK, SAVING, Watchdog
from mapet_ds.vit import compile_blocks

T = TypeVar("T")
BEGAN = "init_from.sha256"
"""The entry of a run's identity that names the file it began from; each checkpoint hands it to the next."""


def run(build_task: Callable[[Any, Ranks], Task], config: RunConfig, engine_config: dict[str, Any]) -> int:
    """Trains a task with checked settings; gives the exit code. Every rank must call it.

    0: the run is at its end or was asked to stop. 2: standard error has a sentence that the user can act on.
    """
    try:
        ranks = init_distributed(config.train.hang_seconds)
        Run(build_task, config, engine_config, ranks).train()
    except UserError as error:
        if not error.printed_elsewhere:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


class Run:
    """One rank's part of a run. Building it continues from the newest checkpoint. Every rank must build one.

    Raises:
        UserError: what the user can correct.
    """

    lock: IO[bytes]
    """The lock on the run's folder, held by rank 0 until the run has trained to its end."""

    def __init__(
        self, build_task: Callable[[Any, Ranks], Task], config: RunConfig, engine_config: dict[str, Any],
        ranks: Ranks,
    ) -> None:  # fmt: skip
        ranks.from_first(lambda: check_engine_config(engine_config, ranks.device))
        self.ranks, self.folder = ranks, Path(config.run_dir)
        self.config: Any = config  # what the task takes
        self._open_folder()
        if (untested := ranks.from_first(check_versions)) and ranks.rank == 0:
            print(untested, file=sys.stderr, flush=True)
        self.stop = StopRequest(self.folder, ranks)
        if config.train.deterministic:  # cuBLAS is deterministic only with this
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.train.deterministic)

        # What is trained.
        self.task = build_task(config, ranks)
        self.index, self.target = self.task.index, self.task.target
        self.steps_per_epoch = len(self.index) / config.train.global_batch_size
        self.total_steps = total_steps(config, len(self.index))
        on_gpu = ranks.device.type == "cuda"
        self.stream = torch.cuda.Stream(ranks.device) if self.target.ahead and on_gpu else None

        # Its weights: those of the newest checkpoint, else those that a new run begins from.
        self.spikes = SpikeGuard(config, self.folder, ranks)
        newest = self._newest()
        began = newest.run["identity"].get(BEGAN) if newest else self.task.begin()
        self._build_engine(engine_config)
        self.identity = checkpoint.identity(config, self.index.fingerprint, self.target.identity)
        self.identity["engine.bf16"] = bool(engine_config.get("bf16", {}).get("enabled"))
        if began:
            self.identity[BEGAN] = began
        self.skipped: list[int] = []
        self.step = self.begun = self.saved = 0
        self.writer = checkpoint.Writer(self.folder, config.checkpoint.keep)
        self._resume(newest)

        # Nothing is refused from here on, so another run's folder stays as it was until now.
        if ranks.rank == 0:
            for doubt in doubts(config, self.index):
                print(f"WARNING: {doubt}", file=sys.stderr, flush=True)
            (self.folder / "DONE").unlink(missing_ok=True)
            write_record(config, engine_config, self.folder, self.index.record(), self.step)
        self.trackers = Trackers(config) if ranks.rank == 0 else None
        self.quarantine = Quarantine(config, self.index)
        self._open_at_step()
        self.watchdog = Watchdog(config.train.hang_seconds, ranks)

    def _open_folder(self) -> None:
        """Makes the run's folder, and locks it for as long as this run lives."""

        def claimed() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / ".writable").touch()
                (self.folder / ".writable").unlink()
                self.lock = claim(self.folder)
            except OSError as error:
                raise ConfigError(f"run_dir = {self.folder} can't be written: {error}.") from error

        self.ranks.from_first(claimed)

    def _newest(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint that has learnt from no step that is passed over, as rank 0 sees it."""
        return self.ranks.from_first(lambda: checkpoint.newest(self.folder, self.spikes.passed_over))

    def _build_engine(self, engine_config: dict[str, Any]) -> None:
        config, ranks, objective = self.config, self.ranks, self.task.objective
        objective.vit.set_grad_checkpointing(config.train.grad_checkpointing)
        groups = self.task.parameter_groups()
        self.engine = build_engine(objective, groups, config, engine_config, ranks.world_size, ranks.device)
        if not config.train.compile:
            return
        if ranks.device.type == "cuda":
            say_what_triton_lacks(ranks)
        if self.engine.zero_optimization_stage() < 3:
            compile_blocks(objective)
        elif ranks.rank == 0:  # it would trace DeepSpeed's hooks anew without end (docs/log.md)
            reason = "ZeRO-3 gathers weights in ways that torch.compile can't trace"
            print(f"{reason}: the student is not compiled.", flush=True)

    def _resume(self, newest: checkpoint.Checkpoint | None) -> None:
        """Continues from a checkpoint, if there is one. Every rank must call it, and loads it."""
        if newest is None:
            return
        checkpoint.check_identity(newest, self.identity, self.config.defaults(), len(self.index))
        self.step, self.skipped = newest.run["step"], newest.run["skipped"]
        self.begun = self.saved = self.writer.saved = self.step
        updates = self.step - len(self.skipped)
        scatter_state(self.engine, newest.load("model"), newest.load("optimizer"), updates)
        if state := newest.load("target"):
            self.target.load_state_dict(state)
        if self.ranks.rank == 0:
            beginning = "Continuing" if self.step < self.total_steps else "Nothing is left to do in"
            print(f"{beginning} {self.folder} at step {self.step} of {self.total_steps}.", flush=True)
            if others := other_versions(newest.run.get("versions", versions())):
                print(f"Other versions than the checkpoint's: {others}.", file=sys.stderr, flush=True)

    def _open_at_step(self) -> None:
        """Opens the loader, the targets, the metrics and the usual loss at the present step."""
        self.loader = self.task.loader(self.step, self.quarantine.known)
        self.taught = self._teach()
        place = (self.total_steps, self.steps_per_epoch, self.step)
        self.metrics = Metrics(self.config, self.ranks, *place, self.trackers)
        self.spikes.recall(self.step)

    def train(self) -> None:
        """Trains to the last step, or until asked to stop; saves either way. Every rank must call it.

        Raises:
            RunError: the loss, the gradients or the disk don't let the run go on.
        """
        with self.trackers or nullcontext():
            last = min(self.total_steps, self.config.train.stop_at_step or self.total_steps)
            while self.step < last and not self.stop.agreed():
                self.train_step()
                if self.step % self.config.log.every_steps == 0 or self.step == last:
                    first = self.metrics.logged_step
                    record = self.log(self.evaluate())
                    if jump := self.spikes.judge(first, record):
                        self.roll_back(jump)
                        continue
                if self.step % self.config.checkpoint.every_steps == 0:
                    self.settle()
                    self.save()

            # Who has asked for a stop may wait for seconds only, so the step is saved before anything else.
            if self.begun != self.step:
                self.save()
            if self.metrics.logged_step != self.step:
                self.log(self.evaluate())
            self._finish()
        if self.trackers:
            self.lock.close()

    def _finish(self) -> None:
        """Saves the last step if it isn't yet, closes everything, and prints how the run ended."""
        self.settle()
        if self.saved != self.step:
            self.save()
            self.settle()
        self.metrics.close()
        self.loader.close()
        self.watchdog.close()
        if self.saved != self.step:
            problem = f"The last checkpoint, of step {self.step}, could not be written"
            raise RunError(f"{problem}: make room in {self.folder}.")
        if self.ranks.rank != 0:
            return
        if self.step < self.total_steps:
            end = f"Stopped and saved at step {self.step} of {self.total_steps}"
            print(f"{end}: the same command continues {self.folder}.", flush=True)
            return
        next_step = self.task.hand_over(self.total_steps)
        write_whole(self.folder / "DONE", f"{self.step} steps\n")
        print(f"Done: {self.step} steps in {self.folder}. {next_step}", flush=True)

    def _teach(self) -> Iterator[tuple[Any, Tensor | None]]:
        """Yields (batch, target) for every micro-batch of this rank from the present step on.

        The target of a step that is passed over is None. Where the target may be ahead, the next one's
        computation has begun before this one is yielded.
        """
        begun: deque[tuple[Any, Callable[[], Tensor | None]]] = deque()
        for step in itertools.count(self.step):
            for _ in range(self.config.grad_accum_steps(self.ranks.world_size)):
                self.watchdog.doing(f"waiting for the images of step {step}")
                began = time.perf_counter()
                batch = next(self.loader).to(self.ranks.device)
                self.metrics.data_wait(time.perf_counter() - began)

                self.watchdog.doing(f"computing the targets of step {step}")
                learnt = step not in self.spikes.passed_over
                begun.append((batch, begin(self.target, batch, self.stream) if learnt else lambda: None))
                while len(begun) > (self.target.ahead and step + 1 < self.total_steps):
                    batch, take = begun.popleft()
                    yield batch, take()

    def train_step(self) -> None:
        """Makes one update: accumulate over micro-batches, clip, AdamW. Every rank must call it.

        A step with a non-finite gradient changes nothing.
        """
        config, engine, step = self.config, self.engine, self.step
        self.lr = learning_rate(step, config.optim, self.steps_per_epoch, self.total_steps)
        set_learning_rate(engine, self.lr)
        skipped, shown = engine.skipped_steps, None
        for _ in range(config.grad_accum_steps(self.ranks.world_size)):
            batch, target = next(self.taught)
            if target is None:
                continue
            self.watchdog.doing(f"computing step {step}")
            self.target.note(target)
            loss: Loss = engine(batch.images, target, batch.draw)
            engine.backward(loss.loss)
            engine.step()
            self.metrics.add({"loss": loss.loss.detach(), **loss.metrics})
            shown = batch, target, loss

        # What the step leaves behind.
        if shown is None:  # it is passed over
            self.skipped.append(step)
        elif engine.skipped_steps > skipped:
            self._skip()
        else:
            self.target.after_step(student_weights(engine), step / self.total_steps)
            if (picture := self.task.picture(step + 1, *shown)) is not None:
                self.metrics.show(step + 1, *picture)
        self.step += 1

    def _skip(self) -> None:
        """Notes this step, which DeepSpeed left out because its gradient was not finite.

        Raises:
            RunError: more such steps in a row than train.max_skipped_steps.
        """
        step, limit = self.step, self.config.train.max_skipped_steps
        self.skipped.append(step)
        if self.ranks.rank == 0:
            print(f"Step {step} had a non-finite gradient and was skipped.", file=sys.stderr, flush=True)
        not_finite = [each for each in self.skipped if each not in self.spikes.passed_over]
        if not_finite[-limit - 1 :] == list(range(step - limit, step + 1)):
            raise RunError(
                f"The gradient was not finite in {limit + 1} steps in a row, up to step {step}. The newest "
                f"checkpoint in {self.folder} is from before. Lower optim.lr or optim.clip_grad, or look at "
                "the data."
            )

    def evaluate(self) -> dict[str, float]:
        """The task's figures where an evaluation is due, else none. Every rank must call it.

        Its time does not count as training's.
        """
        steps = (self.task.evaluate_every_epochs or 0) * self.steps_per_epoch
        same = steps and self.step // steps == self.metrics.logged_step // steps
        if not steps or (same and self.step < self.total_steps):
            return {}
        self.watchdog.doing(f"evaluating step {self.step}")
        began = time.perf_counter()
        doing, show = self.watchdog.doing, lambda *picture: self.metrics.show(self.step, *picture)
        figures = self.task.evaluate(self.engine, doing, show)
        seconds = time.perf_counter() - began
        self.metrics.leave_out(seconds)
        return {**figures, "val_seconds": seconds}

    def log(self, figures: dict[str, float]) -> dict[str, Any]:
        """Writes a line of metrics with these figures in it; gives the line. Every rank must call it.

        The host waits for the GPU.
        """
        self.watchdog.doing(f"logging step {self.step}")
        forget_broken_calls()
        self.quarantine.merge(self.loader.new_bad(), self.ranks)
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        figures = {"lr": self.lr, "grad_norm": grad_norm, **self.target.metrics(), **figures}
        return self.metrics.log(self.step, {**figures, "quarantined": len(self.quarantine.known)})

    def roll_back(self, jump: Rollback) -> None:
        """Goes back to the newest checkpoint from before the steps to pass over. Every rank must call it.

        Raises:
            RunError: there is none yet.
        """
        self.settle()
        self.watchdog.doing(GOING_BACK)
        self.metrics.close()
        self.loader.close()
        self.saved = self.step = 0
        if self.ranks.rank == 0:  # later ones must neither be exported nor count among those to keep
            checkpoint.drop(self.folder, self.spikes.passed_over)
        self._resume(self._newest())

        # Say where the run goes on.
        event = f"The loss jumped to {jump.loss:.4g} (usually {jump.usual:.4g}) before step {jump.last}"
        passed = f"passes over steps {jump.first} to {jump.last - 1}"
        if self.step == 0:
            cure = f"The same command begins anew and {passed}."
            raise RunError(f"{event}, and no checkpoint is from before. {cure}")
        if self.ranks.rank == 0:
            sentence = f"{event}. The run {passed}, from the checkpoint of step {self.step} on."
            print(sentence, file=sys.stderr, flush=True)
        self._open_at_step()

    def save(self) -> None:
        """Has a checkpoint of this step written while training goes on. Every rank must call it.

        The host waits for the GPU, and until the checkpoint before is written, not until it is on the disk:
        settle does. A full disk does not stop the run: standard error names it, `saved` stays behind, and the
        next save tries again.

        Raises:
            RunError: the weights that DeepSpeed gathers are not those that the forward uses.
        """
        self._by_rank_0(self.writer.written)
        self.watchdog.doing("gathering the state for a checkpoint")
        self.quarantine.merge(self.loader.new_bad(), self.ranks)
        weights, moments = gather_state(self.engine, self.ranks.rank)
        self.begun = self.step
        if self.ranks.rank == 0:
            state = {
                "step": self.step,
                "skipped": list(self.skipped),
                "images": len(self.index),
                "config": self.config.to_dict(),
                "identity": self.identity,
                "versions": versions(),
            }
            files = {"model": weights, "optimizer": moments, "target": self.target.state_dict()}
            self.writer.begin(state, files)
        self.watchdog.doing("going on while a checkpoint is written")

    def settle(self) -> None:
        """Waits until the checkpoint that is being written is on disk or has failed. Every rank must call it.

        Afterwards `saved` is the step of the newest checkpoint.
        """
        self.saved = self._by_rank_0(self.writer.settled)
        self.watchdog.doing("going on after a checkpoint")

    def _by_rank_0(self, work: Callable[[], T]) -> T:
        """Lets all ranks wait for rank 0's disk, as long as it takes. Every rank must call it."""
        self.watchdog.doing(SAVING if self.ranks.rank == 0 else "waiting for rank 0 to save")
        return self.ranks.from_first(work)
