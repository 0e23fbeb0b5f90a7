"""The launch: this process's rank, messages between ranks, the lock on a run's folder, requests to stop.

deepspeed, torchrun and plain python all end up here. Everything is read from the environment that they set.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mapet_ds.errors import ConfigError, UserError
from mapet_ds.launchers import has_ended, ignored_gpus, launchers

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STEP_TIMEOUT = timedelta(minutes=30)
CONTROL_TIMEOUT = timedelta(hours=6)
"""Time that ranks wait while the first one lists a large data set. They notice a dead one at once."""


class Ranks(NamedTuple):
    """This process's place in the launch."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any
    """A gloo process group for messages between hosts that must not touch a GPU."""

    def from_first(self, work: Callable[[], T]) -> T:
        """Does `work` on rank 0 alone and gives its result to all. Every rank must call it; no GPU waits.

        Raises:
            UserError: on every rank, where rank 0 raised one, so that none is left waiting.
        """
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [work()]
            except UserError as error:
                outcome = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if isinstance(outcome[0], UserError):
            outcome[0].printed_elsewhere = self.rank != 0
            raise outcome[0]
        return outcome[0]

    def first_then_all(self, work: Callable[[], T]) -> T:
        """Does `work` on every rank; the others begin when rank 0 has done it. Every rank must call it.

        Raises:
            UserError: on every rank, where rank 0 raised one.
        """
        done: list[T] = []
        self.from_first(lambda: done.append(work()))
        return done[0] if done else work()

    def gather_on_first(self, value: T) -> list[T]:
        """The value of each rank, in their order, on rank 0; empty elsewhere. Every rank must call it."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, group=self.control)
        return values or []

    def gather(self, value: T) -> list[T]:
        """Gives the value of each rank, in their order. Every rank must call it; no GPU waits."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values


