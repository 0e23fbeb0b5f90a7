"""timm's VisionTransformer with blocks whose rows may differ in what they attend to.

Parameter names, initialisation and position resampling stay timm's; only the attention of a block learns to take bands.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mapet_ds.config.sections import ModelConfig
from mapet_ds.errors import ConfigError


class Band(NamedTuple):
    """Consecutive rows of a sequence that attend to consecutive keys: to all of them, or by a mask.

    The bands of a block cover consecutive rows to the sequence's end; rows before the first band only serve as keys.
    Each block computes keys and values for rows 0 .. the last key of any band.
    """

    rows: slice
    keys: slice
    mask: Tensor | None = None
    """bool [rows, keys], True = may attend."""
    causal: bool = False
    """The i-th row attends to keys 0 .. i of as many: a triangle that kernels know without a mask."""


class QKVLinear(nn.Linear):
    """timm's fused `qkv`, told which of its rows to use.

    Slicing goes on inside the module's own call: ZeRO-3 gathers a weight per call, from outside it would be empty.
    """

    def forward(self, x: Tensor, part: Literal["q", "kv", "qkv"] = "qkv") -> Tensor:
        width = self.out_features // 3
        rows = {"q": slice(0, width), "kv": slice(width, None), "qkv": slice(None)}[part]
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])


class StreamAttention(Attention):
    """timm's Attention; with bands, queries of the banded rows over the keys and values that their band names."""

    def __init__(self, dim: int, *args: Any, qkv_bias: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, *args, qkv_bias=qkv_bias, **kwargs)
        place = {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
        self.qkv = QKVLinear(dim, 3 * self.attn_dim, bias=qkv_bias, **place)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, H, N, D / H]

    def forward(self, x: Tensor, bands: Sequence[Band] | None = None, **timm_arguments: Any) -> Tensor:
        """[B, N, D] -> [B, rows of the bands, D]; timm's own attention over all rows without bands."""
        if bands is None:
            return super().forward(x, **timm_arguments)
        first, keys = bands[0].rows.start, max(band.keys.stop for band in bands)
        q = self.q_norm(self._heads(self.qkv(x[:, first:], part="q")))
        k, v = (self._heads(rows) for rows in self.qkv(x[:, :keys], part="kv").chunk(2, dim=-1))
        k = self.k_norm(k)
        outputs = []
        for band in bands:
            rows = slice(band.rows.start - first, band.rows.stop - first)
            qkv = q[:, :, rows], k[:, :, band.keys], v[:, :, band.keys]
            outputs.append(F.scaled_dot_product_attention(*qkv, attn_mask=band.mask, is_causal=band.causal))
        x = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        return self.proj(self.norm(x))


class SparingMlp(Mlp):
    """timm's Mlp, whose activation the backward pass makes anew: 4 of the 16 rows of width that a block would keep of each row.

    What it costs is in docs/log.md.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = self.fc1(x)
        return self.drop2(
            checkpoint(self._second, x, use_reentrant=False) if torch.is_grad_enabled() else self._second(x)
        )

    def _second(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(x))))


class StreamBlock(Block):
    """timm's pre-norm Block; with bands it updates and returns only the banded rows."""

    def __init__(self, *args: Any, mlp_layer: type[nn.Module], **kwargs: Any) -> None:
        kwargs |= {"attn_layer": StreamAttention, "mlp_layer": SparingMlp if mlp_layer is Mlp else mlp_layer}
        super().__init__(*args, **kwargs)

    def forward(
        self,
        x: Tensor,
        bands: Sequence[Band] | None = None,
        keep: Tensor | None = None,
        **timm_arguments: Any,
    ) -> Tensor:
        """[B, N, D] -> [B, rows of the bands, D].

        keep: float [B, 2], uniforms of this block's two stochastic depth decisions, one per image and residual, shared by
        all its rows; None keeps every residual.
        """
        first = bands[0].rows.start if bands else 0
        residual = self.ls1(self.attn(self.norm1(x), bands, **timm_arguments))
        x = x[:, first:] + self._thin(residual, self.drop_path1, keep, 0)
        residual = self.ls2(self.mlp(self.norm2(x)))
        return x + self._thin(residual, self.drop_path2, keep, 1)

    def _thin(self, residual: Tensor, drop_path: nn.Module, keep: Tensor | None, column: int) -> Tensor:
        if keep is None or not self.training or not isinstance(drop_path, DropPath):
            return residual
        kept = (keep[:, column] >= drop_path.drop_prob).to(residual.dtype) / (1 - drop_path.drop_prob)
        return residual * kept[:, None, None]


