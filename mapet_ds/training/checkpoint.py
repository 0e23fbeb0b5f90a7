"""A checkpoint is a folder of safetensors by parameter name; it loads at any number of ranks. No pickle is read.

    RUN/checkpoints/step_00001000/model.safetensors      fp32 master weights
                                  optimizer.safetensors  moments, exp_avg.<name> and exp_avg_sq.<name>
                                  target.safetensors     the target's state, where it has one
                                  run.json               step, config, identity, versions, checksums

A folder that has its final name is whole: it is written beside, flushed and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mapet_ds.config.sections import RunConfig, flatten
from mapet_ds.errors import ResumeError
from mapet_ds.files import checksum, whole_folder

FREE = (
    "run_dir", "resume", "checkpoint", "log", "evaluate", "teacher.name", "teacher.weights", "teacher.shard", "teacher.ahead",
    "tokenizer.path", "tokenizer.ids", "data.train", "data.val", "model.path", "data.device", "data.threads", "data.workers",
    "data.prefetch", "data.max_bad_share", "optim.adamw", "train.micro_batch_size", "train.world_size", "train.compile",
    "train.grad_checkpointing", "train.deterministic", "train.stop_at_step", "train.max_skipped_steps", "train.spike_factor",
    "train.max_rollbacks", "train.hang_seconds",
)  # fmt: skip
"""Knobs that may differ at resume: none changes what is computed, beyond the order of floating-point sums; those that judge a
jump of the loss, `log.every_steps` among them, can change which jumps are undone from there on.
The teacher, the codebook, the weights that fine-tuning starts from and the data are compared by content instead of by path."""


class Checkpoint(NamedTuple):
    """One whole checkpoint, verified against its checksums."""

    path: Path
    run: dict[str, Any]

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
    """What must be equal for a run to be the same run, as a flat dictionary.

    data: the index's fingerprint; target: the target's own identity.
    """
    knobs, free = flatten(config.to_dict()), {*FREE, *config.idle_sections}
    kept = {k: v for k, v in knobs.items() if not any(k == name or k.startswith(name + ".") for name in free)}
    return kept | flatten({"data": {"fingerprint": data}, "target": target})


def check_identity(checkpoint: Checkpoint, now: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse to continue another run.

    defaults: of every knob. One that is newer than the checkpoint had its default: what was done before there was a choice.

    Raises:
        ResumeError: naming each setting that differs, with both values.
    """
    now = json.loads(json.dumps(now))
    then = {k: v for k, v in defaults.items() if k in now} | checkpoint.run["identity"]
    differing = [k for k in sorted(now.keys() | then.keys()) if now.get(k) != then.get(k)]
    if differing:
        explained = {"data.fingerprint": " (names and lengths of what data.train holds)"}
        values = {
            k: ["nothing" if which.get(k) is None else which[k] for which in (then, now)] for k in differing
        }
        lines = [
            f"  {k}{explained.get(k, '')}: {old} in the checkpoint, {new} now"
            for k, (old, new) in values.items()
        ]
        raise ResumeError(
            f"{checkpoint.path} belongs to another run:\n" + "\n".join(lines) + "\n"
            "Set them back to continue it, or name a new run_dir to start afresh."
        )


def save(run_dir: Path, state: dict[str, Any], files: dict[str, dict[str, Tensor]], keep: int) -> Path:
    """Write a checkpoint of state["step"] and drop all but the newest `keep`. For rank 0 only.

    state: what run.json holds beside the checksums.
    files: tensors by file name without suffix; empty ones are left out.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{state['step']:08d}"
    for unfinished in folder.glob(".step_*.partial"):
        shutil.rmtree(unfinished)
    with whole_folder(final) as partial:
        checksums = {}
        for name, tensors in files.items():
            if tensors:
                path = partial / f"{name}.safetensors"
                save_file(tensors, path)
                checksums[path.name] = checksum(path)
        (partial / "run.json").write_text(json.dumps({**state, "files": checksums}, indent=1))
    older = [
        path for path in checkpoint_folders(run_dir) if path.name <= final.name
    ]  # a newer one is damaged: not counted
    for old in older[keep:]:
        shutil.rmtree(old)
    return final


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where it is whole: every file is there with its checksum."""
    try:
        run = json.loads((path / "run.json").read_text())
        for name, recorded in run["files"].items():
            if checksum(path / name) != recorded:
                return f"{name} does not have the checksum that run.json gives"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, verified.

    Raises:
        ResumeError: it is damaged.
    """
    if found := damage(path):
        raise ResumeError(f"The checkpoint {path} is damaged: {found}. Remove it, or restore it from a copy.")
    return Checkpoint(path, json.loads((path / "run.json").read_text()))


def _learnt(run: dict[str, Any], unlearnt: Collection[int]) -> set[int]:
    """Of the steps `unlearnt`, those that a checkpoint has learnt from nevertheless."""
    return {step for step in unlearnt if step < run["step"]}.difference(run.get("skipped", ()))


def newest(run_dir: Path, unlearnt: Collection[int] = (), report: Any = print) -> Checkpoint | None:
    """The newest whole checkpoint of a run that has learnt nothing from the steps `unlearnt`; others are reported and passed
    over; None where there is none at all.

    Raises:
        ResumeError: there are some, and none to take.
    """
    folders = checkpoint_folders(run_dir)
    for path in folders:
        if not (found := damage(path)):
            run = json.loads((path / "run.json").read_text())
            if not (learnt := _learnt(run, unlearnt)):
                return Checkpoint(path, run)
            found = f"it has learnt from step {min(learnt)}, which rollbacks.json passes over"
        report(f"Passing over {path}: {found}.")
    if folders:
        clean = " and free of the steps that rollbacks.json passes over" if unlearnt else ""
        raise ResumeError(
            f"No checkpoint in {run_dir / 'checkpoints'} is whole{clean}; remove them to start from step 0."
        )
    return None


def drop(run_dir: Path, unlearnt: Collection[int]) -> None:
    """Remove the whole checkpoints that have learnt from the steps `unlearnt`. For rank 0 only."""
    for path in checkpoint_folders(run_dir):
        if not damage(path) and _learnt(json.loads((path / "run.json").read_text()), unlearnt):
            shutil.rmtree(path)
