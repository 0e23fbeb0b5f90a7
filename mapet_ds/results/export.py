"""A run's ViT as a timm model: weights and config that timm loads by itself, proven by a forward of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.errors import ExportError
from mapet_ds.files import staged
from mapet_ds.results.card import model_card
from mapet_ds.training.checkpoint import Checkpoint, newest, open_checkpoint
from mapet_ds.vit import build_vit
from mapet_ds.weights import fold_layer_scale

TOLERANCE = 1e-5
"""Largest absolute difference of the features, after the final norm, at which an export counts as equal."""
RANDOM_CROP_PCT = 0.9
"""timm's evaluation crop of its ViTs, for runs on random crops; others keep the whole central square."""
NO_PROVENANCE = dict.fromkeys(("license", "description", "origin_url", "paper_name", "paper_ids", "notes"))
"""What timm says of its own weights of an architecture, and isn't true of others."""


class Export(NamedTuple):
    folder: Path
    checkpoint: Path
    architecture: str
    difference: float
    """Largest absolute difference between timm's features and the run's own, on random images."""


def read_vit(checkpoint: Checkpoint, student: bool = False) -> tuple[Config, dict[str, Tensor]]:
    """Settings of a checkpoint and the fp32 weights of its ViT by timm's names.

    Where the target holds a ViT, as a momentum teacher does, it is that one, unless the student is asked for.

    Raises:
        ExportError: it is none of this program's.
    """
    try:
        config = pydantic.TypeAdapter(Config).validate_json(json.dumps(checkpoint.run["config"]))
    except (KeyError, pydantic.ValidationError) as error:
        raise ExportError(
            f"{checkpoint.path / 'run.json'} holds no settings of pre-training (fine-tuning leaves RUN/timm by itself): {error}"
        ) from error
    files = [{} if student else checkpoint.load("target"), checkpoint.load("model")]
    states = [{k.removeprefix("vit."): v for k, v in file.items() if k.startswith("vit.")} for file in files]
    return config, states[0] or states[1]


def timm_arguments(config: Config, layer_scale: Literal["fold", "keep"]) -> dict[str, Any]:
    """What timm.create_model needs beside the model's name; stochastic depth and dropout are left out."""
    model = config.model
    arguments = {k: v for k, v in model.args.items() if not k.endswith("drop_rate") and k != "drop_path_rate"}
    if layer_scale == "fold":
        arguments["init_values"] = 0.0  # none, also where the model's name alone would bring LayerScale
    elif model.layer_scale is not None:
        arguments["init_values"] = model.layer_scale
    return dict(arguments, img_size=model.img_size, patch_size=model.patch_size, num_classes=0)


def evaluation_data(config: Config) -> dict[str, Any]:
    """What timm's evaluation transform takes for a run's ViT: size, mean, std, interpolation, crop."""
    size, data = config.model.img_size, config.data
    crop_pct = 1.0 if data.crop == "center" else RANDOM_CROP_PCT
    return {
        "input_size": (3, size, size),
        "mean": data.mean,
        "std": data.std,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
    }


def _save(config: Config, state: dict[str, Tensor], arguments: dict[str, Any], folder: Path) -> None:
    vit = timm.create_model(
        config.model.name, pretrained_cfg_overlay=NO_PROVENANCE | {"tag": config.objective}, **arguments
    )
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(f"timm's {config.model.name} doesn't take the run's weights: {error}") from error
    save_for_hf(vit, folder, safe_serialization=True, data_config=evaluation_data(config))


@torch.no_grad()
def feature_difference(vit: VisionTransformer, exported: VisionTransformer, img_size: int) -> float:
    """Largest absolute difference of `forward_features` on random images, in float64: of the functions, not
    of the kernels' rounding."""
    images = torch.randn(
        2, 3, img_size, img_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    outputs = [model.eval().double().forward_features(images) for model in (vit, exported)]
    return (outputs[0] - outputs[1]).abs().max().item()


def export_timm(
    checkpoint_or_run: Path,
    out: Path,
    layer_scale: Literal["fold", "keep"] = "fold",
    student: bool = False,
    license: str | None = None,
    repository: str | None = None,
) -> Export:
    """Write the ViT of a checkpoint, or of a run's newest one, as model.safetensors, config.json and README.md in `out`.

    `timm.create_model("local-dir:OUT", pretrained=True)` loads it with the run's size, mean and std;
    `timm.create_model(name, checkpoint_path="OUT/model.safetensors", num_classes=0)` loads it strictly.
    student: not the momentum teacher, which is the one to take where there is one.
    fold: LayerScale goes into the layers before it, so that timm's plain model will do; keep: it stays, as
    `init_values`.
    license, repository: what the card, README.md, says of them.
    Nothing is left in `out` unless the files, read back by timm, give the features of the run's own ViT.

    Raises:
        ExportError: no checkpoint there, or features that differ by more than 1e-5.
        ResumeError: the checkpoint that was named, or every one of the run, is damaged.
    """
    path = checkpoint_or_run
    checkpoint = open_checkpoint(path) if (path / "run.json").is_file() else newest(path)
    if checkpoint is None:
        runs = ", ".join(sorted({str(found.parent.parent) for found in path.glob("*/checkpoints/step_*")}))
        hint = f" It holds runs: {runs}." if runs else ""
        raise ExportError(
            f"{path} is neither a run folder with checkpoints/step_* nor a checkpoint: nothing to export.{hint}"
        )
    config, state = read_vit(checkpoint, student)
    vit = build_vit(config.model)
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(
            f"{checkpoint.path} doesn't hold the ViT that its run.json describes: {error}"
        ) from error
    kept = state if layer_scale == "keep" else fold_layer_scale(state)
    with staged(out) as folder:
        _save(config, kept, timm_arguments(config, layer_scale), folder)
        exported = timm.create_model(f"local-dir:{folder}", pretrained=True)
        difference = feature_difference(vit, exported, config.model.img_size)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"Nothing was exported: timm's features differ from the run's own by {difference:.3g}, more "
                f"than {TOLERANCE:g}, for {checkpoint.path} with layer_scale = {layer_scale}."
            )
        which = (
            "student"
            if student or "target.safetensors" not in checkpoint.run["files"]
            else "momentum teacher"
        )
        (folder / "README.md").write_text(
            model_card(checkpoint.run, config, which, difference, license, repository)
        )
    return Export(out, checkpoint.path, config.model.name, difference)
