"""What a trial has measured, where it is read: the tables of docs/benchmarks.md, and plan.py's file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from mapet_ds.errors import UserError
from mapet_ds.files import write_whole
from trials.runner import Figures, Record

APART = {"hardware", "versions", "settings", "command", "breakdown", "tools", "seconds_of_parts"}
"""Entries of a line that say how it came about, or have a form of their own."""


def show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def rows(figures: Figures, above: str = "") -> Iterator[tuple[str, str]]:
    """Yields name and text of each figure: a median or ratio with its spread, or a single number."""
    for key, value in figures.items():
        name = f"{above}, {key}" if above else key
        name = name.replace("_", " ")
        if isinstance(value, dict) and {"min", "max"} <= set(value):
            middle = value["ratio"] if "ratio" in value else value["median"]
            yield name, f"{show(middle)} ({show(value['min'])} .. {show(value['max'])})"
        elif isinstance(value, dict):
            yield from rows({k: v for k, v in value.items() if k not in APART}, name)
        elif isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            yield name, show(value)
        elif isinstance(value, str):
            yield name, value.replace("|", "/")


def parts(breakdown: Figures) -> Iterator[str]:
    """Yields the lines of the table of a step's parts."""
    yield "| part | share | GFLOP | FLOP a byte | TFLOP/s | of the ceiling |"
    yield "|---|---|---|---|---|---|"
    for name, part in breakdown["parts"].items():
        counted = part["gflop"] > 0
        cells = [f"{part['share']:.1%}", show(part["gflop"]) if counted else ""]
        cells += [show(part["flop_per_byte"]) if counted and part["flop_per_byte"] else ""]
        cells += [show(part["tflops"]), f"{part['share_of_ceiling']:.0%}"] if counted else ["", ""]
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"| unexplained: Python, launches, waiting | {breakdown['unexplained']:.1%} | | | | |"


def section(record: Record) -> Iterator[str]:
    """Yields the lines about one step: its command, its figures, where its time goes."""
    yield f"### {record['step']}"
    yield ""
    if record["verdict"] != "passed":
        yield f"{record['verdict'].capitalize()}: {record['reason'].replace('|', '/')}"[:100].rstrip()
        yield ""
        return
    yield from (f"    {command}" for command in record["commands"])
    yield ""
    figures = record["figures"]
    if found := list(rows({key: value for key, value in figures.items() if key not in APART})):
        yield "| figure | median (min .. max) |"
        yield "|---|---|"
        yield from (f"| {name} | {text} |" for name, text in found)
        yield ""
    if "breakdown" in figures:
        yield from parts(figures["breakdown"])
        yield ""


def text(records: list[Record]) -> str:
    """The measured tables, in Markdown."""
    setup = records[0]["setup"]
    of = {key: value for key, value in setup.items() if value}
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in of.items()), ""]
    for record in records:
        lines += section(record)
    return "\n".join(lines).rstrip() + "\n"


def write_tables(where: str, records: list[Record], page: Path, template: Path) -> None:
    """Puts the tables between the page's two markers; a page that isn't there begins as the template.

    Raises:
        UserError: the page has no such markers.
    """
    if not page.exists():
        shutil.copy(template, page)
    begin, end = f"<!-- trial {where}: begin -->", f"<!-- trial {where}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{page} has no lines {begin} and {end}: put them where the tables shall stand.")
    write_whole(page, f"{before}{begin}\n\n{text(records)}\n{end}{after}")
