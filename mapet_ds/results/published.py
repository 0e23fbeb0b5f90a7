"""The import of checkpoints as MaPeT, ConMIM, BEiT v2 and SAIM were published, as timm models.

Every tensor of a file is used, or is one that a ViT does without (`Method.dropped`), or is a reason to refuse
the file. Sizes are read off the tensors.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mapet_ds.errors import ConfigError
from mapet_ds.files import staged
from mapet_ds.results.export import NO_PROVENANCE, write_timm
from mapet_ds.weights import (
    HEAD_DIM,
    LAYER_SCALE,
    TABLE,
    fit_positions,
    fold_layer_scale,
    mismatches,
    read_tensors,
    shapes,
)


class Method(NamedTuple):
    """The differences of a method's checkpoints from timm's."""

    architectures: dict[int, str]
    """timm's name by width."""
    positions: str
    """The tensor that tells the grid of patches."""
    qkv: dict[str, int]
    """The layers that make up timm's `qkv` one after another, and the thirds of its rows that each has."""
    mark: str
    """A part of a key that no other method's checkpoints have."""
    dropped: frozenset[str]
    """Modules and tensors that served pre-training, or that timm computes."""
    crop_pct: float
    """The published evaluation's crop below 384 pixels. From there on it is the whole central square."""


VITS = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
}
BEITS = {384: "beit_base_patch16_224", 768: "beit_base_patch16_224", 1024: "beit_large_patch16_224"}
BEITV2S = {768: "beitv2_base_patch16_224", 1024: "beitv2_large_patch16_224"}
METHODS = {
    "mapet": Method(
        VITS, "pos_embed", {"q": 1, "kv": 2}, ".attn.kv.",
        frozenset({"decoder", "mask_positional_token"}), 0.9,
    ),
    "beitv2": Method(
        BEITV2S, f"blocks.0.attn.{TABLE}", {"qkv": 3}, "cls_pt_layers.",
        frozenset({"mask_token", "lm_head", "cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head",
                   "relative_position_index"}), 0.875,
    ),
    "conmim": Method(
        BEITS, f"blocks.0.attn.{TABLE}", {"qkv": 3}, ".attn.q_bias",
        frozenset({"mask_token", "projectors", "lm_head", "rel_pos_bias2", "relative_position_index"}), 0.875,
    ),
    "saim": Method(
        VITS, "pos_embed", {"q": 1, "k": 1, "v": 1}, ".attn.k.",
        frozenset({"query_blocks", "prediction_head", "gaussian_blur"}), 0.875,
    ),
}  # fmt: skip
"""Source: what is released with arXiv 2306.07346 (MaPeT), 2205.09616 (ConMIM), 2208.06366 (BEiT v2) and
2212.01610 (SAIM)."""


class Import(NamedTuple):
    """An import that was written."""

    folder: Path
    architecture: str
    num_classes: int
    """0: no classifier."""
    dropped: list[str]
    """Modules and tensors of the checkpoint that were left out."""


def _refuse(wrong: list[str], path: Path, method: str, state: dict[str, Tensor]) -> None:
    if wrong:
        marked = [name for name in METHODS if any(METHODS[name].mark in key for key in state)]
        others = [name for name in marked if name != method]
        hint = f" Its keys are those of --method {others[0]}." if others else ""
        examples = "; ".join(sorted(wrong)[:6])
        problem = f"{path} doesn't fit --method {method}: {len(wrong)} tensors differ"
        raise ConfigError(f"{problem}, e.g. {examples}.{hint}")


def _blocks(state: dict[str, Tensor]) -> set[str]:
    return {match[0] for name in state if (match := re.match(r"blocks\.\d+", name))}


