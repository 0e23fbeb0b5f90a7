"""Checkpoints: folders of safetensors by parameter name, for any number of ranks. No pickle is read.

    RUN/checkpoints/step_00001000/model.safetensors      fp32 master weights
                                  optimizer.safetensors  moments, exp_avg.<name> and exp_avg_sq.<name>
                                  target.safetensors     the target's state, where it has one
                                  run.json               step, config, identity, versions, checksums

A folder that has its final name is whole: it is written beside, renamed, and then flushed. One that a loss of
power has spoilt before is told by its checksums, and those before it are dropped only when it is on the disk.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mapet_ds.config.running import RunConfig, flatten
from mapet_ds.errors import ResumeError
from mapet_ds.files import checksum, flush_folder, whole_folder

FREE = (
    "run_dir", "resume", "checkpoint", "log", "evaluate", "model.path", "optim.adamw",
    "data.train", "data.val", "data.train_masks", "data.val_masks", "data.classes", "data.labels",
    "data.device", "data.threads", "data.workers", "data.prefetch",
    "data.max_bad_share", "data.cache_dir", "data.cache_gb",
    "teacher.name", "teacher.weights", "teacher.shard", "teacher.ahead",
    "tokenizer.path", "tokenizer.ids", "train.micro_batch_size", "train.world_size", "train.compile",
    "train.grad_checkpointing", "train.deterministic", "train.stop_at_step", "train.max_skipped_steps",
    "train.spike_factor", "train.max_rollbacks", "train.hang_seconds",
)  # fmt: skip
"""Knobs and sections that may differ at resume: none changes what is computed, beyond the order of sums.

Those that judge a jump of the loss, `log.every_steps` among them, change only which later jumps are undone.
The teacher, the codebook, the weights that fine-tuning starts from and the data are compared by content, not
by path.
"""


class Checkpoint(NamedTuple):
    """A whole checkpoint, verified against its checksums."""

    path: Path
    run: dict[str, Any]
    """What run.json holds."""

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU; empty where the checkpoint has no such file.

        Raises:
            ResumeError: the file is no safetensors file.
        """
        path = self.path / f"{name}.safetensors"
        if path.name not in self.run["files"]:
            return {}
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ResumeError(f"{path} is not a safetensors file ({error}); nothing else is read.") from error


def identity(config: RunConfig, data: str, target: dict[str, Any]) -> dict[str, Any]:
    """The settings and checksums that must be equal for a run to be the same run, as a flat dictionary.

    data: the index's fingerprint; target: the target's own identity.
    """
    knobs, free = flatten(config.to_dict()), {*FREE, *config.idle_sections}
    kept = {k: v for k, v in knobs.items() if not any(f"{k}.".startswith(f"{name}.") for name in free)}
    return kept | flatten({"data": {"fingerprint": data}, "target": target})


def check_identity(
    checkpoint: Checkpoint, now: dict[str, Any], defaults: dict[str, Any], images: int | None = None
) -> None:
    """Refuses to continue another run's checkpoint.

    now: the identity of the present run.
    defaults: those of every knob. A knob that is newer than the checkpoint counts as its default, which is
    what was done before there was a choice.
    images: their number in data.train now, for the sentence.

    Raises:
        ResumeError: naming each setting that differs, with both values.
    """
    now = json.loads(json.dumps(now))
    then = {k: v for k, v in defaults.items() if k in now} | checkpoint.run["identity"]
    lines = []
    for k in sorted(now.keys() | then.keys()):
        if now.get(k) != then.get(k):
            old, new = ("nothing" if values.get(k) is None else values[k] for values in (then, now))
            meaning = ""
            if k == "data.fingerprint":
                counts = f"{checkpoint.run.get('images')} images then, {images} now"
                meaning = f" (names and lengths of what data.train holds; {counts})"
            lines.append(f"  {k}{meaning}: {old} in the checkpoint, {new} now")
    if lines:
        branch = ""
        if "objective" in now:
            export = f"python tools/export_timm.py {checkpoint.path} OUT"
            branch = f" To branch from its weights, {export}, and model.init_from=OUT in the new run."
        raise ResumeError(
            f"{checkpoint.path} belongs to another run:\n" + "\n".join(lines) + "\n"
            f"Set them back to continue it, or name a new run_dir to start afresh.{branch}"
        )


