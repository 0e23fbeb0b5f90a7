"""A bounded store on a local disk of what was read of remote shards, shared by the processes of a host.

What is kept stays, and when the store is full nothing is added. Each image is read once an epoch in a new
order, so a store for a third of the data set then answers a third of the reads. Dropping the least recently
used would answer fewer: what is dropped is what comes next (docs/log.md).

Nothing here imports torch, because loader workers import this module.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mapet_ds.errors import DataError

FULL = (errno.ENOSPC, errno.EDQUOT)
BLOCK = 4096
"""Bytes by which a disk gives room to a file."""
LEFT_BEHIND_S = 60
"""After so many seconds a file that was never finished is taken for that of a killed process."""
SILENT_S = 3600
"""Seconds in which the processes of a host say one sentence about the store."""
CHECKSUM = 4


class RangeCache:
    """Bytes of remote files by (file, version, offset). Any number of processes may use one at once."""

    def __init__(self, folder: str, gigabytes: float) -> None:
        self.folder, self.limit, self._open = Path(folder).absolute(), int(gigabytes * 1e9), True

    @classmethod
    def of(cls, data: Any) -> RangeCache | None:
        """That of a section `data` of a recipe; None where it names none."""
        return cls(data.cache_dir, data.cache_gb) if data.cache_dir else None

    def prepare(self, versions: Mapping[str, str]) -> None:
        """Makes the folder, and removes what it holds of other versions of these files.

        versions: that of each file, none of them empty.

        Raises:
            DataError: it can't be written, for another reason than a full disk.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._counted():
                pass
            for file, version in versions.items():
                self._keep_alone(self._place(file, version))
        except OSError as error:
            if error.errno not in FULL:
                raise DataError(
                    f"data.cache_dir = {self.folder} can't be written: {error.strerror}. Name a folder on "
                    "this host's own disk, or leave it out."
                ) from error
            self._give_up(f"can't be written: {error.strerror}")

    def get(self, file: str, version: str, offset: int, length: int) -> bytes | None:
        """Bytes that were put there; None where there are none, or not these."""
        path = self._place(file, version) / str(offset)
        try:
            kept = path.read_bytes()
        except OSError:
            return None
        data = kept[:-CHECKSUM]
        if len(data) == length and zlib.crc32(data).to_bytes(CHECKSUM) == kept[-CHECKSUM:]:
            return data
        with contextlib.suppress(OSError):  # cut off by a loss of power, or of another listing
            path.unlink()
            self._take(-_room(len(data)))
        return None

    def put(self, file: str, version: str, offset: int, data: bytes) -> None:
        """Keeps bytes if there is room. On a full disk a sentence says so, and nothing more is kept."""
        if not self._open:
            return
        place = self._place(file, version)
        path, room = place / str(offset), _room(len(data))
        try:
            place.mkdir(parents=True, exist_ok=True)
            if not self._take(room):
                self._give_up(f"holds the {self.limit / 1e9:g} GB that data.cache_gb gives it")
                return
            try:
                kept = self._write(path, data)
            except OSError:
                self._take(-room)
                raise
            if not kept:
                self._take(-room)
        except FileNotFoundError:  # another process, of a later version, has removed this one
            return
        except OSError as error:
            self._give_up(f"can't be written: {error.strerror}")

    def _write(self, path: Path, data: bytes) -> bool:
        """Writes a file under another name, which it then loses; False where it or another process has it."""
        partial = path.with_suffix(".partial")
        try:
            with partial.open("xb") as file:
                file.write(data + zlib.crc32(data).to_bytes(CHECKSUM))
        except FileExistsError:
            if time.time() - partial.stat().st_mtime > LEFT_BEHIND_S:
                partial.unlink()
                self._take(-_room(len(data)))
            return False
        except OSError:  # a full disk may show only when the file is closed
            partial.unlink(missing_ok=True)
            raise
        if path.exists():
            partial.unlink()
            return False
        partial.rename(path)
        return True

    def _place(self, file: str, version: str) -> Path:
        return (
            self.folder / hashlib.sha256(file.encode("utf-8", "surrogateescape")).hexdigest()[:32] / version
        )

    def _keep_alone(self, place: Path) -> None:
        """Removes the other versions of a file, and what a killed process had begun to remove.

        A version that is being removed has a dot in its name, and counts no longer.
        """
        versions = list(place.parent.iterdir()) if place.parent.is_dir() else []
        for other in versions:
            if other.name == place.name:
                continue
            if "." not in other.name:
                freed, gone = _measured(other), other.with_name(f"{other.name}.{os.getpid()}")
                try:
                    other.rename(gone)
                except FileNotFoundError:  # another process was first
                    continue
                self._take(-freed)
                other = gone
            shutil.rmtree(other, ignore_errors=True)

    def _take(self, room: int) -> bool:
        """Adds to the bytes that are taken, or takes from them; False where that is more than allowed."""
        with self._counted() as count:
            if room > 0 and count["bytes"] + room > self.limit:
                return False
            count["bytes"] = max(0, count["bytes"] + room)
        return True

    @contextlib.contextmanager
    def _counted(self) -> Iterator[dict[str, int]]:
        """The bytes that are taken, and when a sentence was last said, for this process to change alone.

        A count that can't be read, as after a loss of power, is made anew from what is there.
        """
        with open(os.open(self.folder / "count.json", os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = text = file.read()
            try:
                count = json.loads(text)
            except ValueError:
                count = {"bytes": _measured(self.folder), "said": 0}
            yield count
            if (text := json.dumps(count).encode().ljust(64)) != before:
                file.seek(0)
                file.write(text)

    def _give_up(self, reason: str) -> None:
        """Keeps nothing more in this process, and says why, once on each host."""
        self._open = False
        try:
            with self._counted() as count:
                if time.time() - count["said"] < SILENT_S:
                    return
                count["said"] = int(time.time())
        except OSError:
            pass  # then each process says it
        said = f"data.cache_dir = {self.folder} {reason}. The run goes on, and reads other images from afar."
        print(said, file=sys.stderr, flush=True)


def _room(length: int) -> int:
    """Bytes that a file of so many takes on the disk."""
    return -(-(length + CHECKSUM) // BLOCK) * BLOCK


def _measured(folder: Path) -> int:
    """Bytes that the kept files below a folder take."""
    total = 0
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if "." not in name]  # those are being removed
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it has got its own name, or is removed
                total += _room(os.stat(os.path.join(where, name)).st_size - CHECKSUM)
    return total
