"""What data.train and its like may name: folders, shards, images, patterns, lists, each so many times.

Nothing is opened here but folders that a pattern names, so that a mistake is answered at once.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from mapet_ds.errors import DataError

REPEATED = re.compile(r"(?P<path>.*\S)\s+x(?P<repeats>[1-9]\d{0,5})", re.DOTALL)
BRACES = re.compile(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}")
MAX_EXPANDED = 1_000_000


def _one_a_line(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "\n".join(value)
    return value


Paths = Annotated[str, BeforeValidator(_one_a_line, json_schema_input_type=str | list[str])]
"""The type of a knob that names data: one text, or a list of them, which is kept as lines."""


class Source(NamedTuple):
    """One thing that is there on the disk, and how often an epoch has it."""

    path: str
    """Absolute."""
    repeats: int


def expand_braces(pattern: str) -> Iterator[str]:
    """Yields what a pattern stands for: {a,b} each word, {000..127} each number with its leading zeros."""
    found = BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    inside = found[1]
    if "," in inside:
        words: Any = inside.split(",")
    else:
        first, last = inside.split("..")
        if int(first) > int(last):
            raise DataError(f"{pattern}: {{{inside}}} counts backwards. Write the smaller number first.")
        width = len(first) if first.startswith("0") else 0
        words = (str(number).zfill(width) for number in range(int(first), int(last) + 1))
    for word in words:
        yield from expand_braces(pattern[: found.start()] + word + pattern[found.end() :])


def _there(pattern: str) -> Iterator[str]:
    """Yields the paths that a line names, in order; those of a wildcard sorted by the names' bytes."""
    if os.path.exists(pattern):  # also where its name looks like a pattern
        yield pattern
        return
    for number, path in enumerate(expand_braces(pattern)):
        if number == MAX_EXPANDED:
            raise DataError(
                f"{pattern} stands for more than {MAX_EXPANDED:,} names: name the folder, or a list."
            )
        if os.path.exists(path):
            yield path
        elif matches := glob.glob(path, recursive=True) if glob.has_magic(path) else []:
            yield from sorted(matches, key=os.fsencode)
        elif path == pattern and not glob.has_magic(path):
            raise DataError(
                f"{pattern} is not a folder that this host can see, nor a shard, an image or a list of them."
            )
        else:
            whole = "" if path == pattern else f", of {pattern},"
            raise DataError(f"{path}{whole} is not there: nothing on this host has such a name.")


def named(found: list[Source]) -> str:
    """The knob's lines that name these sources."""
    return "\n".join(path if repeats == 1 else f"{path} x{repeats}" for path, repeats in found)


def sources(text: str) -> list[Source]:
    """Gives what a knob's lines name, in order. `PATH x3` is had three times an epoch.

    Raises:
        DataError: something is not there.
    """
    found = []
    for line in filter(None, map(str.strip, str(text).split("\n"))):
        if "://" in line:  # no name of a file system: it is looked at where it is read
            found.append(Source(line, 1))
            continue
        repeated = None if os.path.exists(line) else REPEATED.fullmatch(line)
        pattern, repeats = (repeated["path"], int(repeated["repeats"])) if repeated else (line, 1)
        found += [Source(os.path.abspath(path), repeats) for path in _there(pattern)]
    return found
