"""Evaluate a timm ViT, or tokenizers, on labelled images; or a ViT on images without labels.

python tools/evaluate.py knn|linear|attentive|all|features --model OUT --train DIR --val DIR
python tools/evaluate.py tokenizer --tokenizer RECIPE [a.b=value ...] [--tokenizer ...] --train DIR --val DIR
python tools/evaluate.py crops --model OUT --images DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluations.crops import evaluate_crops
from evaluations.judges import evaluate_knn, evaluate_linear, tried, unit
from evaluations.options import parse

from mapet_ds.errors import ConfigError, DataError
from mapet_ds.files import write_whole
from mapet_ds.terminal import answer

if TYPE_CHECKING:
    from mapet_ds.config.finetune import FinetuneConfig
    from mapet_ds.config.sections import Config
    from mapet_ds.data.index import Images, Index
    from mapet_ds.launch import Ranks
    from mapet_ds.results.features import Vectors
    from mapet_ds.results.stored_features import Judged

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.


class Asked(NamedTuple):
    """The features that are asked for, of one forward."""

    features: list[str]
    """Each is judged: mean, token, both."""
    layers: list[int] | None
    """Ascending numbers of the blocks; None: the last, where a model is none of blocks."""
    joined: bool
    """The blocks are one feature; otherwise each is judged."""
    kinds: tuple[str, ...]
    """The vectors that are computed of each block."""

    def one_by_one(self) -> Iterator[tuple[str, list[int], str, dict[str, Any]]]:
        """Yields feature and places of its blocks, and both in words and as figures."""
        from mapet_ds.results.features import WORDS

        places = list(range(len(self.layers or [0])))
        for feature in self.features:
            for each in [places] if self.joined else [[place] for place in places]:
                layers = [self.layers[place] for place in each] if self.layers else [None]
                layer = layers if self.joined else layers[0]
                words = WORDS[feature]
                if self.joined or len(places) > 1:
                    words += f" of block {', '.join(map(str, layers))}"
                yield feature, each, words, {"feature": feature, "layer": layer}


def build_model(arguments: argparse.Namespace) -> Any:
    """The model that is judged, on the CPU.

    Raises:
        ConfigError: there is nothing to load.
    """
    from mapet_ds.results.probe import load_timm

    if arguments.teacher:
        from mapet_ds.config.recipe import load_config
        from mapet_ds.results.tokens import teacher_as_vit

        return teacher_as_vit(load_config(arguments.teacher, arguments.overrides).teacher)
    return load_timm(arguments.model, arguments.arch, arguments.untrained, arguments.seed)


def asked_of(arguments: argparse.Namespace, model: Any) -> Asked:
    """The features that the words ask of a model. A file of features gets every kind.

    Raises:
        ConfigError: the model lacks what --feature, --layer or --last asks for.
    """
    from mapet_ds.results.features import FEATURES, judged_feature, kinds_of

    there = kinds_of(model)
    features = list(dict.fromkeys(arguments.feature or [judged_feature(model)]))
    needed = {kind for feature in features for kind in FEATURES[feature]}
    if needed - {*there}:
        raise ConfigError(
            f"--feature {' '.join(features)}: this model has no class token; leave it out, for the mean of "
            "the patch tokens."
        )
    kinds = there if arguments.features else tuple(kind for kind in there if kind in needed)
    if arguments.teacher:
        if arguments.layer or arguments.last:
            raise ConfigError(
                "--layer and --last are for --model; a teacher's is teacher.layer=, as in training."
            )
        return Asked(features, None, False, kinds)

    blocks, layers = len(model.blocks), arguments.layer or [-1]
    if arguments.last:
        layers = range(-arguments.last, 0)
    elif "all" in layers:
        layers = range(blocks)
    for layer in layers:
        if layer not in range(-blocks, blocks):
            option = f"--last {arguments.last}" if arguments.last else f"--layer {layer}"
            raise ConfigError(f"{option}: this model has layers 0 to {blocks - 1}, or -1, ...")
    return Asked(features, sorted({layer % blocks for layer in layers}), bool(arguments.last), kinds)


@contextmanager
def labelled_sets(
    arguments: argparse.Namespace, ranks: Ranks
) -> Iterator[tuple[FinetuneConfig, dict[str, Index]]]:
    """The settings by which images are read, and those of --train and --val by name. For every rank.

    Raises:
        DataError: labels or images that can't be judged by.
    """
    from mapet_ds.config.finetune import FinetuneConfig, LabelledDataConfig
    from mapet_ds.config.running import TrainConfig
    from mapet_ds.data.index import open_index
    from mapet_ds.data.labelled import check_apart, check_classes

    names = ("train", "val", "workers", "max_bad_share", "exif_orientation")
    data = LabelledDataConfig(**{name: getattr(arguments, name) for name in names})
    config = FinetuneConfig(data=data, train=TrainConfig(micro_batch_size=arguments.batch_size))
    with tempfile.TemporaryDirectory() as cache:
        sets = {
            name: ranks.first_then_all(lambda name=name: open_index(getattr(data, name), Path(cache, name)))
            for name in ("train", "val")
        }
        check_classes(sets["train"], sets["val"], section="--")
        check_apart(sets["train"], sets["val"], "--", ranks, refuse=True)
        yield config, sets


def extract(
    arguments: argparse.Namespace,
    model: Any,
    layers: Sequence[int] | None,
    kinds: Sequence[str],
    ranks: Ranks,
) -> tuple[Judged | None, dict[str, Any]]:
    """The vectors and labels of --train and of --val, and the numbers of images; both on rank 0.

    Images are read as fine-tuning reads them. Every rank must call it.

    Raises:
        ConfigError: --features holds others.
        DataError: labels or images that can't be judged by, or too many unreadable ones.
    """
    from timm.data import resolve_model_data_config

    from mapet_ds.data.index import Selection
    from mapet_ds.results.stored_features import Judged, identity, is_stored, load, save

    with labelled_sets(arguments, ranks) as (config, sets):
        train, val = sets["train"], sets["val"]
        settings = {"--exif_orientation": arguments.exif_orientation}
        settings["the evaluation transform"] = resolve_model_data_config(model)
        file = arguments.features
        key = identity(model, train, val, settings) if file else {}
        if file and ranks.from_first(lambda: is_stored(file, key, layers)):
            return load(file, layers, kinds) if ranks.rank == 0 else (None, {})

        # What is wrong with the validation images is found before the training images are computed.
        arrays, counts = [], {"classes": len(train.classes)}
        limit = arguments.max_images
        for name, whole in (("val", val), ("train", train)):
            images = Selection(whole, limit) if limit else whole
            arrays = [*computed(arguments, config, model, (layers, kinds), name, images, ranks), *arrays]
            counts |= {f"{name}_images": len(arrays[1]), f"{name}_unreadable": len(images) - len(arrays[1])}
    judged = Judged(*arrays)
    if file and ranks.rank == 0:
        save(file, judged, layers, key, counts)
    return judged, counts


def computed(
    arguments: argparse.Namespace, config: FinetuneConfig, model: Any, what: tuple[Any, Any], name: str,
    images: Images, ranks: Ranks,
) -> tuple[Vectors, Any]:  # fmt: skip
    """The vectors, of these layers and kinds, and labels of the images of --train or --val, on rank 0."""
    from timm.data import create_transform, resolve_model_data_config
    from tqdm import tqdm

    from mapet_ds.results.features import labelled_features

    transform: Any = create_transform(**resolve_model_data_config(model))
    batches = -(-len(images) // (arguments.batch_size * ranks.world_size))
    quiet = ranks.rank != 0 or not sys.stderr.isatty()
    with tqdm(desc=name, total=batches, unit="batch", disable=quiet) as bar:
        return labelled_features(
            config, model, images, transform, ranks, lambda _: bar.update(), *what, start_method="fork",
            section="--",
        )  # fmt: skip


def evaluate_tokenizer(arguments: argparse.Namespace, config: Config, ranks: Ranks) -> dict[str, Any]:
    """A row of the table, on rank 0: a tokenizer's use of its ids, and how well these alone classify."""
    from mapet_ds.results.features import chosen
    from mapet_ds.results.tokens import described, tokenizer_as_vit, usage

    judged, counts = extract(arguments, tokenizer_as_vit(config, ranks.device), None, ("mean",), ranks)
    if ranks.rank != 0:
        return {}
    assert judged
    train, val = (chosen(vectors, "mean", [0]) for vectors in (judged.train, judged.val))
    row = {"tokenizer": described(config), **usage(train, val)}
    for probe in (evaluate_knn, evaluate_linear):
        row |= probe(arguments, unit([train, judged.train_labels, val, judged.val_labels]))[1]
    return row | counts


