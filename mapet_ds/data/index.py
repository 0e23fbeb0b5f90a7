"""The index of an image folder or of tar shards: all samples in a fixed order, and where their bytes lie.

The index is memory-mapped: opening it costs the same for a thousand images as for a billion. Nothing here
imports torch or DALI, because loader workers import this module.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapet_ds.config.sources import Source, named, sources
from mapet_ds.data.formats import BadImage
from mapet_ds.data.index_files import STATE, write_index
from mapet_ds.data.kinds import EXAMPLES, by_name, hidden, json_name, summary, text
from mapet_ds.data.listing import LOOSE, OF_THE_FILE, Listing, changed, root_of
from mapet_ds.data.range_cache import RangeCache
from mapet_ds.data.remote import Remote, is_remote
from mapet_ds.errors import DataError

MAX_BYTES = 1 << 30
RETRY_PAUSES_S = (0.1, 1.0, 4.0)
OPEN_SHARDS = 64
SPOT_CHECKS = 200
"""Images, evenly spaced, whose lengths are compared with those recorded when an index is opened again."""


def build_index(source: str | Path, folder: Path, classes: list[str] | None = None) -> None:
    """Writes the index of what `source` names (see config/sources.py) into `folder`. One process calls it.

    classes: the names of the labels of shards.

    Raises:
        DataError: nothing is there, no image is there, or what is there can't be read or meant.
    """
    listing = Listing(sources(str(source)))
    root = os.fsdecode(listing.root)
    write_index(folder, root, listing.members(), listing.shards, classes or [], listing)


class Index:
    """A memory-mapped list of samples. It pickles as its paths, so that workers map the same pages."""

    def __init__(self, folder: Path, root: Path | str, ranges: RangeCache | None = None) -> None:
        """Opens the index that `build_index` wrote into `folder`, for the data set that now lies at `root`.

        ranges: keeps what is read of a remote data set.

        Raises:
            DataError: the index or the root can't be read.
        """
        self.folder, self.root, self.ranges = folder, root, ranges
        try:
            description = json.loads((folder / "index.json").read_text())
            self._samples = np.load(folder / "samples.npy", mmap_mode="r").view(np.ndarray)
            self._path_ends = np.load(folder / "path_ends.npy", mmap_mode="r").view(np.ndarray)
            self._paths = np.memmap(folder / "paths.bin", mode="r").view(np.ndarray)
            self.sources = [Source(*source) for source in description.get("sources", [(str(root), 1)])]
            folders = description.get("folders", [str(root)])
            self.folders: list[str] = [str(root)] if folders and len(self.sources) == 1 else folders
            versions = description.get("versions")
            self.remote = Remote(str(root), ranges, versions) if is_remote(str(root)) else None
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"The index {folder} of {root} can't be opened: {error}. Delete it to have it built anew."
            ) from error
        self._devices: dict[str, int] = {}
        for place in () if self.remote else (str(root), *self.folders):
            try:
                self._devices[place] = os.stat(place).st_dev
            except OSError as error:
                raise DataError(f"The data set {place} is not a folder that this host can see.") from error
        self.fingerprint: str = description["fingerprint"]
        """sha256 of relative paths and lengths, which doesn't depend on where the data set lies."""
        self.classes: list[str] = description["classes"]
        self.passed_over: dict[str, list[Any]] = description.get("passed_over", {})
        """Kind of what the listing passed over -> number, and the first one's path."""
        self.noted: dict[str, list[Any]] = description.get("noted", {})
        """What the listing took and has to say, the same way."""
        self.shards = [shard.encode("utf-8", "surrogateescape") for shard in description["shards"]]
        self._open_shards: OrderedDict[int, int] = OrderedDict()

    @property
    def named(self) -> str:
        """What data.train would name the same by, from any folder."""
        return named(self.sources)

    def __reduce__(self) -> tuple[type[Index], tuple[Path, Path | str, RangeCache | None]]:
        return Index, (self.folder, self.root, self.ranges)

    def __len__(self) -> int:
        return len(self._samples)

    def path(self, i: int) -> str:
        """Path of a sample, as if its shard were a folder."""
        start = int(self._path_ends[i - 1]) if i else 0
        return os.path.join(self.root, os.fsdecode(self._paths[start : int(self._path_ends[i])].tobytes()))

    def label(self, i: int) -> int:
        """Places of a sample's class in `classes`; -1 where it has none."""
        return int(self._samples[i]["label"])

    def labels(self) -> NDArray[np.int32]:
        """[n] `label` of every sample."""
        return self._samples["label"]

    def lengths(self) -> NDArray[np.uint64]:
        """[n] bytes of every sample."""
        return self._samples["length"]

    def empty_folders(self) -> list[str]:
        """Names of the folders beside those of the classes, which hold no sample; none with shards."""
        if self.shards:
            return []
        names = set[str]()
        for folder in self.folders:
            with os.scandir(os.fsencode(folder)) as entries:
                there = [text(entry.name) for entry in entries if entry.is_dir() and not hidden(entry.name)]
                names |= {unicodedata.normalize("NFC", name) for name in there}
        return sorted(names - {*self.classes})

    def record(self) -> dict[str, Any]:
        """What a run's record says of the data: counts, what was passed over, and what there is to note."""
        counts = {"images": len(self), "classes": len(self.classes), "shards": len(self.shards)}
        return counts | {"passed_over": self.passed_over, "to_note": self.noted}

    def summary(self) -> str:
        """One line about what was listed and what was passed over."""
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        parts = [f"{self.root}: {len(self):,} images{classes}"]
        parts += [f"Passed over: {summary(self.passed_over)}"] if self.passed_over else []
        parts += [f"To note: {summary(self.noted, EXAMPLES)}"] if self.noted else []
        return ". ".join(parts) + "."

    def read(self, i: int) -> bytes:
        """Reads the bytes of a sample. Tries again, after a pause, where the storage fails.

        Raises:
            BadImage: the file is gone, forbidden, of another length than the index recorded, or longer than
                MAX_BYTES.
            DataError: the storage failed at every try, or the data set's folder is gone.
        """
        file, offset, length, _ = self._samples[i].item()
        if length > MAX_BYTES:
            raise BadImage(f"{length} bytes, more than the {MAX_BYTES} that are read")
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                data = self._read_at(i, file, offset, length)
                break
            except OSError as error:
                self.close()
                if error.errno in OF_THE_FILE:
                    self._check_root()
                    raise BadImage(f"can't be read: {error.strerror}") from error
                if pause_s is None:
                    raise DataError(
                        f"{self.path(i)} can't be read, tried {len(RETRY_PAUSES_S) + 1} times: "
                        f"{error.strerror}. The storage fails, not the image: see to it and start the same "
                        "command again."
                    ) from error
                time.sleep(pause_s)
        if len(data) < length:
            raise BadImage(f"{len(data)} bytes where the index recorded {length}")
        return data

    def _read_at(self, i: int, file: int, offset: int, length: int) -> bytes:
        if not self.shards or file == LOOSE:
            descriptor = _open(self.path(i))
            try:
                there = os.fstat(descriptor).st_size
                if there != length and there:  # a pipe has none
                    raise BadImage(f"{there} bytes where the index recorded {length}: it has changed since")
                return _pread(descriptor, length, 0)
            finally:
                os.close(descriptor)
        if self.remote:
            return self.remote.read(text(self.shards[file]), offset, length)
        if file not in self._open_shards:
            if len(self._open_shards) == OPEN_SHARDS:
                os.close(self._open_shards.popitem(last=False)[1])
            self._open_shards[file] = _open(os.path.join(os.fsencode(self.root), self.shards[file]))
        self._open_shards.move_to_end(file)
        return _pread(self._open_shards[file], length, offset)

    def has_changed(self, i: int) -> bool:
        """Whether the file of a sample is gone, or of another length than it was when it was listed."""
        if self.remote:
            return False
        file, offset, length, _ = self._samples[i].item()
        loose = not self.shards or file == LOOSE
        try:
            path = self.path(i) if loose else os.path.join(os.fsencode(self.root), self.shards[file])
            there = os.stat(path).st_size
        except OSError:
            return length > 0
        return there != length if loose else there < offset + length

    def _check_root(self) -> None:
        for folder, device in self._devices.items():
            try:
                there = os.stat(folder).st_dev == device
            except OSError:
                there = False
            if not there:
                raise DataError(
                    f"The folder {folder} is gone or no longer mounted. Start the same command when it is "
                    "back."
                )

    def close(self) -> None:
        """Closes the shards that are open. Reading opens them again."""
        while self._open_shards:
            os.close(self._open_shards.popitem()[1])