def use_gpu() -> bool:
    """Whether this process trains on a GPU: torch sees one, and DeepSpeed's DS_ACCELERATOR isn't cpu."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def take_device(rank: int, local_rank: int) -> torch.device:
    """The device of this rank, which it then computes on: the GPU of its number, or the CPU.

    Raises:
        ConfigError: this host has more ranks than GPUs.
    """
    if not use_gpu():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"This host has {torch.cuda.device_count()} GPUs and rank {rank} is its number {local_rank}: "
            "start no more ranks per host than it has GPUs (slots= in the hostfile)."
        )
    torch.cuda.set_device(local_rank)
    if local_rank == 0 and (sentence := ignored_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", ""))):
        print(sentence, file=sys.stderr, flush=True)
    # cuDNN's attention, which torch prefers for bf16 on an H100, has given NaN gradients (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local_rank)


def ranks_per_host() -> int:
    """Number of ranks on this host: deepspeed sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _meet(world_size: int, seconds: float) -> dist.Store:
    """The key-value store of the launch, once all ranks have come to it."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        return store
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "address already in use" in str(error):
            raise ConfigError(f"The port of {address} is taken: choose another --master_port.") from error
        if joined := re.search(r"(\d+)/\d+ clients joined", str(error)):
            raise ConfigError(
                f"Only {joined[1]} of {world_size} ranks came to {address} within {seconds:.0f} s: look "
                "above for the host that failed."
            ) from error
        raise ConfigError(
            f"Rank 0 at {address} can't be reached: {str(error).splitlines()[0]}. --master_addr and "
            "--master_port name it."
        ) from error


def agree_on_device(store: dist.Store, rank: int, world_size: int, device: torch.device) -> None:
    """Sees through the store that all ranks compute on one type of device. Every rank must call it.

    Raises:
        ConfigError: on every rank, where some have a GPU and others none.
    """
    # Rank 0 compares them and tells the others.
    store.set(f"device/{rank}", f"{device.type} {socket.gethostname()}")
    if rank == 0:
        places = [
            place.decode().split() for place in store.multi_get([f"device/{i}" for i in range(world_size)])
        ]
        without = sorted({host for kind, host in places if kind == "cpu"})
        mixed = len({kind for kind, _ in places}) > 1
        store.set(
            "device/sentence", f"{no_gpu(', '.join(without))} Other ranks have theirs." if mixed else ""
        )
    sentence = store.get("device/sentence").decode()

    # The store ends with rank 0, which waits until all have read it.
    if store.add("device/heard", 1) == world_size:
        store.set("device/done", "")
    if rank == 0:
        store.wait(["device/done"])
    if sentence:
        error = ConfigError(sentence)
        error.printed_elsewhere = rank != 0
        raise error


def no_gpu(hosts: str) -> str:
    """A sentence about hosts where torch sees no GPU, and what to look at."""
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU on {hosts}: look at "
        "nvidia-smi there; a driver may be too old for it, or CUDA_VISIBLE_DEVICES empty."
    )


def init_distributed(join_seconds: float = 600) -> Ranks:
    """Joins the launch: NCCL on GPUs, gloo on CPUs; a plain process is alone. Every rank must call it.

    join_seconds: time that it waits for the other ranks.

    Raises:
        ConfigError: the launcher's variables are incomplete, ranks don't come, some ranks have a GPU and
            others none, or this host has more ranks than GPUs.
    """
    # Read the variables of the launcher, or set those of a single process.
    single = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    if os.environ.get("WORLD_SIZE", "1") == "1":
        for name, value in single.items():
            os.environ.setdefault(name, value)
    if missing := [name for name in single if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start with "
            "deepspeed or torchrun, which set them, or unset WORLD_SIZE to run one process."
        )
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))

    # Meet the other ranks. NCCL and gloo would wait for each other for half an hour.
    device = take_device(rank, local_rank)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    store = _meet(world_size, join_seconds)
    agree_on_device(store, rank, world_size, device)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=STEP_TIMEOUT, device_id=device_id
    )
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return Ranks(rank, local_rank, world_size, device, control)


def claim(run_dir: Path, seconds: float = 60) -> IO[bytes]:
    """Locks a run's folder for as long as the returned file is open. For rank 0.

    It waits for a lock that is held, because a run that was killed or asked to stop ends within a minute. On
    a file system without locks it takes none.

    Raises:
        ConfigError: another process still holds the lock, or this one does.
    """
    file = (run_dir / ".lock").open("ab+", buffering=0)
    this_process = f"process {os.getpid()} on {socket.gethostname()}"
    deadline, printed = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another run"
            message = f"run_dir = {run_dir} is in use by {holder}"
            if holder == this_process:
                cure = (
                    "delete the Run that holds it (del run), let it train to its end, or name a new run_dir."
                )
                raise ConfigError(f"{message}, which is this one: {cure}") from None
            if time.monotonic() >= deadline:
                advice = f"end that run (touch {run_dir}/STOP), or name another run_dir."
                raise ConfigError(f"{message}: {advice}") from None
            if not printed:
                wait = f"its end is waited for, up to {seconds:.0f} s."
                print(f"{message}; {wait}", file=sys.stderr, flush=True)
            printed = True
            time.sleep(1)
        except OSError:  # no locks on this file system
            return file
        else:
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                file.truncate(0)
                file.write(this_process.encode())
            return file


def say_what_triton_lacks(ranks: Ranks) -> None:
    """Says on rank 0 which hosts miss what Triton compiles its kernels with. Every rank must call it.

    It refuses nothing, because a cache of kernels that is already there does without them.
    """
    lacks = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        lacks.append("C compiler (gcc)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacks.append("Python.h (python3-dev)")
    for host, missing in sorted(set(ranks.gather_on_first((socket.gethostname(), " and no ".join(lacks))))):
        if missing:
            sentence = f"train.compile = true: {host} has no {missing}, which Triton compiles with"
            print(f"{sentence}. train.compile=false does without.", file=sys.stderr, flush=True)


class StopRequest:
    """The requests to stop this run: a signal to any rank, RUN/STOP, or the end of the launcher.

    A deepspeed launcher that is killed leaves its ranks behind, and they would train on unseen, so its end
    counts as a request. A RUN/STOP from an earlier run is removed. Every rank must build one.
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
        """Whether any rank has a request. Every rank must call it at each step boundary; no GPU waits."""
        stop_file = self.ranks.rank == 0 and self.file.exists()
        flag = torch.tensor(float(self.asked or stop_file or any(map(has_ended, self.launchers))))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.ranks.control)
        return bool(flag)


def once_per_node(work: Callable[[], str]) -> tuple[str, list[str]]:
    """Does `work` on the first rank of each node. Gives the result of this node and those of all.

    Every rank must call it; no GPU waits.

    Raises:
        ConfigError: on every rank, where one raised it, so that none is left waiting.
    """
    # Result and error of each rank: both None on a rank that is not the first of its node.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    outcome: tuple[str | None, str | None] = (None, None)
    if local_rank == 0:
        try:
            outcome = (work(), None)
        except ConfigError as error:
            outcome = (None, str(error))

    # Exchange them in a group that waits for downloads, which may take longer than a step.
    outcomes, first = [outcome], 0
    if dist.is_initialized():
        outcomes, first = [outcome] * dist.get_world_size(), dist.get_rank() - local_rank
        group: Any = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        dist.all_gather_object(outcomes, outcome, group=group)
    if errors := [error for _, error in outcomes if error]:
        raise ConfigError(errors[0])
    mine = outcomes[first][0]
    assert mine is not None, "the first rank of a node has a result or an error"
    return mine, [result for result, _ in outcomes if result is not None]
