"""Write the ViT of a run as a timm model: `python tools/export_timm.py RUN OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mapet_ds.checkpoint import ResumeError
from mapet_ds.config import ConfigError
from mapet_ds.export import ExportError, export_timm


def main() -> int:
    parser = argparse.ArgumentParser(description="Export a run's newest checkpoint, or a named one, to timm.")
    parser.add_argument("checkpoint_or_run", type=Path, help="RUN or RUN/checkpoints/step_00001000")
    parser.add_argument("out", type=Path, help="folder for model.safetensors and config.json")
    parser.add_argument(
        "--layer_scale",
        choices=("fold", "keep"),
        default="fold",
        help="fold it into the layers before it, so that timm's plain model takes the weights, or keep it",
    )
    parser.add_argument("--student", action="store_true", help="the student, where the momentum teacher is the one to take")
    arguments = parser.parse_args()
    try:
        export = export_timm(arguments.checkpoint_or_run, arguments.out, arguments.layer_scale, arguments.student)
    except (ExportError, ConfigError, ResumeError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Nothing was exported: {arguments.out} can't be written as a folder: {error}.", file=sys.stderr)
        return 2
    print(f"{export.folder / 'model.safetensors'}: {export.architecture} of {export.checkpoint}")
    print(f"largest difference between timm's features and the run's own: {export.difference:.3g}")
    print("Load it with:")
    print("  import timm")
    print(f'  model = timm.create_model("local-dir:{export.folder.resolve()}", pretrained=True)')
    print("  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))")
    return 0


if __name__ == "__main__":
    sys.exit(main())
