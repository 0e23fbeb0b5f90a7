"""Evaluate a timm ViT on labelled images: `tools/evaluate.py knn|linear|all --model OUT --train DIR --val DIR`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import TeacherConfig
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.results.probe import (
    EPOCHS,
    LEARNING_RATES,
    K,
    features,
    knn,
    labelled_folders,
    linear,
    linear_sgd,
    load_timm,
    unit_length,
)
from mapet_ds.targets.teacher import build_teacher, teacher_mean_std

NEIGHBOURS = (10, 20, 100)
"""What `all` takes for k, where there are as many training images."""
SMALL = 10**9
"""Training images x width x classes up to which `all` solves the logistic regression whole: minutes on a CPU."""
Found = tuple[list[str], dict[str, Any]]
"""What an evaluation says, a line a figure; and the figures."""


class TeacherFeatures(torch.nn.Module):
    """A recipe's teacher, its layer's features as a ViT's patch tokens: what the targets themselves are worth."""

    num_prefix_tokens = 0

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.teacher = build_teacher(config, torch.device("cpu"))
        mean, std = teacher_mean_std(config)
        size = (3, config.img_size, config.img_size)
        self.pretrained_cfg = {
            "input_size": size,
            "mean": mean,
            "std": std,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.teacher(images)


def extract(arguments: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Features and labels of --train and --val, and what figures rest on."""
    if arguments.teacher:
        model: Any = TeacherFeatures(load_config(arguments.teacher, arguments.overrides).teacher)
    else:
        model = load_timm(arguments.model, arguments.arch, arguments.untrained, arguments.seed)
    if arguments.pool == "token" and not model.num_prefix_tokens:
        raise ConfigError(
            "--pool token: this model has no class token; leave it out, for the mean of the patch tokens."
        )
    train, val = labelled_folders(arguments.train, arguments.val, model)
    found: list[Any] = []
    for folder, name in ((train, "train"), (val, "val")):
        loader = DataLoader(
            folder,
            arguments.batch_size,
            num_workers=arguments.workers,
            pin_memory=arguments.device.type == "cuda",
        )
        batches = tqdm(loader, desc=name, unit="batch", disable=not sys.stderr.isatty())
        found += features(model, batches, arguments.device, arguments.pool)
    return found, {
        "train_images": len(train),
        "val_images": len(val),
        "classes": len(train.classes),
        "model": str(arguments.model or f"teacher of {arguments.teacher}"),
        "untrained": arguments.untrained,
        "pool": arguments.pool,
    }


def unit(found: list[Any]) -> list[Any]:
    """Features and labels, the features of length 1."""
    train, train_labels, val, val_labels = found
    return [unit_length(train), train_labels, unit_length(val), val_labels]


def evaluate_knn(arguments: argparse.Namespace, found: list[Any]) -> Found:
    """The k-NN vote."""
    accuracy = knn(*unit(found), arguments.k, arguments.temperature)
    figures = {"knn_accuracy_percent": accuracy, "k": arguments.k, "temperature": arguments.temperature}
    return [f"k-NN (k = {arguments.k}) accuracy {accuracy:.2f} %"], figures


def evaluate_linear(arguments: argparse.Namespace, found: list[Any]) -> Found:
    """A linear classifier, by --solver."""
    if arguments.solver == "lbfgs":
        accuracy = linear(*unit(found), arguments.penalty)
        figures = {"linear_accuracy_percent": accuracy, "solver": "lbfgs", "penalty": arguments.penalty}
        return [f"Linear accuracy {accuracy:.2f} %"], figures
    settings = {"epochs": arguments.epochs, "batch_norm": arguments.batch_norm, "seed": arguments.seed}
    probe = linear_sgd(*found, arguments.learning_rates, **settings, device=arguments.device)
    tried = ", ".join(f"{lr:g}: {accuracy:.2f} %" for lr, accuracy in probe.held_out.items())
    says = (
        f"Linear (SGD{', batch norm' if arguments.batch_norm else ''}) accuracy {probe.accuracy:.2f} % with learning rate "
        f"{probe.learning_rate:g}, chosen on a tenth of the training images ({tried})"
    )
    best = [lr for lr, accuracy in sorted(probe.held_out.items()) if accuracy == max(probe.held_out.values())]
    for end, name in ((min(probe.held_out), "lowest"), (max(probe.held_out), "highest")):
        if len(probe.held_out) > 1 and best == [end]:
            says += f"; a better one may lie beyond the {name} of them: --learning_rates takes others"
    figures = {
        "linear_accuracy_percent": probe.accuracy,
        "solver": "sgd",
        "learning_rate": probe.learning_rate,
    }
    return [says], figures | {"held_out_accuracy_percent": probe.held_out} | settings


def evaluate_all(arguments: argparse.Namespace, found: list[Any]) -> Found:
    """k-NN for several k, and linear classifiers: by SGD, without and with BatchNorm, and solved whole where the set is small."""
    train, train_labels = found[:2]
    ks = [k for k in NEIGHBOURS if k <= len(train)] or [len(train)]
    runs = [(evaluate_knn, {"k": k}) for k in ks]
    runs += [(evaluate_linear, {"solver": "sgd", "batch_norm": batch_norm}) for batch_norm in (False, True)]
    if train.size * (train_labels.max() + 1) <= SMALL:
        runs.append((evaluate_linear, {"solver": "lbfgs"}))
    says, figures = [], []
    for evaluate, settings in runs:
        lines, figure = evaluate(argparse.Namespace(**{**vars(arguments), **settings}), found)
        says += lines
        figures.append(figure)
    return says, {"knn": figures[: len(ks)], "linear": figures[len(ks) :]}


def number(kind: type, least: float, above: bool = False) -> Callable[[str], Any]:
    """A type for argparse: a finite number that is at least, or above, `least`."""

    def parse_number(text: str) -> Any:
        value = kind(text)
        if not (value > least or (value == least and not above)) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {least}")
        return value

    return parse_number


def device(text: str) -> torch.device:
    """A type for argparse: a device that this host has."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text} is no device of this host: {str(error).splitlines()[0]}"
        ) from error
    return found


def output_file(text: str) -> Path:
    """A type for argparse: a file that can be written, as far as a look at the path tells."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written: name a file in a folder that is there")
    return path


def shared_options() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    which = shared.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder of tools/export_timm.py, or a file of weights")
    which.add_argument(
        "--teacher", metavar="YAML", help="instead: the frozen teacher of this recipe, its dense features"
    )
    shared.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="with --teacher: settings that replace the recipe's"
    )
    shared.add_argument("--arch", help="timm model name, for a file of weights")
    shared.add_argument(
        "--untrained", action="store_true", help="the same architecture with fresh weights, to compare"
    )
    shared.add_argument(
        "--seed", type=number(int, 0), default=0, help="of the fresh weights, and of the linear probe by SGD"
    )
    shared.add_argument(
        "--train", type=Path, required=True, help="folder with a sub-folder of images per class"
    )
    shared.add_argument("--val", type=Path, required=True, help="the same classes, other images")
    shared.add_argument(
        "--pool", choices=("avg", "token"), default="avg", help="mean patch token, or class token"
    )
    shared.add_argument("--batch_size", type=number(int, 1), default=128)
    shared.add_argument("--workers", type=number(int, 0), default=2, help="processes that read and decode")
    shared.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cuda:1, cpu",
    )
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    shared.add_argument(
        "--out", type=output_file, metavar="FILE", help="write that JSON object to a file, too"
    )
    return shared


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a timm ViT on labelled images.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = shared_options()
    voting, fitting = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    voting.add_argument("--temperature", type=number(float, 0, above=True), default=0.07)
    fitting.add_argument(
        "--penalty", type=number(float, 0), default=1e-4, help="lbfgs: on the squared weights"
    )
    rate = number(float, 0, above=True)
    fitting.add_argument(
        "--learning_rates", type=rate, nargs="+", default=LEARNING_RATES, help="sgd: all tried at once"
    )
    fitting.add_argument(
        "--epochs", type=number(int, 1), default=EPOCHS, help="sgd: passes over the features"
    )
    neighbours = commands.add_parser(
        "knn", parents=[shared, voting], help="weighted vote of the k nearest training images"
    )
    neighbours.add_argument("--k", type=number(int, 1), default=K)
    neighbours.set_defaults(evaluate=evaluate_knn)
    classifier = commands.add_parser(
        "linear", parents=[shared, fitting], help="linear classifier on the frozen features"
    )
    classifier.add_argument(
        "--solver", choices=("lbfgs", "sgd"), default="lbfgs",
        help="lbfgs: logistic regression, solved whole on the CPU, for small sets; sgd: as papers train it, on --device",
    )  # fmt: skip
    classifier.add_argument(
        "--batch_norm", action="store_true", help="sgd: BatchNorm without weights before the head"
    )
    classifier.set_defaults(evaluate=evaluate_linear)
    everything = commands.add_parser(
        "all", parents=[shared, voting, fitting], help="all of these, from one pass over the images"
    )
    everything.set_defaults(evaluate=evaluate_all)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    try:
        found, basis = extract(arguments)
        says, figures = arguments.evaluate(arguments, found)
    except (ConfigError, DataError) as error:
        # From a loader's worker the message comes under a traceback; the last line is the sentence.
        print(str(error).splitlines()[-1].removeprefix("mapet_ds.errors.DataError: "), file=sys.stderr)
        return 2
    weights = "untrained" if basis["untrained"] else "trained"
    images = f"{basis['train_images']} training, {basis['val_images']} validation images, {basis['classes']} classes"
    print(
        json.dumps(figures | basis)
        if arguments.json
        else "\n".join(f"{line} ({weights} weights; {images})" for line in says)
    )
    try:
        if arguments.out:
            arguments.out.write_text(json.dumps(figures | basis, indent=1) + "\n")
    except OSError as error:
        print(f"--out {arguments.out} can't be written: {error}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
