"""The DeepSpeed JSON: which keys it may hold, and which knob of the recipe owns the others."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from mapet_ds.errors import ConfigError

ENGINE_KEYS = {
    "zero_optimization", "bf16", "data_types", "communication_data_type", "wall_clock_breakdown",
    "dump_state", "comms_logger", "flops_profiler", "memory_breakdown", "prescale_gradients",
    "gradient_predivide_factor",
}  # fmt: skip
OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size", "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "optimizer": "optim", "scheduler": "optim", "gradient_clipping": "optim.clip_grad",
    "activation_checkpointing": "train.grad_checkpointing", "tensorboard": "log",
}  # fmt: skip


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed JSON that holds engine knobs only. DeepSpeed itself ignores misspelt keys.

    Raises:
        ConfigError: the file can't be read, holds an unknown key or one that the recipe owns, offloads the
            optimizer, lets a gradient that is not finite through, or has a ZeRO stage other than 1, 2, 3.
    """
    try:
        engine = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"The DeepSpeed config {path} can't be read: {error}.") from error
    if not isinstance(engine, dict):
        raise ConfigError(f"The DeepSpeed config {path} must be a JSON object.")

    for key in engine:
        if key in OWNED_KEYS:
            raise ConfigError(f"{path} sets {key}, which belongs to the recipe: use {OWNED_KEYS[key]} there.")
        if key not in ENGINE_KEYS:
            close = difflib.get_close_matches(key, ENGINE_KEYS, n=1)
            hint = f" (meant {close[0]}?)" if close else ""
            raise ConfigError(f"{path} sets {key}, which is not an engine knob{hint}.")

    zero = engine.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage must be 1, 2 or 3.")
    if offload := [key for key in ("offload_optimizer", "offload_param") if key in zero]:
        raise ConfigError(
            f"{path} sets zero_optimization.{offload[0]}: offloading uses an Adam that can't resume exactly."
        )
    if zero.get("compute_grad_norm") is False or engine.get("bf16", {}).get("check_grad_overflow") is False:
        raise ConfigError(
            f"{path} switches compute_grad_norm or bf16.check_grad_overflow off: a gradient that is not "
            "finite would then reach the weights. Leave both out."
        )
    return engine
