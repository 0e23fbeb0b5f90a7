"""The words that tools/evaluate.py understands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluations.judges import evaluate_all, evaluate_knn, evaluate_linear

from mapet_ds.config.shipped import SUITES, shipped_names
from mapet_ds.errors import ConfigError
from mapet_ds.terminal import number, refuse

if TYPE_CHECKING:
    from mapet_ds.config.sections import Config

EXPORT = "folder of tools/export_timm.py, or a file of weights"
ARCHITECTURE = "timm model name, for a file of weights"
NEIGHBOURS: Any = {"type": number(int, 1), "help": "neighbours that vote"}
SOLVERS = "lbfgs: logistic regression, solved whole on the CPU; sgd: as papers train it, on --device"
SOLVER: Any = {"choices": ("lbfgs", "sgd"), "help": SOLVERS}


def output_file(text: str) -> Path:
    """A type for argparse: a file that can be written, as far as a look at the path tells."""
    path = Path(text)
    place = path if path.exists() and not path.is_file() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written: name a file in a folder that is there")
    return path


def layer_number(text: str) -> int | str:
    """A type for argparse: a block's number, or all."""
    try:
        return text if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number nor all") from None


def model_options() -> argparse.ArgumentParser:
    """What is judged by all commands but `tokenizer`."""
    model = argparse.ArgumentParser(add_help=False)
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help=EXPORT)
    which.add_argument(
        "--teacher", metavar="YAML", help="instead: the dense features of this recipe's teacher"
    )
    option = model.add_argument
    option("overrides", nargs="*", metavar="a.b=value", help="with --teacher: replace the recipe's settings")
    option("--arch", help=ARCHITECTURE)
    option("--untrained", action="store_true", help="the same architecture with fresh weights, to compare")
    model.set_defaults(max_images=None)
    return model


def feature_options() -> argparse.ArgumentParser:
    """The features by which a model is judged."""
    model = argparse.ArgumentParser(add_help=False)
    option = model.add_argument
    feature = "mean of the patch tokens, class token, or both joined; of several each is judged (default: "
    feature += "mean, or what suits the objective of an export)"
    option("--feature", choices=("mean", "token", "both"), nargs="+", help=feature)
    blocks = model.add_mutually_exclusive_group()
    layer = "the block to judge, from 0, or -1 for the last, or all; of several each is judged; the final "
    layer += "norm follows (default: the last)"
    blocks.add_argument("--layer", type=layer_number, nargs="+", metavar="N", help=layer)
    last = "instead: the features of the last N blocks, joined"
    blocks.add_argument("--last", type=number(int, 1), metavar="N", help=last)
    stored = "take features from this safetensors file; compute them into it where it isn't there yet"
    option("--features", type=output_file, metavar="FILE", help=stored)
    return model


def reading_options() -> argparse.ArgumentParser:
    """How images are read, and where they are computed on."""
    reading = argparse.ArgumentParser(add_help=False)
    option = reading.add_argument
    option("--batch_size", type=number(int, 1), default=128)
    option("--workers", type=number(int, 0), default=2, help="processes that read and decode")
    few = "of each set at most this share, rounded up, may be unreadable; they are left out"
    option("--max_bad_share", type=number(float, 0), default=0.01, help=few)
    turned = "turn images as EXIF says, for a model that was trained so"
    option("--exif_orientation", action="store_true", help=turned)
    option("--device", help="cuda, cuda:1, cpu; default: a GPU where there is one")
    reading.set_defaults(labels=[], shots=[], draws=1)
    return reading


def writing_options() -> argparse.ArgumentParser:
    """Where the figures go."""
    writing = argparse.ArgumentParser(add_help=False)
    option = writing.add_argument
    option("--json", action="store_true", help="print one JSON object instead of sentences")
    option("--out", type=output_file, metavar="FILE", help="write that JSON object to a file, too")
    return writing


def export_options() -> argparse.ArgumentParser:
    """A model that stands alone: neither a teacher nor fresh weights."""
    export = argparse.ArgumentParser(add_help=False)
    export.add_argument("--model", type=Path, required=True, help=EXPORT)
    export.add_argument("--arch", help=ARCHITECTURE)
    return export


