"""Masks of class ids: the one of each image, read from its PNG, and what the ids mean.

An id becomes its class, 0 and up, or VOID, which counts nowhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mapet_ds.config.segment import MaskedDataConfig
from mapet_ds.data.formats import BadImage, inspect
from mapet_ds.data.index import Index
from mapet_ds.errors import DataError
from mapet_ds.launch import Ranks

Split = Literal["train", "val"]
VOID, UNKNOWN = -1, -2
IDS = 2**16
"""Number of ids that a 16-bit PNG can hold."""
MODES = ("L", "P", "1", "I", "I;16", "I;16B")
"""Pillow's modes whose one number a pixel is an id."""
ENDINGS = {"ade20k": ("", ""), "cityscapes": ("_leftImg8bit", "_gtFine_labelIds"), None: ("", "")}
"""What names of images and of masks end with behind their common part, by data.release."""
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
"""Cityscapes' 19 scored classes and their ids; all other ids are void."""


class Classes(NamedTuple):
    """The classes of a data set."""

    names: list[str]
    table: NDArray[np.int16]
    """[IDS] the class of each id, VOID, or UNKNOWN."""


def _names(data: MaskedDataConfig) -> list[str] | None:
    """The names in the file of classes; None where there is none."""
    if data.release == "ade20k":
        path = Path(data.train) / "objectInfo150.txt"
        lines = path.read_text().splitlines()[1:] if path.is_file() else []
        return [line.split("\t")[-1].strip() for line in lines] or [str(i) for i in range(150)]
    masks = Path(data.masks_of("train"))
    beside = [path for path in (masks / "classes.txt", masks.parent / "classes.txt") if path.is_file()]
    paths = [Path(data.classes)] if data.classes else beside
    if not paths:
        return None
    names = [line.strip() for line in paths[0].read_text().rstrip().splitlines()]
    if wrong := [name for name in names if not name or names.count(name) > 1]:
        what = f"{wrong[0]} stands there twice" if wrong[0] else "a line is empty"
        raise DataError(f"{paths[0]}: {what}; a line is the name of one class, in the order of ids.")
    return names


def classes_of(data: MaskedDataConfig) -> Classes:
    """The names of a data set's classes, and what each id of its masks means.

    Raises:
        DataError: their number is not known, or there are two that differ.
    """
    table = np.full(IDS, UNKNOWN, np.int16)
    if data.release == "cityscapes":
        names = list(CITYSCAPES)
        table[:] = VOID
        table[list(CITYSCAPES.values())] = np.arange(len(names))
    else:
        names = _names(data)
        if names is None and data.num_classes is None:
            raise DataError(
                f"The number of classes of data.train_masks = {data.train_masks} is not known: set "
                "data.num_classes, or put a classes.txt, a name a line in the order of ids, among the masks."
            )
        names = [str(i) for i in range(data.num_classes or 0)] if names is None else names
        low = 1 if data.reduce_zero_label or data.release == "ade20k" else 0
        table[:low] = VOID
        table[low : low + len(names)] = np.arange(len(names))
        if data.void_id is not None:
            if table[data.void_id] >= 0:
                raise DataError(
                    f"data.void_id = {data.void_id} is the id of a class too, since {len(names)} have the "
                    f"ids {low} to {low + len(names) - 1}: set another, or data.void_id=null."
                )
            table[data.void_id] = VOID
    if data.num_classes not in (None, len(names)):
        raise DataError(
            f"data.num_classes = {data.num_classes}, but {len(names)} classes are named ({names[0]}, ...). "
            "Change one of the two."
        )
    return Classes(names, table)


def known_classes(data: MaskedDataConfig, names: list[str]) -> Classes:
    """The classes of a data set for a segmenter that knows these names, or numbers in their place.

    Raises:
        DataError: the data set names others, or another number of them.
    """
    if data.release is None and _names(data) is None and data.num_classes is None:
        return classes_of(dataclasses.replace(data, num_classes=len(names)))._replace(names=names)
    found = classes_of(data)
    if len(found.names) != len(names):
        raise DataError(
            f"data.val = {data.val} has {len(found.names)} classes, the segmenter {len(names)}: "
            f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}. It can only be judged by its own."
        )
    others = [i for i, pair in enumerate(zip(found.names, names)) if pair[0] != pair[1]]
    numbers = [str(i) for i in range(len(names))]
    if others and numbers not in (found.names, names):
        i = others[0]
        raise DataError(
            f"data.val = {data.val}: class {i} is {found.names[i]}, and the segmenter's is {names[i]}; "
            f"{len(others)} of {len(names)} differ. If only words do, name the run's file: data.classes=FILE."
        )
    return found._replace(names=names)