class Selection:
    """A view of an index with at most `limit` of its images, evenly spaced over its order."""

    def __init__(self, index: Index, limit: int) -> None:
        self._index, self._length = index, min(limit, len(index))
        self.classes = index.classes

    def __len__(self) -> int:
        return self._length

    def _place(self, i: int) -> int:
        return i * len(self._index) // self._length

    def path(self, i: int) -> str:
        return self._index.path(self._place(i))

    def label(self, i: int) -> int:
        return self._index.label(self._place(i))

    def read(self, i: int) -> bytes:
        return self._index.read(self._place(i))

    def has_changed(self, i: int) -> bool:
        return self._index.has_changed(self._place(i))


class Ordered(Selection):
    """A view of images in another order."""

    def __init__(self, images: Index | Selection, order: Sequence[int]) -> None:
        self._index, self._order, self._length = images, order, len(order)
        self.classes = images.classes

    def _place(self, i: int) -> int:
        return self._order[i]


class Numbered(Selection):
    """A view of images whose labels are their places, so that what is made of an image tells which it was."""

    def __init__(self, images: Index | Selection) -> None:
        self._index, self._length, self.classes = images, len(images), images.classes

    def label(self, i: int) -> int:
        return i


Images = Index | Selection
"""Images that are read by their place."""


