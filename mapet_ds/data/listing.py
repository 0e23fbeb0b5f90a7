"""The samples of what data.train names, in their fixed order, and what of it would show that it has changed.

The order is that of the names' bytes, whatever the file system lists first; of several sources, theirs.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mapet_ds.config.sources import Source
from mapet_ds.data.kinds import COMPANIONS, PREVIEW, Findings, by_name, hidden, looked_at, suffix, text
from mapet_ds.data.shards import read_shard
from mapet_ds.errors import DataError

LISTS = {b"txt", b"lst", b"list"}
LOOSE = 2**32 - 1
"""The shard's number of an image that is a file, where others are in shards."""
OF_THE_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENXIO, errno.ESPIPE,
}  # fmt: skip
"""Errors that concern one file. Any other is taken for a fault of the storage."""
TRAIN, HELD_OUT = {"train", "training"}, {"val", "valid", "validation", "test", "testing", "dev", "eval"}
RACY_NS = 2_000_000_000
"""A folder changed so shortly before it was listed may change again without a new time."""


class Member(NamedTuple):
    """A sample as the index lists it."""

    path: bytes
    """Below the root; of a member of a shard, as if the shard were a folder."""
    file: int
    """Number of its shard; LOOSE, or 0 where there are no shards, for a file of its own."""
    offset: int
    """Where its bytes begin in the file."""
    length: int
    label: int
    """Its class, -1 for none. While a listing goes on, -2 - k for the k-th name of `Classes`."""


