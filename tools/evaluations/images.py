"""The labelled images by which tools/evaluate.py judges, and their features."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mapet_ds.config.finetune import FinetuneConfig
    from mapet_ds.data.few_labels import Few
    from mapet_ds.data.index import Images, Index
    from mapet_ds.launch import Ranks
    from mapet_ds.results.features import Vectors
    from mapet_ds.results.stored_features import Judged


class Sets(NamedTuple):
    """The images of --train and --val, and the settings by which they are read."""

    config: FinetuneConfig
    train: Index
    val: Index
    few: list[Few]
    """The choices of --train whose labels are used; none: all."""


class Extracted(NamedTuple):
    """The features of both sets, on rank 0."""

    judged: Judged | None
    """None on the other ranks."""
    counts: dict[str, Any]
    """The numbers of images and classes; empty on the other ranks."""
    few: list[Few]


def read_settings(arguments: argparse.Namespace) -> FinetuneConfig:
    """The settings by which images are read."""
    from mapet_ds.config.finetune import FinetuneConfig, LabelledDataConfig
    from mapet_ds.config.running import TrainConfig

    names = ("workers", "max_bad_share", "exif_orientation")
    data = LabelledDataConfig(**{name: getattr(arguments, name) for name in names})
    return FinetuneConfig(data=data, train=TrainConfig(micro_batch_size=arguments.batch_size))


@contextmanager
def opened(source: str, ranks: Ranks) -> Iterator[Index]:
    """The index of images, for as long as the block lasts. For every rank.

    Raises:
        DataError: nothing is there, or no image.
    """
    from mapet_ds.data.index import open_index

    with tempfile.TemporaryDirectory() as cache:
        yield ranks.first_then_all(lambda: open_index(source, Path(cache, "index")))


@contextmanager
def labelled_sets(arguments: argparse.Namespace, ranks: Ranks) -> Iterator[Sets]:
    """The images of --train and --val, for as long as the block lasts. For every rank.

    Raises:
        DataError: labels or images that can't be judged by, or few labels that can't be had.
    """
    from mapet_ds.data.labelled import check_apart, check_classes

    with opened(arguments.train, ranks) as train, opened(arguments.val, ranks) as val:
        check_classes(train, val, section="--")
        check_apart(train, val, "--", ranks, refuse=True)
        few = ranks.from_first(lambda: few_labels(arguments, train))
        yield Sets(read_settings(arguments), train, val, few)


def few_labels(arguments: argparse.Namespace, train: Index) -> list[Few]:
    """The choices of --train that --labels and --shots name, in their order.

    Raises:
        DataError: they can't be had.
    """
    from mapet_ds.data.few_labels import listed, shot_draws

    whose = {"labels": ("--labels", "--train"), "shots": ("--shots", "--train")}
    if arguments.command == "suite":
        whose = {"labels": ("few.lists", "data.train"), "shots": ("few.shots", "data.train")}
    lists = [listed(train, file, whose["labels"], arguments.max_bad_share) for file in arguments.labels]
    seed, draws, named = arguments.seed, arguments.draws, whose["shots"]
    return lists + [shot_draws(train, shots, seed, draws, named) for shots in arguments.shots]


def extract(
    arguments: argparse.Namespace, model: Any, layers: Sequence[int] | None, kinds: Sequence[str],
    ranks: Ranks,
) -> Extracted:  # fmt: skip
    """The vectors and labels of --train and of --val. Every rank must call it.

    Raises:
        ConfigError: --features holds others.
        DataError: labels or images that can't be judged by, or too many unreadable ones.
    """
    with labelled_sets(arguments, ranks) as sets:
        return vectors_of(arguments, sets, model, (layers, kinds), ranks)


def vectors_of(
    arguments: argparse.Namespace, sets: Sets, model: Any,
    what: tuple[Sequence[int] | None, Sequence[str]], ranks: Ranks,
) -> Extracted:  # fmt: skip
    """See `extract`. Images are read as fine-tuning reads them; of few labels, no others of --train.

    what: blocks and kinds of vectors.
    """
    import numpy as np
    from timm.data import resolve_model_data_config

    from mapet_ds.data.index import Ordered
    from mapet_ds.results.stored_features import Judged, identity, is_stored, load, save

    layers, kinds = what
    settings = {"--exif_orientation": arguments.exif_orientation}
    settings["the evaluation transform"] = resolve_model_data_config(model)
    file, few = arguments.features, sets.few
    key = identity(model, sets.train, sets.val, settings) if file else {}
    if file and ranks.from_first(lambda: is_stored(file, key, layers)):
        stored = load(file, layers, kinds) if ranks.rank == 0 else (None, {})
        return Extracted(*stored, few)

    # What is wrong with the validation images is found before the training images are computed.
    found, counts = {}, {"classes": len(sets.train.classes)}
    for name, whole in (("val", sets.val), ("train", sets.train)):
        number = min(arguments.max_images or len(whole), len(whole))
        order = np.arange(number) * len(whole) // number
        if name == "train" and few and not file:
            order = np.unique(np.concatenate([places for each in few for places in each.draws]))
        images = Ordered(whole, order.tolist())
        vectors, labels, rows = computed(arguments, sets.config, model, what, name, images, ranks)
        found[name] = vectors, labels, order[rows]
        counts |= {f"{name}_images": len(rows), f"{name}_unreadable": len(images) - len(rows)}
    train, val = found["train"], found["val"]
    judged = Judged(*train[:2], *val[:2], places=train[2])
    if file and ranks.rank == 0:
        save(file, judged, layers, key, counts)
    return Extracted(judged, counts, few)


def computed(
    arguments: argparse.Namespace, config: FinetuneConfig, model: Any, what: tuple[Any, Any], name: str,
    images: Images, ranks: Ranks,
) -> tuple[Vectors, Any, Any]:  # fmt: skip
    """The vectors, labels and places of the readable images of --train or --val, on rank 0."""
    import numpy as np
    from timm.data import create_transform, resolve_model_data_config

    from mapet_ds.data.index import Numbered
    from mapet_ds.results.features import labelled_features

    transform: Any = create_transform(**resolve_model_data_config(model))
    batches = -(-len(images) // (arguments.batch_size * ranks.world_size))
    with progress(name, batches, ranks) as bar:
        vectors, places = labelled_features(
            config, model, Numbered(images), transform, ranks, lambda _: bar.update(), *what,
            start_method="fork", section="--",
        )  # fmt: skip
    labels = np.fromiter(map(images.label, places.tolist()), np.int64, len(places))
    return vectors, labels, places


def progress(name: str, batches: int, ranks: Ranks) -> Any:
    """A bar over batches, at a terminal and on rank 0 alone."""
    from tqdm import tqdm

    quiet = ranks.rank != 0 or not sys.stderr.isatty()
    return tqdm(desc=name, total=batches, unit="batch", disable=quiet)
