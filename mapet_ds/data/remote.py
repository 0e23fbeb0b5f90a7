"""Shards in an object store or behind a web server, read by ranges of bytes through fsspec.

The folder must hold its index, as tools/make_shards.py writes it, so that no shard is read to be listed.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import posixpath
import sys
from pathlib import Path
from typing import Any

from mapet_ds.data.range_cache import RangeCache
from mapet_ds.errors import DataError
from mapet_ds.files import whole_folder

INDEX_FILES = ("samples.npy", "path_ends.npy", "paths.bin")
VERSION = (
    "ETag", "etag", "Content-MD5", "md5Hash", "content_md5", "blob_id", "generation", "VersionId",
    "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created", "size",
)  # fmt: skip
"""What stores tell of a file that changes with its bytes."""


def is_remote(source: str) -> bool:
    """Whether a source is an address: `s3://bucket/folder`, `hf://datasets/name`, `https://host/folder`."""
    return "://" in source


class Remote:
    """The files below a remote folder. It is connected at the first read, in the process that reads."""

    def __init__(
        self, url: str, ranges: RangeCache | None = None, versions: dict[str, str] | None = None
    ) -> None:
        """ranges: keeps what was read, of the files whose version `versions` names."""
        self.url, self.ranges, self.versions = url.rstrip("/"), ranges, versions or {}
        self._system: Any = None
        self._errors: tuple[type[BaseException], ...] = (OSError, asyncio.TimeoutError)

    def prepare(self) -> None:
        """Makes the cache ready, without what it holds of earlier versions; see `RangeCache.prepare`."""
        if self.ranges:
            self.ranges.prepare({f"{self.url}/{name}": version for name, version in self.versions.items()})

    def _opened(self) -> tuple[Any, str]:
        """The file system, and the folder's path in it."""
        import fsspec  # only where data is remote

        if self._system is None:
            try:
                self._system = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise DataError(f"{self.url} can't be read: {error}.") from error
            if web := sys.modules.get("aiohttp"):  # what https raises
                self._errors += (web.ClientError,)
        return self._system

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Reads bytes of a file; fewer where it ends before.

        Raises:
            OSError: the store can't be reached, or the file is not there.
            DataError: the store gives more than it was asked for.
        """
        file, version = f"{self.url}/{name}", self.versions.get(name, "")
        if self.ranges and (kept := self.ranges.get(file, version, offset, length)) is not None:
            return kept
        system, folder = self._opened()
        try:
            data = system.cat_file(posixpath.join(folder, name), start=offset, end=offset + length)
        except self._errors as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        if len(data) > length:
            raise DataError(
                f"{file} gives {len(data):,} bytes where {length:,} were asked for: its server "
                "knows no ranges of bytes. Serve the shards by one that does, or copy them to a disk."
            )
        if self.ranges and len(data) == length:
            self.ranges.put(file, version, offset, data)
        return data

    def looks(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """What the store tells of each of these files, its `size` among it; nothing of one that is not there.

        A store tells all of them in one listing. A web server, which lists none or without lengths, is asked
        for each.

        Raises:
            DataError: it can't be reached.
        """
        system, folder = self._opened()
        try:
            entries = system.ls(folder, detail=True)
        except self._errors:
            entries = []
        listed = {posixpath.basename(entry["name"].rstrip("/")): entry for entry in entries}
        found = {name: listed.get(name, {}) for name in names}
        for name in (name for name, look in found.items() if look.get("size") is None):
            try:
                found[name] = system.info(posixpath.join(folder, name))
            except FileNotFoundError:
                continue
            except self._errors as error:
                raise DataError(f"{self.url}/{name} can't be looked at: {error}.") from error
        return found

    def copy_index(self, cache: Path) -> None:
        """Copies the index of the folder into `cache`, unless the same one is there; one process calls it.

        Raises:
            DataError: there is none, it does not fit the shards beside it, or the store can't be reached.
        """
        system, folder = self._opened()
        try:
            described = json.loads(system.cat_file(posixpath.join(folder, "index", "index.json")))
        except (*self._errors, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            if not isinstance(error, (FileNotFoundError, ValueError)):
                raise DataError(
                    f"{self.url} can't be reached ({reason}). See to the address, the network and the rights."
                ) from error
            raise DataError(
                f"{self.url} has no index that can be read ({reason}). Pack the images with "
                "tools/make_shards.py and copy the whole folder there, its folder `index` too."
            ) from error
        looks = self._checked(described)
        described |= {"root": self.url, "versions": {name: _version(look) for name, look in looks.items()}}
        here = cache / "index.json"
        before = json.loads(here.read_bytes()) if here.is_file() else {}
        if before == described:
            return
        if before.get("root") == self.url and (then := before.get("versions")):
            changed = [name for name, version in described["versions"].items() if then.get(name) != version]
            if changed:
                print(
                    f"{self.url}: {len(changed)} of {len(looks)} shards have changed since the last start, "
                    f"e.g. {changed[0]}.",
                    file=sys.stderr,
                    flush=True,
                )
        with whole_folder(cache) as written:
            for name in INDEX_FILES:
                try:
                    system.get_file(posixpath.join(folder, "index", name), str(written / name))
                except self._errors as error:
                    raise DataError(f"{self.url}/index/{name} can't be copied: {error}.") from error
            (written / "index.json").write_text(json.dumps(described, indent=1))

    def _checked(self, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The looks at the shards; refuses an index of others than those that lie beside it."""
        system, folder = self._opened()
        looks, state = self.looks(described["shards"]), posixpath.join(folder, "index", "state.json")
        lengths = json.loads(system.cat_file(state)) if system.exists(state) else {}
        for name in described["shards"]:
            now = looks[name].get("size")
            then = lengths.get(name, [now])[0]
            if now is None or now != then:
                problem = "not there" if now is None else f"of {now:,} bytes, of {then:,} when it was listed"
                raise DataError(
                    f"{self.url}/{name} is {problem}: the index beside the shards is of others. Copy the "
                    "whole folder anew, its folder `index` too."
                )
        return looks


def _version(look: dict[str, Any]) -> str:
    """A name for a file's bytes, another one when what the store tells of it has changed."""
    told = [(key, str(look[key])) for key in VERSION if look.get(key) is not None]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
