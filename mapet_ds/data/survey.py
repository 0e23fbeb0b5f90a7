"""A survey of a data set: format, size and bytes of every image, and which have the same bytes."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapet_ds.data.formats import BadImage, content, inspect
from mapet_ds.data.index import Index

CHUNK = 64
FORMATS = ["", "JPEG", "PNG", "WebP", "BMP", "TIFF"]
"""An unreadable image has the first."""
LOOK = np.dtype([("format", "u1"), ("width", "<u4"), ("height", "<u4"), ("sha256", "V16")])
"""What is kept of an image: 25 bytes."""
SMALL = 64
"""Images with a side of fewer pixels are counted as small."""


class Survey(NamedTuple):
    """What a look at every image of an index gave."""

    index: Index
    looks: NDArray[np.void]
    """[n] LOOK; zeros for an image whose bytes can't be read."""
    bad: dict[int, str]
    """Place in the index of each unreadable image -> reason."""

    def formats(self) -> dict[str, NDArray[np.int64]]:
        """The places of the readable images of each format, the most frequent first."""
        places = {name: np.flatnonzero(self.looks["format"] == i) for i, name in enumerate(FORMATS) if i}
        return dict(sorted(((k, v) for k, v in places.items() if v.size), key=lambda kind: -kind[1].size))

    def readable(self) -> NDArray[np.int64]:
        """The places of the readable images."""
        return np.flatnonzero(self.looks["format"])

    def by_class(self) -> NDArray[np.int64]:
        """Number of images of each class, the unreadable ones among them."""
        labels = self.index.labels()
        return np.bincount(labels[labels >= 0], minlength=len(self.index.classes))

    def duplicates(self) -> list[tuple[int, int]]:
        """(place, place of the first with the same bytes) of each image that repeats another one's."""
        return _repeated(self.readable(), self.looks["sha256"])

    def shared(self, other: Survey) -> list[tuple[int, int]]:
        """(place here, place in the other survey) of each image here whose bytes the other has too."""
        mine, theirs = self.readable(), other.readable()
        digests = np.concatenate([other.looks["sha256"][theirs], self.looks["sha256"][mine]])
        pairs = _repeated(np.arange(len(digests)), digests)
        return [(int(mine[i - len(theirs)]), int(theirs[j])) for i, j in pairs if j < len(theirs) <= i]


def _repeated(places: NDArray[np.int64], digests: NDArray[np.void]) -> list[tuple[int, int]]:
    """(place, the first place with the same digest) of each of the places whose digest came before."""
    if not len(places):
        return []
    keys = np.ascontiguousarray(digests[places]).view(np.dtype([("high", "<u8"), ("low", "<u8")]))
    order = np.lexsort((places, keys["low"], keys["high"]))
    keys, places = keys[order], places[order]
    new = np.concatenate([[True], keys[1:] != keys[:-1]])
    first = places[np.flatnonzero(new)][np.cumsum(new) - 1]
    return sorted((int(i), int(j)) for i, j in zip(places[~new], first[~new]))


def _look(index: Index, decode: bool, places: range) -> tuple[bytes, list[tuple[int, str]]]:
    """The looks at these places as bytes, and (place, reason) of the unreadable images among them."""
    looks, bad = np.zeros(len(places), LOOK), []
    if decode:  # only then is DALI needed
        from mapet_ds.data.loader import check_decodes as check
    else:
        check = len
    for row, i in enumerate(places):
        try:
            data = index.read(i)
            width, height = inspect(data)
            check(data)
            digest = np.void(hashlib.sha256(data).digest()[:16])
            looks[row] = FORMATS.index(content(data) or "BMP"), width, height, digest
        except BadImage as reason:
            bad.append((i, str(reason)))
    index.close()
    return looks.tobytes(), bad


def survey(index: Index, decode: bool, jobs: int) -> Iterator[tuple[int, list[tuple[int, str]]] | Survey]:
    """Yields, in the order of the index, how many more images were looked at and which are unreadable.

    The last item is the survey.

    decode: whether to decode each image too. jobs: processes.
    """
    places = [range(start, min(start + CHUNK, len(index))) for start in range(0, len(index), CHUNK)]
    looks, bad, end = np.zeros(len(index), LOOK), dict[int, str](), 0
    work = functools.partial(_look, index, decode)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for chunk, (found, new) in zip(places, pool.map(work, places), strict=True):
            looks[end : end + len(chunk)] = np.frombuffer(found, LOOK)
            end += len(chunk)
            bad |= dict(new)
            yield len(chunk), new
    yield Survey(index, looks, bad)
