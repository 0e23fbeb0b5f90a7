"""One training run, in the order things happen: data -> target -> objective -> engine -> resume -> loop.

Nothing here knows which method runs: a target says what is to be predicted, an objective predicts it. Fine-tuning is a Run with
other parts (finetune.py).
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from torch import Tensor

from mapet_ds.training import checkpoint
from mapet_ds.config.sections import REPOSITORY, ConfigError, RunConfig, flatten, total_steps
from mapet_ds.data.loader import Batch, Loader, open_shared_index
from mapet_ds.draws import first_slot
from mapet_ds.training.engine import (
    build_engine,
    check_engine_config,
    forget_broken_calls,
    gather_state,
    scatter_state,
    set_learning_rate,
    student_weights,
)
from mapet_ds.data.index import DataError
from mapet_ds.results.init_from import begin_from
from mapet_ds.launch import Ranks, StopRequest, claim
from mapet_ds.training.metrics import Metrics
from mapet_ds.objectives import Loss, Objective, build_objective
from mapet_ds.results.online_probe import OnlineProbe
from mapet_ds.training.optim import learning_rate
from mapet_ds.data.quarantine import Quarantine
from mapet_ds.training.spikes import Rollback, SpikeGuard
from mapet_ds.targets.targets import Target, begin, build_target
from mapet_ds.vit import compile_blocks
from mapet_ds.training.watchdog import GOING_BACK, SAVING, Watchdog

PACKAGES = ("torch", "deepspeed", "timm", "open_clip_torch", "nvidia-dali-cuda130", "faiss-gpu", "numpy", "pillow")

BEGAN = "init_from.sha256"
"""In a run's identity: of the file that it began from, carried from checkpoint to checkpoint."""


