"""List the images of a folder (or of tar shards) that can't be decoded: path, tab, reason.

Checks the structure of every image, as a run does before decoding; --decode also decodes each whole.
Exit code 0: all are readable, 1: some are not, 2: the folder can't be used.
"""

from __future__ import annotations

import argparse
import functools
import io
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from mapet_ds.data.formats import BadImage, inspect
from mapet_ds.data.index import Index, open_index
from mapet_ds.terminal import answer, number, option_parser

CHUNK = 64
ESCAPED = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


def unreadable(index: Index, decode: bool, indices: range) -> list[tuple[str, str]]:
    """(path, reason) of the unreadable images among `indices`."""
    if decode:  # only then is DALI needed
        from mapet_ds.data.loader import check_decodes as check
    else:
        check = inspect
    bad = []
    for i in indices:
        try:
            check(index.read(i))
        except BadImage as reason:
            bad.append((index.path(i), str(reason)))
    index.close()
    return bad


def check_all(index: Index, decode: bool, jobs: int) -> int:
    """Prints the unreadable images in the order of the index; gives their number."""
    chunks = [range(start, min(start + CHUNK, len(index))) for start in range(0, len(index), CHUNK)]
    total, check = 0, functools.partial(unreadable, index, decode)
    with (
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(index), unit=" images", file=sys.stderr) as bar,
    ):
        for chunk, bad in zip(chunks, pool.map(check, chunks), strict=True):
            for path, reason in bad:
                bar.write(f"{path.translate(ESCAPED)}\t{reason.translate(ESCAPED)}", file=sys.stdout)
            total += len(bad)
            bar.update(len(chunk))
    return total


def check_folder(arguments: argparse.Namespace) -> int:
    """Checks the images of a folder or of shards; gives 1 where some are unreadable, else 0."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
    with tempfile.TemporaryDirectory() as cache:
        index = open_index(arguments.folder, Path(cache) / "index")
        total = check_all(index, arguments.decode, arguments.jobs)
    print(f"Unreadable: {total} of {len(index)}.", file=sys.stderr)
    return 1 if total else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("folder", help="images, or tar shards")
    parser.add_argument("--decode", action="store_true", help="decode every image too (slower)")
    cores = len(os.sched_getaffinity(0))
    jobs = "processes (default: one per core)"
    parser.add_argument("--jobs", type=number(int, 1), default=cores, help=jobs)
    return parser.parse_args(argv)


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    sys.exit(answer(lambda: check_folder(words)))