def evaluate_tokenizers(arguments: argparse.Namespace) -> None:
    """Prints the table, and writes it to --out; on rank 0."""
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.probe import device_of
    from mapet_ds.results.tokens import table

    arguments.device = device_of(arguments.device)
    ranks = init_distributed()._replace(device=arguments.device)
    try:
        rows = [evaluate_tokenizer(arguments, config, ranks) for config in arguments.configs]
    finally:
        dist.destroy_process_group()
    if ranks.rank != 0:
        return
    rows = [row | {"settings": words} for row, words in zip(rows, arguments.tokenizer, strict=True)]
    print(json.dumps(rows) if arguments.json else table(rows))
    write_figures(arguments.out, rows)


def evaluate_attentive(arguments: argparse.Namespace) -> None:
    """Prints the accuracy of an attentive probe, and writes it to --out. It runs in one process.

    Raises:
        ConfigError: it was started as several ranks.
    """
    import torch.distributed as dist
    from timm.data import create_transform, resolve_model_data_config

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.attentive import EPOCHS, LEARNING_RATES, Tokens, attentive, token_shape
    from mapet_ds.results.probe import device_of

    device = device_of(arguments.device)
    model = build_model(arguments)
    arguments.features, arguments.feature, arguments.last = None, ["mean"], None
    arguments.layer = None if arguments.layer is None else [arguments.layer]
    layers = asked_of(arguments, model).layers
    layer = layers[0] if layers else None
    ranks = init_distributed()._replace(device=device)
    try:
        if ranks.world_size > 1:
            raise ConfigError(
                f"attentive runs in one process, not in {ranks.world_size}: leave torchrun out."
            )
        shape = token_shape(model.to(device), layer)
        transform: Any = create_transform(**resolve_model_data_config(model))
        with labelled_sets(arguments, ranks) as (config, sets):
            train, val = (
                Tokens(config, model, sets[name], transform, ranks, layer) for name in ("train", "val")
            )
            gigabytes = (len(train) + len(val)) * shape.numel() * 4 / 1e9
            if kept := gigabytes <= arguments.memory_gb:
                val.keep()
                train.keep()
            rates, epochs = arguments.learning_rates or LEARNING_RATES, arguments.epochs or EPOCHS
            probe = attentive(train, val, shape[-1], rates, epochs, arguments.seed)
            val.report()
            train.report()
    finally:
        dist.destroy_process_group()
    counts = {"train_images": len(train) - len(train.bad), "val_images": len(val) - len(val.bad)}
    sentence, figures = tried("Attentive", probe)
    figures = {"attentive_accuracy_percent": probe.accuracy} | figures | counts
    figures |= {"train_unreadable": len(train.bad), "val_unreadable": len(val.bad), "epochs": epochs}
    figures |= {"seed": arguments.seed, "batch_size": arguments.batch_size, "layer": layer, "kept": kept}
    figures |= {"classes": len(train.images.classes), **whose(arguments)}
    about = described(arguments, figures)
    print(json.dumps(figures) if arguments.json else f"{sentence} ({about})")
    write_figures(arguments.out, figures)


