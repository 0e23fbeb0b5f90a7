"""The images of Parquet files as Hugging Face's hub has them: a column of bytes, and one of labels.

Parquet compresses pages of many rows, so that one image can't be read without its neighbours. Training reads
images in random order: tools/make_shards.py packs them into tars first. No other file imports pyarrow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mapet_ds.config.sources import sources
from mapet_ds.data.kinds import BEGINNING, Findings, by_content
from mapet_ds.data.listing import refuse_both_splits
from mapet_ds.errors import DataError

ROWS = 64
"""Rows that are held at once."""
SUFFIX = ".parquet"


class Row(NamedTuple):
    """An image of a Parquet file, its bytes untouched."""

    number: int
    """Its place among the rows of all files."""
    data: bytes
    label: int | str | None


def parquet_files(named: str) -> list[str]:
    """The Parquet files that a knob's lines name, in order; none where they name something else.

    Raises:
        DataError: something is not there, or a folder holds files of several splits.
    """
    files = []
    for path, repeats in sources(named):
        if os.path.isdir(path):
            inside = sorted(map(os.fsencode, map(str, Path(path).rglob(f"*{SUFFIX}"))))
            refuse_both_splits(os.fsencode(path), inside, SUFFIX)
            files += [os.fsdecode(file) for file in inside] * repeats
        elif path.endswith(SUFFIX):
            files += [path] * repeats
    return files


class Table:
    """Parquet files of one schema, read in order. Use it where pyarrow is installed (`mapet_ds[parquet]`)."""

    def __init__(self, files: list[str], image: str | None = None, label: str | None = None) -> None:
        """Looks at the schema of the first file.

        image, label: the columns; by default those that the schema tells by their types and names.

        Raises:
            DataError: pyarrow is missing, a file is damaged, or no column or several may be meant.
        """
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ModuleNotFoundError as error:
            cure = "python -m pip install 'mapet_ds[parquet]'"
            raise DataError(f"{files[0]} needs pyarrow to be read: {cure}.") from error
        self._open, self._faults = ParquetFile, (ArrowException, OSError)
        self.files, self.findings = files, Findings()
        opened = [self._opened(file) for file in files]
        self.rows = sum(file.metadata.num_rows for file in opened)
        schema = opened[0].schema_arrow
        self.image = self._column("image", image, schema, [each.name for each in schema if _is_image(each)])
        numbers = [each.name for each in schema if each.name in ("label", "labels", "cls", "fine_label")]
        self.label = self._column("label", label, schema, numbers) if label or numbers else None
        self.classes = _class_names(schema, self.label)

    def _opened(self, file: str) -> Any:
        try:
            return self._open(file)
        except self._faults as error:
            raise DataError(f"{file} can't be read as Parquet: {error}") from error

    def _column(self, what: str, asked: str | None, schema: Any, found: list[str]) -> str:
        """The one column that is meant."""
        if asked and asked not in schema.names:
            raise DataError(f"{self.files[0]} has no column {asked}; it has {', '.join(schema.names)}.")
        if not asked and len(found) != 1:
            which = f"may be {' or '.join(found)}" if found else f"is none of {', '.join(schema.names)}"
            raise DataError(f"{self.files[0]}: the {what} {which}. Name its column: --{what}_column NAME.")
        return asked or found[0]

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows that hold an image, with the memory of a few of them; `findings` has the others.

        Raises:
            DataError: a file is damaged or of another schema, or a label is neither a number nor a name.
        """
        columns, number = [self.image, *([self.label] if self.label else [])], 0
        for name in self.files:
            file = self._opened(name)
            if missing := {*columns} - {*file.schema_arrow.names}:
                raise DataError(f"{name} has no column {missing.pop()}, which {self.files[0]} has.")
            try:
                for batch in file.iter_batches(ROWS, columns=columns):
                    for row in batch.to_pylist():
                        if data := self._bytes(f"{name}, row {number}", row[self.image]):
                            yield Row(number, data, self._label(f"{name}, row {number}", row))
                        number += 1
            except self._faults as error:
                raise DataError(f"{name} is damaged after row {number}: {error}") from error

    def _bytes(self, where: str, value: Any) -> bytes | None:
        """The bytes of an image; None where the row has none, which is noted."""
        path = value.get("path") if isinstance(value, dict) else None
        data = value.get("bytes") if isinstance(value, dict) else value
        if data:
            kind = by_content(b"", data[:BEGINNING])
        else:
            kind = "rows with a path and without bytes" if path else "empty rows"
        if kind == "image":
            return data
        self.findings.pass_over(kind, where.encode())
        return None

    def _label(self, where: str, row: dict[str, Any]) -> int | str | None:
        label = row[self.label] if self.label else None
        if label is not None and not isinstance(label, int | str):
            raise DataError(f"{where}: its {self.label} = {label!r} is neither a number nor a name.")
        return None if label == -1 else label  # the hub's test sets have no labels


def _is_image(field: Any) -> bool:
    """Whether a column may hold images: the hub's {bytes, path}, or bare bytes."""
    inside = {field.type.field(i).name for i in range(field.type.num_fields)}
    return "bytes" in inside or str(field.type) in ("binary", "large_binary")


def _class_names(schema: Any, label: str | None) -> list[str]:
    """The names of the labels, where the hub's metadata have them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return list(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return []
