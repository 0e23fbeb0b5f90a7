"""List the images of a folder (or of tar shards) that can't be decoded: path, tab, reason.

Checks the structure of every image, as a run does before decoding; --decode also decodes each whole. Exit code 0: all
are readable, 1: some are not, 2: the folder can't be used.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from mapet_ds.data.formats import BadImage, inspect
from mapet_ds.data.index import Index, open_index
from mapet_ds.errors import DataError

CHUNK = 64
ESCAPED = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


def check(index: Index, decode: bool, indices: range) -> list[tuple[str, str]]:
    """(path, reason) of the unreadable ones among `indices`."""
    rule = inspect
    if decode:
        from mapet_ds.data.loader import check_decodes as rule  # only then is DALI needed
    found = []
    for i in indices:
        try:
            rule(index.read(i))
        except BadImage as reason:
            found.append((index.path(i), str(reason)))
    index.close()
    return found


def check_all(index: Index, decode: bool, jobs: int) -> int:
    """Print the unreadable images in the order of the index; their number."""
    chunks = [range(start, min(start + CHUNK, len(index))) for start in range(0, len(index), CHUNK)]
    number = 0
    with (
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(index), unit=" images", file=sys.stderr) as bar,
    ):
        for chunk, found in zip(
            chunks, pool.map(functools.partial(check, index, decode), chunks), strict=True
        ):
            for path, reason in found:
                bar.write(f"{path.translate(ESCAPED)}\t{reason.translate(ESCAPED)}", file=sys.stdout)
            number += len(found)
            bar.update(len(chunk))
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="images, or tar shards")
    parser.add_argument("--decode", action="store_true", help="decode every image too (slower)")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)"
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: at least one process is needed")
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
    try:
        with tempfile.TemporaryDirectory() as cache:
            index = open_index(arguments.folder, Path(cache) / "index")
            number = check_all(index, arguments.decode, arguments.jobs)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Unreadable: {number} of {len(index)}.", file=sys.stderr)
    return 1 if number else 0


if __name__ == "__main__":
    sys.exit(main())
