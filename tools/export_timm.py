"""Write the ViT of a run as a timm model, with its card: `python tools/export_timm.py RUN OUT`.

`--push_to_hub USER/NAME` pushes it to Hugging Face's hub, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mapet_ds.terminal import answer, loading

FEATURES = """Take a feature of images with:
  tokens = model.forward_features(images)
  token, mean = tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)  # model(images) is the token
tools/evaluate.py judges the {feature} unless --feature names another."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a run's newest checkpoint, or a named one, to timm.")
    option = parser.add_argument
    option("checkpoint_or_run", type=Path, help="RUN or RUN/checkpoints/step_00001000")
    option("out", type=Path, help="folder for model.safetensors, config.json and README.md, the card")
    scale = "fold it into the layers before it, so that timm's plain model takes the weights, or keep it"
    option("--layer_scale", choices=("fold", "keep"), default="fold", help=scale)
    student = "the student, where the momentum teacher is the one to take"
    option("--student", action="store_true", help=student)
    option("--license", metavar="ID", help="stated in the card, as the hub names it, e.g. apache-2.0")
    push = "upload it there, the card replacing the one there"
    option("--push_to_hub", metavar="USER/NAME", help=push)
    option("--private", action="store_true", help="where the push makes the repository")
    return parser.parse_args(argv)


def export(arguments: argparse.Namespace) -> None:
    """Writes the model, says how to load it, and pushes it where that is asked for."""
    from mapet_ds.results.card import check_hub, push_to_hub
    from mapet_ds.results.export import export_timm
    from mapet_ds.results.features import WORDS

    run, out, repository = arguments.checkpoint_or_run, arguments.out, arguments.push_to_hub
    if repository:
        check_hub(repository)
    model = export_timm(run, out, arguments.layer_scale, arguments.student, arguments.license, repository)
    print(f"{model.folder / 'model.safetensors'}: {model.architecture} of {model.checkpoint}")
    print(f"largest difference between timm's features and the run's own: {model.difference:.3g}")
    print(loading(model.folder))
    print(FEATURES.format(feature=WORDS[model.feature]))
    if repository:
        print(f"Pushed to {push_to_hub(model.folder, repository, arguments.private)}")


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    sys.exit(answer(lambda: export(words), writes=words.out))
