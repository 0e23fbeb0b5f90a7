"""What must be right before training starts: the process group, the hostfile, and how a run is asked to stop.

deepspeed, torchrun and plain python all end up here; everything is read from the environment they set.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.rendezvous import rendezvous

from mapet_ds.checks import DEEPSPEED, command_line, runs_one_of
from mapet_ds.config import ConfigError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TORCHRUN = {"torchrun", "torch.distributed.run"}
STEP_TIMEOUT = timedelta(minutes=30)
CONTROL_TIMEOUT = timedelta(hours=6)  # ranks wait here while the first one lists a large data set; a dead one is seen at once


class Ranks(NamedTuple):
    """This process's place in the launch."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any
    """A gloo process group for messages between hosts that must not touch a GPU."""


def use_gpu() -> bool:
    """Whether this process trains on a GPU: where torch sees one, unless DS_ACCELERATOR=cpu, which DeepSpeed obeys too."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def shapes_only() -> bool:
    """Whether tensors made now have shapes but no values (FakeTensorMode): costs are counted, and no file is read."""
    return isinstance(torch.empty(0), FakeTensor)


def ranks_per_host() -> int:
    """Ranks that the launcher has started on this host: LOCAL_SIZE is deepspeed's word for it, LOCAL_WORLD_SIZE torchrun's."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _meet(world_size: int, seconds: float) -> dist.Store:
    """The launch's key-value store, once the ranks have come to it."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        return store
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        came = re.search(r"(\d+)/\d+ clients joined", str(error))
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "address already in use" in str(error):
            raise ConfigError(f"The port of {address} is taken: choose another --master_port.") from error
        raise ConfigError(
            f"Only {came[1]} of {world_size} ranks came to {address} within {seconds:.0f} s: look above for the host that failed."
            if came
            else f"Rank 0 at {address} can't be reached: {str(error).splitlines()[0]}. --master_addr and --master_port name it."
        ) from error


def init_distributed(join_seconds: float = 600) -> Ranks:
    """Join the launch: NCCL on GPUs, gloo on CPUs; a plain process is a launch of one. Every rank must call it.

    join_seconds: how long it waits for the others.

    Raises:
        ConfigError: the launcher's variables are incomplete, ranks don't come, or there are
            more of them on this host than GPUs.
    """
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if os.environ.get("WORLD_SIZE", "1") == "1":
        for name, value in single.items():
            os.environ.setdefault(name, value)
    if missing := [name for name in single if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start with deepspeed or torchrun, "
            "which set them, or unset WORLD_SIZE to run one process."
        )
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = torch.device("cpu")
    if use_gpu():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"This host has {torch.cuda.device_count()} GPUs and rank {rank} is its number {local_rank}: "
                "start no more ranks per host than it has GPUs (slots= in the hostfile)."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    store = _meet(world_size, join_seconds)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=STEP_TIMEOUT, device_id=device_id
    )  # fmt: skip
    return Ranks(rank, local_rank, world_size, device, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))


def claim(run_dir: Path, seconds: float = 60) -> IO[bytes]:
    """A lock on a run's folder, for as long as the file that it gives is open. For rank 0.

    One that is held is waited for: a run that was killed or asked to stop ends within a minute. Where the file system has no
    locks, none is taken.

    Raises:
        ConfigError: another process still holds it.
    """
    file = (run_dir / ".lock").open("ab+", buffering=0)
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            says = f"run_dir = {run_dir} is in use by {file.read().decode(errors='replace') or 'another run'}"
            if time.monotonic() >= deadline:
                raise ConfigError(f"{says}: end that run (touch {run_dir}/STOP), or name another run_dir.") from None
            if not told:
                print(f"{says}; its end is waited for, up to {seconds:.0f} s.", file=sys.stderr, flush=True)
            told = True
            time.sleep(1)
        except OSError:  # no locks on this file system
            return file
        else:
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file


def launchers() -> list[psutil.Process]:
    """The ancestors that started this rank: torchrun, or deepspeed's runner and the launch under it; none for plain python."""
    return list(takewhile(lambda p: runs_one_of(command_line(p), DEEPSPEED | TORCHRUN), psutil.Process().parents()))


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or dead and only not yet waited for."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class StopRequest:
    """Whether anybody has asked this run to stop: a signal to any rank, RUN/STOP, or the launcher's death.

    A killed deepspeed launcher leaves its ranks behind, and they would train on unseen: so the end of the launcher counts
    as a request. A RUN/STOP left from before is removed. Every rank must build one.
    """

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self.file, self.ranks = run_dir / "STOP", ranks
        self.launchers = launchers()
        self.asked = False
        if ranks.rank == 0:
            self.file.unlink(missing_ok=True)
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def agreed(self) -> bool:
        """True as soon as one rank has been asked. Every rank must call it at each step boundary; no GPU waits."""
        asked = self.asked or any(map(has_ended, self.launchers)) or (self.ranks.rank == 0 and self.file.exists())
        flag = torch.tensor(float(asked))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.ranks.control)
        return bool(flag)
