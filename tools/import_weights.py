"""Write a published checkpoint as a timm model.

python tools/import_weights.py --method mapet CHECKPOINT OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mapet_ds.results.published import METHODS, import_weights
from mapet_ds.terminal import answer, loading


def parse(argv: list[str]) -> argparse.Namespace:
    methods = "Turn a checkpoint published with MaPeT, BEiT v2, ConMIM or SAIM into timm weights."
    parser = argparse.ArgumentParser(description=methods)
    option = parser.add_argument
    option("checkpoint", type=Path, help="of pre-training or fine-tuned; a file of PyTorch's or safetensors")
    option("out", type=Path, help="folder for model.safetensors and config.json")
    option("--method", choices=METHODS, required=True)
    scale = "fold it into the layers before it, or keep it, as published"
    option("--layer_scale", choices=("fold", "keep"), default="fold", help=scale)
    average = "the moving average, where the checkpoint has one beside the weights"
    option("--ema", action="store_true", help=average)
    return parser.parse_args(argv)


def write(arguments: argparse.Namespace) -> None:
    """Writes the model, and says what it is, what was left out and how to load it."""
    path, scale = arguments.checkpoint, arguments.layer_scale
    model = import_weights(arguments.method, path, arguments.out, scale, arguments.ema)
    classes = f"{model.num_classes} classes" if model.num_classes else "no classifier"
    print(f"{model.folder / 'model.safetensors'}: {model.architecture}, {classes}, of {path}")
    print(f"left out: {', '.join(model.dropped) or 'nothing'}")
    print(loading(model.folder))


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    sys.exit(answer(lambda: write(words), writes=words.out))