class Classes:
    """The labels of a listing, numbers and names as they come."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.last = -1
        """The largest number."""

    def number(self, label: int | str | None) -> int:
        """The label of a `Member` while the listing goes on; a name counts as Unicode composes it."""
        if isinstance(label, str):
            return -2 - self.names.setdefault(unicodedata.normalize("NFC", label), len(self.names))
        self.last = max(self.last, -1 if label is None else label)
        return -1 if label is None else label

    def settled(self) -> tuple[list[str], list[int]]:
        """The classes in order, and the place among them of each name as they came.

        Numbers are their own classes; names follow them, sorted by their bytes.
        """
        names = sorted(self.names, key=lambda name: name.encode("utf-8", "surrogateescape"))
        places = {name: self.last + 1 + i for i, name in enumerate(names)}
        return [*map(str, range(self.last + 1)), *names], [places[name] for name in self.names]


class Listing:
    """One pass over sources: `members` yields their samples; the rest is complete when it has ended."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources, self.root = sources, os.fsencode(root_of(sources))
        self.shards: list[bytes] = []
        self.classes, self.findings = Classes(), Findings()
        self.state: dict[str, list[int]] = {}
        """Path below the root -> length and time of what would change with the samples."""
        self.folders: list[str] = []
        """Those that are sources."""
        self._numbers: dict[bytes, int] = {}
        self._names: dict[bytes, list[str]] = {}
        self.loose = len(sources) > 1 or not os.path.isdir(sources[0].path)

    def members(self) -> Iterator[Member]:
        """Yields every sample.

        Raises:
            DataError: a folder or a shard can't be read, or what lies there can't be meant.
        """
        for path, repeats in self.sources:
            found = self.findings
            yield from self._of(os.fsencode(path))
            self.findings = Findings()  # what is there again is said once
            for _ in range(1, repeats):
                yield from self._of(os.fsencode(path))
            self.findings = found

    def _of(self, path: bytes) -> Iterator[Member]:
        """Yields the samples of one source."""
        if self.loose and hidden(os.path.basename(path)) == "system folders" and os.path.isdir(path):
            self.findings.pass_over("system folders", path)
        elif os.path.isdir(path):
            self.folders.append(text(path))
            yield from self._of_folder(path)
        elif by_name(path) == "shard":
            yield from self._of_shard(path)
        elif suffix(path) in LISTS:
            yield from self._of_list(path)
        elif (kind := by_name(path) or looked_at(path)) == "image":
            yield self._image(path, _length(path), os.path.basename(os.path.dirname(path)))
        elif kind == "archives":
            raise DataError(f"{os.fsdecode(path)} is packed or compressed: only uncompressed tars are read.")
        else:
            self.findings.pass_over(kind, path)

    def _of_folder(self, folder: bytes) -> Iterator[Member]:
        """Yields the images of a folder, or the samples of its shards; both at once are refused."""
        shards, archives, image = list[bytes](), list[bytes](), None
        for path, length, kind in self._walk(folder):
            if kind == "shard":
                shards.append(path)
            elif kind == "archives":
                archives.append(path)
            elif kind == "image":
                image = image or path
                top, slash, _ = os.path.relpath(path, folder).partition(b"/")
                yield self._image(path, length, top if slash else None)
            if image and shards:
                raise DataError(
                    f"{os.fsdecode(folder)} holds images ({os.fsdecode(image)}) and tar shards "
                    f"({os.fsdecode(shards[0])}) side by side; name a folder that holds one of the two, or "
                    f"the shards alone by a pattern: '{os.fsdecode(os.path.dirname(shards[0]))}/*.tar'."
                )
        if archives and not image:
            raise DataError(
                f"{os.fsdecode(folder)} holds {len(archives)} packed or compressed files, e.g. "
                f"{os.fsdecode(archives[0])}: only uncompressed tars are read. Unpack them (gunzip, unzip), "
                f"or name the others by a pattern: '{os.fsdecode(os.path.dirname(archives[0]))}/*.tar'."
            )
        for path in archives:
            self.findings.pass_over("archives", path)
        refuse_both_splits(folder, shards)
        for path in shards:
            yield from self._of_shard(path)

    def _of_shard(self, path: bytes) -> Iterator[Member]:
        relative = os.path.relpath(path, self.root)
        number = self._numbers.setdefault(relative, len(self.shards))
        if number == len(self.shards):
            self.shards.append(relative)
        self.state[text(relative)] = _state(path)
        names = self._names_beside(os.path.dirname(path))
        for name, offset, length, label in read_shard(path, relative, self.findings):
            if isinstance(label, int) and label < len(names):
                label = names[label]
            yield Member(relative + b"/" + name, number, offset, length, self.classes.number(label))

    def _names_beside(self, folder: bytes) -> list[str]:
        """The names of the classes that the index beside the shards of a folder gives to their numbers."""
        if folder not in self._names:
            path = Path(os.fsdecode(folder), "index", "index.json")
            self._names[folder] = json.loads(path.read_bytes())["classes"] if path.is_file() else []
        return self._names[folder]

    def _of_list(self, path: bytes) -> Iterator[Member]:
        """Yields the samples of what a text file names, a path a line, below the folder that it lies in."""
        self.state[text(os.path.relpath(path, self.root))] = _state(path)
        try:
            lines = Path(os.fsdecode(path)).read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"The list {os.fsdecode(path)} can't be read: {error.strerror}.") from error
        for number, line in enumerate(lines, 1):
            if not (line := line.strip().removeprefix(b"\xef\xbb\xbf")) or line.startswith(b"#"):
                continue
            named = os.path.join(os.path.dirname(path), line)
            if not os.path.exists(named):
                raise DataError(
                    f"{os.fsdecode(path)}, line {number}: {os.fsdecode(named)} is not there. Lines are "
                    "paths, whole or below the list's own folder."
                )
            if suffix(named) in LISTS and os.path.isfile(named):
                raise DataError(f"{os.fsdecode(path)}, line {number}: a list in a list is not read.")
            yield from self._of(os.path.normpath(named))

    def _image(self, path: bytes, length: int, folder: bytes | None) -> Member:
        """A file as a sample; its class is a folder's name."""
        label = self.classes.number(None if folder is None else text(folder))
        file = LOOSE if self.loose else 0
        return Member(os.path.relpath(path, self.root), file, 0, length, label)

    def _walk(
        self, folder: bytes, ancestors: tuple[tuple[int, int], ...] = ()
    ) -> Iterator[tuple[bytes, int, str]]:
        """Yields (path, length, kind) of every image, shard and archive below a folder, by the names' bytes.

        Links are followed, except to a folder that is above them.
        """
        try:
            here = os.stat(folder)
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"The folder {os.fsdecode(folder)} can't be listed: {error.strerror}.") from error
        if (here.st_dev, here.st_ino) in ancestors:
            return
        racy = time.time_ns() - here.st_mtime_ns < RACY_NS
        self.state[text(os.path.relpath(folder, self.root))] = [-1, -1 if racy else here.st_mtime_ns]
        beside = _companions([entry.name for entry in entries])
        for entry in entries:
            kind = hidden(entry.name) or beside.get(entry.name)
            status = _status(entry) if kind is None else None
            if status is not None and stat.S_ISDIR(status.st_mode):
                if not _is_index(entry.path):
                    yield from self._walk(entry.path, (*ancestors, (here.st_dev, here.st_ino)))
                continue
            kind = kind or by_name(entry.name) or looked_at(entry.path)
            if kind == "shard" and status and not stat.S_ISREG(status.st_mode):
                kind = "pipes and devices"
            if kind in ("image", "shard", "archives"):
                # Without a status it is in the list all the same, so that it is reported when it is read.
                yield entry.path, status.st_size if status else 0, kind
            elif not (entry.name.startswith(b".") and entry.name.endswith(b".partial")):  # whole_folder's
                self.findings.pass_over(kind, os.path.relpath(entry.path, self.root))


