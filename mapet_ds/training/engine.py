"""A DeepSpeed engine around an objective, and its full state by parameter name.

No other file imports DeepSpeed. Workarounds for deepspeed 0.19.8 live here, each with its reason.
"""
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# DeepSpeed has no stubs: an engine's optimizer is one of many classes, and ZeRO-3 adds ds_* to parameters.

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import deepspeed
import deepspeed.ops.adam
import deepspeed.runtime.compiler
import torch
import torch.distributed as dist
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.ops.op_builder import FusedAdamBuilder
from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
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

from mapet_ds.config.running import RunConfig
from mapet_ds.errors import ConfigError, RunError
from mapet_ds.launch import no_gpu, once_per_node

MOMENTS = ("exp_avg", "exp_avg_sq")
BUILD_ERRORS = (
    RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError, MissingCUDAException,
    CUDAMismatchException,
)  # fmt: skip
"""What a missing header, library or driver makes of a compilation: ninja's output, or no library to load."""


SCHEMAS = {
    "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "comms_logger": CommsLoggerConfig
}  # fmt: skip


def check_engine_config(engine_config: dict[str, Any], device: torch.device) -> None:
    """Lets DeepSpeed's own schemas read the sections, before anything is built on the device.

    Raises:
        ConfigError: an unknown or ill-typed key in a section; or bf16 on a CPU that nobody asked for.
    """
    wants_gpu = engine_config.get("bf16", {}).get("enabled") and os.environ.get("DS_ACCELERATOR") != "cpu"
    if wants_gpu and device.type == "cpu":
        raise ConfigError(
            f"The DeepSpeed config asks for bf16, as GPUs compute. {no_gpu(socket.gethostname())} To train "
            "on CPUs, take a _cpu JSON (ds_configs/zero2_cpu.json), or export DS_ACCELERATOR=cpu."
        )
    for section, schema in SCHEMAS.items():
        try:
            schema(**engine_config.get(section, {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([section, *map(str, first["loc"])])
            raise ConfigError(f"DeepSpeed refuses {key} = {first['input']}: {first['msg']}.") from error


def build_engine(
    objective: nn.Module, groups: list[dict[str, Any]], config: RunConfig, engine_config: dict[str, Any],
    world_size: int, device: torch.device,
) -> deepspeed.DeepSpeedEngine:  # fmt: skip
    """A ZeRO engine that trains the objective, with its optimizer states allocated. Every rank must call it.

    Use it by `engine(images, target, draw)`, never by its module: ZeRO's hooks sit on the engine's call.
    groups: AdamW's groups of the objective's parameters.

    Raises:
        ConfigError: FusedAdam is asked for where it can't be built, or DeepSpeed refuses its JSON.
    """
    logger.setLevel(logging.WARNING)
    # DeepSpeed's own calls warn at each step.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*", FutureWarning)
    # On a CPU each first start compiles the shared-memory op, for a minute and with g++. Gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO imports Muon to know one, and Muon's module compiles: Inductor would load on every rank for it.
    with patch.object(deepspeed.runtime.compiler, "compile", lambda: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")

    zero, timers = engine_config["zero_optimization"], {"throughput": {"enabled": False}}
    full = {
        **engine_config,
        # One rank has nothing to send behind its backward pass, and would wait for the GPU after it.
        "zero_optimization": zero if world_size > 1 else zero | {"overlap_comm": False},
        "timers": timers,  # it makes the host wait twice a micro-step, and nobody reads it
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(world_size),
        "gradient_clipping": config.optim.clip_grad,  # without the key DeepSpeed clips at 1.0
        "steps_per_print": 2**31,
    }
    adam = build_adamw(groups, config, device)
    try:
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=adam, config=full, dist_init_required=False
        )
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"DeepSpeed builds no engine from its JSON {json.dumps(engine_config)}: {error}. ds_configs/ has "
            "some that work."
        ) from error
    if engine.zero_optimization_stage() == 3:
        # The objective reads the ViT's own position table and class token outside of the ViT's forward.
        for parameter in objective.vit.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(objective, parameter)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        # Before the norm, which tells as much, it looks through one gradient after the other in bf16.
        engine.optimizer.check_overflow = lambda partition_gradients: None
        engine.optimizer.scaled_global_norm = functools.partial(_gradient_norm, engine.optimizer)
    _allocate_states(engine, step=0)
    return engine


def _gradient_norm(zero: DeepSpeedZeroOptimizer) -> Tensor:
    """The norm of the gradients of all ranks, a scalar on the CPU, finite only where every gradient is.

    It is DeepSpeed's under ZeRO-1/2, bit for bit, in a few launches instead of two a parameter. The host
    waits for the GPU once, here, where DeepSpeed would wait six times and more.
    """
    squares = []
    for i in range(len(zero.bit16_groups)):
        norms = torch.stack(torch._foreach_norm(zero.averaged_gradients[i], dtype=torch.float64))
        own = norms[: len(zero.params_in_partition[i])]  # zeros that fill a partition up come last
        squares.append(own.square().sum().float())
    total = torch.stack(squares)
    dist.all_reduce(total)
    return torch.linalg.vector_norm(total.sqrt()).cpu()


def build_adamw(
    groups: list[dict[str, Any]], config: RunConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The AdamW that optim.adamw names, the same on all ranks. Every rank must call it.

    Raises:
        ConfigError: FusedAdam is asked for where it can't be compiled.
    """
    optim = config.optim
    arguments: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}

    # FusedAdam compiles at its first use, once on each host. Where one can't, none takes it.
    if optim.adamw != "torch" and (device.type == "cuda" or optim.adamw == "deepspeed"):
        try:
            once_per_node(functools.partial(_compile_fused_adam, device))
            return deepspeed.ops.adam.FusedAdam(groups, **arguments, adam_w_mode=True)
        except ConfigError as error:
            if optim.adamw == "deepspeed":
                raise
            if dist.get_rank() == 0:
                print(f"{error} This run takes torch's fused AdamW.", flush=True)
    return torch.optim.AdamW(groups, **arguments, fused=device.type == "cuda")


def _compile_fused_adam(device: torch.device) -> str:
    """Has DeepSpeed compile FusedAdam, or find it compiled.

    Raises:
        ConfigError: there is no GPU here, or no toolkit that works.
    """
    reason = f"a rank on {device}" if device.type != "cuda" else None
    for name in ("nvcc", "ninja"):
        reason = reason or (None if shutil.which(name) else f"no {name} on PATH")
    try:
        if not reason:
            FusedAdamBuilder().load(verbose=False)
    except BUILD_ERRORS as error:
        telling = re.search(r".*(?:error:|cannot find).*", str(error)) or re.search(r".*", str(error))
        reason = f"{type(error).__name__}: {telling[0].strip() if telling else ''}"
    if reason:
        raise ConfigError(
            f"FusedAdam can't be compiled on {socket.gethostname()} ({reason}). It needs a GPU, a CUDA "
            "toolkit and ninja on every host; optim.adamw=torch needs none of them."
        )
    return ""


def _flat_tensors(optimizer: Any) -> list[Tensor]:
    """This rank's fp32 master weights, flat, under whichever ZeRO optimizer DeepSpeed has chosen."""
    names = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"
    for name in names:
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise AssertionError(f"unknown ZeRO optimizer {type(optimizer)}")


def _allocate_states(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Gives the optimizer zero moments and the step count: states can then be read and set before any step.

    With several parameter groups ZeRO-1/2 links parameters to states after the first group's step, when the
    others have none. It links them anew here, when all exist, and that holds for good.
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
    """A context in which a parameter has its full shape, also under ZeRO-3. Every rank must open it."""
    if hasattr(parameter, "ds_id"):
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)
    return contextlib.nullcontext()


def student_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the full tensor of each parameter, the fp32 master weights where there are any.

    A tensor is valid until the next one is taken. In bf16, and under ZeRO-3, each is gathered on its turn:
    every rank must go through all of them, or through none.
    """
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            master = safe_get_full_fp32_param(parameter)
            yield name, master.reshape(getattr(parameter, "ds_shape", parameter.shape))
        else:
            with _whole(parameter):
                yield name, parameter.detach()


def gather_state(engine: deepspeed.DeepSpeedEngine, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Full fp32 master weights by name, and moments as `exp_avg.<name>`, on rank 0's CPU; empty elsewhere.

    Every rank must call it. The host waits for the GPU.

    Raises:
        RunError: on every rank, where a master weight is not what the forward uses.
    """
    weights, moments, wrong = {}, {}, {}
    for name, parameter in engine.module.named_parameters():
        # A constant is held by no optimizer, so it is saved as the forward uses it.
        if not parameter.requires_grad:
            with _whole(parameter):
                weights |= {name: parameter.detach().float().cpu().clone()} if rank == 0 else {}
            continue

        shape = getattr(parameter, "ds_shape", parameter.shape)
        full = [safe_get_full_fp32_param(parameter)]
        full += [safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS]
        with _whole(parameter):
            wrong[name] = (full[0].reshape(shape).to(parameter.dtype) != parameter.detach()).any()
        if rank == 0:
            weights[name], *rest = (tensor.reshape(shape).cpu().clone() for tensor in full)
            moments.update({f"{moment}.{name}": tensor for moment, tensor in zip(MOMENTS, rest)})
    _refuse_wrong(wrong)
    return weights, moments


def _refuse_wrong(wrong: dict[str, Tensor]) -> None:
    """Raises RunError where a flag is set on any rank. Every rank must call it."""
    flags = torch.stack(list(wrong.values())).int()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if names := [name for name, flag in zip(wrong, flags.tolist()) if flag]:
        error = RunError(
            f"DeepSpeed gathers other weights for a checkpoint than the forward uses, in {len(names)} of "
            f"{len(wrong)} parameters ({names[0]} first), so nothing was written. A key of the DeepSpeed "
            "JSON does this; those in ds_configs/ don't."
        )
        error.printed_elsewhere = dist.get_rank() != 0
        raise error


def scatter_state(
    engine: deepspeed.DeepSpeedEngine, weights: dict[str, Tensor], moments: dict[str, Tensor], updates: int
) -> None:
    """Puts full states, as gather_state gives them, into a fresh engine of any world size and ZeRO stage.

    updates: number of optimizer updates the states have seen. Every rank must call it with the same states.
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
            parameter.data.copy_(value)  # setting the fp32 fragment leaves low-precision copies as they were
            continue

        # DeepSpeed's own full setters fail in ZeRO-3 where the ranks do not divide a tensor.
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))
        for moment, state in states.items():
            safe_set_local_optimizer_state(parameter, _own_part(parameter, state), moment)
        with _whole(parameter, modifier_rank=0):
            parameter.data.copy_(value)


def _own_part(parameter: nn.Parameter, full: Tensor) -> Tensor:
    """This rank's share of a tensor as ZeRO-3 cuts it: equal parts, the last of them filled up with zeros."""
    size = parameter.ds_tensor.ds_numel
    flat = nn.functional.pad(full.flatten(), (0, size * dist.get_world_size() - full.numel()))
    return flat[size * dist.get_rank() :][:size]


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Sets the rate of the next update in each parameter group, times its lr_scale where it has one."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def forget_broken_calls() -> None:
    """Lets go of the calls that recomputation ended early; call it between steps only.

    Under ZeRO-3 DeepSpeed 0.19.8 keeps a reference to each.
    """
    del parameter_offload.FWD_MODULE_STACK[1:]
