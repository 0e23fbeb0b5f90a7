"""What a run has written about itself so far: settings, environment, metrics, unreadable images."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mapet_ds.config.sections import flatten
from mapet_ds.errors import DataError


class Record(NamedTuple):
    """What a run has written about itself so far; empty where it has not."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]
    """Those of metrics.jsonl."""
    quarantined: list[tuple[str, str]]
    """Path and reason of each unreadable image."""


def read_record(folder: Path) -> Record:
    """The records of a run of pre-training or fine-tuning, also of one in progress: a line that isn't finished is left out.

    Raises:
        DataError: no run's folder, or a record that can't be read.
    """
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise DataError(
            f"{folder} is not the folder of a run: it has neither config.yaml nor metrics.jsonl. Name a run_dir."
        )

    def text(name: str) -> str:
        path = folder / name
        return path.read_text(errors="replace") if path.is_file() else ""

    try:
        config, environment = (
            yaml.safe_load(text(name)) or {} for name in ("config.yaml", "environment.json")
        )
        lines = [json.loads(line) for line in text("metrics.jsonl").split("\n")[:-1]]
        sections = [config.get(name, {}) for name in ("model", "data", "train")]
        sections += [environment.get(name, {}) for name in ("versions", "git", "deepspeed_config")]
        if not all(isinstance(part, dict) for part in sections):
            raise TypeError("settings and versions were expected by name")
        if any(
            "step" not in line or not all(isinstance(value, int | float) for value in line.values())
            for line in lines
        ):
            raise TypeError("numbers by name were expected, with a step in each line of metrics.jsonl")
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"The records of {folder} can't be read: {' '.join(str(error).split())}.") from error
    quarantined = [
        tuple((line + "\t\t").split("\t")[1:3]) for line in text("quarantine.tsv").split("\n")[1:-1]
    ]
    return Record(folder, config, environment, lines, quarantined)


def curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values of each scalar of a run, those that differ in a last number only (quarters, top 1 and 5) as one group."""
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = defaultdict(dict)
    for line in lines:
        for key, value in line.items():
            if isinstance(value, int | float) and key not in (
                "step",
                "epoch",
                "seconds",
                "val_seconds",
                "val_images",
            ):
                steps, values = found[re.sub(r"_?\d+$", "", key)].setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value if math.isfinite(value) else math.nan)
    return dict(found)


def differing(records: list[Record]) -> list[tuple[str, list[Any]]]:
    """The settings in which runs differ, and the value of each run; None where it has no such setting."""
    flat = [flatten(record.config) for record in records]
    names = dict.fromkeys(name for values in flat for name in values if name != "run_dir")
    rows = [(name, [values.get(name) for values in flat]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]
