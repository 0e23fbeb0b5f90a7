"""Files and folders that exist whole or not at all, and their checksums.

A file takes its name last, after every byte is on the disk. (A checkpoint, which has checksums, takes it
before.) Nothing here imports torch, because loader workers import this module.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil


def checksum(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Waits until a folder, with what is in it and its name, is on the disk."""
    for file in path.rglob("*"):
        flush(file)
    flush(path)
    flush(path.parent)


def _beside(path: Path) -> Path:
    """A free path beside `path`, of this process. What killed processes of this host left there is removed.

    What a living one writes there, or one of another host, which can't be asked, stays.
    """
    prefix = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*.partial"):
        number = leftover.name.removeprefix(prefix).partition(".")[0]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            _remove(leftover)
    return path.with_name(f"{prefix}{os.getpid()}.partial")


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to. The file takes the name `path` when the block ends without an error."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device or a pipe is written as it is, and stays
        yield path
        return
    beside = _beside(path)
    try:
        yield beside
        flush(beside)
        os.replace(beside, path)
        flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, replace: bool = True, flushed: bool = True) -> Iterator[Path]:
    """Gives a new folder to write in. It takes the name `path` when the block ends without an error.

    replace: a folder of that name is replaced; else it must be empty, and an OSError says that it is not.
        Where two processes write it at once, the folder of the later one stays.
    flushed: it is on the disk before it takes its name. Without, it is whole for every process, also when
        this one is killed, but may not outlive a loss of power until flush_folder returns.
    """
    beside = _beside(path)
    old = beside.with_suffix(".old.partial")
    beside.mkdir(parents=True)
    try:
        yield beside
        if flushed:
            flush_folder(beside)
        while True:
            if replace:
                with contextlib.suppress(FileNotFoundError):
                    path.rename(old)
                _remove(old)
            try:
                beside.rename(path)
                break
            except OSError as error:  # another process has put its own there
                if not replace or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        if flushed:
            flush(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Gives a folder to write in. Its files replace those of `out` when the block ends without an error.

    The folder lies in `out` where that exists, because `out` may be a mount or the only place that may be
    written; else it lies beside it. Other files of `out` stay.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    parent = out if out.is_dir() else out.parent
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}.") as folder:
        yield Path(folder)
        out.mkdir(exist_ok=True)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # weights before their description
            flush(file)
            os.replace(file, out / file.name)
        flush(out)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that exists whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(text)
