"""Token ids on disk: tools/tokenize_images.py writes them for a whole index, training needs no teacher then.

    OUT/ids.bin    uint16, little-endian, [images, patches]: a row for each image, in the index's order
        ids.json   settings, tokenizer and index; images without ids; a checksum of each chunk of rows
        index/     the index of the images

A folder that has its final name is whole: it grows as OUT.partial and is renamed. Nothing here imports torch
or DALI, so that a folder of another recipe is refused in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapet_ds.config.running import flatten
from mapet_ds.config.sections import Config
from mapet_ds.errors import ConfigError
from mapet_ds.files import flush, write_whole

NO_ID = 0xFFFF
"""Fills the row of an image that could not be read, so that at most 65535 ids are left."""
CHUNKS = 256
"""Number of parts of the rows, each with a checksum. A pass that is killed loses less than one of them."""


def check_storable(config: Config) -> None:
    """Refuses settings whose ids can't be a function of the image alone, or don't fit 16 bits.

    Raises:
        ConfigError: crops are random, or there are too many ids.
    """
    if config.data.crop != "center":
        raise ConfigError(
            f"tokenizer.ids = {config.tokenizer.ids} is for one crop of each image, data.crop = "
            f"{config.data.crop} makes new ones every epoch: set data.crop=center, or leave tokenizer.ids "
            "empty."
        )
    if config.tokenizer.vocab_size > NO_ID:
        raise ConfigError(
            f"tokenizer.vocab_size = {config.tokenizer.vocab_size}: at most {NO_ID} ids can be stored, in 16 "
            "bits each. Leave tokenizer.ids empty to compute them on the fly."
        )


def settings_of(config: Config) -> dict[str, Any]:
    """Lists the settings that decide about ids, by name.

    The checksum of its bytes stands for tokenizer.path; None where there is no file.
    """
    path = Path(config.tokenizer.path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    teacher = {f"teacher.{name}": value for name, value in dataclasses.asdict(config.teacher).items()}
    del teacher["teacher.shard"], teacher["teacher.ahead"]
    return {
        "data.crop": config.data.crop,
        **({"data.exif_orientation": True} if config.data.exif_orientation else {}),
        "patches along a side": config.grid,
        "tokenizer.name": config.tokenizer.name,
        "tokenizer.vocab_size": config.tokenizer.vocab_size,
        **teacher,
        "the sha256 of tokenizer.path": sha256,
    }


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _difference(then: dict[str, Any], now: dict[str, Any], free: Iterable[str] = ()) -> str | None:
    """The first setting that differs, with both values. A tokenizer's file that is gone is not compared."""
    for name in sorted((then.keys() | now.keys()) - {*free}):
        no_file = name.startswith("the sha256") and now[name] is None
        if then.get(name) != now.get(name) and not no_file:
            return f"{name} = {str(then.get(name))[:80]}, but this recipe has {str(now.get(name))[:80]}"
    return None


