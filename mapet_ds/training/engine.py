"""The only import of DeepSpeed: an engine around an objective, and its full state by parameter name.

Workarounds for deepspeed 0.19.8 live here and nowhere else, each with its reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn

from mapet_ds.config.sections import RunConfig
from mapet_ds.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_engine_config(engine_config: dict[str, Any]) -> None:
    """Let DeepSpeed's own schema read the ZeRO section before any GPU is touched.

    Raises:
        ConfigError: an unknown or ill-typed key in zero_optimization.
    """
    try:
        DeepSpeedZeroConfig(**engine_config["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"DeepSpeed refuses zero_optimization.{key} = {first['input']}: {first['msg']}."
        ) from error


def build_engine(
    objective: nn.Module, groups: list[dict[str, Any]], config: RunConfig, engine_config: dict[str, Any], world_size: int,
    device: torch.device,
) -> deepspeed.DeepSpeedEngine:  # fmt: skip
    """A ZeRO engine that trains the objective, its optimizer states allocated. Every rank must call it.

    groups: AdamW's, of the objective's parameters.

    Use it by `engine(images, target, draw)`, never by its module: ZeRO's hooks sit on the engine's call.

    Raises:
        ConfigError: FusedAdam is asked for where it can't be built.
    """
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", ".*all_gather_into_tensor.*", FutureWarning
    )  # DeepSpeed's own calls, each step
    # On a CPU the shared-memory op is compiled at every first start (a minute, and fatal without g++); gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    full = {
        **engine_config,
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(world_size),
        "gradient_clipping": config.optim.clip_grad,  # 1.0 if the key is left out
        "steps_per_print": 2**31,
    }
    optimizer = _adamw(groups, config, device)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=full, dist_init_required=False
    )
    if engine.zero_optimization_stage() == 3:
        # The objective reads the ViT's own position table and class token outside of the ViT's forward.
        for parameter in objective.vit.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(objective, parameter)
    _allocate_states(engine, step=0)
    return engine


def _adamw(groups: list[dict[str, Any]], config: RunConfig, device: torch.device) -> torch.optim.Optimizer:
    optim = config.optim
    arguments = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    can_build = torch.tensor(
        float(device.type == "cuda" and all(map(shutil.which, ("nvcc", "ninja")))), device=device
    )
    dist.all_reduce(can_build, op=dist.ReduceOp.MIN)  # all hosts must choose the same optimizer
    if optim.adamw == "deepspeed" and not can_build:
        raise ConfigError(
            f"optim.adamw = deepspeed compiles FusedAdam, which needs a GPU, nvcc and ninja on every host (this rank: {device}); "
            "optim.adamw=torch needs none of them."
        )
    if optim.adamw == "torch" or not can_build:
        return torch.optim.AdamW(groups, **arguments, fused=device.type == "cuda")
    from deepspeed.ops.adam import FusedAdam  # compiles on first use

    for turn in (0, 1):  # one rank of each node compiles, the others find it done
        if (int(os.environ.get("LOCAL_RANK", "0")) == 0) == (turn == 0):
            optimizer = FusedAdam(groups, **arguments, adam_w_mode=True)
        dist.barrier()
    return optimizer


def _flat_tensors(optimizer: Any) -> list[Tensor]:
    """This rank's fp32 master weights, flat, under whichever ZeRO optimizer DeepSpeed has chosen."""
    for name in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise AssertionError(f"unknown ZeRO optimizer {type(optimizer)}")


