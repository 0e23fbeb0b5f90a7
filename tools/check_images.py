"""Look at a data set as a run would: what is taken, passed over and refused, and which images are unreadable.

Prints path, tab, reason of each image that can't be decoded, and then what the data set is made of: formats,
sizes, classes, images with the bytes of another, also between training and validation (--val).

Checks the structure of every image, as a run does before decoding; --decode also decodes each whole.
Exit code 0: all are readable, 1: some are not, 2: the data set can't be used, for the reason that is printed.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from mapet_ds.data.index import open_index
from mapet_ds.data.survey import Survey, survey
from mapet_ds.errors import DataError
from mapet_ds.files import whole_file
from mapet_ds.results.report.dataset import render, sentences
from mapet_ds.terminal import answer, number, option_parser

ESCAPED = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


def look(source: str, cache: Path, arguments: argparse.Namespace) -> Survey:
    """Lists and surveys a data set; prints its unreadable images in the order of the index."""
    index = open_index(source, cache)
    with tqdm(total=len(index), unit=" images", file=sys.stderr) as bar:
        for item in survey(index, arguments.decode, arguments.jobs):
            if isinstance(item, Survey):
                return item
            done, bad = item
            for place, reason in bad:
                path = index.path(place).translate(ESCAPED)
                bar.write(f"{path}\t{reason.translate(ESCAPED)}", file=sys.stdout)
            bar.update(done)
    raise AssertionError("a survey ends with its result")


def check(arguments: argparse.Namespace) -> int:
    """Checks a data set, and another beside it; gives 1 where images are unreadable, else 0."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
    out: Path | None = arguments.html
    if out and (not out.absolute().parent.is_dir() or out.is_dir()):
        raise DataError(f"--html {out} can't be written: name a file in a folder that is there.")
    with tempfile.TemporaryDirectory() as cache:
        train = look(arguments.folder, Path(cache) / "train", arguments)
        val = look(arguments.val, Path(cache) / "val", arguments) if arguments.val else None
        for line in sentences(train, val):
            print(line, file=sys.stderr)
        if out:
            with whole_file(out) as beside:
                beside.write_text(render(train, val), encoding="utf-8", errors="backslashreplace")
    return 1 if train.bad or (val and val.bad) else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__)
    option = parser.add_argument
    option("folder", help="images, or tar shards; or what else data.train may name (docs/data.md)")
    option("--val", metavar="FOLDER", help="another data set, which must not share images with the first")
    option("--html", type=Path, metavar="FILE", help="a page with examples of each kind to write")
    option("--decode", action="store_true", help="decode every image too (slower)")
    cores = len(os.sched_getaffinity(0))
    option("--jobs", type=number(int, 1), default=cores, help="processes (default: one per core)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    sys.exit(answer(lambda: check(words), writes=words.html))
