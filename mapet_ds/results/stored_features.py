"""Features on disk, so that every probe takes them from one pass over the images.

A safetensors file holds train_mean, train_token where there are class tokens, train_labels, the same of val,
and train_places, the training images' places in the index. Rows [n, D], or [n, blocks, D] of several blocks,
are in the order of the index, without unreadable images. Its metadata holds the identity of model, images and
settings, the blocks, and the counts of images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mapet_ds.data.index import Index
from mapet_ds.errors import ConfigError
from mapet_ds.files import whole_file
from mapet_ds.results.features import Labels, Vectors


class Judged(NamedTuple):
    """The vectors and labels of both sets of images."""

    train: Vectors
    train_labels: Labels
    val: Vectors
    val_labels: Labels
    places: NDArray[np.int64] | None = None
    """[n] the places in the index of the training images; None of a file that was written without."""


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


def is_stored(file: Path, now: dict[str, str], layers: Sequence[int] | None) -> bool:
    """Whether a file holds the features of this identity and these blocks; False where there is no file.

    Raises:
        ConfigError: it holds others, or isn't one of features.
    """
    if not file.exists():
        return False
    try:
        with safetensors.safe_open(file, "np") as stored:
            then, blocks = (json.loads((stored.metadata() or {})[name]) for name in ("identity", "layers"))
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{file} is no file that `features` wrote ({error}): name another.") from error
    if differing := [name for name in now if then.get(name) != now[name]]:
        raise ConfigError(
            f"{file} holds features of other things: {', '.join(differing)} differ. Name another file, or "
            "delete this one."
        )
    if layers and (missing := sorted({*layers} - {*(blocks or [])})):
        raise ConfigError(
            f"{file} holds features of layer {', '.join(map(str, blocks))}, not of "
            f"{', '.join(map(str, missing))}. Name another file, or delete this one."
        )
    return True


def load(file: Path, layers: Sequence[int] | None, kinds: Sequence[str]) -> tuple[Judged, dict[str, Any]]:
    """The vectors of a file that `is_stored`, and the counts of images."""
    with safetensors.safe_open(file, "np") as stored:
        blocks, counts = (json.loads(stored.metadata()[name]) for name in ("layers", "counts"))
        places = [blocks.index(layer) for layer in layers] if layers else [0]

        def vectors(name: str) -> Vectors:
            whole = {kind: stored.get_tensor(f"{name}_{kind}") for kind in kinds}
            return {
                kind: each.reshape(len(each), -1, each.shape[-1])[:, places] for kind, each in whole.items()
            }

        labels = {name: stored.get_tensor(f"{name}_labels") for name in ("train", "val")}
        sets = vectors("train"), labels["train"], vectors("val"), labels["val"]
        places = stored.get_tensor("train_places") if "train_places" in stored.keys() else None  # noqa: SIM118
        return Judged(*sets, places), counts


def save(
    file: Path, judged: Judged, layers: Sequence[int] | None, identity: dict[str, str], counts: dict[str, Any]
) -> None:
    """Writes a file whole or not at all.

    Raises:
        OSError: the storage fails.
    """
    arrays: dict[str, Any] = {"train_labels": judged.train_labels, "val_labels": judged.val_labels}
    if judged.places is not None:
        arrays["train_places"] = judged.places
    for name, vectors in (("train", judged.train), ("val", judged.val)):
        for kind, each in vectors.items():
            arrays[f"{name}_{kind}"] = each[:, 0] if each.shape[1] == 1 else each
    metadata = {"identity": identity, "layers": layers, "counts": counts}
    with whole_file(file) as beside:
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, beside,
            {name: json.dumps(value) for name, value in metadata.items()},
        )  # fmt: skip
