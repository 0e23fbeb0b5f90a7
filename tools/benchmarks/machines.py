"""What a machine is before any training: its GPUs' ceilings, its tools, its links, its storage."""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from benchmarks import measuring
from benchmarks.measuring import Figures, circumstances, device_of, settings, summary, timed
from torch.cuda import nccl

from mapet_ds.data.index import open_index
from mapet_ds.draws import SampleOrder
from mapet_ds.launch import Ranks, init_distributed

PINNED = 2**28
"""Bytes that are copied between host and GPU."""


def driver() -> str | None:
    """The NVIDIA driver's version; None where there is no nvidia-smi that answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None


def toolchain() -> Figures:
    """What compiling needs at run time: FusedAdam nvcc, ninja and g++, Triton a C compiler and Python.h."""
    found: Figures = {name: shutil.which(name) is not None for name in ("nvcc", "ninja", "g++", "gcc")}
    return found | {"Python.h": (Path(sysconfig.get_path("include")) / "Python.h").is_file()}


def gpu_figures(device: torch.device) -> Figures:
    """The GPU's ceilings: matrix products by dtype, memory, and copies from and to the host."""
    properties = torch.cuda.get_device_properties(device)
    host = torch.empty(PINNED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(PINNED, dtype=torch.uint8, device=device)

    def copies(target: torch.Tensor, source: torch.Tensor) -> float:
        return PINNED / min(timed(device, target.copy_, source)[0] for _ in range(5)) / 1e9

    return {
        "memory_gib": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())) if dist.is_nccl_available() else None,
        "to_gpu_gbyte_s": copies(there, host), "from_gpu_gbyte_s": copies(host, there),
    }  # fmt: skip


def measure_machine(arguments: argparse.Namespace) -> Figures | None:
    """Versions, tools and ceilings of this host, and under a launcher which hosts differ; on rank 0."""
    ranks = init_distributed()
    device = ranks.device if device_of(arguments.device).type == "cuda" else torch.device("cpu")
    config = settings(arguments)
    about = circumstances(config, arguments)
    about |= {"host": socket.gethostname(), "driver": driver(), "tools": toolchain()}
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    about["matrix_product_tflops"] = {name: measuring.ceiling(device, each) for name, each in dtypes.items()}
    about["copy_gbyte_s"] = measuring.bandwidth(device) / 1e9
    if device.type == "cuda":
        about |= {"gpus": torch.cuda.device_count()} | gpu_figures(device)

    # Each host once; what must be equal on all of them, and is not.
    hosts = {each["host"]: each for each in ranks.gather_on_first(about)}
    if not hosts:
        return None
    same = ("versions", "driver", "gpus", "tools")
    unlike = [key for key in same if len({str(each.get(key)) for each in hosts.values()}) > 1]
    speeds = {name: each["matrix_product_tflops"]["bf16"] for name, each in hosts.items()}
    return about | {"ranks": ranks.world_size, "hosts": speeds, "hosts_differ_in": unlike}


def measure_allreduce(arguments: argparse.Namespace) -> Figures | None:
    """Bus bandwidth of an all-reduce in fp32, by its size; on rank 0.

    The bus carries 2 (n - 1) / n of the bytes for n ranks, as nccl-tests counts.
    """
    ranks = init_distributed()
    figures, share = Figures(), 2 * (ranks.world_size - 1) / ranks.world_size
    for mebibytes in arguments.mebibytes:
        tensor = torch.ones(mebibytes * 2**18, device=ranks.device)
        work = partial(dist.all_reduce, tensor)
        work()
        seconds = []
        for _ in range(arguments.repeats):
            tensor.fill_(1.0)
            dist.barrier(ranks.control)
            seconds.append(timed(ranks.device, work)[0])
        assert tensor[0].item() == ranks.world_size, "the sum of ones is the number of ranks"
        bus = [share * tensor.nbytes / each / 1e9 for each in seconds]
        figures[f"{mebibytes} MiB"] = {"bus_gbyte_s": summary(bus), "ms": summary([1e3 * s for s in seconds])}
    hosts = set(ranks.gather_on_first(socket.gethostname()))
    about = {"ranks": ranks.world_size, "hosts": len(hosts), "backend": dist.get_backend()}
    return None if ranks.rank else circumstances(settings(arguments), arguments) | about | {"sizes": figures}


def read_rates(arguments: argparse.Namespace, ranks: Ranks, index: Any) -> tuple[list[float], list[float]]:
    """Bytes and images a second of this host's reading, one figure a repeat. Every rank must call it.

    The first rank of each host reads, with --threads threads. No image is read twice, so the page cache
    helps only where the data set is small.
    """
    order, gigabytes, images = SampleOrder(len(index), settings(arguments).seed, 0), [], []
    for repeat in range(arguments.repeats):
        first = (repeat * ranks.world_size + ranks.rank) * arguments.images
        places = (first + np.arange(arguments.images)) % len(index)
        wanted = order.epoch_places(0, places).tolist()
        dist.barrier(ranks.control)
        if ranks.local_rank:
            continue
        with ThreadPoolExecutor(arguments.threads) as pool:
            start = time.perf_counter()
            read = sum(pool.map(lambda i: len(index.read(i)), wanted))
            seconds = time.perf_counter() - start
        gigabytes.append(read / seconds / 1e9)
        images.append(len(wanted) / seconds)
    return gigabytes, images


def measure_storage(arguments: argparse.Namespace) -> Figures | None:
    """Bytes a second that each host reads of --data while all hosts read; on rank 0."""
    ranks = init_distributed()
    with tempfile.TemporaryDirectory() as scratch:
        index = ranks.first_then_all(lambda: open_index(arguments.data, arguments.index or Path(scratch)))
        rates = ranks.gather_on_first(read_rates(arguments, ranks, index))
        readers = [each for each in rates if each[0]]
        if ranks.rank:
            return None
    slowest = [min(values) for values in zip(*(each[0] for each in readers))]
    together = [float(sum(values)) for values in zip(*(each[1] for each in readers))]
    again = arguments.images * arguments.repeats * ranks.world_size > len(index)
    return circumstances(settings(arguments), arguments) | {
        "hosts": len(readers), "images": len(index), "repeatedly": again,
        "host_gbyte_s": summary(slowest), "images_per_second": summary(together),
    }  # fmt: skip