def _open(path: str | bytes) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe must not hold up the run


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    while len(data) < length and (more := os.pread(descriptor, length - len(data), offset + len(data))):
        data += more
    return data


def open_index(source: str, cache: Path, compare: bool = True, ranges: RangeCache | None = None) -> Index:
    """Opens the index of what `source` names: the one beside a folder's shards, or else the one in `cache`.

    The one in `cache` is built where it is missing, of other sources, or where these have changed since: what
    a run may continue on is decided by the fingerprint. Rank 0 calls first, the others after a barrier.

    compare: whether to look for changes; one process is enough. It costs a look at every folder or shard, and
        at SPOT_CHECKS files.
    ranges: keeps what is read of a remote data set; every rank's is made ready.

    Raises:
        DataError: see `build_index` and `Index`; or the shards beside an index are not those it lists.
    """
    there = sources(source)
    if not there:
        raise DataError("The name of the data set is empty.")
    if any(is_remote(path) for path, _ in there):
        if len(there) > 1:
            raise DataError(
                f"{there[0].path} and others: a remote folder must stand alone. Pack them as one."
            )
        if compare or not (cache / "index.json").is_file():
            Remote(there[0].path).copy_index(cache)
        index = Index(cache, there[0].path, ranges)
        assert index.remote
        index.remote.prepare()
        return index
    root, own = Path(root_of(there)), Path(there[0].path, "index")
    if there == [Source(str(root), 1)] and (own / "index.json").is_file():
        index = Index(own, root)
        if compare and (problem := _beside(index)):
            raise DataError(
                f"{own} does not fit the shards beside it: {problem}. Pack them anew with "
                f"tools/make_shards.py, or delete {own} to have the folder listed as it is."
            )
        return index
    recorded = _description(cache)
    same = recorded.get("root") == str(root) and recorded.get("sources", [list(there[0])]) == [
        *map(list, there)
    ]
    if same and not compare:
        return Index(cache, root)
    before = Index(cache, root) if same else None
    path = _change(before) if before else None
    if before and path is None:
        return before
    build_index(source, cache)
    index = Index(cache, root)
    if before and index.fingerprint != before.fingerprint:
        then = f"{len(before):,} images then, {len(index):,} now"
        _say(f"{root} has changed since it was listed ({json_name(path or '')}): {then}.")
    elif before and not np.array_equal(before.labels(), index.labels()):
        _say(f"{root}: the images are those of before, but their labels have changed.")
    _say(index.summary())
    return index


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _description(folder: Path) -> dict[str, Any]:
    """What the index in a folder records about itself; nothing where there is none."""
    path = folder / "index.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _change(index: Index, times: bool = True) -> str | None:
    """A path that shows that what was listed is no longer what is there; None where nothing does.

    times: whether another time of change is enough; not where the data set may have been copied.
    """
    recorded = index.folder / STATE
    state = json.loads(recorded.read_bytes()) if recorded.is_file() else {}
    if path := changed(str(index.root), state, times):
        return path
    number = min(SPOT_CHECKS, len(index))
    if state and index.shards and len(index.sources) == 1:
        number = 0  # the state knows all
    for k in range(number):
        if index.has_changed(i := k * len(index) // number):
            return index.path(i)
    return None


def _beside(index: Index) -> str | None:
    """What is wrong with the shards beside an index; None where they fit it."""
    with os.scandir(os.fsencode(index.root)) as entries:
        there = {entry.name for entry in entries if by_name(entry.name) == "shard"}
    listed = {shard for shard in index.shards if b"/" not in shard}
    if there != listed:
        return f"it lists {len(listed)} shards, {len(there)} are there"
    path = _change(index, times=False)
    return path and f"{path} is of another length, or gone"
