"""The programs that started this process, known by the command lines of its ancestors."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import psutil

from mapet_ds.errors import ConfigError

DEEPSPEED = {"deepspeed", "ds", "deepspeed.launcher.launch", "deepspeed.launcher.runner"}
TORCHRUN = {"torchrun", "torch.distributed.run"}


def command_line(process: psutil.Process) -> list[str]:
    """The words of a process's command line; none where they can't be read."""
    try:
        return process.cmdline()
    except psutil.Error:  # it is another user's, or has just ended
        return []


def ancestors() -> list[list[str]]:
    """The command lines of the processes above this one."""
    return [command_line(process) for process in psutil.Process().parents()]


def runs_one_of(words: list[str], programs: set[str]) -> bool:
    """Whether a command line runs one of these programs."""
    return any(Path(word).name in programs for word in words)


def launchers() -> list[psutil.Process]:
    """The ancestors that started this rank: torchrun, or deepspeed's two programs; none for plain python."""
    programs = DEEPSPEED | TORCHRUN
    return list(takewhile(lambda p: runs_one_of(command_line(p), programs), psutil.Process().parents()))


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or dead and only not yet waited for."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ignored_gpus(own: str) -> str | None:
    """A sentence where the user's CUDA_VISIBLE_DEVICES is not what the deepspeed launcher gave this process.

    With --num_gpus, --include or --exclude DeepSpeed 0.19.8 counts the host's GPUs from 0. The launcher's own
    environment still has what the user wrote.

    own: this process's CUDA_VISIBLE_DEVICES.
    """
    for process in (each for each in launchers() if runs_one_of(command_line(each), {"deepspeed", "ds"})):
        try:
            asked = process.environ().get("CUDA_VISIBLE_DEVICES", "")
        except psutil.Error:  # it is another user's, or has just ended
            continue
        if asked and not set(own.split(",")) <= set(asked.split(",")):
            return (
                f"CUDA_VISIBLE_DEVICES = {asked}, but deepspeed ignores it beside --num_gpus, --include or "
                f"--exclude, and gave this host's ranks the GPUs {own}. --include localhost:{asked} takes "
                "those that you named."
            )
    return None


def check_hostfile(command_lines: list[list[str]]) -> None:
    """Refuses a launch whose hostfile is missing. DeepSpeed 0.19.8 only warns and trains on this host alone.

    command_lines: those of this process's ancestors. Only deepspeed's are checked, because mpirun's -H lists
        hosts.

    Raises:
        ConfigError: a `--hostfile` or `-H` of deepspeed names a file that does not exist.
    """
    for words in (words for words in command_lines if runs_one_of(words, DEEPSPEED)):
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name not in ("--hostfile", "-H"):
                continue
            path = value if equals else words[i + 1] if i + 1 < len(words) else ""
            if not Path(path).is_file():
                raise ConfigError(
                    f"The hostfile {path or '(no name)'} does not exist, and DeepSpeed would train on this "
                    "host alone. Write it (one line a host: NAME slots=GPUS), or leave --hostfile out to use "
                    "one host."
                )