def compile_blocks(module: nn.Module) -> None:
    """torch.compile every block of a module's ViTs, each at its first call."""
    for block in module.modules():
        if isinstance(block, Block):
            block.compile()


def build_vit(config: ModelConfig) -> VisionTransformer:
    """A freshly initialised timm ViT (no classifier) with StreamBlocks, from torch's CPU generator.

    Raises:
        ConfigError: timm has no such model, or it is not a plain ViT with a class token.
    """
    try:
        vit = timm.create_model(
            config.name,
            pretrained=False,
            num_classes=0,
            img_size=config.img_size,
            patch_size=config.patch_size,
            drop_path_rate=config.drop_path,
            init_values=config.layer_scale
            or 0.0,  # timm drops a None, and with it a model's own default wins
            block_fn=StreamBlock,
            **config.args,
        )
    except RuntimeError as error:  # timm's own: no such model
        close = difflib.get_close_matches(config.name, timm.list_models("vit_*"), n=3)
        raise ConfigError(
            f"model.name = {config.name}: {error}; close: {', '.join(close) or 'none'}."
        ) from error
    except (TypeError, ValueError, AssertionError, AttributeError, ZeroDivisionError) as error:
        # timm checks what it is given here and there: an assertion, a division, an attribute that isn't there
        raise ConfigError(
            f"timm can't build model.name = {config.name} with model.args = {config.args}: {type(error).__name__} {error}"
        ) from error
    plain = type(vit) is VisionTransformer and vit.has_class_token and vit.pos_embed is not None
    if not plain or not len(vit.blocks):
        raise ConfigError(
            f"model.name = {config.name} with model.args = {config.args} is not a plain timm ViT with a class token, a learned "
            "position table and blocks; take one such as vit_small_patch16_224, vit_base_patch16_224, vit_large_patch16_224."
        )
    return vit


def embed(
    vit: VisionTransformer, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix tokens [B, P, D] (class, registers), patches [B, L, D] in raster order, and the positions [1, L, D] of patches;
    prefix and patches have their positions added already.

    mask: bool [B, L], True = this patch is replaced by mask_token [1, 1, D] before positions are added.
    """
    x = vit.patch_embed(images.to(vit.patch_embed.proj.weight.dtype))
    num_patches = x.shape[1]
    if mask is not None:
        x = torch.where(mask[:, :, None], mask_token.to(x.dtype), x)
    x = vit.norm_pre(vit._pos_embed(x))
    return x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :], vit.pos_embed[:, -num_patches:]


def run_block(
    block: StreamBlock, x: Tensor, bands: Sequence[Band] | None, keep: Tensor | None, recompute: bool
) -> Tensor:
    """One block on rows [B, N, D]. keep: [B, 2] or None; recompute: drop its activations until the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, bands, keep, use_reentrant=False)
    return block(x, bands, keep)


def run_blocks(
    vit: VisionTransformer,
    x: Tensor,
    bands: Sequence[Sequence[Band] | None] | None,
    keep: Tensor | None = None,
) -> Tensor:
    """Rows [B, N, D] through all blocks and the final norm. bands: one entry a block, or None; a None is a block, or all,
    whose rows attend to all; keep: [B, 2 * depth] or None."""
    for i, block in enumerate(vit.blocks):
        block_keep = None if keep is None else keep[:, 2 * i : 2 * i + 2]
        x = run_block(block, x, bands and bands[i], block_keep, vit.grad_checkpointing)
    return vit.norm(x)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, n] of x [B, L, D]: [B, n, D]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


@torch.no_grad()
def beit_init(vit: VisionTransformer) -> VisionTransformer:
    """The same ViT, the last linear layer of each residual branch divided by sqrt(2 l), l = 1 .. depth (BEiT, section 2.5)."""
    for number, block in enumerate(vit.blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))
    return vit