def _allocate_states(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Zero moments and the step count, so that states can be read and set before the first step.

    With several parameter groups ZeRO-1/2 links parameters to states after the first group's step only, and then finds
    none for the others; linking anew here, when all exist, is right for good.
    """
    zero, adam = engine.optimizer, engine.optimizer.optimizer
    for flat in _flat_tensors(zero):
        state = adam.state[flat]
        if isinstance(adam, torch.optim.AdamW):
            fused = adam.defaults["fused"]
            state["step"] = torch.tensor(float(step), device=flat.device if fused else "cpu")
        else:
            state["step"] = step
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(flat))
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _whole(parameter: nn.Parameter, modifier_rank: int | None = None) -> contextlib.AbstractContextManager:
    """While it is open a parameter has its full shape, also under ZeRO-3. Every rank must open it."""
    if hasattr(parameter, "ds_id"):
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)
    return contextlib.nullcontext()


def student_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of each parameter, fp32 master weights where there are any; valid until the next is asked for.

    In bf16, and under ZeRO-3, each is gathered on its turn: every rank must go through all of them, or through none.
    """
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            yield (
                name,
                safe_get_full_fp32_param(parameter).reshape(getattr(parameter, "ds_shape", parameter.shape)),
            )
        else:
            with _whole(parameter):
                yield name, parameter.detach()


def gather_state(engine: deepspeed.DeepSpeedEngine, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Full fp32 master weights by name, and moments as `exp_avg.<name>`: on rank 0, on the CPU; empty elsewhere.

    Every rank must call it, in the same order. The host waits for the GPU.
    """
    weights, moments = {}, {}
    for name, parameter in engine.module.named_parameters():
        if (
            not parameter.requires_grad
        ):  # a constant: no optimizer holds it, so it is saved as forwards use it
            with _whole(parameter):
                weights |= {name: parameter.detach().float().cpu().clone()} if rank == 0 else {}
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        full = [safe_get_full_fp32_param(parameter)]
        full += [safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS]
        if rank == 0:
            weights[name], *rest = (tensor.reshape(shape).cpu().clone() for tensor in full)
            moments.update({f"{moment}.{name}": tensor for moment, tensor in zip(MOMENTS, rest)})
    return weights, moments


def scatter_state(
    engine: deepspeed.DeepSpeedEngine, weights: dict[str, Tensor], moments: dict[str, Tensor], updates: int
) -> None:
    """Put full states, as gather_state gave them, into a fresh engine of any world size and ZeRO stage.

    updates: number of optimizer updates the states have seen. Every rank must call it with the same full states.
    """
    _allocate_states(engine, step=updates)
    for name, parameter in engine.module.named_parameters():
        value = weights[name].to(engine.device)
        if not parameter.requires_grad:
            with _whole(parameter, modifier_rank=0):
                parameter.data.copy_(value)
            continue
        states = {moment: moments[f"{moment}.{name}"].to(engine.device) for moment in MOMENTS}
        if not hasattr(parameter, "ds_id"):
            safe_set_full_fp32_param(parameter, value)
            for moment, state in states.items():
                safe_set_full_optimizer_state(parameter, state, moment)
            parameter.data.copy_(
                value
            )  # setting the fp32 fragment leaves the low-precision copies as they were
            continue
        # DeepSpeed's own full setters fail in ZeRO-3 where the ranks do not divide a tensor.
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))
        for moment, state in states.items():
            safe_set_local_optimizer_state(parameter, _own_part(parameter, state), moment)
        with _whole(parameter, modifier_rank=0):
            parameter.data.copy_(value)


def _own_part(parameter: nn.Parameter, full: Tensor) -> Tensor:
    """This rank's share of a tensor as ZeRO-3 cuts it: equal parts, the last ones filled up with zeros."""
    size = parameter.ds_tensor.ds_numel
    flat = nn.functional.pad(full.flatten(), (0, size * dist.get_world_size() - full.numel()))
    return flat[size * dist.get_rank() :][:size]


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """The rate of the next update, for every parameter group: times its lr_scale, where it has one."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def forget_broken_calls() -> None:
    """Let go of the calls that recomputation ended early, of which DeepSpeed 0.19.8 keeps a reference each under ZeRO-3. Between
    steps only."""
    del parameter_offload.FWD_MODULE_STACK[1:]
