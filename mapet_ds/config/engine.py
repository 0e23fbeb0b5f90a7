"""The DeepSpeed JSON: which keys it may hold, and which knob of the recipe owns the others."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from mapet_ds.config.knobs import knobs, known_keys
from mapet_ds.config.shipped import ENGINES, shipped_file, shipped_names
from mapet_ds.errors import ConfigError

DataType = Literal["fp32", "bf16", "fp16"]


@knobs
class BF16:
    """The section bf16 of a DeepSpeed JSON."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


@knobs
class DataTypes:
    """The section data_types of a DeepSpeed JSON."""

    grad_accum_dtype: DataType | None = None
    param_dtype: DataType | None = None
    buffer_dtype: DataType | None = None
    keep_in_fp32_modules: Literal["auto"] | list[str] = "auto"


@knobs
class EngineKeys:
    """The keys that a DeepSpeed JSON may hold. What is open here, DeepSpeed's own schemas read."""

    zero_optimization: dict[str, Any] = Field(default_factory=dict)
    bf16: BF16 = BF16()
    data_types: DataTypes = DataTypes()
    communication_data_type: DataType | None = None
    wall_clock_breakdown: bool = False
    dump_state: bool = False
    memory_breakdown: bool = False
    comms_logger: dict[str, Any] = Field(default_factory=dict)
    flops_profiler: dict[str, Any] = Field(default_factory=dict)
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 1.0


OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size", "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "optimizer": "optim", "scheduler": "optim", "gradient_clipping": "optim.clip_grad",
    "activation_checkpointing": "train.grad_checkpointing", "tensorboard": "log",
}  # fmt: skip

_OFFLOAD = "offloading uses an Adam that can't resume exactly"
_QUANTIZED = "the forward would use other weights than a checkpoint holds"
_BF16_STATE = "the master weights and moments of a checkpoint are fp32"
REFUSED = {
    "zero_optimization.offload_optimizer": (None, _OFFLOAD),
    "zero_optimization.offload_param": (None, _OFFLOAD),
    "zero_optimization.cpu_offload": (False, _OFFLOAD),
    "zero_optimization.cpu_offload_param": (False, _OFFLOAD),
    "zero_optimization.cpu_offload_use_pin_memory": (False, _OFFLOAD),
    "zero_optimization.zenflow": (None, _OFFLOAD),
    "zero_optimization.zero_quantized_weights": (False, _QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _QUANTIZED),
    "zero_optimization.zero_quantized_gradients": (False, "no test shows that it trains rightly"),
    "zero_optimization.round_robin_gradients": (
        False, "DeepSpeed then gathers other parameters' weights into a checkpoint"
    ),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed has it no more"),
    "zero_optimization.compute_grad_norm": (True, "clipping and metrics need the gradient's norm"),
    "bf16.check_grad_overflow": (True, "a gradient that is not finite would then reach the weights"),
    "bf16.bf16_master_weights_and_grads": (False, _BF16_STATE),
    "bf16.bf16_optimizer_states": (False, _BF16_STATE),
}  # fmt: skip
"""Settings that may only have DeepSpeed's default, and why."""


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed JSON that holds engine knobs only. DeepSpeed itself ignores misspelt keys.

    path: a file, or the name of a shipped one.

    Raises:
        ConfigError: the file can't be read, holds an unknown key or one that the recipe owns, a value that
            loses weights, or a ZeRO stage other than 1, 2, 3.
    """
    path = shipped_file(path, ENGINES)
    try:
        engine = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        cure = f"Shipped ones: {', '.join(shipped_names(ENGINES))}."
        raise ConfigError(f"The DeepSpeed config {path} can't be read: {error}. {cure}") from error
    if not isinstance(engine, dict):
        raise ConfigError(f"The DeepSpeed config {path} must be a JSON object.")
    for key in engine:
        if key in OWNED_KEYS:
            raise ConfigError(f"{path} sets {key}, which belongs to the recipe: use {OWNED_KEYS[key]} there.")

    try:
        pydantic.TypeAdapter(EngineKeys).validate_json(json.dumps(engine))
    except pydantic.ValidationError as errors:
        raise ConfigError("\n".join(_sentence(path, error) for error in errors.errors())) from errors
    zero = engine.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage must be 1, 2 or 3.")
    if refusals := list(_refusals(engine)):
        raise ConfigError("\n".join(f"{path} sets {refusal}." for refusal in refusals))
    return engine


def _sentence(path: str | Path, error: Any) -> str:
    """The sentence for pydantic's record of an error."""
    key, value = ".".join(map(str, error["loc"])), json.dumps(error["input"])
    if error["type"] == "unexpected_keyword_argument":
        close = difflib.get_close_matches(key, [*vars(EngineKeys()), *known_keys(EngineKeys)], n=1)
        hint = f" (meant {close[0]}?)" if close else ""
        return f"{path} sets {key}, which is not an engine knob{hint}."
    message = error["msg"].replace("an object", "an object with keys")
    return f"{path} sets {key} = {value}: {message[0].lower()}{message[1:]}."


def _refusals(engine: dict[str, Any]) -> Iterator[str]:
    """A phrase for each value that no run may have: the setting, the value and the reason."""
    zero = engine["zero_optimization"]
    for key, (default, reason) in REFUSED.items():
        section, _, name = key.partition(".")
        value = engine.get(section, {}).get(name, default)
        if value != default:
            yield f"{key} = {json.dumps(value)}: {reason}. Leave it out"

    # DeepSpeed would take its default for it, without a word.
    for name in (name for name, value in zero.items() if value == "auto"):
        yield f"zero_optimization.{name} = auto, which only transformers fills in: write a value"

    # DeepSpeed asserts it while it builds the engine.
    scaled = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}
    for key in (key for key, default in scaled.items() if engine.get(key, default) != default):
        if zero["stage"] > 1 and zero.get("reduce_scatter", True):
            yield (
                f"{key} = {json.dumps(engine[key])}, which DeepSpeed allows at stage {zero['stage']} only "
                "with zero_optimization.reduce_scatter = false"
            )
