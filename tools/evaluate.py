"""Evaluate a timm ViT, or tokenizers, on labelled images.

python tools/evaluate.py knn|linear|all|features --model OUT --train DIR --val DIR
python tools/evaluate.py tokenizer --tokenizer RECIPE [a.b=value ...] [--tokenizer ...] --train DIR --val DIR
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapet_ds.errors import ConfigError, DataError
from mapet_ds.files import write_whole
from mapet_ds.terminal import answer, number, refuse

if TYPE_CHECKING:
    from mapet_ds.config.finetune import FinetuneConfig
    from mapet_ds.config.sections import Config
    from mapet_ds.data.index import Images
    from mapet_ds.launch import Ranks

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.

NEIGHBOURS = (10, 20, 100)
"""What `all` takes for k, where there are as many training images."""
SMALL = 10**9
"""Training images x width x classes up to which `all` solves the logistic regression: minutes on a CPU."""
Result = tuple[list[str], dict[str, Any]]
"""A sentence for each figure, and the figures."""


def build_model(arguments: argparse.Namespace) -> Any:
    """The model that is judged, on the CPU.

    Raises:
        ConfigError: there is nothing to load, or it lacks what --pool or --layer asks for.
    """
    from mapet_ds.results.probe import load_timm

    if arguments.teacher:
        from mapet_ds.config.recipe import load_config
        from mapet_ds.results.tokens import teacher_as_vit

        model = teacher_as_vit(load_config(arguments.teacher, arguments.overrides).teacher)
    else:
        model = load_timm(arguments.model, arguments.arch, arguments.untrained, arguments.seed)
    if arguments.pool == "token" and not model.num_prefix_tokens:
        raise ConfigError(
            "--pool token: this model has no class token; leave it out, for the mean of the patch tokens."
        )
    if arguments.layer is not None:
        if arguments.teacher:
            raise ConfigError("--layer is for --model; a teacher's is teacher.layer=, as in training.")
        if arguments.layer not in range(-(blocks := len(model.blocks)), blocks):
            raise ConfigError(
                f"--layer {arguments.layer}: this model has layers 0 to {blocks - 1}, or -1, ..."
            )
    return model


def extract(arguments: argparse.Namespace, model: Any, ranks: Ranks) -> tuple[list[Any], dict[str, Any]]:
    """Features and labels of --train and of --val, four arrays, and the numbers of images; both on rank 0.

    Images are read as fine-tuning reads them. Every rank must call it.

    Raises:
        ConfigError: --features holds others.
        DataError: labels or images that can't be judged by, or too many unreadable ones.
    """
    from timm.data import resolve_model_data_config

    from mapet_ds.config.finetune import FinetuneConfig, LabelledDataConfig
    from mapet_ds.config.running import TrainConfig
    from mapet_ds.data.index import Selection, open_index
    from mapet_ds.data.labelled import check_apart, check_classes
    from mapet_ds.results.stored_features import identity, is_stored, load, save

    names = ("train", "val", "workers", "max_bad_share", "exif_orientation")
    data = LabelledDataConfig(**{name: getattr(arguments, name) for name in names})
    config = FinetuneConfig(data=data, train=TrainConfig(micro_batch_size=arguments.batch_size))
    with tempfile.TemporaryDirectory() as cache:
        train, val = (
            ranks.first_then_all(lambda name=name: open_index(getattr(data, name), Path(cache, name)))
            for name in ("train", "val")
        )
        check_classes(train, val, section="--")
        check_apart(train, val, "--", ranks, refuse=True)
        settings = {f"--{name}": getattr(arguments, name) for name in ("pool", "layer", "exif_orientation")}
        settings["the evaluation transform"] = resolve_model_data_config(model)
        file = arguments.features
        key = identity(model, train, val, settings) if file else {}
        if file and ranks.from_first(lambda: is_stored(file, key)):
            arrays, counts = load(file) if ranks.rank == 0 else ([], {})
            return arrays, counts

        # What is wrong with the validation images is found before the training images are computed.
        arrays, counts = [], {"classes": len(train.classes)}
        limit = arguments.max_images
        for name, whole in (("val", val), ("train", train)):
            images = Selection(whole, limit) if limit else whole
            arrays = [*computed(arguments, config, model, name, images, ranks), *arrays]
            counts |= {f"{name}_images": len(arrays[1]), f"{name}_unreadable": len(images) - len(arrays[1])}
    if file and ranks.rank == 0:
        save(file, arrays, key, counts)
    return arrays, counts


def computed(
    arguments: argparse.Namespace, config: FinetuneConfig, model: Any, name: str, images: Images, ranks: Ranks
) -> tuple[Any, Any]:
    """Features and labels of the images of --train or --val, on rank 0."""
    from timm.data import create_transform, resolve_model_data_config
    from tqdm import tqdm

    from mapet_ds.results.probe import labelled_features

    transform: Any = create_transform(**resolve_model_data_config(model))
    batches = -(-len(images) // (arguments.batch_size * ranks.world_size))
    quiet = ranks.rank != 0 or not sys.stderr.isatty()
    with tqdm(desc=name, total=batches, unit="batch", disable=quiet) as bar:
        return labelled_features(
            config, model, images, transform, ranks, lambda _: bar.update(), arguments.pool, arguments.layer,
            start_method="fork", section="--",
        )  # fmt: skip


def unit(arrays: list[Any]) -> list[Any]:
    """The four arrays with features of length 1."""
    from mapet_ds.results.probe import unit_length

    train, train_labels, val, val_labels = arrays
    return [unit_length(train), train_labels, unit_length(val), val_labels]


def evaluate_knn(arguments: argparse.Namespace, arrays: list[Any]) -> Result:
    """The k-NN vote."""
    from mapet_ds.results.probe import K, knn

    k, temperature = arguments.k or K, arguments.temperature
    accuracy = knn(*unit(arrays), k=k, temperature=temperature)
    figures = {"knn_accuracy_percent": accuracy, "k": k, "temperature": temperature}
    return [f"k-NN (k = {k}) accuracy {accuracy:.2f} %"], figures


def evaluate_linear(arguments: argparse.Namespace, arrays: list[Any]) -> Result:
    """A linear classifier, by --solver."""
    from mapet_ds.results.probe import EPOCHS, LEARNING_RATES, linear, linear_sgd

    if arguments.solver == "lbfgs":
        accuracy = linear(*unit(arrays), penalty=arguments.penalty)
        figures = {"linear_accuracy_percent": accuracy, "solver": "lbfgs", "penalty": arguments.penalty}
        return [f"Linear accuracy {accuracy:.2f} %"], figures
    rates, norm = arguments.learning_rates or LEARNING_RATES, arguments.batch_norm
    settings = {"epochs": arguments.epochs or EPOCHS, "batch_norm": norm, "seed": arguments.seed}
    probe = linear_sgd(*arrays, learning_rates=rates, **settings, device=arguments.device)

    # The sentence says which rate was chosen, and where a better one may lie.
    held_out, rate = probe.held_out, probe.learning_rate
    tried = ", ".join(f"{lr:g}: {accuracy:.2f} %" for lr, accuracy in held_out.items())
    sentence = (
        f"Linear (SGD{', batch norm' if norm else ''}) accuracy {probe.accuracy:.2f} % with learning rate "
        f"{rate:g}, chosen on a tenth of the training images ({tried})"
    )
    best = [lr for lr, accuracy in sorted(held_out.items()) if accuracy == max(held_out.values())]
    for end, name in ((min(held_out), "lowest"), (max(held_out), "highest")):
        if len(held_out) > 1 and best == [end]:
            sentence += f"; a better one may lie beyond the {name} of them: --learning_rates takes others"
    figures = {"linear_accuracy_percent": probe.accuracy, "solver": "sgd", "learning_rate": rate}
    return [sentence], figures | {"held_out_accuracy_percent": held_out} | settings


def evaluate_features(arguments: argparse.Namespace, arrays: list[Any]) -> Result:
    """The features themselves, which are in --features by now."""
    rows = " and ".join(f"{len(each)} rows of {each.shape[1]}" for each in (arrays[0], arrays[2]))
    return [f"{arguments.features}: {rows} of --train and --val"], {"features": str(arguments.features)}


def evaluate_all(arguments: argparse.Namespace, arrays: list[Any]) -> Result:
    """k-NN for several k, and linear classifiers: SGD without and with BatchNorm; lbfgs for small sets."""
    train, train_labels = arrays[:2]
    ks = [k for k in NEIGHBOURS if k <= len(train)] or [len(train)]
    runs: list[tuple[Any, dict[str, Any]]] = [(evaluate_knn, {"k": k}) for k in ks]
    runs += [(evaluate_linear, {"solver": "sgd", "batch_norm": norm}) for norm in (False, True)]
    if train.size * (train_labels.max() + 1) <= SMALL:
        runs.append((evaluate_linear, {"solver": "lbfgs"}))
    results = [run(argparse.Namespace(**vars(arguments) | own), arrays) for run, own in runs]
    sentences = [sentence for lines, _ in results for sentence in lines]
    figures = [each for _, each in results]
    return sentences, {"knn": figures[: len(ks)], "linear": figures[len(ks) :]}


def evaluate_tokenizer(arguments: argparse.Namespace, config: Config, ranks: Ranks) -> dict[str, Any]:
    """A row of the table, on rank 0: a tokenizer's use of its ids, and how well these alone classify."""
    from mapet_ds.results.tokens import described, tokenizer_as_vit, usage

    arrays, counts = extract(arguments, tokenizer_as_vit(config, ranks.device), ranks)
    if ranks.rank != 0:
        return {}
    row = {"tokenizer": described(config), **usage(arrays[0], arrays[2])}
    for probe in (evaluate_knn, evaluate_linear):
        row |= probe(arguments, unit(arrays))[1]
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


