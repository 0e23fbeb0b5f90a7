"""What DeepSpeed 0.19.8 keeps on a rank and sends, by ZeRO stage: arithmetic, without importing it.

Found on real engines with CPU ranks (tests/test_zero.py). In bf16, stage 1 keeps every gradient in fp32, and its bf16 twin
from one micro-step to the next. Stages 1 and 2 sum gradients by a whole all-reduce, stage 2 at every micro-step. Stage 3
keeps a model below stage3_max_reuse_distance gathered from its forward to its backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

FP32 = 4


class Engine(NamedTuple):
    """Bytes of a rank's training state, and bytes that it sends."""

    weights: int
    """In the forward pass's precision; under stage 3 with those gathered for it."""
    optimizer: int
    """fp32 master weights and both moments."""
    gradients: int
    buffers: int
    """Reduction buckets."""
    reduced: int
    """Size of the gradient that ranks sum."""
    reduced_each_micro_step: bool
    """False: once an update."""
    scattered: bool
    """A sum goes to its owner alone, half an all-reduce."""
    gathered_per_micro_step: int
    gathered_per_step: int


def engine_costs(engine_config: dict[str, Any], parameters: int, ranks: int, accumulate: bool) -> Engine:
    """Of a checked DeepSpeed JSON and so many trainable parameters. accumulate: more than one micro-step an update."""
    zero, bf16 = engine_config["zero_optimization"], engine_config.get("bf16", {}).get("enabled", False)
    stage, size, part = zero["stage"], 2 if bf16 else FP32, -(-parameters // ranks)
    bucket = zero.get("reduce_bucket_size", 500_000_000)
    sent = FP32 if engine_config.get("communication_data_type") == "fp32" else size
    weights, master = size * parameters, 3 * FP32 * part
    if stage == 3:
        gathers = 1 if parameters <= zero.get("stage3_max_reuse_distance", 10**9) else 2
        live = min(parameters, zero.get("stage3_max_live_parameters", 10**9))
        weights = size * (part + live)
        return Engine(weights, master, FP32 * part, FP32 * bucket, sent * parameters, True, True, gathers * size * parameters, 0)
    if stage == 1:
        kept = FP32 * parameters + (size * parameters if bf16 and accumulate else 0)
        return Engine(weights, master, kept, 0, sent * parameters, False, False, 0, weights)
    buckets = bucket * (size * (2 if zero.get("overlap_comm") else 1) + (sent if sent != size else 0))
    return Engine(weights, master, FP32 * part, buckets, sent * parameters, True, False, 0, weights)
