"""Features on disk, so that every probe takes them from one pass over the images.

A safetensors file holds train, train_labels, val and val_labels. Rows are in the order of the index, without
unreadable images. Its metadata holds the identity of model, images and settings, and the counts of images.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from mapet_ds.data.index import Index
from mapet_ds.errors import ConfigError
from mapet_ds.files import whole_file
from mapet_ds.results.probe import Features, Labels

NAMES = ("train", "train_labels", "val", "val_labels")
Arrays = list[Features | Labels]
"""Four arrays, as NAMES lists them."""


def identity(model: Any, train: Index, val: Index, settings: dict[str, Any]) -> dict[str, str]:
    """What features depend on, in words by name: weights, architecture, images, labels and settings.

    An image that changes without changing its length is not noticed.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.float().cpu().contiguous().numpy().data)
    heads = [module.num_heads for module in model.modules() if hasattr(module, "num_heads")]
    sets = {"--train": train, "--val": val}
    labels = {name: hashlib.sha256(images.labels().tobytes()).hexdigest() for name, images in sets.items()}
    return {
        "the model's weights": weights.hexdigest(),
        "the model's modules": hashlib.sha256(f"{model} {heads}".encode()).hexdigest(),
        **{f"the images of {name}": images.fingerprint for name, images in sets.items()},
        **{f"the labels of {name}": sha256 for name, sha256 in labels.items()},
        **{name: json.dumps(value) for name, value in settings.items()},
    }


def is_stored(file: Path, now: dict[str, str]) -> bool:
    """Whether a file holds the features of this identity; False where there is no file.

    Raises:
        ConfigError: it holds others, or isn't one of features.
    """
    if not file.exists():
        return False
    try:
        with safetensors.safe_open(file, "np") as stored:
            then = json.loads(stored.metadata()["identity"])
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{file} is no file of features ({error}): name another.") from error
    if differing := [name for name in now if then.get(name) != now[name]]:
        raise ConfigError(
            f"{file} holds features of other things: {', '.join(differing)} differ. Name another file, or "
            "delete this one."
        )
    return True


def load(file: Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a file that `is_stored`, and the counts of images."""
    with safetensors.safe_open(file, "np") as stored:
        return [stored.get_tensor(name) for name in NAMES], json.loads(stored.metadata()["counts"])


def save(file: Path, arrays: Arrays, identity: dict[str, str], counts: dict[str, Any]) -> None:
    """Writes a file whole or not at all.

    Raises:
        OSError: the storage fails.
    """
    metadata = {"identity": json.dumps(identity), "counts": json.dumps(counts)}
    with whole_file(file) as beside:
        save_file({k: np.ascontiguousarray(v) for k, v in zip(NAMES, arrays, strict=True)}, beside, metadata)
