"""Write a published checkpoint as a timm model: `python tools/import_weights.py --method mapet CHECKPOINT OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mapet_ds.errors import ConfigError
from mapet_ds.results.published import METHODS, import_weights


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Turn a checkpoint published with MaPeT, ConMIM or SAIM into timm weights."
    )
    parser.add_argument(
        "checkpoint", type=Path, help="of pre-training or fine-tuned; a file of PyTorch's or safetensors"
    )
    parser.add_argument("out", type=Path, help="folder for model.safetensors and config.json")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument(
        "--layer_scale",
        choices=("fold", "keep"),
        default="fold",
        help="fold it into the layers before it, or keep it, as published",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the moving average, where the checkpoint has one beside the weights",
    )
    arguments = parser.parse_args()
    try:
        found = import_weights(
            arguments.method, arguments.checkpoint, arguments.out, arguments.layer_scale, arguments.ema
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Nothing was written: {arguments.out} can't be written as a folder: {error}.", file=sys.stderr)
        return 2
    classes = f"{found.num_classes} classes" if found.num_classes else "no classifier"
    print(f"{found.folder / 'model.safetensors'}: {found.architecture}, {classes}, of {arguments.checkpoint}")
    print(f"left out: {', '.join(found.dropped) or 'nothing'}")
    print("Load it with:")
    print("  import timm")
    print(f'  model = timm.create_model("local-dir:{found.folder.resolve()}", pretrained=True)')
    print("  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))")
    return 0


if __name__ == "__main__":
    sys.exit(main())
