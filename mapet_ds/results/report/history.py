"""The records that a run writes about itself: settings, environment, metrics, unreadable images."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mapet_ds.config.running import flatten
from mapet_ds.errors import DataError

NO_CURVE = ("step", "epoch", "seconds", "val_seconds", "val_images")
"""Numbers in metrics.jsonl that give no curve."""


class Record(NamedTuple):
    """The records of a run so far. A part is empty where the run has not written it."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    quarantined: list[tuple[str, str]]
    """Path and reason of each unreadable image."""


def read_record(folder: Path) -> Record:
    """The records of a run of pre-training or fine-tuning, finished or in progress.

    A line of metrics that is still being written is left out.

    Raises:
        DataError: the folder is not that of a run, or a record can't be read.
    """

    def text(name: str) -> str:
        path = folder / name
        return path.read_text(errors="replace") if path.is_file() else ""

    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        reason = "it has neither config.yaml nor metrics.jsonl. Name a run_dir."
        raise DataError(f"{folder} is not the folder of a run: {reason}")
    try:
        config = yaml.safe_load(text("config.yaml")) or {}
        environment = yaml.safe_load(text("environment.json")) or {}
        sections = [config.get(name, {}) for name in ("model", "data", "train")]
        sections += [environment.get(name, {}) for name in ("versions", "git", "deepspeed_config")]
        if not all(isinstance(section, dict) for section in sections):
            raise TypeError("settings and versions were expected by name")
        lines = [json.loads(line) for line in text("metrics.jsonl").split("\n")[:-1]]
        for line in lines:
            if "step" not in line or not all(isinstance(value, int | float) for value in line.values()):
                raise TypeError("numbers by name were expected, with a step in each line of metrics.jsonl")
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"The records of {folder} can't be read: {' '.join(str(error).split())}.") from error
    rows = [f"{line}\t\t".split("\t") for line in text("quarantine.tsv").split("\n")[1:-1]]
    return Record(folder, config, environment, lines, [(row[1], row[2]) for row in rows])


def curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """The steps and values of each scalar of a run, by group and name.

    Scalars whose names differ in a last number only (quarters, top 1 and 5), or in the feature that they
    judge, are one group. A value that isn't finite becomes NaN.
    """
    groups: dict[str, dict[str, tuple[list[int], list[float]]]] = defaultdict(dict)
    for line in lines:
        for name, value in line.items():
            if name in NO_CURVE:
                continue
            steps, values = groups[re.sub(r"_?\d+$|_(mean|token|both)$", "", name)].setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value if math.isfinite(value) else math.nan)
    return dict(groups)


def kind(record: Record) -> str:
    """What a run trains: pre-training, fine-tuning, segmentation, or unknown where it has no settings."""
    if not record.config:
        return "unknown"
    if "objective" in record.config:
        return "pre-training"
    return "segmentation" if "head" in record.config["model"] else "fine-tuning"


def differing(records: list[Record]) -> list[tuple[str, list[Any]]]:
    """The settings in which runs differ, with the value of each run; None where a run has no such setting."""
    settings = [flatten(record.config) for record in records]
    names = dict.fromkeys(name for values in settings for name in values if name != "run_dir")
    rows = [(name, [values.get(name) for values in settings]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]
