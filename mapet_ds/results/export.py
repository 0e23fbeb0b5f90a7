"""The export of a run's ViT as weights and config that timm loads by itself, proven by a forward of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.errors import ExportError
from mapet_ds.files import staged
from mapet_ds.results.card import model_card
from mapet_ds.training.checkpoint import Checkpoint, newest, open_checkpoint
from mapet_ds.vit import build_vit
from mapet_ds.weights import fit_positions, fold_layer_scale

TOLERANCE = 1e-5
"""The largest absolute difference of features, after the final norm, at which an export counts as equal."""
RANDOM_CROP_PCT = 0.9
"""timm's evaluation crop of its ViTs, for runs on random crops. Other runs keep the whole central square."""
NO_PROVENANCE = dict.fromkeys(("license", "description", "origin_url", "paper_name", "paper_ids", "notes"))
"""The entries of timm's configs that are true of timm's own weights only, emptied."""


class Export(NamedTuple):
    """An export that was written."""

    folder: Path
    checkpoint: Path
    architecture: str
    difference: float
    """Largest absolute difference between timm's features and the run's own, on random images."""
    feature: str
    """The feature by which the objective is judged, as in results/features.py."""


def read_vit(checkpoint: Checkpoint, student: bool = False) -> tuple[Config, dict[str, Tensor]]:
    """The settings of a checkpoint and the fp32 weights of its ViT by timm's names.

    The ViT is a momentum teacher's where the target holds one and `student` is False.

    Raises:
        ExportError: the checkpoint is not one of pre-training.
    """
    try:
        config = pydantic.TypeAdapter(Config).validate_json(json.dumps(checkpoint.run["config"]))
    except (KeyError, pydantic.ValidationError) as error:
        problem = "holds no settings of pre-training (fine-tuning leaves RUN/timm by itself)"
        raise ExportError(f"{checkpoint.path / 'run.json'} {problem}: {error}") from error
    for name in ("model",) if student else ("target", "model"):
        file = checkpoint.load(name)
        if vit := {key.removeprefix("vit."): file[key] for key in file if key.startswith("vit.")}:
            return config, vit
    return config, {}


