"""Pack an image folder into WebDataset-style tar shards (image, and .cls where it has a label) with their index beside.

The shards hold the same images with the same labels in the same order, or in a random one (--shuffle_seed). The same input
gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mapet_ds.data.formats import BadImage
from mapet_ds.data.index import Index, build_index, open_index
from mapet_ds.draws import IndexOrder, SampleOrder
from mapet_ds.errors import DataError
from mapet_ds.files import whole_folder


def members(index: Index, i: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of what goes into a shard for one image. The number keeps WebDataset's keys apart."""
    folder, name = os.path.split(os.path.relpath(index.path(i), index.root))
    stem, _, suffix = name.rpartition(".")
    key = os.path.join(folder, f"{i:09d}_{stem.replace('.', '_')}")
    try:
        yield f"{key}.{suffix.lower()}", index.read(i)
    except BadImage as reason:
        raise DataError(
            f"{index.path(i)} {reason}; take it out of the folder, or give it back its bytes."
        ) from reason
    if index.label(i) >= 0:
        yield f"{key}.cls", str(index.label(i)).encode()


def write_shards(index: Index, order: SampleOrder, folder: Path, max_bytes: int, max_images: int) -> int:
    """Fill `folder` with shards of at most so many bytes of images (but at least one image); their number."""
    number, size, images, shard = 0, 0, 0, None
    for i in tqdm(map(order, range(len(index))), total=len(index), unit=" images", file=sys.stderr):
        content = list(members(index, i))
        if shard is None or images == max_images or size + len(content[0][1]) > max_bytes:
            if shard:
                shard.close()
            shard = tarfile.open(folder / f"shard-{number:06d}.tar", "w", format=tarfile.GNU_FORMAT)
            number, size, images = number + 1, 0, 0
        for name, data in content:
            header = tarfile.TarInfo(name)  # owner, mode and time are its constants
            header.size = len(data)
            shard.addfile(header, io.BytesIO(data))
        size, images = size + len(content[0][1]), images + 1
    shard.close()
    index.close()
    return number


def make_shards(source: str, out: Path, max_bytes: int, max_images: int, seed: int | None) -> str:
    """Write the shards beside `out`, then give them its name; a sentence that says what was written.

    Raises:
        DataError: `out` holds something already or lies in the source; an image can't be read.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already and is not overwritten; name a new folder.")
    if out.is_relative_to(os.path.abspath(source)):
        raise DataError(
            f"{out} lies inside {source}, which would then hold images and shards; name a folder outside."
        )
    with tempfile.TemporaryDirectory() as scratch, whole_folder(out) as written:
        index = open_index(source, Path(scratch) / "index")
        order = IndexOrder(len(index), 0) if seed is None else SampleOrder(len(index), seed)
        number = write_shards(index, order, written, max_bytes, max_images)
        build_index(written, written / "index", index.classes)
    return (
        f"{out}: images {len(index)}, classes {len(index.classes)}, shards {number}. Unreadable images are in them as they are "
        "(tools/check_images.py lists them). A run that has begun on the folder does not continue on its shards."
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="images; labels are the names of the first sub-folders")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--shard_size_mib", type=float, default=1024, help="largest shard, MiB of images (default 1024)"
    )
    parser.add_argument("--shard_images", type=int, default=1_000_000, help="most images in a shard")
    parser.add_argument(
        "--shuffle_seed", type=int, metavar="N", help="pack in random order N (docs/cluster.md says why)"
    )
    arguments = parser.parse_args()
    if arguments.shard_size_mib <= 0 or arguments.shard_images < 1 or (arguments.shuffle_seed or 0) < 0:
        parser.error("--shard_size_mib and --shard_images must be positive, --shuffle_seed at least 0")
    try:
        max_bytes = int(arguments.shard_size_mib * 2**20)
        print(
            make_shards(
                arguments.folder, arguments.out, max_bytes, arguments.shard_images, arguments.shuffle_seed
            )
        )
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{arguments.out} can't be written as a folder: {error}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