def output_file(text: str) -> Path:
    """A type for argparse: a file that can be written, as far as a look at the path tells."""
    path = Path(text)
    place = path if path.exists() and not path.is_file() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written: name a file in a folder that is there")
    return path


def model_options() -> argparse.ArgumentParser:
    """What is judged by all commands but `tokenizer`."""
    model = argparse.ArgumentParser(add_help=False)
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder of tools/export_timm.py, or a file of weights")
    which.add_argument(
        "--teacher", metavar="YAML", help="instead: the dense features of this recipe's teacher"
    )
    option = model.add_argument
    option("overrides", nargs="*", metavar="a.b=value", help="with --teacher: replace the recipe's settings")
    option("--arch", help="timm model name, for a file of weights")
    option("--untrained", action="store_true", help="the same architecture with fresh weights, to compare")
    option("--pool", choices=("avg", "token"), default="avg", help="mean patch token, or class token")
    layer = "the block to judge, from 0, or -1 for the last; the final norm follows (default: the last)"
    option("--layer", type=int, metavar="N", help=layer)
    stored = "take features from this safetensors file; compute them into it where it isn't there yet"
    option("--features", type=output_file, metavar="FILE", help=stored)
    model.set_defaults(max_images=None)
    return model


def shared_options() -> argparse.ArgumentParser:
    """The images, and where the figures go."""
    shared = argparse.ArgumentParser(add_help=False)
    option = shared.add_argument
    option("--seed", type=number(int, 0), default=0, help="of fresh weights, and of the linear probe by SGD")
    option("--train", required=True, help="folder with a sub-folder of images per class, or tar shards")
    option("--val", required=True, help="the same classes, other images")
    option("--batch_size", type=number(int, 1), default=128)
    option("--workers", type=number(int, 0), default=2, help="processes that read and decode")
    few = "of each set at most this share, rounded up, may be unreadable; they are left out"
    option("--max_bad_share", type=number(float, 0), default=0.01, help=few)
    turned = "turn images as EXIF says, for a model that was trained so"
    option("--exif_orientation", action="store_true", help=turned)
    option("--device", help="cuda, cuda:1, cpu; default: a GPU where there is one")
    option("--json", action="store_true", help="print one JSON object instead of sentences")
    option("--out", type=output_file, metavar="FILE", help="write that JSON object to a file, too")
    return shared


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a timm ViT, or tokenizers, on labelled images.")
    commands = parser.add_subparsers(dest="command", required=True)
    model, shared, positive = model_options(), shared_options(), number(float, 0, above=True)
    voting, fitting = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    voting.add_argument("--temperature", type=positive, default=0.07)
    neighbours = {"type": number(int, 1), "help": "neighbours that vote"}
    option = fitting.add_argument
    option("--penalty", type=number(float, 0), default=1e-4, help="lbfgs: on the squared weights")
    option("--learning_rates", type=positive, nargs="+", help="sgd: all tried at once")
    option("--epochs", type=number(int, 1), help="sgd: passes over the features")
    solvers = "lbfgs: logistic regression, solved whole on the CPU; sgd: as papers train it, on --device"
    solver = {"choices": ("lbfgs", "sgd"), "help": solvers}

    vote = "weighted vote of the k nearest training images"
    command = commands.add_parser("knn", parents=[model, shared, voting], help=vote)
    command.add_argument("--k", **neighbours)
    command.set_defaults(evaluate=evaluate_knn)

    command = commands.add_parser(
        "linear", parents=[model, shared, fitting], help="linear classifier on the frozen features"
    )
    command.add_argument("--solver", default="lbfgs", **solver)
    norm = "sgd: BatchNorm without weights before the head"
    command.add_argument("--batch_norm", action="store_true", help=norm)
    command.set_defaults(evaluate=evaluate_linear)

    everything = "all of these, from one pass over the images"
    command = commands.add_parser("all", parents=[model, shared, voting, fitting], help=everything)
    command.set_defaults(evaluate=evaluate_all)

    command = commands.add_parser(
        "features", parents=[model, shared], help="the features, into --out FILE.safetensors"
    )
    command.set_defaults(evaluate=evaluate_features)

    ids = "tokenizers side by side: the use of their ids, and how well these alone classify"
    command = commands.add_parser("tokenizer", parents=[shared, voting, fitting], help=ids)
    given = "a recipe and settings that replace its own; once for each tokenizer"
    many = {"action": "append", "nargs": "+", "required": True, "metavar": ("RECIPE", "a.b=value")}
    command.add_argument("--tokenizer", **many, help=given)
    command.add_argument("--k", **neighbours)
    command.add_argument("--solver", default="sgd", **solver)
    few = "of each folder at most so many, evenly spaced over its sorted names"
    command.add_argument("--max_images", type=number(int, 1), default=10_000, metavar="N", help=few)
    command.set_defaults(pool="avg", layer=None, features=None, batch_norm=False)

    arguments = parser.parse_args(argv)
    if arguments.command == "features":
        arguments.features, arguments.out = arguments.out or arguments.features, None
        if arguments.features is None:
            parser.error("features needs --out FILE.safetensors")
    if arguments.command == "tokenizer":
        try:
            arguments.configs = [tokenizer_settings(*words) for words in arguments.tokenizer]
        except ConfigError as error:
            refuse(parser, error)
    return arguments


