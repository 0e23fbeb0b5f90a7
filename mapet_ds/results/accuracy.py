"""Top-1 and top-5 of a classifier on sets of images whose classes it knows, under whatever names."""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from mapet_ds.data.index import Images, Index, Numbered
from mapet_ds.data.labelled import Bad, EvaluationBatches, report_unreadable, served
from mapet_ds.errors import DataError
from mapet_ds.launch import Ranks
from mapet_ds.results.features import in_order

WNID = re.compile(r"n\d{8}")
SUBSETS = ("imagenet_a", "imagenet_r", "mini_imagenet")
"""Lists of ImageNet's classes that timm brings along."""
VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")
"""The name of an image of ImageNet's validation set, whose number ReaL's labels go by."""
TOP = 5


class Reading(NamedTuple):
    """What the classes of a set are to a model."""

    words: str
    outputs: NDArray[np.int64]
    """[classes of the set] the model's output of each; -1 where the model lacks it."""


class Predicted(NamedTuple):
    """The likeliest outputs of each readable image, on rank 0."""

    places: NDArray[np.int64]
    """[n] places among the images."""
    among_all: NDArray[np.int64]
    """[n, 5], or as many as there are outputs."""
    among: NDArray[np.int64]
    """[n, 5] of the outputs that were allowed."""


def class_names(model: Any) -> tuple[list[str], str]:
    """The names of a classifier's outputs, and where they come from; none, where nothing tells them."""
    names = list(model.pretrained_cfg.get("label_names") or [])
    if names and names != [*map(str, range(len(names)))]:
        return names, "the model's class names"
    if subset := infer_imagenet_subset(model):
        imagenet: Any = ImageNetInfo(subset)
        return imagenet.label_names(), f"the order of {subset}, by the model's {model.num_classes} outputs"
    return names, "the model's class numbers"


def imagenet_names() -> list[str]:
    """ImageNet-1k's wnids in their order."""
    imagenet: Any = ImageNetInfo("imagenet-1k")
    return imagenet.label_names()


def read_classes(model: Any, classes: list[str], named: str) -> Reading:
    """What the classes of a set are to a model: by name, by wnid, or by number.

    Names of the model's classes come first. A number is ImageNet's class of that place where the model's
    names are wnids, as in ImageNet-V2; else it is the model's output.

    named: the user's words for the set, for the sentences.

    Raises:
        DataError: a class can't be mapped, or the model has none of them.
    """
    names, source = class_names(model)
    known = {name: output for output, name in enumerate(names)}
    of_wnids = bool(names) and all(map(WNID.fullmatch, names))
    numbers = all(name.isdecimal() for name in classes)
    if numbers and not known.keys() & {*classes}:
        if of_wnids:
            of_imagenet = imagenet_names()
            words, there = f"numbers, read in the order of ImageNet's 1,000 wnids; {source}", len(of_imagenet)
            outputs = [known.get(name, -1) for name in of_imagenet]
        else:
            words, there = "numbers, read as those of the model's outputs", model.num_classes
            outputs = [*range(there)]
        if beyond := [name for name in classes if int(name) >= there]:
            raise DataError(f"{named}: class {beyond[0]} is beyond the {there:,} that its numbers go by.")
        found = [outputs[int(name)] for name in classes]
    else:
        strange = [name for name in classes if name not in known and not (of_wnids and WNID.fullmatch(name))]
        if strange:
            some = ", ".join(strange[:3])
            theirs = ", ".join(names[:3]) + " and others" * (len(names) > 3) or "not known by name"
            raise DataError(
                f"{named}: {len(strange)} of its {len(classes)} classes can't be mapped to the model's, e.g. "
                f"{some}; the model's are {theirs}. Name folders as the model's classes, by wnid (n01440764) "
                "or by number."
            )
        kind = "wnids" if of_wnids else "names"
        words, found = f"{kind}, read by {source}", [known.get(name, -1) for name in classes]
    if max(found) < 0:
        raise DataError(f"{named}: the model has none of its {len(classes)} classes, e.g. {classes[0]}.")
    return Reading(words, np.array(found, np.int64))