def save(run_dir: Path, state: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> Path:
    """Writes a checkpoint of state["step"]; gives its folder, for `secure`. For rank 0.

    A process that is killed from then on has saved the step, however long the disk takes.

    state: what run.json holds beside the checksums.
    files: tensors by file name without suffix; empty ones are left out.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{state['step']:08d}"
    for unfinished in folder.glob(".step_*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)
    with whole_folder(final, flushed=False) as partial:
        checksums = {}
        for name, tensors in files.items():
            if tensors:
                path = partial / f"{name}.safetensors"
                save_file(tensors, path)
                checksums[path.name] = checksum(path)
        (partial / "run.json").write_text(json.dumps({**state, "files": checksums}, indent=1))
    return final


def secure(path: Path, keep: int) -> None:
    """Waits until a checkpoint is on the disk, then drops all but the newest `keep`. For rank 0."""
    flush_folder(path)

    # A folder of a later step is a damaged one that the run has passed over: it does not count.
    counted = [each for each in checkpoint_folders(path.parents[1]) if each.name <= path.name]
    for old in counted[keep:]:
        shutil.rmtree(old)


class Writer:
    """Two threads of rank 0, for checkpoints while training goes on: one writes, one waits for the disk.

    A full disk stops nothing: standard error names the step, and `saved` stays behind.
    """

    saved = 0
    """The step of the newest checkpoint that is on the disk."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._writer, self._disk = ThreadPoolExecutor(1, "checkpoint"), ThreadPoolExecutor(1, "disk")
        self._writing: Future[Future[None] | None] | None = None

    def begin(self, state: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> None:
        """Has a checkpoint written; see `save`."""
        self._writing = self._writer.submit(self._write, state, files)

    def written(self) -> None:
        """Waits until what is being written has its name or has failed, not until it is on the disk."""
        if self._writing:
            self._writing.result()

    def settled(self) -> int:
        """Waits until what is being written is on the disk or has failed; gives `saved`."""
        if self._writing and (disk := self._writing.result()):
            disk.result()
        return self.saved

    def _write(self, state: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> Future[None] | None:
        step = state["step"]
        try:
            folder = save(self._run_dir, state, files)
        except (OSError, SafetensorError) as error:
            print(f"NO CHECKPOINT of step {step} could be written: {error}.", file=sys.stderr, flush=True)
            return None
        return self._disk.submit(self._secure, folder, step)

    def _secure(self, folder: Path, step: int) -> None:
        try:
            secure(folder, self._keep)
            self.saved = step
        except OSError as error:
            print(f"THE CHECKPOINT of step {step} is not on the disk: {error}.", file=sys.stderr, flush=True)


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    return sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)


def damage(path: Path) -> str | None:
    """A phrase for what is wrong with a checkpoint folder; None where each file has its checksum."""
    try:
        for name, recorded in _run_json(path)["files"].items():
            if checksum(path / name) != recorded:
                return f"{name} does not have the checksum that run.json gives"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a folder, verified.

    Raises:
        ResumeError: it is damaged.
    """
    if fault := damage(path):
        raise ResumeError(f"The checkpoint {path} is damaged: {fault}. Remove it, or restore it from a copy.")
    return Checkpoint(path, _run_json(path))


def _run_json(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text())


def _learnt(run: dict[str, Any], unlearnt: Collection[int]) -> set[int]:
    """Those of the steps `unlearnt` that a checkpoint has learnt from nevertheless."""
    return {step for step in unlearnt if step < run["step"]}.difference(run.get("skipped", ()))


def newest(
    run_dir: Path, unlearnt: Collection[int] = (), report: Callable[[str], Any] = print
) -> Checkpoint | None:
    """The newest whole checkpoint of a run that has learnt nothing from the steps `unlearnt`.

    None where the run has no checkpoint. `report` gets a sentence for each that is passed over.

    Raises:
        ResumeError: there are checkpoints, and none of them can be taken.
    """
    folders = checkpoint_folders(run_dir)
    for path in folders:
        if not (fault := damage(path)):
            run = _run_json(path)
            if not (learnt := _learnt(run, unlearnt)):
                return Checkpoint(path, run)
            fault = f"it has learnt from step {min(learnt)}, which rollbacks.json passes over"
        report(f"Passing over {path}: {fault}.")
    if folders:
        clean = " and free of the steps that rollbacks.json passes over" if unlearnt else ""
        raise ResumeError(
            f"No checkpoint in {run_dir / 'checkpoints'} is whole{clean}; remove them to start from step 0."
        )
    return None


def drop(run_dir: Path, unlearnt: Collection[int]) -> None:
    """Removes the whole checkpoints that have learnt from the steps `unlearnt`. For rank 0 only."""
    for path in checkpoint_folders(run_dir):
        if not damage(path) and _learnt(_run_json(path), unlearnt):
            shutil.rmtree(path)
