"""VQ-KD, the tokenizer of BEiT v2: a ViT maps patches to a small space, in which the nearest code is the id.

It is built from its published checkpoint, whose tensors give every size. The decoder, the teacher and the
statistics in that file served its training and are not used.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.targets.codebook import Codebook
from mapet_ds.weights import HEAD_DIM, fingerprint, mismatches, read_tensors, shapes, shapes_only

CODES = "quantize.embedding.weight"
USED = ("encoder.", "encode_task_layer.", CODES)
SIZED = {
    "encoder.pos_embed": 3, "encoder.patch_embed.proj.weight": 4, "encoder.blocks.0.mlp.fc1.weight": 2,
    "encode_task_layer.2.weight": 2, CODES: 2,
}  # fmt: skip
"""The tensors whose shapes give the sizes, and their numbers of dimensions."""


class VQKD(nn.Module):
    """A `Tokenizer` that is frozen, computes in fp32, and takes images scaled to -1 .. 1.

    Raises:
        ConfigError: no checkpoint, one of another architecture, or another grid than the student's.

    Source: BEiT v2 (arXiv 2208.06366), VQ-KD as released.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__()
        path = config.tokenizer.path
        weights = _published_shapes(config) if shapes_only() else _read_weights(path)
        encoder = _encoder_arguments(weights, path)
        if (grid := encoder["img_size"] // encoder["patch_size"]) != config.grid:
            raise ConfigError(
                f"tokenizer.path = {path} gives {grid} x {grid} ids of an image of {encoder['img_size']} px, "
                f"but the student's patches are {config.grid} x {config.grid}: each patch needs one target. "
                "Change model.img_size or model.patch_size."
            )
        width, code_dim = encoder["embed_dim"], weights[CODES].shape[1]
        with torch.device(device if shapes_only() else "meta"):
            self.encoder = VisionTransformer(**encoder)
            layers = nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim)
            self.encode_task_layer = nn.Sequential(*layers)
        self.identity: dict[str, Any] = {"name": "vqkd"}
        if not shapes_only():
            self._check_strictly(weights, path)
            state = {name: _named(name, weights).float() for name in self.state_dict()}
            self.load_state_dict(state, assign=True)
            self.identity["sha256"] = fingerprint(weights)
        self.to(device).requires_grad_(False).eval()
        self.codebook = Codebook(weights[CODES], {}).to(device)
        self.vocab_size = len(weights[CODES])
        self.view = View(encoder["img_size"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> long ids [B, L] in raster order. Does not make the host wait."""
        cudnn = torch.backends.cudnn
        exact = cudnn.flags(enabled=True, benchmark=cudnn.benchmark, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), exact:
            patches = self.encoder.forward_features(images.float())[:, 1:]
            points = self.encode_task_layer(self.encoder.fc_norm(patches))
            return self.codebook.assign(F.normalize(points, dim=-1))

    def _check_strictly(self, weights: dict[str, Tensor], path: str) -> None:
        wanted = shapes(self.state_dict())
        for name in [name for name in wanted if name.endswith("attn.qkv.bias")]:
            width = wanted.pop(name)[0] // 3
            wanted |= {name.replace("qkv.bias", bias): (width,) for bias in ("q_bias", "v_bias")}
        given = shapes({name: tensor for name, tensor in weights.items() if name != CODES})
        _refuse(mismatches(wanted, given), path)


def _refuse(wrong: list[str], path: str) -> None:
    if wrong:
        raise ConfigError(
            f"tokenizer.path = {path} is not a checkpoint of VQ-KD: {len(wrong)} tensors differ, e.g. "
            f"{'; '.join(sorted(wrong)[:3])}. BEiT v2's are named vqkd_encoder_base_decoder_*.pth."
        )


def _read_weights(path: str) -> dict[str, Tensor]:
    """The tensors that the tokenizer is made of, by their published names."""
    tensors = read_tensors(Path(path), f"tokenizer.path = {path or '(empty)'}")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(USED)}


def _encoder_arguments(weights: dict[str, Tensor], path: str) -> dict[str, Any]:
    """timm's arguments for the encoder, from the shapes of its tensors: absolute positions, no LayerScale."""
    _refuse([f"{name} is missing" for name in SIZED.keys() - weights.keys()], path)
    sizes = shapes({name: weights[name] for name in SIZED})
    wrong = [name for name, dims in SIZED.items() if len(sizes[name]) != dims]
    _refuse([f"{name} is {sizes[name]}, not {SIZED[name]}-d" for name in wrong], path)
    embed_dim, _, patch_size, _ = sizes["encoder.patch_embed.proj.weight"]
    if embed_dim % HEAD_DIM:
        _refuse([f"the encoder's width {embed_dim} is no multiple of {HEAD_DIM}"], path)
    blocks = {match[0] for name in weights if (match := re.match(r"encoder\.blocks\.\d+\.", name))}
    return {
        "img_size": math.isqrt(sizes["encoder.pos_embed"][1] - 1) * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": len(blocks),
        "num_heads": embed_dim // HEAD_DIM,
        "mlp_ratio": sizes["encoder.blocks.0.mlp.fc1.weight"][0] / embed_dim,
        "num_classes": 0,
        "global_pool": "avg",  # makes the last norm fc_norm, over patches, as in the checkpoint
    }


def _published_shapes(config: Config) -> dict[str, Tensor]:
    """Tensors without values, of BEiT v2's own sizes for the student's grid: 12 blocks of 768."""
    sizes = {
        "encoder.pos_embed": (1, 1 + config.num_patches, 768),
        "encoder.patch_embed.proj.weight": (768, 3, *[config.model.patch_size] * 2),
        "encoder.blocks.0.mlp.fc1.weight": (3072, 768),
        "encode_task_layer.2.weight": (32, 768),
        CODES: (config.tokenizer.vocab_size, 32),
    }
    sizes |= {f"encoder.blocks.{i}.norm1.weight": (768,) for i in range(12)}
    return {name: torch.empty(shape) for name, shape in sizes.items()}


def _named(name: str, weights: dict[str, Tensor]) -> Tensor:
    """The tensor of timm's name. Published attention has no bias of keys: it is zero."""
    if not name.endswith("attn.qkv.bias"):
        return weights[name]
    q, v = (weights[name.replace("qkv.bias", bias)] for bias in ("q_bias", "v_bias"))
    return torch.cat([q, torch.zeros_like(q), v])