def root_of(sources: list[Source]) -> str:
    """The folder that all sources lie in; of one folder, itself."""
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path, _ in sources]
    return os.path.commonpath(folders)


def _companions(names: list[bytes]) -> dict[bytes, str]:
    """The names of one folder that are pictures about others, and as which kind each is passed over."""
    kinds = dict[bytes, str]()
    if any(by_name(name) == "shard" for name in names if name[-4:].lower() == b".tar"):
        for name in filter(PREVIEW.match, names):
            if by_name(name) == "image":
                kinds[name] = "pictures beside shards"
    images: set[bytes] | None = None
    for name in names:
        if name.count(b".") < 2 or by_name(name) != "image":
            continue
        first, _, word = name.rpartition(b".")[0].rpartition(b".")
        if word.lower() in COMPANIONS:
            images = images or {each.rpartition(b".")[0] for each in names if by_name(each) == "image"}
            if first in images:
                kinds[name] = f"pictures beside an image (.{text(word)}.{text(suffix(name))})"
    return kinds


def refuse_both_splits(folder: bytes, shards: list[bytes], ending: str = ".tar") -> None:
    """Refuses shards of which some bear the name of the training split, and others that of another.

    Raises:
        DataError: it shows the pattern that takes one split.
    """
    kinds = dict[str, bytes]()
    for path in shards:
        words = {*re.split(r"[^a-z]+", os.fsdecode(os.path.relpath(path, folder)).lower())}
        for kind, known in (("train", TRAIN), ("held out", HELD_OUT)):
            if words & known:
                kinds.setdefault(kind, path)
    if len(kinds) == 2:
        raise DataError(
            f"{os.fsdecode(folder)} holds shards of several splits, e.g. {os.fsdecode(kinds['train'])} and "
            f"{os.fsdecode(kinds['held out'])}. Name those that are meant, e.g. "
            f"'{os.fsdecode(folder)}/*train*{ending}'; or, to take all, '{os.fsdecode(folder)}/**/*{ending}'."
        )


def _is_index(path: bytes) -> bool:
    return os.path.basename(path) == b"index" and os.path.isfile(os.path.join(path, b"index.json"))


def _status(entry: os.DirEntry[bytes]) -> os.stat_result | None:
    """What the file system says about a file; None where it can't be looked at for a reason of its own."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise DataError(f"{os.fsdecode(entry.path)} can't be looked at: {error.strerror}.") from error
        return None


def _length(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _state(path: bytes) -> list[int]:
    """Length (-1 of a folder) and time of the last change; [-2, 0] of what is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return [-2, 0]
    return [-1 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns]


def changed(root: str, state: dict[str, list[int]], times: bool = True) -> str | None:
    """The first path of a recorded state whose length or, with `times`, time of change is another now."""
    for path, then in state.items():
        now = _state(os.path.join(os.fsencode(root), path.encode("utf-8", "surrogateescape")))
        if now[0] != then[0] or (times and now != then):
            return path
    return None


def described(listing: Listing) -> dict[str, Any]:
    """What the index records about a listing that has ended."""
    found = listing.findings
    return {
        "sources": [list(source) for source in listing.sources],
        "folders": sorted({*listing.folders}),
        "passed_over": found.passed_over,
        "noted": found.noted,
    }