class StoredIds:
    """The ids of a whole index, memory-mapped: opening them costs the same for any number of images.

    rows: uint16 [images, num_patches], the ids.
    settings: the settings they were computed with. identity: the tokenizer's own. fingerprint: the index's.
    unreadable: place in the index (as text) -> path and reason, of the images without ids.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens a folder that `IdsWriter` has finished. Sizes are checked here, checksums by `damaged`.

        Raises:
            ConfigError: the folder is missing, not finished, cut off, or of another kind.
        """
        self.folder = Path(os.path.abspath(folder))
        try:
            description = json.loads((self.folder / "ids.json").read_text())
            size = (self.folder / "ids.bin").stat().st_size
            self.images, self.num_patches = description["images"], description["num_patches"]
            self.settings, self.identity = description["settings"], description["identity"]
            self.fingerprint, self.unreadable = description["fingerprint"], description["unreadable"]
            self.sha256, self._chunk = description["sha256"], description["images_per_chunk"]
            chunks = -(-self.images // self._chunk)
            if size == 2 * self.images * self.num_patches and len(self.sha256) == chunks:
                rows = np.memmap(self.folder / "ids.bin", "<u2", "r", shape=(self.images, self.num_patches))
                self.rows = rows.view(np.ndarray)
                return
        except FileNotFoundError as error:
            begun = _partial(self.folder).is_dir() and not self.folder.is_dir()
            state = "is not finished" if begun else f"has no {error.filename}"
            raise ConfigError(
                f"tokenizer.ids = {folder} {state}: tools/tokenize_images.py writes it; the same command "
                "goes on where it was."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"tokenizer.ids = {folder} can't be opened: {type(error).__name__} {error}. Delete the "
                "folder and write it anew."
            ) from error
        raise ConfigError(
            f"tokenizer.ids = {folder} is damaged: ids.bin has {size} bytes for {self.images} images of "
            f"{self.num_patches} ids. Delete the folder and write it anew with tools/tokenize_images.py."
        )

    def check(self, config: Config, free: Iterable[str] = ()) -> None:
        """Refuses ids of another recipe. The teacher's weights are compared by their names, not read.

        free: names of settings that may differ.

        Raises:
            ConfigError: a setting differs; the sentence names it with both values.
        """
        if difference := _difference(self.settings, settings_of(config), free):
            raise ConfigError(
                f"tokenizer.ids = {self.folder} was written with {difference}. Write other ids into another "
                "folder with tools/tokenize_images.py and this recipe, or change the recipe."
            )

    def check_data(self, data: str, fingerprint: str) -> None:
        """Refuses ids of other images than those in the folder `data`, whose index has this fingerprint.

        Raises:
            ConfigError: the names or the lengths of files differ.
        """
        if self.fingerprint != fingerprint:
            raise ConfigError(
                f"tokenizer.ids = {self.folder} was written for other images than data.train = {data} holds "
                "(names and lengths are compared). Write ids for these into another folder with "
                "tools/tokenize_images.py, or name the other images."
            )

    def damaged(self, part: int = 0, parts: int = 1) -> int | None:
        """The first damaged chunk among part, part + parts, part + 2 * parts, ...; None if all are whole.

        Reads the rows of these chunks from the disk.
        """
        for number in range(part, len(self.sha256), parts):
            if _sha256(self.rows[number * self._chunk : (number + 1) * self._chunk]) != self.sha256[number]:
                return number
        return None


def _sha256(rows: NDArray[np.uint16]) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()


class IdsWriter:
    """Writes the rows of an index in order, from where an earlier pass was cut off. One process has one.

    done: number of rows that are safely on the disk.
    unreadable: place in the index (as text) -> path and reason.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any], images: int, num_patches: int) -> None:
        """Opens the beginning of an earlier pass, or begins one.

        about: settings, identity and fingerprint, which an earlier pass must share.

        Raises:
            ConfigError: the earlier pass is of another recipe.
        """
        self.folder = Path(os.path.abspath(folder))
        self.partial = self.make_folder(folder)
        self.images, self._chunk = images, -(-images // CHUNKS)
        self.about = json.loads(json.dumps(about))
        self.sha256: list[str] = []
        self.unreadable: dict[str, str] = {}
        self.path, self._record = self.partial / "ids.bin", self.partial / "ids.json"
        if self._record.is_file():
            self._go_on(json.loads(self._record.read_text()))
        self.done = self._next = min(len(self.sha256) * self._chunk, images)
        self._waiting = np.empty((0, num_patches), "<u2")

    @staticmethod
    def make_folder(folder: str | Path) -> Path:
        """Makes the folder that a pass writes to until it is whole. Every rank may call it.

        Raises:
            ConfigError: the folder can't be made or written.
        """
        partial = _partial(Path(os.path.abspath(folder)))
        try:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / "ids.bin").touch()
        except OSError as error:
            raise ConfigError(f"tokenizer.ids = {folder} can't be written: {error}.") from error
        return partial

    def _go_on(self, record: dict[str, Any]) -> None:
        """Takes over the chunks of an earlier pass, up to the first that hasn't its checksum."""
        then, now = (
            about["settings"]
            | flatten(about["identity"], "the tokenizer's ")
            | {"the index's fingerprint": about["fingerprint"]}
            for about in (record, self.about)
        )
        if difference := _difference(then, now):
            raise ConfigError(
                f"{self.partial} is the beginning of a pass with {difference}. Name another tokenizer.ids, "
                "or delete that folder."
            )
        self.unreadable = record["unreadable"]
        with self.path.open("rb") as file:
            for sha256 in record["sha256"]:
                rows = min(self._chunk, self.images - len(self.sha256) * self._chunk)
                if hashlib.sha256(file.read(2 * record["num_patches"] * rows)).hexdigest() != sha256:
                    break
                self.sha256.append(sha256)

    def add(self, first: int, rows: NDArray[np.uint16], unreadable: dict[int, str]) -> None:
        """Adds rows, from image `first` on. Rows that are there already or past the last image are left out.

        rows: uint16 [n, num_patches]. unreadable: place in the index -> path and reason.

        Raises:
            OSError: the disk is full or fails; `done` rows are safe.
        """
        self.unreadable |= {str(i): reason for i, reason in unreadable.items()}
        fresh = rows[self._next - first : self.images - first]
        self._next += len(fresh)
        self._waiting = np.concatenate([self._waiting, fresh])
        while len(self._waiting) >= self._chunk or (self._next == self.images and len(self._waiting)):
            self._write(self._waiting[: self._chunk])
            self._waiting = self._waiting[self._chunk :]

    def _write(self, rows: NDArray[np.uint16]) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.done * rows[0].nbytes)
            file.write(np.ascontiguousarray(rows).data)
            file.flush()
            os.fsync(file.fileno())
        self.sha256.append(_sha256(rows))
        self.done += len(rows)
        sizes = {"images": self.images, "num_patches": rows.shape[1], "images_per_chunk": self._chunk}
        unreadable = {i: self.unreadable[i] for i in sorted(self.unreadable, key=int)}
        record = {**sizes, **self.about, "unreadable": unreadable, "sha256": self.sha256}
        write_whole(self._record, json.dumps(record, indent=1))

    def finish(self) -> None:
        """Gives the folder its final name."""
        assert self.done == self.images
        self.partial.rename(self.folder)
        flush(self.folder.parent)
