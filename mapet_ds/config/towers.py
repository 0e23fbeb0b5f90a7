"""Sizes of image towers, by open_clip's JSON files or timm's names. No heavy library is imported."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from mapet_ds.config.sections import TIMM, TeacherConfig
from mapet_ds.errors import ConfigError


def teacher_model_config(name: str) -> dict[str, Any]:
    """Reads open_clip's own description of a model, with its `vision_cfg`; or makes one for timm:NAME.

    Raises:
        ConfigError: open_clip has no such model, the folder has no open_clip_config.json that describes one,
            or timm:NAME names weights too.
    """
    if name.startswith(TIMM):
        model, _, tag = name.removeprefix(TIMM).partition(".")
        if tag or not model:
            cure = f"teacher.name={TIMM}{model or 'NAME'} teacher.weights={tag or 'TAG'}"
            raise ConfigError(f"teacher.name = {name}: weights have a knob of their own, {cure}.")
        vision = {"timm_model_name": model, "timm_pool": "", "timm_proj": "linear"}  # its own pooling stays
        return {"embed_dim": 1, "timm_alone": True, "vision_cfg": vision}

    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not path.is_file():
            raise ConfigError(
                f"teacher.name = {name}: there is no {path}. tools/make_demo.py writes such a folder."
            )
        try:
            model = json.loads(path.read_text())["model_cfg"]
            return {**model, "vision_cfg": dict(model["vision_cfg"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} does not describe an open_clip model: {type(error).__name__} {error}."
            ) from error

    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None  # requirements.txt installs it
    folder = Path(package.origin).parent / "model_configs"
    path = folder / f"{name}.json"
    if not path.is_file():
        close = difflib.get_close_matches(name, [p.stem for p in folder.glob("*.json")], n=3)
        raise ConfigError(
            f"teacher.name = {name} is not an open_clip model; close: {', '.join(close) or 'none'}."
        )
    return json.loads(path.read_text())


def teacher_layers(teacher: TeacherConfig) -> int | None:
    """Number of layers that teacher.layer chooses from; None where only building the tower can tell."""
    vision = teacher_model_config(teacher.name)["vision_cfg"]
    if vision.get("timm_model_name"):
        return None
    layers = vision.get("layers", 12)
    return 5 if isinstance(layers, list) else layers  # a ModifiedResNet: stem, layer1 .. layer4


def timm_patch(vision: dict[str, Any]) -> int | None:
    """Side of a patch that the name of timm's model tells, pixels; None where it tells none."""
    match = re.search(r"patch(\d+)", vision.get("timm_model_name") or "")
    return int(match[1]) if match else None


def teacher_grid(teacher: TeacherConfig) -> int | None:
    """Patches along one side of the teacher's feature map; None where only building the tower can tell."""
    vision = teacher_model_config(teacher.name)["vision_cfg"]
    if isinstance(vision.get("layers"), list):  # ModifiedResNet: stem 4, then 1, 2, 4, 8
        stage = teacher.layer % 5  # stem, layer1 .. layer4
        return teacher.img_size // (4 * 2 ** max(stage - 1, 0))
    if patch := vision.get("patch_size"):
        return teacher.img_size // patch
    patch = timm_patch(vision)
    return teacher.img_size // patch if patch else None
