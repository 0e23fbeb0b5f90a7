"""How figures are taken: in turns, with their spread, and with what they rest on."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import Config
from mapet_ds.errors import ConfigError

Figures = dict[str, Any]
Times = dict[str, list[float]]
"""Seconds by the name of what was timed."""
Work = Callable[[], Any]
ALONE: dict[str, Any] = {"rank": 0, "world_size": 1, "local_rank": 0}
"""A loader's place where nothing else runs."""


def summary(values: Sequence[float]) -> Figures:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(above: list[float], below: list[float]) -> Figures:
    """Ratio of the medians; min and max are those of the pairs measured one after the other."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    medians = statistics.median(above) / statistics.median(below)
    return {"ratio": medians, "min": min(pairs), "max": max(pairs)}


def cpu_seconds() -> float:
    """User and system time of this process and its living children so far."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def timed(device: torch.device, work: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
    """Wall-clock seconds, CPU seconds, and what the work gives. Waits for the GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start, cpu = time.perf_counter(), cpu_seconds()
    result = work(*arguments)
    wait()
    return time.perf_counter() - start, cpu_seconds() - cpu, result


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of five square matrix products: what this chip can do now.

    They have 8192 rows on a GPU. On a CPU they have 2048, or fewer where a product takes over 0.1 s: a CPU
    without instructions for bf16 is hundreds of times slower at it.
    """
    for side in [8192] if device.type == "cuda" else [256, 512, 1024, 2048]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        seconds = min(timed(device, torch.mm, a, b)[0] for _ in range(5))
        if seconds > 0.1:
            break
    return 2 * side**3 / seconds / 1e12


def bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of the fastest of five copies of 1 GiB on a GPU, of 256 MiB on a CPU.

    No cache holds so much.
    """
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source).copy_(source)
    return 2 * len(source) / min(timed(device, copy.copy_, source)[0] for _ in range(5))


def in_turns(device: torch.device, works: dict[str, Work], repeats: int) -> tuple[Times, Times]:
    """Wall-clock and CPU seconds of each work by name, measured one after the other, again and again."""
    wall: Times = {name: [] for name in works}
    cpu: Times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seconds, used, _ = timed(device, work)
            wall[name].append(seconds)
            cpu[name].append(used)
    return wall, cpu


def repeatedly(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


def counted_flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in a work.

    Those of attention count whatever its mask. What is compiled runs in eager mode here, so that its
    operations can be seen.
    """
    eager, counter = torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False)
    with eager, counter, sdpa_kernel(SDPBackend.MATH):  # other kernels have no formula on a CPU
        work()
    return counter.get_total_flops()


def device_of(name: str) -> torch.device:
    """The device of --device; auto is a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}, but torch sees no GPU on this host; say --device cpu.")
    return device


PACKAGES = {
    "torch", "torchvision", "deepspeed", "timm", "open_clip_torch", "pillow", "faiss-gpu",
    "nvidia-dali-cuda120", "nvidia-dali-cuda130", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
}  # fmt: skip
"""The packages on which speed depends; CUDA 12 and 13 have their own."""


def versions() -> dict[str, str]:
    """The versions of those that are installed."""
    return {d.name: d.version for d in distributions() if d.name in PACKAGES}


def circumstances(config: Config, arguments: argparse.Namespace) -> Figures:
    """Hardware, versions, command and settings: what any figure rests on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
    }
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    cpu = names[0] if names else "unknown"
    return {
        "hardware": {"cpu": cpu, "cores": cores, "load_average": load, "gpu": gpu},
        "versions": {"python": sys.version.split()[0]} | versions(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings | {"model": config.model.name},
    }


def draw_batches(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def race(arguments: argparse.Namespace, contestants: dict[str, Callable[[], Any]]) -> Figures:
    """Speed and CPU time of iterators of batches, and the ratios of the first one over the others.

    Each in turn is started afresh; batches that it prepares ahead are drawn before the clock starts.
    """
    first, *others = contestants
    device, number = device_of(arguments.device), arguments.batch_size * arguments.batches
    wall: Times = {name: [] for name in contestants}
    cpu: Times = {name: [] for name in contestants}
    for _ in range(arguments.repeats):
        for name, contestant in contestants.items():
            with contextlib.closing(contestant()) as batches:
                draw_batches(batches, 2 * arguments.threads)
                seconds, cpu_used, _ = timed(device, draw_batches, batches, arguments.batches)
            wall[name].append(number / seconds)
            cpu[name].append(1000 * cpu_used / number)
    return {
        "images_per_second": {name: summary(values) for name, values in wall.items()},
        "cpu_ms_per_image": {name: summary(values) for name, values in cpu.items()},
        f"speed_{first}_over": {name: ratio(wall[first], wall[name]) for name in others},
        f"cpu_time_over_{first}": {name: ratio(cpu[name], cpu[first]) for name in others},
    }


def settings(arguments: argparse.Namespace, *overrides: str) -> Config:
    """The recipe with what the sub-command needs on top, and the user's words on top of that."""
    device, batch_size = device_of(arguments.device).type, arguments.batch_size
    shared = [
        f"train.micro_batch_size={batch_size}", f"train.global_batch_size={batch_size}",
        f"data.threads={arguments.threads}", f"data.device={'gpu' if device == 'cuda' else 'cpu'}",
    ]  # fmt: skip
    return load_config(arguments.config, [*shared, *overrides, *arguments.overrides])