def shared_options() -> argparse.ArgumentParser:
    """The images, and where the figures go."""
    shared = argparse.ArgumentParser(add_help=False, parents=[reading_options(), writing_options()])
    option = shared.add_argument
    option("--seed", type=number(int, 0), default=0, help="of fresh weights, of --shots, of probes by SGD")
    option("--train", required=True, help="folder with a sub-folder of images per class, or tar shards")
    option("--val", required=True, help="the same classes, other images")
    return shared


def probe_options() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """How neighbours vote, and how a linear layer is fitted."""
    voting, fitting = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    positive, option = number(float, 0, above=True), fitting.add_argument
    voting.add_argument("--temperature", type=positive, default=0.07)
    option("--penalty", type=number(float, 0), default=1e-4, help="lbfgs: on the squared weights")
    option("--learning_rates", type=positive, nargs="+", help="sgd: all tried at once")
    option("--epochs", type=number(int, 1), help="sgd: passes over the features")
    return voting, fitting


def few_options() -> argparse.ArgumentParser:
    """The part of --train whose labels are used."""
    few = argparse.ArgumentParser(add_help=False)
    listed = "learn from the images of --train that this text file names, one a line; each file is judged"
    few.add_argument("--labels", type=Path, nargs="+", metavar="FILE", default=[], help=listed)
    shots = "learn from N images of each class, drawn by --seed; each N is judged"
    few.add_argument("--shots", type=number(int, 1), nargs="+", metavar="N", default=[], help=shots)
    draws = "draws of --shots, whose mean and standard deviation are given (default: 3)"
    few.add_argument("--draws", type=number(int, 1), metavar="N", default=3, help=draws)
    return few


def accuracy_options() -> argparse.ArgumentParser:
    """The fine-tuned model, and the images that it is judged on."""
    accuracy = argparse.ArgumentParser(add_help=False)
    option = accuracy.add_argument
    option("--model", type=Path, required=True, help="folder that tools/finetune.py wrote, RUN/timm")
    option("--arch", help=ARCHITECTURE)
    images = "folders named by the model's classes, by wnid, or by ImageNet's number; or tar shards"
    option("--images", required=True, metavar="DIR", help=images)
    classes = "only images of these classes, among which the model chooses: imagenet_a, imagenet_r, "
    classes += "mini_imagenet, or a file that names one a line (default: those of the images)"
    option("--classes", metavar="LIST", default="", help=classes)
    real = "judge by ReaL's labels, too: the published real.json, or without a file the one of timm"
    option("--real", nargs="?", const="timm", metavar="FILE", help=real)
    return accuracy


def crops_options() -> argparse.ArgumentParser:
    """The model, and the images without labels that it is judged on."""
    crops = argparse.ArgumentParser(add_help=False, parents=[export_options()])
    option = crops.add_argument
    option("--images", required=True, help="folder of images at any depth, tar shards, patterns or lists")
    option("--feature", choices=("mean", "token", "both"), help="what is compared; default: as for knn")
    most = "at most so many, evenly spaced over the set (default: 1000)"
    option("--max_images", type=number(int, 2), default=1000, metavar="N", help=most)
    option("--seed", type=number(int, 0), default=0, help="of fresh weights")
    return crops


def suite_options() -> argparse.ArgumentParser:
    """The model, the document, and where its results go."""
    suite = argparse.ArgumentParser(add_help=False, parents=[export_options()])
    option = suite.add_argument
    named = f"a suite: a file, or one of {', '.join(shipped_names(SUITES))}"
    option("--suite", required=True, metavar="YAML", help=named)
    option("overrides", nargs="*", metavar="a.b=value", help="replace the document's entries")
    out = "folder of results.json, table.md and features.safetensors (default: suite, in the model's folder)"
    option("--out", type=Path, metavar="DIR", help=out)
    stored = "take features from this safetensors file; compute them into it where it isn't there yet"
    option("--features", type=output_file, metavar="FILE", help=stored)
    fixed = {"teacher": None, "untrained": False, "max_images": None, "layer": None, "last": None}
    suite.set_defaults(**fixed)
    return suite


