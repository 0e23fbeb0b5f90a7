"""The record that a run writes at its start: its settings, and the versions that run them."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from mapet_ds.config.running import RunConfig, flatten
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.files import write_whole

PACKAGES = (
    "torch", "deepspeed", "timm", "open_clip_torch", "nvidia-dali-cuda130", "faiss-gpu", "numpy", "pillow",
)  # fmt: skip
"""The packages on which results depend."""
LOWEST = {"timm": "1.0.24"}
"""The oldest versions that work, where an older one is known to fail."""


@cache
def versions() -> dict[str, str]:
    """The installed versions of the packages on which results depend."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(*arguments: str) -> str | None:
    """git's answer about the repository; None where there is no git."""
    command = ["git", *arguments]
    try:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return None


def check_versions() -> str:
    """A sentence that names the packages whose versions no test has seen; empty where all are those tested.

    Raises:
        ConfigError: a package is older than the oldest with which this works.
    """
    installed = versions()
    for name, lowest in LOWEST.items():
        if name in installed and Version(installed[name]) < Version(lowest):
            raise ConfigError(
                f"{name} {installed[name]} is too old: {lowest} is the oldest that works. "
                "pip install -r requirements.txt installs what is tested."
            )
    path = REPOSITORY / "requirements.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    tested = [Requirement(line.partition("#")[0]) for line in lines if re.match(r"[A-Za-z]", line)]
    others = [
        f"{each.name} {installed[each.name]} (tested: {str(each.specifier).removeprefix('==')})"
        for each in tested
        if each.name in installed and not each.specifier.contains(installed[each.name])
    ]
    return f"Not tested with these versions: {', '.join(others)}." if others else ""


def _changed(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """The values that differ, by name: what was, and what is."""
    names = sorted({*then, *now})
    return {name: [then.get(name), now.get(name)] for name in names if then.get(name) != now.get(name)}


def other_versions(then: dict[str, str]) -> str:
    """The packages whose versions differ from those of then, with both; empty where none does."""
    changed = _changed(then, versions())
    return ", ".join(f"{name} {new or 'none'} (was {old or 'none'})" for name, (old, new) in changed.items())


def _earlier(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The environment and the flat settings that are recorded so far; empty where they can't be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        environment = json.loads((folder / "environment.json").read_text())
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        if isinstance(environment, dict) and isinstance(settings, dict):
            return environment, flatten(settings)
    return {}, {}


def write_record(
    config: RunConfig, engine_config: dict[str, Any], folder: Path, data: dict[str, Any], step: int = 0
) -> None:
    """Writes the resolved settings (config.yaml), and command, commit and versions (environment.json).

    The environment of a run's first start stays when it goes on. `starts` in it lists each start: its time,
    step, command and commit, and what differs from the start before, with both values.

    data: what the index says of data.train.
    step: the step that the run goes on from; 0: it is new.
    """
    now = flatten(config.to_dict())
    first, settings = _earlier(folder) if step else ({}, now)
    starts = first.get("starts", [])
    before = starts[-1]["versions"] if starts else first.get("versions", versions())
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "versions": versions(),
        "changed": _changed(settings or now, now) | _changed(before, versions()),
    }
    changed = (_git("status", "--porcelain") or "").splitlines()
    environment = first or {
        "command": sys.argv,
        "deepspeed_config": engine_config,
        "git": {"commit": start["commit"], "changed": changed},
        "data.train": data,
        "python": sys.version,
        "versions": versions(),
    }
    write_whole(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    environment["starts"] = [*starts, start]
    write_whole(folder / "environment.json", json.dumps(environment, indent=1))
