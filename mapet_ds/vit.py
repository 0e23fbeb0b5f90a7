"""The student: timm's VisionTransformer or BEiT, of the blocks in blocks.py, and how rows run through them.

Parameter names, initialisation and position resampling stay timm's.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, build_sincos2d_pos_embed, trunc_normal_
from timm.models import beit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mapet_ds.blocks import Band, QKVLinear, RelativeAttention, RelativeBlock, SparingMlp, StreamBlock
from mapet_ds.config.sections import ModelConfig
from mapet_ds.data.batch import to_device
from mapet_ds.errors import ConfigError

ViT = VisionTransformer | beit.Beit
"""A student: of StreamBlocks, or of RelativeBlocks where positions are relative."""
Rows = Sequence[Band] | Tensor | None
"""What a block updates: bands of a StreamBlock, rows of a RelativeBlock, or all rows."""


class Graph(nn.Module):
    """Marks what `compile_blocks` compiles beside blocks: it reads and writes much, and computes little."""


def compile_blocks(module: nn.Module) -> None:
    """Sets torch.compile to compile each block of a module's ViTs, and each Graph, at its first call.

    A Graph is compiled for each shape it meets. One graph for all shapes could take the place of another
    between a forward pass and its repetition in the backward pass, which then keeps other tensors.
    """
    for part in module.modules():
        if isinstance(part, (Block, beit.Block)):
            part.compile()
        elif isinstance(part, Graph):
            part.compile(dynamic=False)


def build_vit(config: ModelConfig) -> Any:
    """A timm ViT of StreamBlocks without a classifier, freshly initialised from torch's CPU generator.

    Where positions are relative (config.relative) it is timm's BEiT, of RelativeBlocks.

    Raises:
        ConfigError: timm has no such model, or it is neither a plain ViT with a class token nor a BEiT.
    """
    asked = f"model.name = {config.name} with model.args = {config.args}"
    blocks: dict[str, Any] = {} if config.relative else {"block_fn": StreamBlock}
    try:
        vit = timm.create_model(
            config.name, pretrained=False, num_classes=0, img_size=config.img_size,
            patch_size=config.patch_size, drop_path_rate=config.drop_path,
            init_values=config.layer_scale or 0.0,  # timm drops a None: a model's own default would win
            **blocks, **config.timm_args,
        )  # fmt: skip
    except RuntimeError as error:  # timm's own: no such model
        known = timm.list_models(["vit_*", "beit*"])
        close = ", ".join(difflib.get_close_matches(config.name, known, n=3)) or "none"
        raise ConfigError(f"model.name = {config.name}: {error}; close: {close}.") from error
    except (TypeError, ValueError, AssertionError, AttributeError, ZeroDivisionError) as error:
        # timm checks its arguments here and there: an assertion, a division, an attribute that isn't there
        raise ConfigError(f"timm can't build {asked}: {type(error).__name__} {error}") from error
    if type(vit) is beit.Beit and vit.blocks and any("pos" in name for name, _ in vit.named_parameters()):
        _check_beit(vit, asked)
        return _with_relative_blocks(vit)
    if type(vit) is VisionTransformer and vit.has_class_token and vit.pos_embed is not None and vit.blocks:
        return vit
    raise ConfigError(
        f"{asked} is neither a plain timm ViT with a class token, a learned position table and blocks, nor a "
        "timm BEiT with positions; take one such as vit_small_patch16_224, vit_base_patch16_224, "
        "vit_large_patch16_224, beit_base_patch16_224."
    )


def _check_beit(vit: beit.Beit, asked: str) -> None:
    first: Any = vit.blocks[0].attn
    if vit.rel_pos_bias is not None and first.relative_position_bias_table is not None:
        raise ConfigError(
            f"{asked}: a table for all blocks and one in each can't be exported together. Beside "
            "use_shared_rel_pos_bias: true set use_rel_pos_bias: false."
        )
    if first.attn_drop.p or first.proj_drop.p:
        raise ConfigError(f"{asked}: a BEiT takes no attn_drop_rate and no proj_drop_rate here.")


def _with_relative_blocks(vit: beit.Beit) -> beit.Beit:
    """The same BEiT, its blocks of the classes above: timm has no argument for them."""
    for block in vit.blocks:
        block.__class__, block.attn.__class__, block.attn.qkv.__class__ = (  # pyright: ignore
            RelativeBlock, RelativeAttention, QKVLinear,
        )  # fmt: skip
        if type(block.mlp) is Mlp:
            block.mlp.__class__ = SparingMlp
    return vit


def embed(
    vit: ViT, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of images [B, 3, S, S] before the first block, and the positions of patches.

    Gives the prefix tokens [B, P, D] (class, registers), the patches [B, L, D] in raster order, both with
    their positions added, and the positions [1, L, D] of patches alone, zero where all are relative.

    mask: bool [B, L], True = mask_token [1, 1, D] takes the place of this patch before positions are added.
    """
    x = vit.patch_embed(images.to(vit.patch_embed.proj.weight.dtype))
    num_patches = x.shape[1]
    if mask is not None:
        assert mask_token is not None
        x = torch.where(mask[:, :, None], mask_token.to(x.dtype), x)
    if isinstance(vit, VisionTransformer):
        x = vit.norm_pre(vit._pos_embed(x))
    else:
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = vit.pos_drop(x if vit.pos_embed is None else x + vit.pos_embed)
    positions = x.new_zeros(1, x.shape[1], x.shape[2]) if vit.pos_embed is None else vit.pos_embed
    return x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :], positions[:, -num_patches:]


