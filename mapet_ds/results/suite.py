"""The results of a suite: one JSON that goes on where it stopped, and its table in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mapet_ds.config.study import differences
from mapet_ds.errors import ConfigError
from mapet_ds.files import write_whole

FILE = "results.json"
SHORT = 12
"""Letters of a checksum that a sentence shows."""


def _read(file: Path) -> dict[str, Any]:
    """What a file of results holds; nothing where there is none.

    Raises:
        ConfigError: it is none.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read ({error}): name another --out, or delete it.") from error
    if not isinstance(found, dict) or not found.keys() >= {"about", "basis", "results"}:
        raise ConfigError(f"{file} holds no results of a suite: name another --out.")
    return found


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """The same with long checksums cut, for a sentence."""
    return {name: v[:SHORT] if isinstance(v, str) and len(v) == 64 else v for name, v in values.items()}


class Results:
    """Figures by the row of the table, each with the settings that it was measured by.

    basis: what all figures depend on, by name: weights, images, labels.

    Raises:
        ConfigError: the file holds figures of another basis.
    """

    def __init__(self, file: Path, basis: dict[str, Any], about: dict[str, Any]) -> None:
        self.file = file
        found = _read(file)
        self.content = {"about": about, "basis": basis, "results": found.get("results", {})}
        if found and found["basis"] != basis:
            self._refuse(differences(_short(found["basis"]), _short(basis)))

    def _refuse(self, lines: list[str]) -> None:
        raise ConfigError(
            "\n".join(
                [f"{self.file} holds results of other things:", *lines, "Name another --out, or delete it."]
            )
        )

    def missing(self, wanted: dict[str, dict[str, Any]]) -> list[str]:
        """The rows, of all that are wanted with their settings, that have no figures yet.

        Raises:
            ConfigError: some were measured by other settings; every difference is named, with both values.
        """
        lines, results = [], self.content["results"]
        for row, settings in wanted.items():
            if row in results:
                then, now = (_short(each) for each in (results[row]["settings"], settings))
                lines += [f"  {row},{line[1:]}" for line in differences(then, json.loads(json.dumps(now)))]
        if lines:
            self._refuse(lines)
        # The document's order, then what an earlier one has measured.
        order = [*wanted, *(row for row in results if row not in wanted)]
        self.content["results"] = {row: results[row] for row in order if row in results}
        return [row for row in wanted if row not in results]

    def add(self, row: str, settings: dict[str, Any], figures: dict[str, Any], order: list[str]) -> None:
        """Writes a row's figures into the file.

        order: of the rows that are wanted.
        """
        results = self.content["results"] | {row: {"settings": settings, "figures": figures}}
        rows = [*order, *(each for each in results if each not in order)]
        self.content["results"] = {each: results[each] for each in rows if each in results}
        write_whole(self.file, json.dumps(self.content, indent=1) + "\n")


def rows_of(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What was measured, top-1, top-5 and a note, as the table shows them."""
    rows = []
    for row, measured in results.items():
        figures = measured["figures"]
        top1, top5 = f"{figures['top1']:.2f}", figures.get("top5")
        if "standard_deviation" in figures:
            top1 += f" ± {figures['standard_deviation']:.2f}"
        rows.append((row, top1, "" if top5 is None else f"{top5:.2f}", figures["note"]))
    return rows


def table(content: dict[str, Any]) -> str:
    """The Markdown table of what a file of results holds."""
    about = content["about"]
    lines = ["| measured | top-1, % | top-5, % | note |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows_of(content["results"])]
    images = f"{about['train_images']:,} training and {about['val_images']:,} validation images"
    ending = f"Probes learn from `{about['train']}` and are judged on `{about['val']}`: {images} of "
    ending += f"{about['classes']:,} classes. ± is the standard deviation over draws."
    return "\n".join([*lines, "", ending, ""])


def results_below(folder: Path) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Name and rows of each suite that was measured of a model in this folder."""
    files = sorted(folder.glob(f"*/suite/{FILE}"))
    return [(file.parts[-3], rows_of(_read(file)["results"])) for file in files]
