"""How figures are taken: by turns, with their spread, and with what they rest on."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
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


def summary(values: list[float]) -> Figures:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(above: list[float], below: list[float]) -> Figures:
    """Ratio of the medians; min and max are of the pairs measured one after the other."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "ratio": statistics.median(above) / statistics.median(below),
        "min": min(pairs),
        "max": max(pairs),
    }


def cpu_seconds() -> float:
    """User and system time so far of this process and its living children."""
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
    """TFLOP/s of the fastest of five square matrix products, 8192 a side on a GPU, 2048 on a CPU: what this chip can do now."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * side**3 / min(timed(device, torch.mm, a, b)[0] for _ in range(5)) / 1e12


def bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of the fastest of five copies that no cache holds: 1 GiB on a GPU, 256 MiB on a CPU."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source).copy_(source)
    return 2 * len(source) / min(timed(device, copy.copy_, source)[0] for _ in range(5))


def repeatedly(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


def counted_flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in it, those of attention whatever its mask.

    Of what is compiled as well: it runs in eager mode here, where operations can be seen.
    """
    eager, counter = torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False)
    with eager, counter, sdpa_kernel(SDPBackend.MATH):  # other kernels have no formula on a CPU
        work()
    return counter.get_total_flops()


def device_of(name: str) -> torch.device:
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}, but torch sees no GPU on this host; say --device cpu.")
    return device


def circumstances(config: Config, arguments: argparse.Namespace) -> Figures:
    """Hardware, versions, command and settings: what any figure rests on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown"
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = ["torch", "torchvision", "timm", "open_clip_torch", "pillow", "nvidia-dali-cuda130"]
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key != "measure"
    }
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return {
        "hardware": {"cpu": cpu, "cores": cores, "load_average": load, "gpu": gpu},
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings | {"model": config.model.name},
    }


def draw_batches(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def race(arguments: argparse.Namespace, contestants: dict[str, Callable[[], Any]]) -> Figures:
    """Each in turn, started afresh, with the batches that are prepared ahead drawn before the clock starts; ratios are of
    the first one over the others."""
    first, *others = contestants
    wall, cpu = ({name: [] for name in contestants} for _ in range(2))
    number = arguments.batch_size * arguments.batches
    for _ in range(arguments.repeats):
        for name, contestant in contestants.items():
            with contextlib.closing(contestant()) as batches:
                draw_batches(batches, 2 * arguments.threads)
                seconds, cpu_used, _ = timed(
                    device_of(arguments.device), draw_batches, batches, arguments.batches
                )
            wall[name].append(number / seconds)
            cpu[name].append(1000 * cpu_used / number)
    return {
        "images_per_second": {name: summary(values) for name, values in wall.items()},
        "cpu_ms_per_image": {name: summary(values) for name, values in cpu.items()},
        f"speed_{first}_over": {name: ratio(wall[first], wall[name]) for name in others},
        f"cpu_time_over_{first}": {name: ratio(cpu[name], cpu[first]) for name in others},
    }


def settings(arguments: argparse.Namespace, *overrides: str) -> Config:
    """The recipe, what the sub-command needs, then the user's words."""
    device, batch_size = device_of(arguments.device).type, arguments.batch_size
    shared = [
        f"train.micro_batch_size={batch_size}", f"train.global_batch_size={batch_size}",
        f"data.threads={arguments.threads}", f"data.device={'gpu' if device == 'cuda' else 'cpu'}",
    ]  # fmt: skip
    return load_config(arguments.config, [*shared, *overrides, *arguments.overrides])