def stochastic_depth(
    blocks: Sequence[nn.Module], keep: Tensor | None, dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """The factors [B, 2] of each block's two residuals: 0, or 1 / (1 - drop_prob) where one is kept.

    They are made outside of the blocks, because torch.compile would trace a block anew for a second
    drop_prob, and then recompute other tensors than it had kept (pytorch#166926).

    keep: float [B, 2 * blocks], uniforms. None keeps every residual, and so do blocks that don't train.
    """
    paths = [path for block in blocks for path in (block.drop_path1, block.drop_path2)]
    drop = [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths]
    if keep is None or not blocks[0].training or not any(drop):
        return [None] * len(blocks)
    rates = to_device(torch.tensor(drop, dtype=torch.float64), keep.device)
    wide = torch.promote_types(dtype, torch.float32)
    factors = (keep >= rates.to(keep.dtype)).to(wide) / (1 - rates).to(wide)
    return factors.to(dtype).unflatten(1, (-1, 2)).transpose(0, 1).contiguous().unbind()


def run_block(
    block: nn.Module, x: Tensor, rows: Rows, kept: Tensor | None, recompute: bool, **timm_arguments: Any
) -> Tensor:
    """A block's output for rows [B, N, D]. recompute: drop its activations until the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, rows, kept, use_reentrant=False, **timm_arguments)
    return block(x, rows, kept, **timm_arguments)


def run_blocks(vit: ViT, x: Tensor, rows: Sequence[Rows] | None, keep: Tensor | None = None) -> Tensor:
    """The output of all blocks and of the final norm for rows [B, N, D].

    rows: an entry a block; None, of a block or for all, is dense attention. keep: [B, 2 * depth] or None.
    """
    shared = getattr(vit, "rel_pos_bias", None)  # one table for all blocks
    arguments = {} if shared is None else {"shared_rel_pos_bias": shared()}
    kept = stochastic_depth(list(vit.blocks), keep, x.dtype)
    for i, block in enumerate(vit.blocks):
        x = run_block(
            block, x, None if rows is None else rows[i], kept[i], vit.grad_checkpointing, **arguments
        )
    return vit.norm(x)


@torch.no_grad()
def beit_init(module: nn.Module, vit: ViT, init: str) -> None:
    """Divides the last linear layers of the l-th block by sqrt(2 l), where timm has not done so.

    init: "timm" leaves all else to timm; "beit" first draws all linear layers of the module, the patch
    embedding, tokens and positions anew, a normal distribution of 0.02 cut at one deviation.

    Source: BEiT, arXiv 2106.08254, 2.5; the released code for the spread.
    """
    if init == "beit":
        weights = [layer.weight for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        tokens = ("cls_token", "mask_token", "pos_embed")
        weights += [tensor for name, tensor in module.named_parameters() if name.endswith(tokens)]
        for weight in weights:
            trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        vit.get_parameter("patch_embed.proj.bias").zero_()
    if init == "beit" or isinstance(vit, VisionTransformer):
        for i in range(len(vit.blocks)):
            for layer in ("attn.proj", "mlp.fc2"):
                vit.get_parameter(f"blocks.{i}.{layer}.weight").div_(math.sqrt(2 * (i + 1)))


def sincos_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D sine and cosine positions of grid x grid patches: [1, L, width], in timm's order of channels.

    MAE and SAIM have the same numbers in another order of channels.

    Raises:
        ConfigError: a width that is no multiple of 4.
    """
    if width % 4:
        raise ConfigError(f"Fixed sin-cos positions need a width that is a multiple of 4, not {width}.")
    return build_sincos2d_pos_embed([grid, grid], width)[None]


def mae_init(module: nn.Module, vit: ViT, split_qkv: bool = False) -> None:
    """Initialises a module's linear layers, and its ViT's tokens and fixed positions, as MAE does.

    Weights are Xavier-uniform; with split_qkv those of query, key and value each on their own. Biases are
    zero. Positions are a sin-cos table, zero for prefix tokens, that no gradient reaches.

    Source: MAE, arXiv 2111.06377, A.1 and the released code.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            for weight in layer.weight.data.chunk(3 if split_qkv and isinstance(layer, QKVLinear) else 1):
                nn.init.xavier_uniform_(weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    assert vit.cls_token is not None and vit.pos_embed is not None
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))
    nn.init.normal_(vit.cls_token, std=0.02)
    table = sincos_positions(vit.patch_embed.grid_size[0], vit.embed_dim)
    prefix = vit.pos_embed.shape[1] - table.shape[1]
    vit.pos_embed.requires_grad_(False).copy_(F.pad(table, (0, 0, prefix, 0)))


def mask_token_and_head(width: int, target_dim: int) -> tuple[nn.Parameter, nn.Linear]:
    """A mask token [1, 1, width] and a linear head: truncated normal of deviation 0.02, biases of zero."""
    token, head = nn.Parameter(torch.empty(1, 1, width)), nn.Linear(width, target_dim)
    trunc_normal_(token, std=0.02)
    trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return token, head