def _pngs(folder: str, ending: str) -> dict[str, str]:
    """Name without its ending -> path, both below the folder, of the masks in it."""
    found, ending = {}, f"{ending}.png"
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(ending.lower()) and not file.startswith("."):
                below = os.path.relpath(os.path.join(path, file), folder)
                found[below[: -len(ending)]] = below
    return found


class Masks:
    """The masks of an index's images. It pickles, for loader workers."""

    def __init__(self, folder: str, paths: list[str], fingerprint: str, classes: Classes) -> None:
        self.folder, self.paths, self.fingerprint, self.classes = folder, paths, fingerprint, classes

    def path(self, i: int) -> str:
        """Path of the mask of the image at this place of the index."""
        return os.path.join(self.folder, self.paths[i])

    def read(self, i: int, size: tuple[int, int]) -> NDArray[np.int16]:
        """The classes [height, width] of an image of this size, (width, height).

        Raises:
            BadImage: the file is gone or damaged.
            DataError: it holds colours, is of another size, or has an id that is no class.
        """
        path = self.path(i)
        try:
            data = Path(path).read_bytes()
            inspect(data)
            with Image.open(io.BytesIO(data)) as image:
                mode, given = image.mode, image.size
                ids = np.asarray(image)
        except (BadImage, OSError, SyntaxError, ValueError) as error:
            raise BadImage(f"its mask {path}: {error}") from error
        if mode not in MODES:
            raise DataError(
                f"{path} holds colours ({mode}), where each pixel of a mask must hold a class id: save ids "
                "as 8-bit or 16-bit grey, or as the indices of a palette."
            )
        if given != size:
            raise DataError(
                f"{path} is {given[0]} x {given[1]} pixels, its image {size[0]} x {size[1]}: a mask must be "
                "as large as its image. Resize neither alone."
            )
        return self._classes(ids.astype(np.int64), path)

    def _classes(self, ids: NDArray[np.int64], path: str) -> NDArray[np.int16]:
        found = self.classes.table[np.clip(ids, 0, IDS - 1)]
        unknown = ids[found == UNKNOWN]
        if unknown.size:
            names = self.classes.names
            low = int(np.flatnonzero(self.classes.table >= 0)[0])
            raise DataError(
                f"{path} has the id {unknown.min()} in {unknown.size} pixels, but the {len(names)} classes "
                f"have the ids {low} to {low + len(names) - 1}. Set data.void_id if it means no class, "
                "data.reduce_zero_label if 0 does, or data.num_classes."
            )
        return found


def open_masks(data: MaskedDataConfig, split: Split, index: Index, classes: Classes, ranks: Ranks) -> Masks:
    """Finds the mask of each image of a split's index. Every rank must call it.

    Raises:
        DataError: an image has no mask, or images lie in shards.
    """
    folder = data.masks_of(split)
    paths, fingerprint = ranks.from_first(lambda: _paired(data, split, index))
    return Masks(folder, paths, fingerprint, classes)


def _paired(data: MaskedDataConfig, split: Split, index: Index) -> tuple[list[str], str]:
    """Each image's mask below its folder, and a sha256 of their names and lengths."""
    name, folder = f"data.{split}", data.masks_of(split)
    if index.shards or len(index.sources) > 1:
        raise DataError(f"{name} = {getattr(data, split)}: masks are found by name for one folder of images.")
    of_image, of_mask = ENDINGS[data.release]
    masks, paths, missing = _pngs(folder, of_mask), [], []
    for i in range(len(index)):
        stem = os.path.splitext(os.path.relpath(index.path(i), index.root))[0].removesuffix(of_image)
        paths.append(masks.get(stem, ""))
        missing += [] if stem in masks else [stem]
    if missing:
        raise DataError(
            f"{name} = {index.root}: {len(missing)} of {len(index)} images have no mask, e.g. "
            f"{missing[0]}{of_mask}.png is not in {folder}, which holds {len(masks)} masks. Add them, or "
            "take these images out."
        )
    sha = hashlib.sha256()
    for path in paths:
        sha.update(f"{path}\0{os.stat(os.path.join(folder, path)).st_size}\n".encode())
    return paths, sha.hexdigest()
