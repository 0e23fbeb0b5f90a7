"""Few labels: the images that a list names, or some of each class by a keyed draw. Nothing imports torch."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapet_ds.data.index import Index
from mapet_ds.draws import Purpose, uniforms
from mapet_ds.errors import DataError

Places = NDArray[np.int64]
"""[n] ascending places in an index."""


class Few(NamedTuple):
    """A choice of images whose labels are used, in one draw or several."""

    words: str
    figures: dict[str, Any]
    """What it is, as a result says it."""
    draws: list[Places]


def _lines(file: Path, knob: str) -> list[str]:
    """What a list names, each once, in its order."""
    try:
        names = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{knob} = {file} can't be read as a list of file names: {error}.") from error
    if not (names := list(dict.fromkeys(filter(None, names)))):
        raise DataError(f"{knob} = {file} is empty: it names an image a line, e.g. n01440764_10026.JPEG.")
    return names


def _found(index: Index, names: list[str], named: str) -> dict[str, int]:
    """The place of each name that the set has: of its first image of that path."""
    wanted, depths, found = set(names), sorted({name.count("/") for name in names}), dict[str, int]()
    for place in range(len(index)):
        parts = index.path(place).split("/")
        for depth in depths:
            name = "/".join(parts[-depth - 1 :])
            if name not in wanted or (first := found.setdefault(name, place)) == place:
                continue
            if index.path(first) != index.path(place):
                raise DataError(
                    f"{named}: {name} may be {index.path(first)} or {index.path(place)}. Write the class's "
                    "folder before each name, e.g. n01440764/1.JPEG."
                )
    return found


def listed(index: Index, file: Path, named: tuple[str, str], max_missing: float) -> Few:
    """The images that a text file names, one a line, by file name or by the end of the path.

    Names that the set lacks are left out. Their number, and that of classes without a label, is said.

    named: the user's words for the list and for the set, for the sentences.
    max_missing: the largest share of the names, rounded up, that the set may lack.

    Raises:
        DataError: the list is empty or can't be read, names no one image, or more than the set has.

    Source: the published 1 % and 10 % of ImageNet are such lists: SimCLR, Chen et al., arXiv 2002.05709.
    """
    knob, of_set = named
    names = _lines(file, knob)
    found = _found(index, names, f"{knob} = {file}")
    if missing := [name for name in names if name not in found]:
        sentence = f"{knob} = {file}: {len(missing)} of {len(names)} names are not in {of_set}"
        sentence += f" = {index.root}, e.g. {missing[0]}"
        if len(missing) > min(math.ceil(max_missing * len(names)), len(names) - 1):
            raise DataError(
                f"{sentence}. It has {index.path(0)}: name the set that the list is of, or another list."
            )
        print(f"{sentence}: left out.", file=sys.stderr, flush=True)
    places = np.unique(np.array(list(found.values()), np.int64))
    unlabelled = sorted({*range(len(index.classes))} - {*index.labels()[places].tolist()})
    if unlabelled:
        count = f"{len(unlabelled)} of {len(index.classes)} classes"
        message = f"{knob} = {file} names no image of {count}, e.g. of {index.classes[unlabelled[0]]}."
        print(message, file=sys.stderr, flush=True)
    figures = {"labels": file.name, "names": len(names), "names_missing": len(missing)}
    return Few(f"the {len(places)} labels of {file.name}", figures, [places])


def drawn(index: Index, shots: int, seed: int, draw: int, named: tuple[str, str]) -> Places:
    """So many images of each class. Those of fewer shots, of the same seed and draw, are among them.

    named: the user's words for the number and for the set, for the sentences.

    Raises:
        DataError: a class has fewer images.
    """
    knob, of_set = named
    labels = index.labels().astype(np.int64)
    counts = np.bincount(labels, minlength=len(index.classes))
    if (short := np.flatnonzero(counts < shots)).size:
        first = short[0]
        raise DataError(
            f"{knob} = {shots}: {short.size} of {len(counts)} classes of {of_set} = {index.root} have fewer "
            f"images, e.g. {index.classes[first]} has {counts[first]}. Lower it."
        )
    numbers = uniforms(seed, Purpose.LABELS, draw, 0, len(labels), 1)[:, 0]
    order = np.lexsort((numbers, labels))  # class by class, each by its numbers
    rank = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    return np.sort(order[rank < shots])


def shot_draws(index: Index, shots: int, seed: int, draws: int, named: tuple[str, str]) -> Few:
    """So many images of each class, in draws 0 to draws - 1. See `drawn`."""
    places = [drawn(index, shots, seed, draw, named) for draw in range(draws)]
    words = f"{shots} label{'s' if shots > 1 else ''} a class"
    return Few(words, {"shots": shots, "seed": seed}, places)
