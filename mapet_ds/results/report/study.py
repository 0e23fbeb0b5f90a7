"""What a study has found: one table, as Markdown and CSV, and one page that needs nothing else.

A cell is the mean over seeds, its spread their standard deviation. A difference to the baseline has the
spread of both, added as independent errors are. One within it, or of fewer than three seeds, is marked.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

SEEDS = 3
"""The fewest seeds by which one row is called better than another."""
MEASURES = {
    "knn": "k-NN %", "linear": "linear %", "finetune": "fine-tuned %", "online_knn": "online k-NN %",
    "online_linear": "online linear %",
}  # fmt: skip
COSTS = {
    "steps": "steps", "speed": "images/s", "gpu_hours": "GPU-hours", "cpu_hours": "CPU-hours",
    "flops": "PFLOP",
}  # fmt: skip
GROUPS = {"steps": "equal steps", "flops": "equal FLOPs", "time": "equal time"}


class Outcome(NamedTuple):
    """What one run has come to."""

    row: str
    equal: str
    figures: dict[str, float]
    """By the names of MEASURES and COSTS; what isn't measured is missing."""
    failed: str = ""
    """Why it has ended early."""


class Cell(NamedTuple):
    """A figure of a row over its seeds."""

    mean: float
    spread: float
    """The standard deviation of the seeds (n - 1); NaN of one seed."""
    seeds: int
    difference: float | None = None
    """To the baseline's mean; None where that is not measured, and of the baseline itself."""
    margin: float = math.nan
    """The spread of the difference."""

    @property
    def verdict(self) -> str:
        """beyond or within the spread, or that there are too few seeds; empty without a difference."""
        if self.difference is None:
            return ""
        if math.isnan(self.margin):
            return "too few seeds"
        return "beyond" if abs(self.difference) > self.margin else "within"

    def against(self, base: Cell | None) -> Cell:
        """The same beside the baseline's cell."""
        if base is None:
            return self
        enough = min(self.seeds, base.seeds) >= SEEDS
        margin = math.hypot(self.spread, base.spread) if enough else math.nan
        return self._replace(difference=self.mean - base.mean, margin=margin)

    def __str__(self) -> str:
        text = f"{self.mean:.1f}" + ("" if math.isnan(self.spread) else f" ± {self.spread:.1f}")
        if self.difference is None:
            return text
        mark = {"beyond": "", "within": " ~", "too few seeds": " ?"}[self.verdict]
        return f"{text} ({self.difference:+.1f}{mark})"


class Line(NamedTuple):
    """A row of the table."""

    row: str
    cells: dict[tuple[str, str], Cell]
    """By group and figure."""
    failed: list[str]


def cell(values: list[float]) -> Cell:
    """The mean and the spread of the seeds' figures."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(statistics.mean(values), spread, len(values))


def table(outcomes: list[Outcome], baseline: str) -> list[Line]:
    """The rows in the outcomes' order, each compared with the baseline at equal steps, FLOPs or time."""
    values: dict[str, dict[tuple[str, str], list[float]]] = {}
    failed: dict[str, list[str]] = {}
    for outcome in outcomes:
        cells = values.setdefault(outcome.row, {})
        for name, value in outcome.figures.items():
            cells.setdefault((outcome.equal, name), []).append(value)
        if outcome.failed:
            failed.setdefault(outcome.row, []).append(outcome.failed)
    means = {row: {key: cell(each) for key, each in cells.items()} for row, cells in values.items()}
    for row, cells in means.items():
        for key, each in cells.items():
            if row != baseline and key[1] in MEASURES:
                cells[key] = each.against(means.get(baseline, {}).get(key))
    return [Line(row, cells, list(dict.fromkeys(failed.get(row, [])))) for row, cells in means.items()]


def columns(lines: list[Line]) -> list[tuple[str, str]]:
    """The groups and figures that some row has, in the order of the tables above."""
    there = {key for line in lines for key in line.cells}
    return [(group, name) for group in GROUPS for name in [*MEASURES, *COSTS] if (group, name) in there]


