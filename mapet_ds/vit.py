"""timm's VisionTransformer and BEiT, with blocks that update some rows, which may attend to different keys.

Parameter names, initialisation and position resampling stay timm's; only a block's attention takes bands, or
rows by name where positions are relative.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, Mlp, build_sincos2d_pos_embed, trunc_normal_
from timm.models import beit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mapet_ds.config.sections import ModelConfig
from mapet_ds.data.batch import to_device
from mapet_ds.errors import ConfigError


class Band(NamedTuple):
    """Consecutive rows of a sequence that attend to consecutive keys: to all of them, or by a mask.

    The bands of a block cover consecutive rows to the sequence's end. Rows before the first band only serve
    as keys. A block computes keys and values for the rows from 0 to the last key of any band.
    """

    rows: slice
    keys: slice
    mask: Tensor | None = None
    """bool [rows, keys], True = may attend."""
    causal: bool = False
    """The i-th row attends to keys 0 .. i, as many as rows: a triangle that kernels know without a mask."""


class QKVLinear(nn.Linear):
    """timm's fused `qkv`, which also computes queries, and keys and values, for different rows.

    The weight is split inside the module's own call, because ZeRO-3 gathers it there; outside it is empty.
    Both parts take one call, because the gradients of a split are put together by one copy.
    """

    def forward(self, x: Tensor, seen: Tensor | None = None, bias: Tensor | None = None) -> Any:
        """[B, N, D] -> [B, N, 3 D]; with rows `seen`, q [B, N, D] of x and kv [B, M, 2 D] of those.

        bias: [3 D], in place of the module's own.
        """
        bias = self.bias if bias is None else bias
        if seen is None:
            return F.linear(x, self.weight, bias)
        sizes = [self.out_features // 3, self.out_features // 3 * 2]
        q, kv = self.weight.split(sizes)
        q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
        return F.linear(x, q, q_bias), F.linear(seen, kv, kv_bias)


class StreamAttention(Attention):
    """timm's Attention, which also takes bands: each band's rows then attend to that band's keys alone."""

    def __init__(self, dim: int, *args: Any, qkv_bias: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, *args, qkv_bias=qkv_bias, **kwargs)
        weight = self.qkv.weight
        self.qkv = QKVLinear(dim, 3 * self.attn_dim, qkv_bias, device=weight.device, dtype=weight.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, H, N, D / H]

    def forward(self, x: Tensor, bands: Sequence[Band] | None = None, **timm_arguments: Any) -> Tensor:
        """[B, N, D] -> [B, rows of the bands, D]; without bands, timm's own attention of all rows."""
        if bands is None:
            return super().forward(x, **timm_arguments)
        first, keys = bands[0].rows.start, max(band.keys.stop for band in bands)
        queries, rest = self.qkv(x[:, first:], x[:, :keys])
        q = self.q_norm(self._heads(queries))
        k, v = (self._heads(rows) for rows in rest.chunk(2, dim=-1))
        k = self.k_norm(k)
        outputs = []
        for band in bands:
            rows = slice(band.rows.start - first, band.rows.stop - first)
            qkv = q[:, :, rows], k[:, :, band.keys], v[:, :, band.keys]
            outputs.append(F.scaled_dot_product_attention(*qkv, attn_mask=band.mask, is_causal=band.causal))
        x = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        return self.proj(self.norm(x))


class SparingMlp(Mlp):
    """timm's Mlp, whose activation the backward pass makes anew.

    It saves 4 of the 16 widths that a block would keep of each row. docs/log.md has the cost in time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = self.fc1(x)
        recompute = torch.is_grad_enabled()
        return self.drop2(checkpoint(self._rest, x, use_reentrant=False) if recompute else self._rest(x))

    def _rest(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(x))))


class StreamBlock(Block):
    """timm's pre-norm Block, which also takes bands: it then updates and returns their rows alone."""

    def __init__(self, *args: Any, mlp_layer: type[nn.Module], **kwargs: Any) -> None:
        kwargs |= {"attn_layer": StreamAttention, "mlp_layer": SparingMlp if mlp_layer is Mlp else mlp_layer}
        super().__init__(*args, **kwargs)

    def forward(
        self,
        x: Tensor,
        bands: Sequence[Band] | None = None,
        kept: Tensor | None = None,
        **timm_arguments: Any,
    ) -> Tensor:
        """[B, N, D] -> [B, rows of the bands, D]; without bands, all rows attend to all.

        kept: [B, 2], the factors of each image's two residuals, which all of its rows share; see
        stochastic_depth. None keeps every residual.
        """
        first = bands[0].rows.start if bands else 0
        residual = self.ls1(self.attn(self.norm1(x), bands, **timm_arguments))
        x = x[:, first:] + (residual if kept is None else residual * kept[:, 0, None, None])
        residual = self.ls2(self.mlp(self.norm2(x)))
        return x + (residual if kept is None else residual * kept[:, 1, None, None])


class RelativeAttention(beit.Attention):
    """timm's attention with a bias by relative position, which also takes the rows to update.

    All rows of x are keys, in raster order, so that one bias serves all images. A row that is picked brings
    its line of the bias along.
    """

    qkv: QKVLinear

    def forward(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; with rows named, long [B, n], theirs alone: [B, n, D].

        shared_rel_pos_bias: [heads, N, N], of a table that all blocks share.
        """
        if rows is None and not self.fused_attn:  # somebody looks at the weights, which timm shows
            return super().forward(x, shared_rel_pos_bias)
        bias = None
        if self.q_bias is not None and self.v_bias is not None:  # k_bias is a buffer, and never in bf16
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        if rows is None:
            q, k, v = self.qkv(x, bias=bias).chunk(3, dim=-1)
        else:
            q, rest = self.qkv(take_rows(x, rows), x, bias)
            k, v = rest.chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))

        # The bias of all rows [1, heads, N, N], or of those of each image [B, heads, n, N].
        biases = [] if shared_rel_pos_bias is None else [shared_rel_pos_bias[None]]
        biases += [] if self.relative_position_bias_table is None else [self._get_rel_pos_bias()]
        mask = sum(biases[1:], biases[0]) if biases else None
        mask = mask if mask is None or rows is None else mask[0][:, rows].transpose(0, 1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class RelativeBlock(beit.Block):
    """timm's BEiT Block, which also takes the rows to update, and then returns these alone."""

    def forward(
        self, x: Tensor, rows: Tensor | None = None, kept: Tensor | None = None, **timm_arguments: Any
    ) -> Tensor:
        """As RelativeAttention's. kept: see StreamBlock."""
        assert rows is None or isinstance(rows, Tensor), "a bias by relative position knows no bands"
        residual = self.attn(self.norm1(x), rows=rows, **timm_arguments)
        residual = residual if self.gamma_1 is None else residual * self.gamma_1
        x = x if rows is None else take_rows(x, rows)
        x = x + (residual if kept is None else residual * kept[:, 0, None, None])
        residual = self.mlp(self.norm2(x))
        residual = residual if self.gamma_2 is None else residual * self.gamma_2
        return x + (residual if kept is None else residual * kept[:, 1, None, None])


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


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index`, long [B, n], of x [B, L, D]: [B, n, D]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


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
