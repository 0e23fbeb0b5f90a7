"""Pack images into WebDataset-style tar shards with their index: a folder, or what else data.train may name.

The shards hold the same images with the same labels (.cls, where an image has one) in the same order, or in
a random one (--shuffle_seed). The same input gives the same bytes.

Parquet files, as Hugging Face's hub has data sets, are packed too, row by row, the images' bytes untouched:

    hf download uoft-cs/cifar10 --repo-type dataset --local-dir /data/cifar10
    tools/make_shards.py '/data/cifar10/**/train-*.parquet' /data/cifar10_shards
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mapet_ds.config.sources import sources
from mapet_ds.data.formats import BadImage, content
from mapet_ds.data.index import Index, build_index, open_index
from mapet_ds.data.kinds import SUFFIXES, summary
from mapet_ds.data.parquet import Table, parquet_files
from mapet_ds.draws import IndexOrder, SampleOrder
from mapet_ds.errors import DataError
from mapet_ds.files import whole_folder
from mapet_ds.terminal import answer, number, option_parser


class Sample(NamedTuple):
    """What goes into a shard for one image."""

    name: str
    data: bytes
    label: int | str | None

    def members(self, i: int) -> Iterator[tuple[str, bytes]]:
        """(name, content). The number keeps WebDataset's keys apart."""
        folder, name = os.path.split(self.name)
        stem, _, ending = name.rpartition(".")
        if os.fsencode(ending.lower()) not in SUFFIXES:  # taken by its bytes
            ending = content(self.data) or "jpg"
        key = os.path.join(folder, f"{i:09d}" + (f"_{stem.replace('.', '_')}" if stem else ""))
        yield f"{key}.{ending.lower()}", self.data
        if self.label is not None:
            yield f"{key}.cls", str(self.label).encode()


def indexed(index: Index, order: SampleOrder) -> Iterator[tuple[int, Sample]]:
    """Yields the images of an index by number, in an order."""
    for i in map(order, range(len(index))):
        try:
            data = index.read(i)
        except BadImage as reason:
            what_to_do = "take it out of the folder, or give it back its bytes"
            raise DataError(f"{index.path(i)} {reason}; {what_to_do}.") from reason
        label = index.label(i)
        yield i, Sample(os.path.relpath(index.path(i), index.root), data, label if label >= 0 else None)
    index.close()


def write_shards(
    samples: Iterable[tuple[int, Sample]], total: int, folder: Path, max_bytes: int, max_images: int
) -> int:
    """Fills `folder` with shards of at most so many bytes of images, but one image; gives their number."""
    shards = size = images = 0
    with contextlib.ExitStack() as stack:
        shard = None
        for i, sample in tqdm(samples, total=total, unit=" images", file=sys.stderr):
            length = len(sample.data)
            if shard is None or images == max_images or size + length > max_bytes:
                stack.close()
                path = folder / f"shard-{shards:06d}.tar"
                shard = stack.enter_context(tarfile.open(path, "w", format=tarfile.GNU_FORMAT))
                shards, size, images = shards + 1, 0, 0
            for name, data in sample.members(i):
                header = tarfile.TarInfo(name)  # owner, mode and time are its constants
                header.size = len(data)
                shard.addfile(header, io.BytesIO(data))
            size, images = size + length, images + 1
    return shards


def from_parquet(files: list[str], arguments: argparse.Namespace, folder: Path, size: int) -> tuple[int, int]:
    """Fills `folder` with the rows of Parquet files as they come; gives the numbers of images and shards."""
    if arguments.shuffle_seed is not None:
        raise DataError("--shuffle_seed can't reorder Parquet rows: pack them, then pack the shards with it.")
    table = Table(files, arguments.image_column, arguments.label_column)
    samples = ((row.number, Sample("", row.data, row.label)) for row in table)
    shards = write_shards(samples, table.rows, folder, size, arguments.shard_images)
    if passed := table.findings.passed_over:
        print(f"Passed over: {summary(passed)}.", file=sys.stderr, flush=True)
    build_index(folder, folder / "index", table.classes or None)
    return len(Index(folder / "index", folder)), shards


def make_shards(arguments: argparse.Namespace) -> None:
    """Writes the shards beside the new folder, then gives them its name.

    Raises:
        DataError: the folder holds something already or lies in the source; an image can't be read.
    """
    source, out, seed = arguments.folder, Path(os.path.abspath(arguments.out)), arguments.shuffle_seed
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already and is not overwritten; name a new folder.")
    if around := next((path for path, _ in sources(source) if out.is_relative_to(path)), None):
        both = "which would then hold images and shards"
        raise DataError(f"{out} lies inside {around}, {both}; name a folder outside.")
    size = int(arguments.shard_size_mib * 2**20)
    with whole_folder(out, replace=False) as folder, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        if files := parquet_files(source):
            images, shards = from_parquet(files, arguments, folder, size)
        else:
            index = open_index(source, Path(scratch) / "index")
            order = IndexOrder(len(index), 0) if seed is None else SampleOrder(len(index), seed)
            images = len(index)
            shards = write_shards(indexed(index, order), images, folder, size, arguments.shard_images)
            build_index(folder, folder / "index", index.classes)
        classes = len(Index(folder / "index", folder).classes)
    print(
        f"{out}: images {images}, classes {classes}, shards {shards}. Unreadable images are "
        "in them as they are (tools/check_images.py lists them). A run that has begun on the folder does not "
        "continue on its shards."
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__)
    option = parser.add_argument
    option(
        "folder", help="images (labels: the names of the first sub-folders), a pattern, a list; docs/data.md"
    )
    option("out", type=Path, help="a new folder")
    size = "largest shard, MiB of images (default 1024)"
    option("--shard_size_mib", type=number(float, 0, above=True), default=1024, help=size)
    option("--shard_images", type=number(int, 1), default=1_000_000, help="most images in a shard")
    order = "pack in random order N (docs/cluster.md says why)"
    option("--shuffle_seed", type=number(int, 0), metavar="N", help=order)
    option("--image_column", metavar="NAME", help="Parquet: the column of the images, where several may be")
    option("--label_column", metavar="NAME", help="Parquet: the column of the labels")
    return parser.parse_args(argv)


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    sys.exit(answer(lambda: make_shards(words), writes=words.out))