def _text(name: str, each: Cell | None) -> str:
    if each is None:
        return ""
    if name in MEASURES:
        return str(each)
    if name == "flops":
        return f"{each.mean / 1e15:.4g}"
    return f"{each.mean:,.0f}" if each.mean >= 100 else f"{each.mean:.3g}"


def titles(lines: list[Line]) -> list[str]:
    """The heads of the columns; a group's first one names the group."""
    heads, last = [], ""
    for group, name in columns(lines):
        head = {**MEASURES, **COSTS}[name]
        heads.append(head if group == last else f"{GROUPS[group]}: {head}")
        last = group
    return heads


def cells(line: Line, lines: list[Line]) -> list[str]:
    """The texts of a row's cells; a row without any says why."""
    shown = [_text(name, line.cells.get((group, name))) for group, name in columns(lines)]
    if line.failed and not line.cells:
        shown[:1] = ["failed"]
    return shown


def caption(baseline: str) -> list[str]:
    """The sentences that say how to read the table."""
    return [
        f"Mean ± standard deviation over seeds; in brackets the difference to {baseline}.",
        f"~: not beyond the spread of the two. ?: fewer than {SEEDS} seeds, so not judged.",
    ]


def markdown(lines: list[Line], baseline: str) -> str:
    """The table with its caption, and a sentence for each run that failed."""
    heads = ["row", *titles(lines)]
    text = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    text += ["| " + " | ".join([line.row, *cells(line, lines)]) + " |" for line in lines]
    text += ["", *caption(baseline)]
    text += [f"- {line.row} failed: {reason}" for line in lines for reason in line.failed]
    return "\n".join(text) + "\n"


def comma_separated(lines: list[Line]) -> str:
    """The same as CSV: a line for each row, group and figure, in full digits."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["row", "equal", "figure", "mean", "spread", "seeds", "difference", "margin", "verdict"])
    for line in lines:
        for group, name in columns(lines):
            if each := line.cells.get((group, name)):
                writer.writerow([line.row, group, name, *each, each.verdict])
        for reason in line.failed:
            writer.writerow([line.row, "", "failed", "", "", "", "", "", reason])
    return stream.getvalue()


def charts(lines: list[Line]) -> list[dict[str, Any]]:
    """A picture of each measure: a mark for each row and group, with its spread."""
    from mapet_ds.results.report.page import SERIES, Chart  # it imports torch

    pictures = []
    for name, title in MEASURES.items():
        shown = [line for line in lines if any(key[1] == name for key in line.cells)]
        if not shown:
            continue
        chart = Chart(f"study {name}", (5, 0.6 + 0.27 * len(shown)))
        words = []
        for i, (group, label) in enumerate(GROUPS.items()):
            found = [(y, line.cells.get((group, name))) for y, line in enumerate(shown)]
            found = [(y, each) for y, each in found if each]
            if not found:
                continue
            places, spreads = [y + 0.2 * i for y, _ in found], [each.spread for _, each in found]
            errors = [0 if math.isnan(spread) else spread for spread in spreads]
            means = [each.mean for _, each in found]
            chart.axes.errorbar(means, places, xerr=errors, fmt="o", ms=4, color=SERIES[i], label=label)
            words += [f"{shown[y].row}, {label}: {each}" for y, each in found]
        chart.axes.set_yticks(range(len(shown)), [line.row for line in shown])
        chart.axes.invert_yaxis()
        chart.axes.legend(loc="lower right")
        pictures.append({"title": title, "svg": chart.svg(f"{title}. {'; '.join(words)}.")})
    return pictures


def page(name: str, lines: list[Line], baseline: str, document: str) -> str:
    """The HTML of the study: the pictures, the table, what failed, the document."""
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = [(line.row, cells(line, lines), line.failed) for line in lines]
    return environment.get_template("study.html").render(
        name=name, charts=charts(lines), titles=titles(lines), rows=rows, caption=caption(baseline),
        document=document,
    )  # fmt: skip
