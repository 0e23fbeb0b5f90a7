"""The index of an image folder or of tar shards: all samples in a fixed order, and where their bytes lie.

The index is memory-mapped: opening it costs the same for a thousand images as for a billion. Nothing here
imports torch or DALI, because loader workers import this module.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
import tarfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapet_ds.data.formats import BadImage
from mapet_ds.errors import DataError
from mapet_ds.files import whole_folder

SUFFIXES = {b"jpg", b"jpeg", b"png", b"webp", b"bmp", b"tif", b"tiff", b"gif"}
"""Endings of the files that are samples. GIF is among them so that it is reported as unreadable."""
SAMPLE = np.dtype([("file", "<u4"), ("offset", "<u8"), ("length", "<u8"), ("label", "<i4")])
MAX_LABEL = 1_000_000
MAX_BYTES = 1 << 30
RETRY_PAUSES_S = (0.1, 1.0, 4.0)
OPEN_SHARDS = 64
OF_THE_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENXIO, errno.ESPIPE,
}  # fmt: skip
"""Errors that concern one file. Any other is taken for a fault of the storage."""


def _walk(folder: bytes, ancestors: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[bytes, int]]:
    """Yields (path, length) of every file below a folder, sorted by the bytes of the names.

    Links are followed, except to a folder that is above them.
    """
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        here = os.stat(folder)
    except OSError as error:
        raise DataError(f"The folder {os.fsdecode(folder)} can't be listed: {error.strerror}.") from error
    if (here.st_dev, here.st_ino) in ancestors:
        return
    for entry in entries:
        try:
            status = entry.stat()
        except OSError as error:
            if error.errno not in OF_THE_FILE:
                raise DataError(f"{os.fsdecode(entry.path)} can't be looked at: {error.strerror}.") from error
            yield entry.path, 0  # in the list all the same, so that it is reported when it is read
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(entry.path, (*ancestors, (here.st_dev, here.st_ino)))
        else:
            yield entry.path, status.st_size


def _suffix(name: bytes) -> bytes:
    return name.rpartition(b".")[2].lower()


class Member(NamedTuple):
    """A sample as the index lists it."""

    path: bytes
    """Below the root; of a member of a shard, as if the shard were a folder."""
    file: int
    """Number of its shard; 0 without shards."""
    offset: int
    """Where its bytes begin in the file."""
    length: int
    label: int


def _key(name: str) -> str:
    """WebDataset's key: the path of a member up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _shard_members(path: bytes, number: int, name: bytes) -> Iterator[Member]:
    """Yields the samples of a shard, whose labels may stand before or after them."""
    labels: dict[str, int] = {}
    images: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(os.fsdecode(path), "r:") as archive:
            shard: Any = archive  # its `members` have no type
            for member in shard:
                if member.isreg() and _suffix(os.fsencode(member.name)) in SUFFIXES:
                    images.append(member)
                elif member.isreg() and member.name.endswith(".cls") and member.size < 16:
                    text = shard.extractfile(member).read().strip()
                    if text.isdigit() and int(text) < MAX_LABEL:
                        labels[_key(member.name)] = int(text)
                shard.members = []  # tarfile would keep every header
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"The shard {os.fsdecode(path)} can't be read as an uncompressed tar: {error}. "
            "Unpack a compressed one, replace a damaged one, or take it out of the folder."
        ) from error
    for member in images:
        label = labels.get(_key(member.name), -1)
        member_path = name + b"/" + os.fsencode(member.name)
        yield Member(member_path, number, member.offset_data, member.size, label)


def _members(root: bytes, shards: list[bytes], classes: list[str]) -> Iterator[Member]:
    """Yields every sample below the root in its fixed order; fills `shards` and `classes` on the way."""
    images = False
    for path, length in _walk(root):
        relative = os.path.relpath(path, root)
        suffix = _suffix(relative)
        if suffix == b"tar":
            shards.append(relative)
            yield from _shard_members(path, len(shards) - 1, relative)
        elif suffix in SUFFIXES:
            images = True
            top, slash, _ = relative.partition(b"/")
            if slash and (not classes or classes[-1] != os.fsdecode(top)):
                classes.append(os.fsdecode(top))
            yield Member(relative, 0, 0, length, len(classes) - 1 if slash else -1)
        if images and shards:
            raise DataError(
                f"{os.fsdecode(root)} holds images and tar shards ({os.fsdecode(shards[0])}) side by side; "
                "name a folder that holds one of the two."
            )


def build_index(source: str | Path, folder: Path, classes: list[str] | None = None) -> None:
    """Writes the index of an image folder or a folder of tar shards into `folder`. One process calls it.

    The order is that of the names' bytes, whatever the file system lists first.

    classes: the names of the labels of shards.

    Raises:
        DataError: a folder or a shard can't be read, there is no image, or images and shards are mixed.
    """
    root = os.path.abspath(source)
    shards: list[bytes] = []
    folders: list[str] = []
    members = _members(os.fsencode(root), shards, folders)
    write_index(folder, root, members, shards, folders if classes is None else classes)