def _arguments(state: dict[str, Tensor], path: Path, method: str) -> dict[str, Any]:
    """timm.create_model's arguments, by the names and sizes of the tensors."""
    architectures, positions = METHODS[method].architectures, METHODS[method].positions
    relative = TABLE in positions

    # The tensors that tell sizes.
    dims = {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, positions: 2 if relative else 3}
    dims |= {"head.weight": 2} if "head.weight" in state else {}
    wrong = [f"{name} is missing" for name in dims if name not in state]
    present = {name: n for name, n in dims.items() if name in state}
    wrong += [
        f"{name} is {state[name].ndim}-d, not {n}-d" for name, n in present.items() if state[name].ndim != n
    ]
    _refuse(wrong, path, method, state)

    # The sizes.
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    if width not in architectures:
        known = ", ".join(map(str, architectures))
        raise ConfigError(f"{path} is of width {width}; --method {method} knows {known}.")
    rows = state[positions].shape[0 if relative else 1]
    grid = (math.isqrt(max(rows - 3, 1)) + 1) // 2 if relative else math.isqrt(max(rows - 1, 1))
    scaled = any(LAYER_SCALE.fullmatch(name) for name in state)
    return {
        "model_name": architectures[width],
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len(_blocks(state)),
        "num_heads": width // HEAD_DIM,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "global_pool": "avg" if "fc_norm.weight" in state else "token",
        "init_values": (1e-5 if width == 1024 else 0.1) if scaled else 0.0,
    }


def _sources(name: str, qkv: dict[str, int]) -> dict[str, int]:
    """The published tensors that make up timm's one after another, and the thirds of its rows in each."""
    if ".attn.qkv." not in name:
        return {name: 3}
    return {name.replace(".qkv.", f".{layer}."): thirds for layer, thirds in qkv.items()}


def _to_timm(state: dict[str, Tensor], path: Path, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """timm's arguments, and fp32 weights by timm's names."""
    # BEiT's one table of relative positions goes to each block: its fine-tuning begins from that.
    state = fit_positions(state, shared=False)

    # timm's tensors, and the published ones of which each is made.
    arguments = _arguments(state, path, method)
    with torch.device("meta"):
        model = timm.create_model(**arguments)
    weights, wanted = {}, {}
    sources = {name: _sources(name, METHODS[method].qkv) for name in model.state_dict()}
    for name, tensor in model.state_dict().items():
        for source, thirds in sources[name].items():
            wanted[source] = (len(tensor) * thirds // 3, *tensor.shape[1:])
    _refuse(mismatches(wanted, shapes(state)), path, method, state)
    for name, parts in sources.items():
        weights[name] = torch.cat([state[source].float() for source in parts])
    return arguments, weights


def import_weights(
    method: str, path: Path, out: Path, layer_scale: Literal["fold", "keep"] = "fold", ema: bool = False
) -> Import:
    """Writes a published checkpoint, pre-trained or fine-tuned, as model.safetensors and config.json.

    `timm.create_model("local-dir:OUT", pretrained=True)` loads it with its classifier, if it has one, and
    with the published evaluation's size, mean, std and crop.

    layer_scale: "fold" moves LayerScale into the layers before it; "keep" leaves it, as `init_values`.
    ema: whether to take the moving average that the checkpoint has beside the weights.

    Raises:
        ConfigError: the file can't be read, or isn't wholly one of this method's.
    """
    # timm's arguments and weights.
    state = read_tensors(path, str(path), ema=ema)
    left_out = {name: parts for name in state if (parts := METHODS[method].dropped & set(name.split(".")))}
    kept = {name: state[name] for name in state.keys() - left_out.keys()}
    arguments, weights = _to_timm(kept, path, method)
    if layer_scale == "fold":
        weights, arguments["init_values"] = fold_layer_scale(weights), 0.0

    # The model.
    vit = timm.create_model(pretrained_cfg_overlay=NO_PROVENANCE | {"tag": method}, **arguments)
    vit.load_state_dict(weights)
    size = arguments["img_size"]
    data_config = {
        "input_size": (3, size, size),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": METHODS[method].crop_pct if size < 384 else 1.0,
    }
    with staged(out) as folder:
        write_timm(vit, folder, data_config)
    dropped = sorted(set().union(*left_out.values()))
    return Import(out, arguments["model_name"], arguments["num_classes"], dropped)