class Run:
    """Everything one rank holds; building it already continues from the newest checkpoint. Every rank must build one.

    Raises:
        ConfigError, DataError, ResumeError: what the user can correct.
    """

    def __init__(self, config: RunConfig, engine_config: dict[str, Any], ranks: Ranks) -> None:
        check_engine_config(engine_config)
        self.config, self.ranks = config, ranks
        self.folder = Path(config.run_dir)
        self._open_folder()
        self.stop = StopRequest(self.folder, ranks)
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to be deterministic
        torch.use_deterministic_algorithms(config.train.deterministic)

        self.index = open_shared_index(config.data.train, self.folder / "index", ranks)
        self.steps_per_epoch = len(self.index) / config.train.global_batch_size
        self.total_steps = total_steps(config, len(self.index))
        self.target, objective = self._build_parts()
        self.stream = torch.cuda.Stream(ranks.device) if self.target.ahead and ranks.device.type == "cuda" else None
        self.spikes = SpikeGuard(config, self.folder, ranks)
        found = self._newest()
        began = self._begin(objective) if found is None else found.run["identity"].get(BEGAN)
        objective.vit.set_grad_checkpointing(config.train.grad_checkpointing)
        self.engine = build_engine(objective, config, engine_config, ranks.world_size, ranks.device)
        if config.train.compile and self.engine.zero_optimization_stage() < 3:
            compile_blocks(objective)
        elif config.train.compile and ranks.rank == 0:  # it would trace DeepSpeed's hooks anew without end (docs/log.md)
            print("ZeRO-3 gathers weights in ways that torch.compile can't trace: the student is not compiled.", flush=True)

        self.identity = checkpoint.identity(config, self.index.fingerprint, self.target.identity)
        self.identity["engine.bf16"] = bool(engine_config.get("bf16", {}).get("enabled"))
        if began:
            self.identity[BEGAN] = began
        self.skipped: list[int] = []
        self.step = self.saved = 0
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[int] | None = None
        self._resume(found)
        if ranks.rank == 0:  # after a refusal could have come: another run's folder stays as it was
            (self.folder / "DONE").unlink(missing_ok=True)
            write_record(config, engine_config, self.folder)
        self.quarantine = Quarantine(config, self.index)
        self._open_at_step()
        self.watchdog = Watchdog(config.train.hang_seconds, ranks)

    def _build_parts(self) -> tuple[Target, Objective]:
        if self.config.evaluate.train:
            self.probe = OnlineProbe(self.config, self.index, self.folder, self.ranks)
        target = build_target(self.config, self.ranks.device)
        return target, build_objective(self.config, target.dim)

    def _open_loader(self) -> Any:
        """The micro-batches of this rank from the present step on."""
        ranks = self.ranks
        return Loader(
            self.config, self.index, student=True, teacher=self.target.teacher_view, rank=ranks.rank,
            world_size=ranks.world_size, local_rank=ranks.local_rank, first_step=self.step, bad=self.quarantine.known,
        )  # fmt: skip

    def _figures(self) -> dict[str, float]:
        """What a line of metrics has beside losses and speed; where one is due an evaluation, whose time does not count as
        training's. Every rank must call it."""
        figures, epochs = self.target.metrics(), self.config.evaluate_every_epochs
        steps = epochs and epochs * self.steps_per_epoch
        if not steps or (self.step // steps == self.metrics.logged_step // steps and self.step < self.total_steps):
            return figures
        began = time.perf_counter()
        found = self._evaluate()
        seconds = time.perf_counter() - began
        self.metrics.leave_out(seconds)
        return {**figures, **found, "val_seconds": seconds}

    def _evaluate(self) -> dict[str, float]:
        """Of the ViT that export would take now: a momentum teacher's, else the student's. Every rank must call it."""
        averaged = {name: tensor for name, tensor in self.target.state_dict().items() if name.startswith("vit.")}
        return self.probe(averaged.items() or student_weights(self.engine), self.watchdog.doing)

    def _hand_over(self) -> str:
        """What rank 0 does and says when all steps are done and saved."""
        return f"To timm: python tools/export_timm.py {self.folder} OUT"

    def _open_at_step(self) -> None:
        """What a resumed run does from its step on: loader, targets, metrics, the usual loss."""
        self.loader, self.taught = self._open_loader(), self._teach()
        self.metrics = Metrics(self.config, self.ranks, self.total_steps, self.steps_per_epoch, self.step)
        self.spikes.recall(self.step)

    def _open_folder(self) -> None:
        if self.ranks.rank == 0:
            try:
                used = any((self.folder / "checkpoints").glob("step_*"))
                if used and self.config.resume == "never":
                    raise ConfigError(f"run_dir = {self.folder} holds a run and resume is never; name a new run_dir.")
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / ".writable").touch()
                (self.folder / ".writable").unlink()
                self.lock = claim(self.folder)
            except OSError as error:
                raise ConfigError(f"run_dir = {self.folder} can't be written: {error}.") from error
        dist.barrier(self.ranks.control)

    def _newest(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint that has learnt nothing from what is passed over, if there is one: rank 0 chooses."""
        chosen = [checkpoint.newest(self.folder, self.spikes.passed_over) if self.ranks.rank == 0 else None]
        dist.broadcast_object_list(chosen, src=0, group=self.ranks.control)
        return chosen[0]

    def _begin(self, objective: Objective) -> str | None:
        """Put weights to begin from into the student, and its momentum teacher, if any; their sha256. Every rank must call it."""
        if self.config.model.init_from is None:
            return None
        sha256, notes = begin_from(objective.vit, self.config)
        if self.target.state_dict():
            self.target.load_state_dict(objective.state_dict())
        if self.ranks.rank == 0:
            print("; ".join([f"Beginning from {self.config.model.init_from}, sha256 {sha256[:12]}", *notes]) + ".", flush=True)
        return sha256

    def _resume(self, found: checkpoint.Checkpoint | None) -> None:
        """Continue from a checkpoint, if there is one: all ranks load it."""
        if found is None:
            return
        checkpoint.check_identity(found, self.identity, flatten(type(self.config)().to_dict()))
        self.step, self.skipped = found.run["step"], found.run["skipped"]
        self.saved = self.step
        scatter_state(self.engine, found.load("model"), found.load("optimizer"), self.step - len(self.skipped))
        if state := found.load("target"):
            self.target.load_state_dict(state)
        if self.ranks.rank == 0:
            says = "Continuing" if self.step < self.total_steps else "Nothing is left to do in"
            print(f"{says} {self.folder} at step {self.step} of {self.total_steps}.", flush=True)

    def train(self) -> None:
        """Train to the last step, or until asked to stop; save either way.

        Raises:
            DataError: the last checkpoint could not be written.
        """
        last = min(self.total_steps, self.config.train.stop_at_step or self.total_steps)
        while self.step < last and not self.stop.agreed():
            self.train_step()
            if self.step % self.config.log.every_steps == 0 or self.step == last:
                self._log()  # may go back
            if self.step != self.saved and self.step % self.config.checkpoint.every_steps == 0:
                self.save()
        if self.metrics.logged_step != self.step:
            self._log()
        self.settle()
        if self.saved != self.step:
            self.save()
            self.settle()
        self.metrics.close()
        self.loader.close()
        self.watchdog.close()
        if self.saved != self.step:
            raise DataError(f"The last checkpoint, of step {self.step}, could not be written: make room in {self.folder}.")
        if self.ranks.rank == 0:
            self._say_farewell()

    def _say_farewell(self) -> None:
        if self.step < self.total_steps:
            says = f"Stopped and saved at step {self.step} of {self.total_steps}"
            print(f"{says}: the same command continues {self.folder}.", flush=True)
            return
        says = self._hand_over()
        (self.folder / "DONE").write_text(f"{self.step} steps\n")
        print(f"Done: {self.step} steps in {self.folder}. {says}", flush=True)

    def _teach(self) -> Iterator[tuple[Batch, Tensor | None]]:
        """This rank's micro-batches from the present step on with their targets, of which a step that is passed over has none;
        the next one's is begun before, where the target may be ahead."""
        begun: deque[tuple[Batch, Callable[[], Tensor]]] = deque()
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
        """One update: accumulate over micro-batches, clip, AdamW. A step with a non-finite gradient changes nothing."""
        config, ranks, engine = self.config, self.ranks, self.engine
        accum = config.grad_accum_steps(ranks.world_size)
        lr = learning_rate(self.step, config.optim, self.steps_per_epoch, self.total_steps)
        set_learning_rate(engine, lr)
        skipped = engine.skipped_steps
        show = config.log.images_every_steps and (self.step + 1) % config.log.images_every_steps == 0
        for micro_step in range(accum):
            batch, target = next(self.taught)
            if target is None:
                continue
            self.watchdog.doing(f"computing step {self.step}")
            self.target.note(target)
            slot = first_slot(micro_step, ranks.rank, ranks.world_size, config.train.micro_batch_size)
            draw = engine.module.draw(self.step, slot, len(batch.index)).to(ranks.device)
            loss: Loss = engine(batch.images, target, draw)
            engine.backward(loss.loss)
            engine.step()
            self.metrics.add({"loss": loss.loss.detach(), **loss.metrics})
        self.step += 1
        self.lr = lr
        if self.step - 1 in self.spikes.passed_over:
            self.skipped.append(self.step - 1)
            return
        if engine.skipped_steps > skipped:
            self._skip()
        else:
            self.target.after_step(student_weights(engine), (self.step - 1) / self.total_steps)
        if show:
            self.metrics.images(self.step, batch.images, target, loss.prediction)

    def _skip(self) -> None:
        """Note a step that DeepSpeed left out because its gradient was not finite; give up after too many in a row."""
        self.skipped.append(self.step - 1)
        limit = self.config.train.max_skipped_steps
        if self.ranks.rank == 0:
            print(f"Step {self.step - 1} had a non-finite gradient and was skipped.", file=sys.stderr, flush=True)
        not_finite = [step for step in self.skipped if step not in self.spikes.passed_over]
        if not_finite[-limit - 1 :] == list(range(self.step - limit - 1, self.step)):
            raise DataError(
                f"The gradient was not finite in {limit + 1} steps in a row, up to step {self.step - 1}. The newest "
                f"checkpoint in {self.folder} is from before. Lower optim.lr or optim.clip_grad, or look at the data."
            )

    def _log(self) -> None:
        self.watchdog.doing(f"logging step {self.step}")
        forget_broken_calls()
        self.quarantine.merge(self.loader.new_bad(), self.ranks)
        extra = {"lr": self.lr, "grad_norm": float(self.engine.get_global_grad_norm() or 0.0)}
        first = self.metrics.logged_step
        record = self.metrics.log(self.step, {**extra, **self._figures(), "quarantined": len(self.quarantine.known)})
        if found := self.spikes.judge(first, record):
            self._go_back(found)

    def _go_back(self, found: Rollback) -> None:
        """To the newest checkpoint from before what is passed over.

        Raises:
            DataError: there is none yet.
        """
        self.settle()
        self.watchdog.doing(GOING_BACK)
        says = f"The loss jumped to {found.loss:.4g} (usually {found.usual:.4g}) before step {found.last}"
        passed = f"passes over steps {found.first} to {found.last - 1}"
        self.metrics.close()
        self.loader.close()
        self.saved = self.step = 0
        if self.ranks.rank == 0:  # they must neither be exported nor count among those to keep
            checkpoint.drop(self.folder, self.spikes.passed_over)
        self._resume(self._newest())
        if self.step == 0:
            raise DataError(f"{says}, and no checkpoint is from before. The same command begins anew and {passed}.")
        if self.ranks.rank == 0:
            print(f"{says}. The run {passed}, from the checkpoint of step {self.step} on.", file=sys.stderr, flush=True)
        self._open_at_step()

    def save(self) -> None:
        """Have a checkpoint of this step written, while training goes on. Every rank must call it; the host waits for the GPU
        and for the checkpoint before.

        A full disk does not stop the run: it is said aloud, `saved` stays behind, and the next save tries again.
        """
        self.settle()
        self.watchdog.doing("gathering the state for a checkpoint")
        self.quarantine.merge(self.loader.new_bad(), self.ranks)
        weights, moments = gather_state(self.engine, self.ranks.rank)
        if self.ranks.rank == 0:
            run = {
                "step": self.step,
                "skipped": list(self.skipped),
                "images": len(self.index),
                "config": self.config.to_dict(),
                "identity": self.identity,
                "versions": versions(),
            }
            files = {"model": weights, "optimizer": moments, "target": self.target.state_dict()}
            self.writing = self.writer.submit(self._write, run, files)
        self.watchdog.doing("going on while a checkpoint is written")

    def _write(self, run: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> int:
        """The step of the newest checkpoint of this run, after trying to write this one."""
        try:
            checkpoint.save(self.folder, run, files, self.config.checkpoint.keep)
        except (OSError, SafetensorError) as error:
            print(f"NO CHECKPOINT of step {run['step']} could be written: {error}.", file=sys.stderr, flush=True)
            return self.saved
        return run["step"]

    def settle(self) -> None:
        """Wait until the checkpoint that is being written, if one is, is on disk or has failed; `saved` then says which is the
        newest. Every rank must call it."""
        self.watchdog.doing(SAVING if self.ranks.rank == 0 else "waiting for rank 0 to save")
        saved = torch.tensor(self.writing.result() if self.writing else self.saved)
        dist.broadcast(saved, src=0, group=self.ranks.control)
        self.saved, self.writing = int(saved), None
        self.watchdog.doing("going on after a checkpoint")


def versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    return {d.name: d.version for d in distributions() if d.name in PACKAGES}


def write_record(config: RunConfig, engine_config: dict[str, Any], folder: Path) -> None:
    """The resolved settings (config.yaml) and what ran them (environment.json)."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()

    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    environment = {
        "command": sys.argv,
        "deepspeed_config": engine_config,
        "git": {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain").splitlines()},
        "python": sys.version,
        "versions": versions(),
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))