def subset_outputs(model: Any, named: str, listed: str) -> NDArray[np.int64]:
    """The outputs of a list of classes: one of timm's (SUBSETS), or a file of wnids, names or numbers.

    named: the user's words for it. listed: name or path.

    Raises:
        DataError: there is no such list, or the model lacks a class of it.
    """
    if listed in SUBSETS:
        data = pkgutil.get_data("timm.data", f"_info/{listed}_synsets.txt")
        assert data
        text = data.decode()
    else:
        try:
            text = Path(listed).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{named} = {listed} is none of {', '.join(SUBSETS)}, and no file of classes: {error}."
            ) from error
    classes = list(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))
    if not classes:
        raise DataError(f"{named} = {listed} is empty: it names a class a line.")
    outputs = read_classes(model, classes, f"{named} = {listed}").outputs
    if (lacking := np.flatnonzero(outputs < 0)).size:
        raise DataError(
            f"{named} = {listed}: the model lacks {lacking.size} of its {len(classes)} classes, e.g. "
            f"{classes[lacking[0]]}."
        )
    return outputs


@torch.inference_mode()
def predict(
    config: Any, model: Any, images: Images, transform: Callable[[Image.Image], Tensor], ranks: Ranks,
    allowed: NDArray[np.int64], doing: Callable[[str], Any], start_method: str = "spawn",
) -> Predicted:  # fmt: skip
    """The likeliest outputs of the readable images. Every rank must call it, and computes its share.

    allowed: the outputs among which the model chooses, too. The rest as for `labelled_features`.

    Raises:
        DataError: more than data.max_bad_share of the images are unreadable.
    """
    model = model.to(ranks.device).eval()
    dataset, bad = EvaluationBatches(config, Numbered(images), transform, ranks.rank, ranks.world_size), Bad()
    choices, parts = torch.from_numpy(allowed).to(ranks.device), []
    numbers = range(len(dataset))
    for batch in served(dataset, numbers, config.data.workers, ranks, start_method):
        doing("predicting")
        bad += batch.bad
        logits = model(batch.images.to(ranks.device, non_blocking=True)).float()
        every = logits.topk(min(TOP, logits.shape[1])).indices
        own = choices[logits[:, choices].topk(min(TOP, len(choices))).indices]
        parts.append((batch.label, every.cpu(), own.cpu()))
    report_unreadable(config, images, bad, ranks, "--")
    places, every, own = (in_order(torch.cat(each).numpy(), ranks) for each in zip(*parts))
    return Predicted(places[places >= 0], every[places >= 0], own[places >= 0])


def accuracies(predicted: NDArray[np.int64], right: Iterable[Iterable[int]]) -> tuple[float, float]:
    """Top-1 and top-5 in percent of predictions [n, 5], by the outputs that are right for each."""
    rows = [[output in wanted for output in row] for row, wanted in zip(predicted.tolist(), map(set, right))]
    hits = np.array(rows)
    return 100 * float(hits[:, 0].mean()), 100 * float(hits.any(1).mean())


def real_labels(model: Any, images: Index, named: str, file: Path | None) -> list[set[int]]:
    """The outputs that ReaL calls right for each image; none where it has no label that the model knows.

    file: the published real.json; None takes the one that timm brings along.

    Raises:
        DataError: the file or the images are none of ImageNet's validation set, or the classes of the model
            are not known.

    Source: Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159.
    """
    data = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    try:
        labels = json.loads(data if file is None and data else Path(str(file)).read_text())
        labels = [[int(label) for label in each] for each in labels]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{named} = {file} is no real.json, a list of lists of classes: {error}.") from error
    names, _ = class_names(model)
    known, of_imagenet = {name: output for output, name in enumerate(names)}, imagenet_names()
    if not known.keys() & {*of_imagenet}:
        raise DataError(
            f"{named}: ReaL's labels are ImageNet's, and the model's classes are none of its wnids: leave "
            "ReaL out (of a suite by accuracy.real=null)."
        )
    right, found = [], 0
    for place in range(len(images)):
        match = VALIDATION.search(images.path(place).rpartition("/")[2])
        number = int(match[1]) if match else 0
        found += 0 < number <= len(labels)
        own = labels[number - 1] if 0 < number <= len(labels) else []
        right.append({known[of_imagenet[label]] for label in own if of_imagenet[label] in known})
    if not found:
        raise DataError(
            f"{named}: no image of {images.root} is named as in ImageNet's validation set, "
            f"ILSVRC2012_val_00000001.JPEG; {images.path(0)} is there."
        )
    return right