def suite_settings(arguments: argparse.Namespace) -> None:
    """Puts what the suite's document says in the place of options.

    Raises:
        ConfigError: a mistake in it.
    """
    from mapet_ds.config.suite import load_suite

    arguments.suite = suite = load_suite(arguments.suite, arguments.overrides)
    arguments.train, arguments.val, arguments.seed = suite.data.train, suite.data.val, suite.seed
    arguments.feature, arguments.draws = suite.features, suite.few.draws
    arguments.labels, arguments.shots = [Path(file) for file in suite.few.lists], suite.few.shots
    model = arguments.model
    arguments.out = arguments.out or (model if model.is_dir() else model.parent) / "suite"


def attentive_options() -> argparse.ArgumentParser:
    """The block whose patch tokens are pooled, and how the attentive probe is trained."""
    attentive = argparse.ArgumentParser(add_help=False)
    option = attentive.add_argument
    one = "the block whose tokens are pooled, from 0, or -1 for the last; the final norm follows"
    option("--layer", type=int, metavar="N", help=one)
    option("--learning_rates", type=number(float, 0, above=True), nargs="+", help="all tried at once")
    option("--epochs", type=number(int, 1), help="passes over the images")
    memory = "keep patch tokens in memory up to so many GB; beyond that each pass computes them again"
    option("--memory_gb", type=number(float, 0), default=8.0, metavar="GB", help=memory)
    return attentive


def add_tokenizer(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Adds the command `tokenizer`."""
    ids = "tokenizers side by side: the use of their ids, and how well these alone classify"
    command = commands.add_parser("tokenizer", parents=parents, help=ids)
    given = "a recipe and settings that replace its own; once for each tokenizer"
    many = {"action": "append", "nargs": "+", "required": True, "metavar": ("RECIPE", "a.b=value")}
    command.add_argument("--tokenizer", **many, help=given)
    command.add_argument("--k", **NEIGHBOURS)
    command.add_argument("--solver", default="sgd", **SOLVER)
    few = "of each folder at most so many, evenly spaced over its sorted names"
    command.add_argument("--max_images", type=number(int, 1), default=10_000, metavar="N", help=few)
    command.set_defaults(features=None, batch_norm=False)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a timm ViT, or tokenizers, on labelled images.")
    commands = parser.add_subparsers(dest="command", required=True)
    model, features, shared = model_options(), feature_options(), shared_options()
    (voting, fitting), few = probe_options(), few_options()
    vote = "weighted vote of the k nearest training images"
    command = commands.add_parser("knn", parents=[model, features, shared, few, voting], help=vote)
    command.add_argument("--k", **NEIGHBOURS)
    command.set_defaults(evaluate=evaluate_knn)

    command = commands.add_parser(
        "linear", parents=[model, features, shared, fitting, few],
        help="linear classifier on the frozen features",
    )  # fmt: skip
    command.add_argument("--solver", default="lbfgs", **SOLVER)
    norm = "sgd: BatchNorm without weights before the head"
    command.add_argument("--batch_norm", action="store_true", help=norm)
    command.set_defaults(evaluate=evaluate_linear)

    pooled = "attention pools the frozen patch tokens, a linear layer classifies; in one process"
    commands.add_parser("attentive", parents=[model, shared, attentive_options()], help=pooled)

    everything = "knn and linear in several ways, from one pass over the images"
    command = commands.add_parser("all", parents=[model, features, shared, voting, fitting], help=everything)
    command.set_defaults(evaluate=evaluate_all)

    stored = "the features, into --out FILE.safetensors"
    commands.add_parser("features", parents=[model, features, shared], help=stored)

    add_tokenizer(commands, [shared, voting, fitting])

    top = "top-1 and top-5 of a fine-tuned model, on any images whose classes it knows"
    alone = [reading_options(), writing_options()]
    commands.add_parser("accuracy", parents=[accuracy_options(), *alone], help=top)

    again = "how often a crop of an image finds another one of it among all, beside fresh weights; no labels"
    commands.add_parser("crops", parents=[crops_options(), *alone], help=again)

    whole = "all that a document names, of one model: a table, which goes on where it stopped"
    commands.add_parser("suite", parents=[suite_options(), reading_options()], help=whole)

    arguments = parser.parse_args(argv)
    if arguments.command == "features":
        arguments.features, arguments.out = arguments.out or arguments.features, None
        if arguments.features is None:
            parser.error("features needs --out FILE.safetensors")
    try:
        if arguments.command == "tokenizer":
            arguments.configs = [tokenizer_settings(*words) for words in arguments.tokenizer]
        if arguments.command == "suite":
            suite_settings(arguments)
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
