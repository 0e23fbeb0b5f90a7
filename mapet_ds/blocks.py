"""Blocks of timm's that update some rows, which may attend to different keys: bands, or rows by name.

Parameter names and initialisation stay timm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models import beit
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index`, long [B, n], of x [B, L, D]: [B, n, D]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


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
