"""Write the ViT of a run as a timm model, with its card: `python tools/export_timm.py RUN OUT`; push it to Hugging Face's hub:
`--push_to_hub USER/NAME`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mapet_ds.errors import ConfigError, ExportError, ResumeError
from mapet_ds.results.card import check_hub, push_to_hub
from mapet_ds.results.export import export_timm


def main() -> int:
    parser = argparse.ArgumentParser(description="Export a run's newest checkpoint, or a named one, to timm.")
    parser.add_argument("checkpoint_or_run", type=Path, help="RUN or RUN/checkpoints/step_00001000")
    parser.add_argument(
        "out", type=Path, help="folder for model.safetensors, config.json and README.md, the card"
    )
    parser.add_argument(
        "--layer_scale",
        choices=("fold", "keep"),
        default="fold",
        help="fold it into the layers before it, so that timm's plain model takes the weights, or keep it",
    )
    parser.add_argument(
        "--student", action="store_true", help="the student, where the momentum teacher is the one to take"
    )
    parser.add_argument(
        "--license", metavar="ID", help="stated in the card, as the hub names it, e.g. apache-2.0"
    )
    parser.add_argument(
        "--push_to_hub", metavar="USER/NAME", help="upload it there, the card replacing the one there"
    )
    parser.add_argument("--private", action="store_true", help="where the push makes the repository")
    arguments = parser.parse_args()
    repository = arguments.push_to_hub
    try:
        if repository:
            check_hub(repository)
        export = export_timm(
            arguments.checkpoint_or_run,
            arguments.out,
            arguments.layer_scale,
            arguments.student,
            arguments.license,
            repository,
        )
    except (ExportError, ConfigError, ResumeError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"Nothing was exported: {arguments.out} can't be written as a folder: {error}.", file=sys.stderr
        )
        return 2
    print(f"{export.folder / 'model.safetensors'}: {export.architecture} of {export.checkpoint}")
    print(f"largest difference between timm's features and the run's own: {export.difference:.3g}")
    print("Load it with:")
    print("  import timm")
    print(f'  model = timm.create_model("local-dir:{export.folder.resolve()}", pretrained=True)')
    print("  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))")
    if repository:
        try:
            print(f"Pushed to {push_to_hub(export.folder, repository, arguments.private)}")
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
