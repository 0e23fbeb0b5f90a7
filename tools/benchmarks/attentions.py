"""Ways to compute the attention of MaPeT's hidden patches and queries, on noise: each row attends to consecutive keys."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from benchmarks.measuring import Figures, circumstances, device_of, ratio, settings, summary, timed
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from mapet_ds.config import ConfigError
from mapet_ds.objectives.mapet import attention_mask
from mapet_ds.vit import build_vit

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries [B, H, 2 t, D] over keys and values [B, H, K, D]."""


def banded(mask: Tensor, parts: int) -> Attention:
    """By mask, each stream's rows in so many parts, over the keys alone that a part attends to."""
    bands = []
    for rows in (part for stream in torch.arange(len(mask)).chunk(2) for part in stream.tensor_split(parts)):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        keys = mask[rows].any(dim=0).nonzero()[:, 0]
        keys = slice(int(keys[0]), int(keys[-1]) + 1)
        bands.append((rows, keys, mask[rows, keys].contiguous()))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = ((q[:, :, rows], k[:, :, keys], v[:, :, keys], part) for rows, keys, part in bands)
        return torch.cat([F.scaled_dot_product_attention(*each) for each in parts], dim=2)

    return attention


def compiled_flex(mask: Tensor) -> Attention:
    blocks = create_block_mask(lambda b, h, row, key: mask[row, key], None, None, *mask.shape, device=mask.device)
    return partial(torch.compile(flex_attention), block_mask=blocks)


def sliding_window(mask: Tensor) -> Attention:
    """FlashAttention's sliding window, without a mask, for a stream at a time: the last row ends at the last key."""
    hidden, keys = len(mask) // 2, mask.shape[1] - 1
    window = (int(mask[0].sum()) - 1, 0)

    def stream(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = len(q)
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        ends = (torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length for length in (hidden, keys))
        return varlen_attn(*packed, *ends, hidden, keys, window_size=window).unflatten(0, (batch, hidden)).transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        content = stream(q[:, :, :hidden], k[:, :, 1:], v[:, :, 1:])
        return torch.cat([content, stream(q[:, :, hidden:], k[:, :, :-1], v[:, :, :-1])], dim=2)

    return attention


def measure_attention(arguments: argparse.Namespace) -> Figures:
    """Forward and backward of one block's band, in turns."""
    device, config = device_of(arguments.device), settings(arguments, f"model.name={arguments.model}")
    if config.objective != "mapet":
        raise ConfigError(f"`attention` is about mapet's rows, and objective = {config.objective}.")
    torch.set_num_threads(arguments.threads)
    with torch.device("meta"):
        vit = build_vit(config.model)
    hidden, dtype = config.mapet.num_hidden(config), getattr(torch, arguments.dtype)
    mask = attention_mask(hidden, vit.num_prefix_tokens + config.num_patches - hidden).to(device)
    ways = {"mask": partial(F.scaled_dot_product_attention, attn_mask=mask)} | {f"bands_{n}": banded(mask, n) for n in (1, 2, 3)}
    if device.type == "cuda":
        ways["flex"] = compiled_flex(mask)
        if dtype != torch.float32:
            ways["window"] = sliding_window(mask)
    draw = partial(torch.randn, device=device, dtype=dtype)
    sizes, heads = (len(mask), len(mask), *[mask.shape[1]] * 2), (vit.blocks[0].attn.num_heads, vit.blocks[0].attn.head_dim)
    gradient, *inputs = (draw(arguments.batch_size, rows, *heads).transpose(1, 2).requires_grad_() for rows in sizes)

    def run(way: Attention) -> list[Tensor]:
        output = way(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]

    wanted, found = run(ways["mask"]), {}
    for name, way in ways.items():
        found[name] = max((a - b).abs().max().item() for a, b in zip(run(way), wanted, strict=True))
    seconds, cpu = ({name: [] for name in ways} for _ in range(2))
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            wall, used, _ = timed(device, run, way)
            seconds[name].append(wall)
            cpu[name].append(used)
    return circumstances(config, arguments) | {
        "rows": len(mask), "keys": mask.shape[1], "largest_difference": found,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "over_mask": {name: ratio(values, seconds["mask"]) for name, values in seconds.items()},
        "cpu_over_mask": {name: ratio(values, cpu["mask"]) for name, values in cpu.items()},
    }  # fmt: skip
