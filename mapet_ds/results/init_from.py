"""The weights that pre-training begins from in place of fresh ones: model.init_from.

The run computes at first what the source computes. The source's classifier is left out; what only
pre-training has (heads, mask token, second stream, projector) stays fresh from the seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mapet_ds.config.sections import TIMM, Config
from mapet_ds.errors import ConfigError
from mapet_ds.files import checksum
from mapet_ds.launch import once_per_node
from mapet_ds.vit import ViT
from mapet_ds.weights import (
    LAYER_SCALE,
    SHARED_TABLE,
    UNREADABLE,
    fit_positions,
    fold_layer_scale,
    mismatches,
    shapes,
    timm_tag_file,
    timm_weights,
)


def _described(name: str, path: Path, source: str, kind: type) -> Any:
    """timm's own model of a folder or a tag, of the run's kind, its weights loaded strictly."""
    asked = f"model.init_from = {source}"
    try:
        model = timm.create_model(name, pretrained=False)
    except UNREADABLE as error:
        raise ConfigError(f"{asked}: timm can't build it: {type(error).__name__} {error}.") from error
    if type(model) is not kind:
        named = f"a {type(model).__name__}, and model.name names a {kind.__name__}"
        raise ConfigError(f"{asked} is {named}: positions of the two are of another kind.")
    state = timm_weights(path, model, asked)
    _refuse(mismatches(shapes(model.state_dict()), shapes(state)), source)
    model.load_state_dict(state)
    return model


def _figures(vit: ViT) -> dict[str, object]:
    """The figures in which two ViTs of the same names must agree to compute the same."""
    block: Any = vit.blocks[0]
    return {
        "width": vit.embed_dim, "blocks": len(vit.blocks), "heads": block.attn.num_heads,
        "activation": type(block.mlp.act).__name__, "epsilon of norms": block.norm1.eps,
    }  # fmt: skip


def _refuse(wrong: list[str], source: str) -> None:
    if wrong:
        raise ConfigError(
            f"model.init_from = {source} doesn't fit: {len(wrong)} tensors differ, e.g. "
            f"{'; '.join(wrong[:3])}. Name weights of the model that model.name and model.args describe, or "
            "change these. (A run's own checkpoint goes through tools/export_timm.py.)"
        )


def begin_from(vit: ViT, config: Config) -> tuple[str, list[str]]:
    """Loads model.init_from into the run's ViT. Every rank must call it.

    Gives the sha256 of its file, and phrases for what changed on the way. The function stays: a LayerScale
    that the source lacks begins at 1, one that the run lacks is folded away. timm resamples another grid or
    patch size. A fine-tuned source with fc_norm, which normalises the mean, leaves the run's norm fresh.

    Raises:
        ConfigError: it can't be downloaded or read, is of another architecture, or is another file on another
            node. Nothing is loaded in part.
    """
    source = config.model.init_from
    assert source is not None
    asked, own, notes = f"model.init_from = {source}", _figures(vit), []
    tag = source.removeprefix(TIMM) if source.startswith(TIMM) else None

    # The source's tensors, resampled to the run's grid and patches, and the figures that it is known by.
    if tag is None and not Path(source).is_dir():  # a file alone tells neither heads nor activation
        path = Path(source)
        state = timm_weights(path, vit, asked)
        blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        given = {"width": state["cls_token"].shape[-1], "blocks": len(blocks)} if "cls_token" in state else {}
    else:
        path = Path(source) / "model.safetensors" if tag is None else timm_tag_file(tag, asked)
        model = _described(tag or f"local-dir:{source}", path, source, type(vit))
        given = _figures(model)
        notes += _resize(model, config) + _other_colours(model, config)
        state = model.state_dict()

    # The checks.
    if differing := [name for name in given if given[name] != own[name]]:
        theirs, ours = (", ".join(f"{name} {each[name]}" for name in differing) for each in (given, own))
        raise ConfigError(f"{asked} has {theirs}; model.name = {config.model.name} has here {ours}.")
    sha256, all_nodes = once_per_node(lambda: checksum(path))
    if len(set(all_nodes)) > 1:
        raise ConfigError(f"{asked}: the nodes read different weights; give all of them the same file.")

    vit.load_state_dict(_adapted(state, vit, source, notes))
    return sha256, notes


def _resize(model: ViT, config: Config) -> list[str]:
    """Resamples a ViT to the run's grid and patch size; gives a note of it."""
    size, patch = config.model.img_size, config.model.patch_size
    was: Any = model.patch_embed
    old_size, old_patch = was.img_size[0], was.patch_size[0]
    if (old_size, old_patch) == (size, patch):
        return []
    model.set_input_size((size, size), (patch, patch))
    return [f"resampled from {old_size} px in patches of {old_patch} to {size} px in patches of {patch}"]


def _other_colours(model: Any, config: Config) -> list[str]:
    """A note of each of mean and std in which the source's images differ from the run's."""
    notes = []
    for name in ("mean", "std"):
        theirs, ours = tuple(model.pretrained_cfg[name]), getattr(config.data, name)
        if theirs != ours:
            notes.append(f"data.{name} = {list(ours)}, but it has learnt with {list(theirs)}")
    return notes


def _adapted(state: dict[str, Tensor], vit: ViT, source: str, notes: list[str]) -> dict[str, Tensor]:
    """The state with which this ViT computes the source's function; adds to the notes."""
    fresh = vit.state_dict()

    # The classifier and its norm.
    if "fc_norm.weight" in state and "norm.weight" not in state:
        state |= {name: fresh[name] for name in fresh if name.startswith("norm.")}
        notes.append("norm is fresh, the source normalises the mean")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "fc_norm."))}

    # Relative positions, and LayerScale.
    state = fit_positions(state, SHARED_TABLE in fresh)
    wanted, scales = shapes(fresh), [name for name in fresh if LAYER_SCALE.fullmatch(name)]
    if missing := [name for name in scales if name not in state]:
        state |= {name: torch.ones_like(fresh[name]) for name in missing}
        notes.append("LayerScale begins at 1, the source has none")
    if not scales and (folded := [name for name in state if LAYER_SCALE.fullmatch(name)]):
        wanted |= dict.fromkeys(folded, (vit.embed_dim,))
        notes.append("its LayerScale is folded into the layers before it")
    _refuse(mismatches(wanted, shapes(state)), source)
    return state if scales else fold_layer_scale(state)
