"""VQ-KD, the tokenizer of BEiT v2: a ViT whose patches are mapped to a small space and named by the nearest of K codes.

Built from its published checkpoint, whose tensors tell every size; what else the file holds (decoder, teacher, statistics)
served training and is not used.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet_ds.config import Config, ConfigError
from mapet_ds.data import View
from mapet_ds.launch import shapes_only
from mapet_ds.teacher import mismatches
from mapet_ds.tokenizer import Codebook

CODES = "quantize.embedding.weight"
USED = ("encoder.", "encode_task_layer.", CODES)
SIZED = {
    "encoder.pos_embed": 3, "encoder.patch_embed.proj.weight": 4, "encoder.blocks.0.mlp.fc1.weight": 2,
    "encode_task_layer.2.weight": 2, CODES: 2,
}  # fmt: skip
"""Tensors that tell the sizes, and their dimensions."""
HEAD_DIM = 64
"""The one size that no tensor tells: 12 heads of 768."""
PUBLISHED = {
    "encoder.pos_embed": (1, 197, 768), "encoder.patch_embed.proj.weight": (768, 3, 16, 16),
    "encoder.blocks.0.mlp.fc1.weight": (3072, 768), "encode_task_layer.2.weight": (32, 768),
} | {f"encoder.blocks.{i}.norm1.weight": (768,) for i in range(12)}  # fmt: skip
"""Shapes that tell the sizes of BEiT v2's own."""
UNREADABLE = (
    safetensors.SafetensorError, pickle.UnpicklingError, struct.error, OSError, RuntimeError, EOFError, AttributeError,
    LookupError, TypeError, ValueError,
)  # fmt: skip
"""What PyTorch's reader raises at a file that is damaged or of another kind: nearly anything."""


class VQKD(nn.Module):
    """A `Tokenizer`: frozen, fp32, of images scaled to -1 .. 1.

    Raises:
        ConfigError: no checkpoint, one of another architecture, or another grid than the student's.

    Source: BEiT v2 (arXiv 2208.06366), VQ-KD as released.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__()
        path = config.tokenizer.path
        if shapes_only():
            weights = {name: torch.empty(shape) for name, shape in PUBLISHED.items()}
            weights[CODES] = torch.empty(config.tokenizer.vocab_size, 32)
        else:
            weights = _read_weights(path)
        encoder = _encoder_arguments(weights, path)
        if (grid := encoder["img_size"] // encoder["patch_size"]) != config.grid:
            raise ConfigError(
                f"tokenizer.path = {path} gives {grid} x {grid} ids of an image of {encoder['img_size']} px, but the "
                f"student's patches are {config.grid} x {config.grid}: each patch needs one target. Change model.img_size "
                "or model.patch_size."
            )
        embed_dim = encoder["embed_dim"]
        with torch.device(device if shapes_only() else "meta"):
            self.encoder = VisionTransformer(**encoder)
            self.encode_task_layer = nn.Sequential(
                nn.Linear(embed_dim, embed_dim), nn.Tanh(), nn.Linear(embed_dim, weights[CODES].shape[1])
            )
        if not shapes_only():
            self._check_strictly(weights, path)
            self.load_state_dict({name: _named(name, weights).float() for name in self.state_dict()}, assign=True)
        self.to(device).requires_grad_(False).eval()
        self.codebook = Codebook(weights[CODES], {}).to(device)
        self.vocab_size = len(weights[CODES])
        self.view = View(encoder["img_size"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.identity = {"name": "vqkd", "sha256": "" if shapes_only() else _fingerprint(weights)}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> long ids [B, L], patches row by row. In fp32; does not make the host wait."""
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), exact:
            patches = self.encoder.forward_features(images.float())[:, 1:]
            points = self.encode_task_layer(self.encoder.fc_norm(patches))
            return self.codebook.assign(F.normalize(points, dim=-1))

    def _check_strictly(self, weights: dict[str, Tensor], path: str) -> None:
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        for name in [name for name in wanted if name.endswith("attn.qkv.bias")]:
            width = wanted.pop(name)[0] // 3
            wanted |= {name.replace("qkv.bias", bias): (width,) for bias in ("q_bias", "v_bias")}
        given = {name: tuple(tensor.shape) for name, tensor in weights.items() if name != CODES}
        _refuse(mismatches(wanted, given), path)


def _refuse(wrong: list[str], path: str) -> None:
    if wrong:
        raise ConfigError(
            f"tokenizer.path = {path} is not a checkpoint of VQ-KD: {len(wrong)} tensors differ, e.g. "
            f"{'; '.join(sorted(wrong)[:3])}. BEiT v2's are named vqkd_encoder_base_decoder_*.pth."
        )


def read_checkpoint(path: str | Path) -> Any:
    """What a safetensors file or a checkpoint of PyTorch's holds. Nothing in it is ever executed; raises what is UNREADABLE."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # training keeps its options beside the weights
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_weights(path: str) -> dict[str, Tensor]:
    """The tensors that the tokenizer is made of, by their published names."""
    if not Path(path).is_file():
        raise ConfigError(f"tokenizer.path = {path!r} is not a file: name VQ-KD's, vqkd_encoder_base_decoder_*.pth.")
    try:
        tensors = read_checkpoint(path)
        tensors = tensors.get("model", tensors.get("state_dict", tensors))
        return {name: t for name, t in tensors.items() if name.startswith(USED) and isinstance(t, Tensor)}
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"tokenizer.path = {path} can't be read as plain tensors by name: {reason}") from error


def _encoder_arguments(weights: dict[str, Tensor], path: str) -> dict[str, Any]:
    """timm's arguments for the encoder, from the sizes of its tensors: absolute positions, no LayerScale."""
    _refuse([f"{name} is missing" for name in SIZED.keys() - weights.keys()], path)
    shapes = {name: tuple(weights[name].shape) for name in SIZED}
    _refuse([f"{name} is {shapes[name]}, not {dims}-d" for name, dims in SIZED.items() if len(shapes[name]) != dims], path)
    embed_dim, _, patch_size, _ = shapes["encoder.patch_embed.proj.weight"]
    if embed_dim % HEAD_DIM:
        _refuse([f"the encoder's width {embed_dim} is no multiple of {HEAD_DIM}"], path)
    blocks = {match[0] for name in weights if (match := re.match(r"encoder\.blocks\.\d+\.", name))}
    return {
        "img_size": math.isqrt(shapes["encoder.pos_embed"][1] - 1) * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": len(blocks),
        "num_heads": embed_dim // HEAD_DIM,
        "mlp_ratio": shapes["encoder.blocks.0.mlp.fc1.weight"][0] / embed_dim,
        "num_classes": 0,
        "global_pool": "avg",  # so that the last norm is fc_norm, of patches, as in the checkpoint
    }


def _named(name: str, weights: dict[str, Tensor]) -> Tensor:
    """The tensor of timm's name; published attention has no bias of keys."""
    if not name.endswith("attn.qkv.bias"):
        return weights[name]
    q, v = (weights[name.replace("qkv.bias", bias)] for bias in ("q_bias", "v_bias"))
    return torch.cat([q, torch.zeros_like(q), v])


def _fingerprint(weights: dict[str, Tensor]) -> str:
    """sha256 of names and weights, the same for every kind of file that holds them."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode())
        sha.update(weights[name].float().contiguous().numpy().data)
    return sha.hexdigest()
