"""One step of the recipe's objective: where its time goes, and MaPeT's against MaPeT's as published."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from benchmarks import measuring
from benchmarks.measuring import Figures, Times, circumstances, device_of, in_turns, ratio, summary
from benchmarks.roofline import breakdown, flops_by_part, show
from torch import Tensor

from mapet_ds.config.sections import REPOSITORY, Config
from mapet_ds.errors import ConfigError
from mapet_ds.methods import build_objective
from mapet_ds.planning.counting import shape_of_target, student
from mapet_ds.planning.parts import Parts


def check_twin(arguments: argparse.Namespace, config: Config) -> None:
    """Refuses a twin of another objective than MaPeT.

    Raises:
        ConfigError: naming it.
    """
    if arguments.against == "dense" and config.objective != "mapet":
        raise ConfigError(
            f"The dense twin is MaPeT's, and objective = {config.objective}: add --against none."
        )


def dense_twin(model: Any) -> Any:
    """MaPeT as published, on the weights of a model. It is the tests' reference, and no part of the package.

    Raises:
        ConfigError: the repository is here without its tests.
    """
    sys.path.insert(0, str(REPOSITORY / "tests"))
    try:
        reference = importlib.import_module("reference")
    except ModuleNotFoundError as error:
        tests = f"{REPOSITORY}/tests has none"
        raise ConfigError(f"--against dense compares with tests/reference.py, but {tests}.") from error
    return reference.DenseMaPeT(model)


class Steps:
    """Forward and backward of an objective on noise, and of its dense twin with the same weights."""

    def __init__(self, config: Config, device: torch.device, dtype: str) -> None:
        self.device, self.dtype, batch = device, dtype, config.train.micro_batch_size
        dim = shape_of_target(config).dim
        self.model = build_objective(config, dim).to(device)
        generator = torch.Generator().manual_seed(config.seed)
        side, patches = config.model.img_size, (batch, config.num_patches)
        images = torch.randn(batch, 3, side, side, generator=generator)
        if config.method.predicts_ids:
            target = torch.randint(config.tokenizer.vocab_size, patches, generator=generator)
        else:
            noise = torch.randn(*patches, dim, generator=generator)
            target = F.normalize(noise, dim=-1)
        self.draw = self.model.draw(0, 0, batch)
        self.batch = images.to(device), target.to(device), self.draw.to(device)

    def add_twin(self) -> None:
        """Adds the dense twin, and the masks of this batch."""
        self.twin = dense_twin(self.model)
        self.ready = self.masks()

    def masks(self) -> tuple[Tensor, ...]:
        """The masks that the twin needs beside the batch, made and moved to the device."""
        masks = self.twin.masks(self.draw.order, self.model.num_visible)
        return tuple(mask.to(self.device) for mask in masks)

    def step(self) -> float:
        """The loss after forward and backward."""
        return self._run(lambda: self.model(*self.batch).loss)

    def dense(self) -> float:
        """The twin's loss after forward and backward."""
        images, ids, draw = self.batch
        return self._run(lambda: self.twin(images, ids, draw.order, self.ready))

    def _run(self, loss: Callable[[], Tensor]) -> float:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            value = loss()
        value.backward()
        return value.item()

    def breakdown(self, config: Config, peak: float, repeats: int, trace: Path | None) -> Figures:
        """Where the time of a step and of AdamW's update goes."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=self.device.type == "cuda")

        def step(parts: Parts) -> None:
            self.step()
            with parts("optimizer"):
                optimizer.step()

        images = len(self.batch[0])
        flops: dict[str, float] = {name: images * count for name, count in flops_by_part(config).items()}
        return breakdown(self.model, step, flops, peak, self.device, repeats, trace=trace)


def peak_memory(name: str, config: Config, device: torch.device, dtype: str, threads: int) -> int:
    """Bytes that one step needs at its peak over what lies in memory before it.

    On a CPU the caller must be a process of its own.
    """
    torch.set_num_threads(threads)
    steps = Steps(config, device, dtype)
    if name == "dense":
        steps.add_twin()
    step = getattr(steps, name)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    # getrusage's maximum begins at the parent's. Writing 5 sets VmHWM, the peak, back to what is used now.
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def measure_step(arguments: argparse.Namespace) -> Figures:
    """One step, and its dense twin's where --against asks for it."""
    device, threads = device_of(arguments.device), arguments.threads
    config = measuring.settings(
        arguments, f"model.name={arguments.model}", "model.drop_path=0", "train.compile=false"
    )
    check_twin(arguments, config)
    names = ["step"] if arguments.against == "none" else ["step", "dense"]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as child:
        shared = (config, device, arguments.dtype, threads)
        peaks = {name: child.submit(peak_memory, name, *shared).result() for name in names}

    # Take the times in turns.
    torch.set_num_threads(threads)
    steps = Steps(config, device, arguments.dtype)
    if "dense" in names:
        steps.add_twin()
    losses = {name: getattr(steps, name)() for name in names}
    timed_names = names if arguments.against == "none" else [*names, "masks"]
    works = {name: getattr(steps, name) for name in timed_names}
    wall, cpu = in_turns(device, works, arguments.repeats)

    # Compare them with what the chip can do.
    peak = measuring.ceiling(device, torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    useful = student(config).minimum * arguments.batch_size / 1e12 / peak
    figures = circumstances(config, arguments) | {
        "objective": config.objective, "vocab_size": config.tokenizer.vocab_size,
        "ceiling_tflops": peak,
        "seconds": {name: summary(values) for name, values in wall.items()},
        "cpu_seconds": {name: summary(values) for name, values in cpu.items()},
        "mfu": summary([useful / each for each in wall["step"]]),
        "peak_bytes": peaks, "loss": losses,
    }  # fmt: skip
    if "dense" in names:
        figures |= compare(wall, cpu, peaks, losses)
    figures["breakdown"] = steps.breakdown(config, 1e12 * peak, arguments.repeats, arguments.trace)
    show(figures["breakdown"], 1e12 * peak, arguments.plot)
    return figures


def compare(wall: Times, cpu: Times, peaks: Figures, losses: Figures) -> Figures:
    """Ratios of MaPeT's dense twin over the step as it is."""
    whole = [step + mask for step, mask in zip(wall["dense"], wall["masks"])]
    return {
        "dense_over_step": ratio(wall["dense"], wall["step"]),
        "dense_with_masks_over_step": ratio(whole, wall["step"]),
        "cpu_dense_over_step": ratio(cpu["dense"], cpu["step"]),
        "peak_dense_over_step": peaks["dense"] / peaks["step"],
        "loss_relative_difference": abs(losses["dense"] - losses["step"]) / abs(losses["step"]),
    }
