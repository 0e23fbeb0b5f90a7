"""Write one self-contained HTML page about a run, or about several compared.

`python tools/report.py RUN [RUN ...] --out page.html` takes runs in progress, stopped or done. What the page
shows is in mapet_ds/results/report/page.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mapet_ds.errors import DataError
from mapet_ds.files import whole_file
from mapet_ds.results.report.history import read_record
from mapet_ds.results.report.page import Sizes, render
from mapet_ds.terminal import answer, number, option_parser


def write(arguments: Any) -> None:
    """Writes the page.

    Raises:
        DataError: no run, or --out can't be a file.
    """
    out = arguments.out
    records = [read_record(folder) for folder in arguments.runs]
    if not out.parent.is_dir() or out.is_dir():
        raise DataError(f"--out {out} can't be written: name a file in a folder that is there.")
    page = render(records, Sizes(*(getattr(arguments, name) for name in Sizes._fields)))
    with whole_file(out) as beside:
        beside.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(f"{out}: {len(page) / 2**20:.1f} MiB, {len(records)} run{'s' * (len(records) > 1)}.")


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder that a run writes to")
    parser.add_argument("--out", required=True, type=Path, metavar="HTML", help="the page to write")
    sizes = {
        "images": (8, "images shown with their maps"),
        "sample": (256, "images that figures are of"),
        "patches": (12, "nearest patches shown of a code"),
    }
    for name, (default, text) in sizes.items():
        shown = f"{text} (default {default})"
        parser.add_argument(f"--{name}", type=number(int, 1), default=default, metavar="N", help=shown)
    arguments = parser.parse_args()
    return answer(lambda: write(arguments), writes=arguments.out)


if __name__ == "__main__":
    sys.exit(main())