def timm_arguments(config: Config, layer_scale: Literal["fold", "keep"]) -> dict[str, Any]:
    """timm.create_model's arguments beside the model's name, without stochastic depth and dropout."""
    model = config.model
    args = model.timm_args
    if args.get("use_shared_rel_pos_bias"):  # its table goes to each block
        args = args | {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
    arguments = {k: v for k, v in args.items() if not k.endswith("drop_rate") and k != "drop_path_rate"}
    if layer_scale == "fold":
        arguments["init_values"] = 0.0  # no LayerScale, also where the model's name alone would bring it
    elif model.layer_scale is not None:
        arguments["init_values"] = model.layer_scale
    return dict(arguments, img_size=model.img_size, patch_size=model.patch_size, num_classes=0)


def evaluation_data(config: Config) -> dict[str, Any]:
    """The arguments of timm's evaluation transform for a run's ViT: size, mean, std, interpolation, crop."""
    size, data = config.model.img_size, config.data
    crop_pct = 1.0 if data.crop == "center" else RANDOM_CROP_PCT
    arguments = {"input_size": (3, size, size), "mean": data.mean, "std": data.std}
    return {**arguments, "interpolation": "bicubic", "crop_pct": crop_pct}


def write_timm(vit: Any, folder: Path, data_config: dict[str, Any], classes: Sequence[str] = ()) -> None:
    """Writes a timm model as model.safetensors and config.json, which timm and transformers load themselves.

    data_config: timm's, of the images that the model takes. classes: names, for `id2label` and timm's cards.
    """
    labels = {"label_names": list(classes)} if classes else {}
    save_for_hf(vit, str(folder), model_config=labels, safe_serialization=True, data_config=data_config)
    # The number of classes stands at the root. transformers passes it on by itself, and fails over a second.
    path = folder / "config.json"
    description = json.loads(path.read_text())
    del description["model_args"]["num_classes"]
    path.write_text(json.dumps(description, indent=2))


def _save(config: Config, state: dict[str, Tensor], arguments: dict[str, Any], folder: Path) -> None:
    overlay = NO_PROVENANCE | {"tag": config.objective_name}
    vit = timm.create_model(config.model.name, pretrained_cfg_overlay=overlay, **arguments)
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(f"timm's {config.model.name} doesn't take the run's weights: {error}") from error
    write_timm(vit, folder, evaluation_data(config))


@torch.no_grad()
def feature_difference(vit: Any, exported: Any, img_size: int) -> float:
    """The largest absolute difference of two timm models' `forward_features` on random images.

    In float64 it is the difference of the functions, and not of the kernels' rounding.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, img_size, img_size, dtype=torch.float64, generator=generator)
    outputs = [model.eval().double().forward_features(images) for model in (vit, exported)]
    return (outputs[0] - outputs[1]).abs().max().item()


def _newest_or_named(path: Path) -> Checkpoint:
    """The checkpoint of a folder, or the newest one of a run's folder."""
    checkpoint = open_checkpoint(path) if (path / "run.json").is_file() else newest(path)
    if checkpoint is None:
        runs = ", ".join(sorted({str(step.parent.parent) for step in path.glob("*/checkpoints/step_*")}))
        hint = f" It holds runs: {runs}." if runs else ""
        problem = "is neither a run folder with checkpoints/step_* nor a checkpoint"
        raise ExportError(f"{path} {problem}: nothing to export.{hint}")
    return checkpoint


def export_timm(
    checkpoint_or_run: Path, out: Path, layer_scale: Literal["fold", "keep"] = "fold", student: bool = False,
    license: str | None = None, repository: str | None = None,
) -> Export:  # fmt: skip
    """Writes the ViT of a checkpoint, or of a run's newest one: model.safetensors, config.json, README.md.

    `timm.create_model("local-dir:OUT", pretrained=True)` loads it with the run's size, mean and std.
    `timm.create_model(name, checkpoint_path="OUT/model.safetensors", num_classes=0)` loads it strictly.
    A BEiT has a table of relative positions in each block, as fine-tuning wants it. By name it takes
    global_pool="token" as well, and init_values=0.0 where LayerScale is folded.
    Nothing is left in `out` unless the files, read back by timm, give the features of the run's own ViT.

    layer_scale: "fold" moves LayerScale into the layers before it, for timm's plain model; "keep" leaves it
        to timm as `init_values`.
    student: whether to take the student also where there is a momentum teacher.
    license, repository: for the card, README.md.

    Raises:
        ExportError: no checkpoint there, or features that differ by more than 1e-5.
        ResumeError: the checkpoint that was named, or every one of the run, is damaged.
    """
    # The run's own ViT.
    checkpoint = _newest_or_named(checkpoint_or_run)
    config, state = read_vit(checkpoint, student)
    vit = build_vit(config.model)
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        problem = "doesn't hold the ViT that its run.json describes"
        raise ExportError(f"{checkpoint.path} {problem}: {error}") from error

    # timm's, written and read back.
    kept = fit_positions(state if layer_scale == "keep" else fold_layer_scale(state), shared=False)
    with staged(out) as folder:
        _save(config, kept, timm_arguments(config, layer_scale), folder)
        exported = timm.create_model(f"local-dir:{folder}", pretrained=True)
        difference = feature_difference(vit, exported, config.model.img_size)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"Nothing was exported: timm's features differ from the run's own by {difference:.3g}, more "
                f"than {TOLERANCE:g}, for {checkpoint.path} with layer_scale = {layer_scale}."
            )
        averaged = not student and "target.safetensors" in checkpoint.run["files"]
        which = "momentum teacher" if averaged else "student"
        card = model_card(checkpoint.run, config, which, difference, license, repository)
        (folder / "README.md").write_text(card)
    return Export(out, checkpoint.path, config.model.name, difference, config.method.feature)
