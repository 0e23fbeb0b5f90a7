"""What tools/evaluate.py prints and writes beside its figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mapet_ds.errors import DataError
from mapet_ds.files import write_whole


def whose(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model that figures are of."""
    model = str(arguments.model or f"teacher of {arguments.teacher}")
    return {"model": model, "untrained": arguments.untrained}


def described(arguments: argparse.Namespace, basis: dict[str, Any]) -> str:
    """What stands in brackets behind each figure."""
    weights = "untrained" if arguments.untrained else "trained"
    images = f"{basis['val_images']} validation images"
    if not (arguments.labels or arguments.shots):
        images = f"{basis['train_images']} training, {images}"
    return f"{weights} weights; {images}, {basis['classes']} classes"


def write_figures(out: Path | None, figures: Any) -> None:
    """Writes a JSON object to --out.

    Raises:
        DataError: the storage fails.
    """
    if out:
        try:
            write_whole(out, json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"--out {out} can't be written: {error}.") from error
