"""Evaluate a timm ViT on labelled images: `tools/evaluate.py knn|linear --model OUT --train DIR --val DIR`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from mapet_ds.config import ConfigError, TeacherConfig
from mapet_ds.index import DataError
from mapet_ds.probe import features, knn, labelled_folders, linear, load_timm
from mapet_ds.recipe import load_config
from mapet_ds.teacher import build_teacher, teacher_mean_std


class TeacherFeatures(torch.nn.Module):
    """A recipe's teacher, its layer's features as a ViT's patch tokens: what the targets themselves are worth."""

    num_prefix_tokens = 0

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.teacher = build_teacher(config, torch.device("cpu"))
        mean, std = teacher_mean_std(config)
        size = (3, config.img_size, config.img_size)
        self.pretrained_cfg = {"input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.teacher(images)


def extract(arguments: argparse.Namespace) -> tuple[list[Any], dict[str, object]]:
    """Features and labels of --train and --val, and what figures rest on."""
    if arguments.teacher:
        model: Any = TeacherFeatures(load_config(arguments.teacher, arguments.overrides).teacher)
    else:
        model = load_timm(arguments.model, arguments.arch, arguments.untrained, arguments.seed)
    train, val = labelled_folders(arguments.train, arguments.val, model)
    found: list[Any] = []
    for folder, name in ((train, "train"), (val, "val")):
        loader = DataLoader(
            folder, arguments.batch_size, num_workers=arguments.workers, pin_memory=arguments.device.type == "cuda"
        )
        found += features(model, tqdm(loader, desc=name, unit="batch", disable=not sys.stderr.isatty()), arguments.device)
    return found, {
        "train_images": len(train),
        "val_images": len(val),
        "classes": len(train.classes),
        "model": str(arguments.model or f"teacher of {arguments.teacher}"),
        "untrained": arguments.untrained,
    }


def sentence(name: str, accuracy: float, basis: dict[str, object]) -> str:
    weights = "untrained" if basis["untrained"] else "trained"
    images = f"{basis['train_images']} training, {basis['val_images']} validation images, {basis['classes']} classes"
    return f"{name} accuracy {accuracy:.2f} % ({weights} weights; {images})"


def evaluate_knn(arguments: argparse.Namespace) -> tuple[str, dict[str, object]]:
    """Accuracy of the k-NN vote on --val, as a sentence and as figures with what they rest on."""
    found, basis = extract(arguments)
    accuracy = knn(*found, arguments.k, arguments.temperature)
    figures = {"knn_accuracy_percent": accuracy, "k": arguments.k, "temperature": arguments.temperature}
    return sentence(f"k-NN (k = {arguments.k})", accuracy, basis), figures | basis


def evaluate_linear(arguments: argparse.Namespace) -> tuple[str, dict[str, object]]:
    """Accuracy of a logistic regression on --val, as a sentence and as figures with what they rest on."""
    found, basis = extract(arguments)
    accuracy = linear(*found, arguments.penalty)
    return sentence("Linear", accuracy, basis), {"linear_accuracy_percent": accuracy, "penalty": arguments.penalty} | basis


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
        raise argparse.ArgumentTypeError(f"{text} is no device of this host: {str(error).splitlines()[0]}") from error
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a timm ViT on labelled images.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    which = shared.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder of tools/export_timm.py, or a file of weights")
    which.add_argument("--teacher", metavar="YAML", help="instead: the frozen teacher of this recipe, its dense features")
    shared.add_argument("overrides", nargs="*", metavar="a.b=value", help="with --teacher: settings that replace the recipe's")
    shared.add_argument("--arch", help="timm model name, for a file of weights")
    shared.add_argument(
        "--untrained", action="store_true", help="the same architecture with fresh weights, to compare"
    )
    shared.add_argument("--seed", type=int, default=0, help="of the fresh weights")
    shared.add_argument(
        "--train", type=Path, required=True, help="folder with a sub-folder of images per class"
    )
    shared.add_argument("--val", type=Path, required=True, help="the same classes, other images")
    shared.add_argument("--batch_size", type=number(int, 1), default=128)
    shared.add_argument("--workers", type=number(int, 0), default=2, help="processes that read and decode")
    shared.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    neighbours = commands.add_parser(
        "knn", parents=[shared], help="weighted vote of the k nearest training images"
    )
    neighbours.add_argument("--k", type=number(int, 1), default=20)
    neighbours.add_argument("--temperature", type=number(float, 0, above=True), default=0.07)
    neighbours.set_defaults(evaluate=evaluate_knn)
    classifier = commands.add_parser("linear", parents=[shared], help="logistic regression on the frozen features")
    classifier.add_argument("--penalty", type=number(float, 0), default=1e-4, help="on the squared weights")
    classifier.set_defaults(evaluate=evaluate_linear)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    try:
        says, figures = arguments.evaluate(arguments)
    except (ConfigError, DataError) as error:
        # From a loader's worker the message comes under a traceback; the last line is the sentence.
        print(str(error).splitlines()[-1].removeprefix("mapet_ds.index.DataError: "), file=sys.stderr)
        return 2
    print(json.dumps(figures) if arguments.json else says)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