def evaluate_unlabelled(arguments: argparse.Namespace) -> None:
    """Prints how often a crop finds its image, and writes it to --out; on rank 0."""
    sentences, figures = evaluate_crops(arguments)
    if figures:
        print(json.dumps(figures) if arguments.json else "\n".join(sentences))
        write_figures(arguments.out, figures)


def whose(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model that figures are of."""
    model = str(arguments.model or f"teacher of {arguments.teacher}")
    return {"model": model, "untrained": arguments.untrained}


def described(arguments: argparse.Namespace, basis: dict[str, Any]) -> str:
    """What stands in brackets behind each figure."""
    weights = "untrained" if arguments.untrained else "trained"
    images = f"{basis['train_images']} training, {basis['val_images']} validation images"
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


def figures_of(
    arguments: argparse.Namespace, asked: Asked, judged: Judged, basis: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """A sentence for each figure, and the figures: those of the first feature asked for, then of each."""
    from mapet_ds.results.features import chosen

    about, basis = described(arguments, basis), basis | whose(arguments)
    if arguments.command == "features":
        kinds = " and ".join(asked.kinds)
        width = judged.train[asked.kinds[0]].shape[-1]
        rows = " and ".join(f"{len(each)}" for each in (judged.train_labels, judged.val_labels))
        sentence = f"{arguments.features}: {kinds}, {width} wide, of {rows} images of --train and --val"
        return [f"{sentence} ({about})"], basis | {
            "features": str(arguments.features),
            "layers": asked.layers,
        }

    sentences, results = [], []
    for feature, places, words, own in asked.one_by_one():
        train, val = (chosen(vectors, feature, places) for vectors in (judged.train, judged.val))
        arrays = [train, judged.train_labels, val, judged.val_labels]
        lines, figures = arguments.evaluate(arguments, arrays)
        sentences += [f"{line} ({words}; {about})" for line in lines]
        results.append(figures | own)
    several = {"judged": results} if len(results) > 1 else {}
    return sentences, results[0] | basis | several


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the figures that the command asks for, and writes them to --out; on rank 0."""
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.probe import device_of

    arguments.device = device_of(arguments.device)
    model = build_model(arguments)
    asked = asked_of(arguments, model)
    ranks = init_distributed()._replace(device=arguments.device)
    try:
        judged, basis = extract(arguments, model, asked.layers, asked.kinds, ranks)
    finally:
        dist.destroy_process_group()
    if ranks.rank != 0:
        return
    assert judged
    sentences, figures = figures_of(arguments, asked, judged, basis)
    print(json.dumps(figures) if arguments.json else "\n".join(sentences))
    write_figures(arguments.out, figures)


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    others = {"tokenizer": evaluate_tokenizers, "attentive": evaluate_attentive, "crops": evaluate_unlabelled}
    sys.exit(answer(lambda: others.get(words.command, evaluate)(words)))
