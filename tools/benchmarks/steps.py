"""One step of MaPeT: sorted by rank against as published."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks.measuring import Figures, circumstances, device_of, ratio, settings, summary, timed
from torch import Tensor

from mapet_ds.config import REPOSITORY, Config, ConfigError


def build_step(config: Config, device: torch.device, dtype: str) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Forward and backward of MaPeT by name, on one batch and the same weights, and what makes the dense one's masks."""
    # The dense twin is the tests' reference too, and no part of the package.
    sys.path.insert(0, str(REPOSITORY / "tests"))
    try:
        from reference import DenseMaPeT
    except ModuleNotFoundError as error:
        raise ConfigError(f"`step` compares with tests/reference.py, but {REPOSITORY}/tests has none.") from error
    from mapet_ds.objectives import build_objective

    model = build_objective(config, config.tokenizer.vocab_size).to(device)
    twin, batch = DenseMaPeT(model), config.train.micro_batch_size
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.randn(batch, 3, config.model.img_size, config.model.img_size, generator=generator).to(device)
    ids = torch.randint(config.tokenizer.vocab_size, (batch, config.num_patches), generator=generator).to(device)
    on_cpu = model.draw(0, 0, batch)
    draw = on_cpu.to(device)

    def masks() -> tuple[Tensor, ...]:
        return tuple(mask.to(device) for mask in twin.masks(on_cpu.order, model.num_visible))

    def run(loss: Callable[[], Tensor]) -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        return value.item()

    ready = masks()
    sorted_step = partial(run, lambda: model(images, ids, draw).loss)
    return {"sorted": sorted_step, "dense": partial(run, lambda: twin(images, ids, draw.order, ready))}, masks


def peak_memory(name: str, config: Config, device: torch.device, dtype: str, threads: int) -> int:
    """Bytes that one step needs at its peak over what lies in memory before it. On a CPU: in a process of its own."""
    torch.set_num_threads(threads)
    steps, _ = build_step(config, device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[name]()
        return torch.cuda.max_memory_allocated() - before
    # Not getrusage, whose maximum begins at the parent's. Writing 5 sets VmHWM, the peak, back to what is used now.
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    steps[name]()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def measure_step(arguments: argparse.Namespace) -> Figures:
    device, threads = device_of(arguments.device), arguments.threads
    config = settings(arguments, f"model.name={arguments.model}", "model.drop_path=0", "objective=mapet")
    figures = circumstances(config, arguments) | {"vocab_size": config.tokenizer.vocab_size}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as child:
        shared = (config, device, arguments.dtype, threads)
        sorted_peak, dense_peak = (child.submit(peak_memory, name, *shared).result() for name in ("sorted", "dense"))
    torch.set_num_threads(threads)
    steps, masks = build_step(config, device, arguments.dtype)
    losses = {name: step() for name, step in steps.items()}
    wall, cpu = ({name: [] for name in (*steps, "masks")} for _ in range(2))
    for _ in range(arguments.repeats):
        for name, work in {**steps, "masks": masks}.items():
            seconds, cpu_used, _ = timed(device, work)
            wall[name].append(seconds)
            cpu[name].append(cpu_used)
    whole = [step + mask for step, mask in zip(wall["dense"], wall["masks"])]
    return figures | {
        "seconds": {name: summary(values) for name, values in wall.items()},
        "cpu_seconds": {name: summary(values) for name, values in cpu.items()},
        "dense_over_sorted": ratio(wall["dense"], wall["sorted"]),
        "dense_with_masks_over_sorted": ratio(whole, wall["sorted"]),
        "cpu_dense_over_sorted": ratio(cpu["dense"], cpu["sorted"]),
        "peak_bytes": {"sorted": sorted_peak, "dense": dense_peak},
        "peak_dense_over_sorted": dense_peak / sorted_peak,
        "loss": losses,
        "loss_relative_difference": abs(losses["dense"] - losses["sorted"]) / abs(losses["sorted"]),
    }

