"""Which programs started this process, by the command lines of its ancestors."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import psutil

from mapet_ds.errors import ConfigError

DEEPSPEED = {"deepspeed", "ds", "deepspeed.launcher.launch", "deepspeed.launcher.runner"}
TORCHRUN = {"torchrun", "torch.distributed.run"}


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # another user's, or it has just ended
        return []


def ancestors() -> list[list[str]]:
    """The command lines of the processes above this one."""
    return [command_line(process) for process in psutil.Process().parents()]


def runs_one_of(words: list[str], programs: set[str]) -> bool:
    return any(Path(word).name in programs for word in words)


def launchers() -> list[psutil.Process]:
    """The ancestors that started this rank: torchrun, or deepspeed's runner and the launch under it; none for plain python."""
    return list(
        takewhile(lambda p: runs_one_of(command_line(p), DEEPSPEED | TORCHRUN), psutil.Process().parents())
    )


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or dead and only not yet waited for."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def check_hostfile(command_lines: list[list[str]]) -> None:
    """Refuse a launch whose hostfile is missing: DeepSpeed 0.19.8 only warns and trains on the local node alone.

    command_lines: those of this process's ancestors; only deepspeed's are looked at (mpirun's -H lists hosts).

    Raises:
        ConfigError: a `--hostfile` or `-H` of deepspeed names a file that is not there.
    """
    for words in (words for words in command_lines if runs_one_of(words, DEEPSPEED)):
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name not in ("--hostfile", "-H"):
                continue
            path = value if equals else words[i + 1] if i + 1 < len(words) else ""
            if not Path(path).is_file():
                raise ConfigError(
                    f"The hostfile {path or '(no name)'} does not exist, and DeepSpeed would train on this host alone. "
                    "Write it (one line a host: NAME slots=GPUS), or leave --hostfile out to use one host."
                )