def write_index(
    folder: Path, root: str, members: Iterable[Member], shards: list[bytes], classes: list[str]
) -> None:
    """Writes the index of these samples, which lie below `root`, into `folder`, whole or not at all.

    No sample is held in memory. `shards` and `classes` are read after the last sample, because `members` may
    fill them. With shards and no classes, the names of the classes are their numbers.

    Raises:
        DataError: there is no sample.
    """
    digest = hashlib.sha256()
    kinds = {"samples": SAMPLE, "path_ends": np.dtype("<u8")}
    with whole_folder(folder) as written:
        # The samples go to plain files as they come, of unknown number.
        raw = {name: written / f"{name}.raw" for name in kinds}
        end, last_label = 0, -1
        with (
            open(written / "paths.bin", "wb") as paths,
            raw["samples"].open("wb") as samples,
            raw["path_ends"].open("wb") as ends,
        ):
            for member in members:
                end += paths.write(member.path)
                ends.write(struct.pack("<Q", end))
                samples.write(struct.pack("<IQQi", *member[1:]))
                digest.update(member.path + b"\0" + struct.pack("<Q", member.length))
                last_label = max(last_label, member.label)
        if not end:
            endings = ", ".join("." + suffix.decode() for suffix in sorted(SUFFIXES))
            raise DataError(
                f"{root} holds no image: looked in it and below for {endings} and for .tar shards."
            )

        # NumPy's headers hold the number.
        for name, path in raw.items():
            np.save(written / f"{name}.npy", np.memmap(path, kinds[name], "r"))
            path.unlink()
        description = {
            "root": "." if folder.parent == Path(root) else root,
            "fingerprint": digest.hexdigest(),
            "classes": classes or ([str(label) for label in range(last_label + 1)] if shards else []),
            "shards": [os.fsdecode(shard) for shard in shards],
        }
        (written / "index.json").write_text(json.dumps(description, indent=1))


class Index:
    """A memory-mapped list of samples. It pickles as its two paths, so that workers map the same pages."""

    def __init__(self, folder: Path, root: Path) -> None:
        """Opens the index that `build_index` wrote into `folder`, for the data set that now lies at `root`.

        Raises:
            DataError: the index or the root can't be read.
        """
        self.folder, self.root = folder, root
        try:
            description = json.loads((folder / "index.json").read_text())
            self._samples = np.load(folder / "samples.npy", mmap_mode="r").view(np.ndarray)
            self._path_ends = np.load(folder / "path_ends.npy", mmap_mode="r").view(np.ndarray)
            self._paths = np.memmap(folder / "paths.bin", mode="r").view(np.ndarray)
            self._device = os.stat(root).st_dev
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"The index {folder} of {root} can't be opened: {error}. Delete it to have it built anew."
            ) from error
        self.fingerprint: str = description["fingerprint"]
        """sha256 of relative paths and lengths, which doesn't depend on where the data set lies."""
        self.classes: list[str] = description["classes"]
        self._shards: list[str] = description["shards"]
        self._open_shards: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[Index], tuple[Path, Path]]:
        return Index, (self.folder, self.root)

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
        if self._shards:
            return []
        with os.scandir(self.root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        return [name for name in names if not name.startswith(".") and name not in self.classes]

    def read(self, i: int) -> bytes:
        """Reads the bytes of a sample. Tries again, after a pause, where the storage fails.

        Raises:
            BadImage: the file is gone, forbidden, shorter than the index recorded, or longer than MAX_BYTES.
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
        if not self._shards:
            descriptor = _open(self.path(i))
            try:
                return _pread(descriptor, length, 0)
            finally:
                os.close(descriptor)
        if file not in self._open_shards:
            if len(self._open_shards) == OPEN_SHARDS:
                os.close(self._open_shards.popitem(last=False)[1])
            self._open_shards[file] = _open(os.path.join(self.root, self._shards[file]))
        self._open_shards.move_to_end(file)
        return _pread(self._open_shards[file], length, offset)

    def _check_root(self) -> None:
        try:
            there = os.stat(self.root).st_dev == self._device
        except OSError:
            there = False
        if not there:
            raise DataError(
                f"The folder {self.root} is gone or no longer mounted. Start the same command when it is "
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


Images = Index | Selection
"""Images that are read by their place."""


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe must not hold up the run


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    while len(data) < length and (more := os.pread(descriptor, length - len(data), offset + len(data))):
        data += more
    return data


def open_index(source: str, cache: Path) -> Index:
    """Opens the index of the data set at `source`: its own (`source/index`), or else the one in `cache`.

    The one in `cache` is built where it is missing or of another folder. Images added later are not seen, on
    purpose. Rank 0 calls first, the others after a barrier, so that one process builds.

    Raises:
        DataError: the data set is no folder; or see `build_index` and `Index`.
    """
    root = Path(os.path.abspath(source))
    if not root.is_dir():
        raise DataError(f"The data set {source} is not a folder that this host can see.")
    if (root / "index" / "index.json").is_file():
        return Index(root / "index", root)
    recorded = cache / "index.json"
    if not recorded.is_file() or json.loads(recorded.read_text()).get("root") != str(root):
        build_index(root, cache)
    return Index(cache, root)
