"""Top-1 and top-5 of a fine-tuned model on sets of images, for tools/evaluate.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluations.figures import write_figures
from evaluations.images import opened, progress, read_settings

from mapet_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mapet_ds.data.index import Index
    from mapet_ds.launch import Ranks
    from mapet_ds.results.accuracy import Reading

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.


class Judging(NamedTuple):
    """A set of images, as a model is judged on it."""

    index: Index
    reading: Reading
    allowed: NDArray[Any]
    """The outputs among which the model chooses."""
    places: NDArray[Any]
    """Those of the images in the index that are judged: the model has their class, and it is allowed."""
    right: list[set[int]] | None
    """The outputs that ReaL calls right for each image of the index."""


def build_classifier(arguments: argparse.Namespace) -> Any:
    """The model with its classifier, on the CPU.

    Raises:
        ConfigError: it has none.
    """
    from mapet_ds.results.probe import load_timm

    model = load_timm(arguments.model, arguments.arch, classify=True)
    if not model.num_classes:
        raise ConfigError(
            f"--model {arguments.model} has no classifier, so no top-1: tools/finetune.py trains one."
        )
    return model


def judging(
    model: Any, index: Index, named: str, classes: str = "", real: Path | str | None = None
) -> Judging:
    """How a model is judged on a set: by which of its outputs, and by which images.

    named: the user's words for the set, for the sentences. classes: as for `subset_outputs`; empty: all.
    real: real.json, or "timm" for the one that timm brings along; None: not by ReaL's labels.

    Raises:
        DataError: classes or labels that can't be mapped to the model's.
    """
    import numpy as np

    from mapet_ds.results.accuracy import read_classes, real_labels, subset_outputs

    if (index.labels() < 0).any():
        raise DataError(f"{named}: images have no label. Put them into a sub-folder for each class.")
    reading = read_classes(model, index.classes, named)
    outputs = reading.outputs[index.labels()]
    allowed = subset_outputs(model, f"{named}: classes", classes) if classes else np.unique(outputs)
    allowed = allowed[allowed >= 0]
    places = np.flatnonzero(np.isin(outputs, allowed))
    if not places.size:
        raise DataError(f"{named}: none of its images is of a class of {classes}.")
    right = None
    if real is not None:
        right = real_labels(model, index, f"{named}: real", None if str(real) == "timm" else Path(real))
        if not any(right[place] for place in places):
            raise DataError(f"{named}: no image has a label of ReaL's that the model knows.")
    return Judging(index, reading, allowed, places, right)


def accuracy_of(
    arguments: argparse.Namespace, model: Any, name: str, judged: Judging, ranks: Ranks
) -> dict[str, Any]:
    """The figures of a set, on rank 0. Every rank must call it."""
    from timm.data import create_transform, resolve_model_data_config

    from mapet_ds.data.index import Ordered
    from mapet_ds.results.accuracy import accuracies, predict

    images = Ordered(judged.index, judged.places.tolist())
    transform: Any = create_transform(**resolve_model_data_config(model))
    batches = -(-len(images) // (arguments.batch_size * ranks.world_size))
    with progress(name, batches, ranks) as bar:
        predicted = predict(
            read_settings(arguments), model, images, transform, ranks, judged.allowed,
            lambda _: bar.update(), start_method="fork",
        )  # fmt: skip
    if ranks.rank != 0:
        return {}
    places = judged.places[predicted.places]
    outputs = judged.reading.outputs[judged.index.labels()[places]]
    right = [[output] for output in outputs.tolist()]
    top1, top5 = accuracies(predicted.among, right)
    figures = {"top1": top1, "top5": top5, "images": len(places), "unreadable": len(images) - len(places)}
    figures |= {"classes": len(judged.allowed), "classes_of_model": model.num_classes}
    figures |= {"left_out": len(judged.index) - len(images), "read_as": judged.reading.words}
    if len(judged.allowed) < model.num_classes:
        every = accuracies(predicted.among_all, right)
        figures |= dict(zip(("top1_among_all_classes", "top5_among_all_classes"), every))
    if judged.right:
        labels = [judged.right[place] for place in places]
        kept = [place for place, each in enumerate(labels) if each]
        real = accuracies(predicted.among_all[kept], [labels[place] for place in kept])
        figures |= {"real_top1": real[0], "real_top5": real[1], "real_images": len(kept)}
    return figures


def words_of(figures: dict[str, Any]) -> str:
    """What stands behind the accuracies of a set."""
    parts = [f"{figures['images']:,} images", figures["read_as"]]
    if "top1_among_all_classes" in figures:
        top1, top5 = figures["top1_among_all_classes"], figures["top5_among_all_classes"]
        parts.append(
            f"it chooses among {figures['classes']:,} of its {figures['classes_of_model']:,} classes; among "
            f"all of them top-1 {top1:.2f} %, top-5 {top5:.2f} %"
        )
    if figures["left_out"]:
        parts.append(f"{figures['left_out']:,} images of other classes are left out")
    return "; ".join(parts)


def evaluate_accuracy(arguments: argparse.Namespace) -> None:
    """Prints top-1 and top-5 of a fine-tuned model on --images, and writes them to --out."""
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.probe import device_of

    device, model = device_of(arguments.device), build_classifier(arguments)
    ranks = init_distributed()._replace(device=device)
    try:
        with opened(arguments.images, ranks) as index:
            named = f"--images = {arguments.images}"
            judged = ranks.first_then_all(
                lambda: judging(model, index, named, arguments.classes, arguments.real)
            )
            figures = accuracy_of(arguments, model, named, judged, ranks)
    finally:
        dist.destroy_process_group()
    if ranks.rank != 0:
        return
    figures |= {"model": str(arguments.model)}
    lines = [f"Top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} % ({words_of(figures)})"]
    if "real_top1" in figures:
        real = f"ReaL: top-1 {figures['real_top1']:.2f} %, top-5 {figures['real_top5']:.2f} %"
        lines.append(f"{real} ({figures['real_images']:,} images that have a label there)")
    print(json.dumps(figures) if arguments.json else "\n".join(lines))
    write_figures(arguments.out, figures)