def tokenizer_settings(recipe: str, *overrides: str) -> Config:
    """The settings of one --tokenizer.

    Raises:
        ConfigError: a mistake in them, or no file at tokenizer.path.
    """
    from mapet_ds.config.recipe import load_config
    from mapet_ds.config.rules import check_method
    from mapet_ds.training.command_line import check_tokenizer_file

    config = load_config(recipe, list(overrides))
    check_method(config)
    check_tokenizer_file(config.tokenizer)
    return config


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the figures that the command asks for, and writes them to --out; on rank 0."""
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.probe import device_of

    arguments.device = device_of(arguments.device)
    model = build_model(arguments)
    ranks = init_distributed()._replace(device=arguments.device)
    try:
        arrays, basis = extract(arguments, model, ranks)
    finally:
        dist.destroy_process_group()
    if ranks.rank != 0:
        return
    sentences, figures = arguments.evaluate(arguments, arrays)
    figures |= basis | {"model": str(arguments.model or f"teacher of {arguments.teacher}")}
    figures |= {name: getattr(arguments, name) for name in ("untrained", "pool", "layer")}
    weights = "untrained" if arguments.untrained else "trained"
    images = f"{basis['train_images']} training, {basis['val_images']} validation images"
    about = f"({weights} weights; {images}, {basis['classes']} classes)"
    print(json.dumps(figures) if arguments.json else "\n".join(f"{line} {about}" for line in sentences))
    write_figures(arguments.out, figures)


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    work = evaluate_tokenizers if words.command == "tokenizer" else evaluate
    sys.exit(answer(lambda: work(words)))
