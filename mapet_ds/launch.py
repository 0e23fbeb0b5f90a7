"""What must be right before training starts: the process group, the hostfile, and how a run is asked to stop.

deepspeed, torchrun and plain python all end up here; everything is read from the environment they set.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from mapet_ds.config import ConfigError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Ranks(NamedTuple):
    """This process's place in the launch."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any
    """A gloo process group for messages between hosts that must not touch a GPU."""


def check_hostfile(command_lines: list[list[str]]) -> None:
    """Refuse a launch whose hostfile is missing: DeepSpeed 0.19.8 only warns and trains on the local node alone.

    command_lines: those of this process's ancestors.

    Raises:
        ConfigError: a `--hostfile` or `-H` names a file that is not there.
    """
    for words in command_lines:
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name not in ("--hostfile", "-H"):
                continue
            path = value if equals else words[i + 1] if i + 1 < len(words) else ""
            if path and not Path(path).exists():
                raise ConfigError(
                    f"The hostfile {path} does not exist, and DeepSpeed would train on this host alone. "
                    "Write it (one line a host: NAME slots=GPUS), or leave --hostfile out to use one host."
                )


def _ancestors() -> list[list[str]]:
    lines = []
    for process in psutil.Process().parents():
        try:
            lines.append(process.cmdline())
        except psutil.Error:
            break
    return lines


def init_distributed() -> Ranks:
    """Join the launch: NCCL on GPUs, gloo on CPUs; a plain process is a launch of one. Every rank must call it.

    Raises:
        ConfigError: the hostfile is missing, or there are more ranks on this host than GPUs.
    """
    check_hostfile(_ancestors())
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"This host has {torch.cuda.device_count()} GPUs and rank {rank} is its number {local_rank}: "
                "start no more ranks per host than it has GPUs (slots= in the hostfile)."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=30),
        device_id=device if device.type == "cuda" else None,
    )
    return Ranks(rank, local_rank, world_size, device, dist.new_group(backend="gloo"))


class StopRequest:
    """Whether anybody has asked this run to stop: a signal to any rank, RUN/STOP, or the launcher's death.

    The deepspeed launcher, when killed, leaves its ranks behind: a rank whose parent has changed asks to stop.
    """

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self.file, self.ranks = run_dir / "STOP", ranks
        self.parent = os.getppid()
        self.asked = False
        if ranks.rank == 0:
            self.file.unlink(missing_ok=True)
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def agreed(self) -> bool:
        """True as soon as one rank has been asked. Every rank must call it at each step boundary; no GPU waits."""
        asked = self.asked or os.getppid() != self.parent or (self.ranks.rank == 0 and self.file.exists())
        flag = torch.tensor(float(asked))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.ranks.control)
        return bool(flag)
