"""The record that a run writes at its start: its settings, and the versions that run them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mapet_ds.config.sections import REPOSITORY, RunConfig
from mapet_ds.files import write_whole

PACKAGES = (
    "torch", "deepspeed", "timm", "open_clip_torch", "nvidia-dali-cuda130", "faiss-gpu", "numpy", "pillow",
)  # fmt: skip
"""The packages on which results depend."""


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


def write_record(
    config: RunConfig, engine_config: dict[str, Any], folder: Path, data: dict[str, Any]
) -> None:
    """Writes the resolved settings (config.yaml), and command, commit and versions (environment.json).

    data: what the index says of data.train.
    """
    write_whole(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    changed = (_git("status", "--porcelain") or "").splitlines()
    environment = {
        "command": sys.argv,
        "deepspeed_config": engine_config,
        "git": {"commit": _git("rev-parse", "HEAD"), "changed": changed},
        "data.train": data,
        "python": sys.version,
        "versions": versions(),
    }
    write_whole(folder / "environment.json", json.dumps(environment, indent=1))
