"""The ViT that pre-training begins from in place of fresh weights: model.init_from.

The run computes at first what the source computes. Its classifier is left out; what only pre-training has (heads, mask token,
second stream, projector) stays fresh from the seed.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet_ds.config.sections import TIMM, Config
from mapet_ds.errors import ConfigError
from mapet_ds.files import checksum
from mapet_ds.launch import once_per_node
from mapet_ds.weights import LAYER_SCALE, UNREADABLE, fold_layer_scale, mismatches, shapes, timm_weights


def _tag_file(tag: str) -> str:
    """Path of a timm tag's weights, downloaded by the first rank of each node while the others wait."""

    def download() -> str:
        try:
            repository = timm.get_pretrained_cfg(tag, allow_unregistered=False).hf_hub_id
            return hf_hub_download(repository, "model.safetensors")
        except (RuntimeError, HFValidationError) as error:
            raise ConfigError(
                f"model.init_from = {TIMM}{tag}: timm has no such weights on Hugging Face's hub: {error}"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"model.init_from = {TIMM}{tag} can't be downloaded: {str(error).partition(chr(10))[0]} Fetch it where there is a "
                "network (it is kept in HF_HOME), or name a local file or folder."
            ) from error

    return once_per_node(download)[0]


def _described(name: str, path: Path, source: str) -> VisionTransformer:
    """timm's own model of a folder or a tag, its weights loaded strictly."""
    try:
        model = timm.create_model(name, pretrained=False)
    except UNREADABLE as error:
        raise ConfigError(
            f"model.init_from = {source}: timm can't build it: {type(error).__name__} {error}."
        ) from error
    if type(model) is not VisionTransformer:
        raise ConfigError(
            f"model.init_from = {source} is a {type(model).__name__}, and only timm's plain VisionTransformer fits."
        )
    _refuse(
        mismatches(
            shapes(model.state_dict()),
            shapes(state := timm_weights(path, model, f"model.init_from = {source}")),
        ),
        source,
    )
    model.load_state_dict(state)
    return model


def _figures(vit: VisionTransformer) -> dict[str, object]:
    """What makes another function of the same weights, or asks for others."""
    block = vit.blocks[0]
    return {
        "width": vit.embed_dim, "blocks": len(vit.blocks), "heads": block.attn.num_heads,
        "activation": type(block.mlp.act).__name__, "epsilon of norms": block.norm1.eps,
    }  # fmt: skip


def _refuse(wrong: list[str], source: str) -> None:
    if wrong:
        raise ConfigError(
            f"model.init_from = {source} doesn't fit: {len(wrong)} tensors differ, e.g. {'; '.join(wrong[:3])}. Give it the model "
            "that model.name and model.args describe, or these what it is. (A run's own checkpoint goes through "
            "tools/export_timm.py.)"
        )


def begin_from(vit: VisionTransformer, config: Config) -> tuple[str, list[str]]:
    """Load model.init_from into the run's ViT; the sha256 of its file, and what changed on the way, in words. Every rank must
    call it.

    The function stays: a LayerScale that the source hasn't begins at 1, one that the run hasn't is folded away. Another grid
    or patch size is resampled by timm. A fine-tuned source with fc_norm, which is of the mean, leaves the run's norm fresh.

    Raises:
        ConfigError: it can't be had or read, is of another architecture, or another file on another node; nothing is loaded in
            part.
    """
    source, notes, size = config.model.init_from, [], (config.model.img_size, config.model.patch_size)
    tag, folder = source.removeprefix(TIMM), Path(source)
    path = (
        Path(_tag_file(tag))
        if source.startswith(TIMM)
        else folder / "model.safetensors"
        if folder.is_dir()
        else folder
    )
    own = _figures(vit)
    if path == folder:  # of a file alone neither heads nor activation are known
        state = timm_weights(path, vit, f"model.init_from = {source}")
        blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        given = {"width": state["cls_token"].shape[-1], "blocks": len(blocks)} if "cls_token" in state else {}
    else:
        model = _described(tag if source.startswith(TIMM) else f"local-dir:{source}", path, source)
        given, was = _figures(model), (model.patch_embed.img_size[0], model.patch_embed.patch_size[0])
        if was != size:
            model.set_input_size(size[0], size[1])
            notes.append(
                f"resampled from {was[0]} px in patches of {was[1]} to {size[0]} px in patches of {size[1]}"
            )
        for name in ("mean", "std"):
            if (used := tuple(model.pretrained_cfg[name])) != (here := getattr(config.data, name)):
                notes.append(f"data.{name} = {list(here)}, but it has learnt with {list(used)}")
        state = model.state_dict()
    if differing := [name for name in given if given[name] != own[name]]:
        told = [", ".join(f"{name} {figures[name]}" for name in differing) for figures in (given, own)]
        raise ConfigError(
            f"model.init_from = {source} has {told[0]}; model.name = {config.model.name} has here {told[1]}."
        )
    sha256, all_nodes = once_per_node(lambda: checksum(path))
    if len(set(all_nodes)) > 1:
        raise ConfigError(
            f"model.init_from = {source}: the nodes read different weights; give all of them the same file."
        )
    vit.load_state_dict(_adapted(state, vit, source, notes))
    return sha256, notes


def _adapted(
    state: dict[str, Tensor], vit: VisionTransformer, source: str, notes: list[str]
) -> dict[str, Tensor]:
    """The state that this ViT needs for the source's function; adds to the notes."""
    fresh = vit.state_dict()
    if "fc_norm.weight" in state and "norm.weight" not in state:
        state |= {name: fresh[name] for name in fresh if name.startswith("norm.")}
        notes.append("norm is fresh, the source normalises the mean")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "fc_norm."))}
    wanted, scales = shapes(fresh), [name for name in fresh if LAYER_SCALE.fullmatch(name)]
    if missing := [name for name in scales if name not in state]:
        state |= {name: torch.ones_like(fresh[name]) for name in missing}
        notes.append("LayerScale begins at 1, the source has none")
    if not scales and (folded := [name for name in state if LAYER_SCALE.fullmatch(name)]):
        wanted |= dict.fromkeys(folded, (vit.embed_dim,))
        notes.append("its LayerScale is folded into the layers before it")
    _refuse(mismatches(wanted, shapes(state)), source)
    return state if scales else fold_layer_scale(state)
