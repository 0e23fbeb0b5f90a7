"""What a recipe will take on a cluster: memory, micro-batch, time, input, scaling. Arithmetic on counts.

What DeepSpeed 0.19.8 keeps and sends was found on real engines with CPU ranks (tests/test_forecast.py), and
torch's allocator holds the whole of a step's memory to it (tests/test_gpu_path.py). In
bf16, stage 1 keeps every gradient in fp32, and its bf16 twin from one micro-step to the next. Stages 1 and
2 sum gradients by a whole all-reduce, stage 2 at every micro-step. Stage 3 keeps a model below
stage3_max_reuse_distance gathered from its forward to its backward pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mapet_ds.config.running import total_steps
from mapet_ds.config.sections import Config
from mapet_ds.errors import ConfigError
from mapet_ds.planning.counting import Student, Target, student, target
from mapet_ds.planning.roofline import Gpu

GIB = 2**30
FP32 = 4
USABLE = 0.79
"""Share of the memory that tensors can use: the allocator reserves up to 1.26 times what is in use."""
CONTEXT = 1.5 * GIB
"""CUDA context, NCCL's and cuBLAS's buffers."""
DECODER = 1.0 * GIB
"""What DALI's decoder keeps on a GPU."""
LAUNCH_SECONDS = 0.015
"""Least duration of a micro-step: the host can't launch its kernels faster."""
LINK_SHARE, MEMORY_SHARE, FP32_SHARE, TF32_SHARE = 0.8, 0.7, 0.7, 0.5
"""Attained shares of the data sheet of links, memory, fp32 units and, in TF32, half the bf16 units."""
HOP_SECONDS = 1e-5
"""Latency of one hop of a collective."""
LARGEST = 1024
"""GPUs at the end of the scaling curve."""


class Engine(NamedTuple):
    """Bytes of a rank's training state, and bytes that it sends."""

    weights: int
    """In the forward pass's precision; under stage 3 with those gathered for it."""
    optimizer: int
    """fp32 master weights and both moments."""
    gradients: int
    buffers: int
    """Reduction buckets, from the beginning of the backward pass on."""
    reduced: int
    """Size of the gradient that ranks sum."""
    gradients_stay: bool = True
    """False: they are made while the backward pass lets go of activations, and gone after the update."""
    reduced_each_micro_step: bool = True
    """False: once an update."""
    scattered: bool = False
    """A sum goes to its owner alone, half an all-reduce."""
    gathered_per_micro_step: int = 0
    gathered_per_step: int = 0


def engine_costs(engine_config: dict[str, Any], parameters: int, ranks: int, accumulate: bool) -> Engine:
    """The bytes that an engine keeps and sends, by its checked DeepSpeed JSON and its trainable parameters.

    accumulate: an update has more than one micro-step.
    """
    zero, bf16 = engine_config["zero_optimization"], engine_config.get("bf16", {}).get("enabled", False)
    stage, size, part = zero["stage"], 2 if bf16 else FP32, -(-parameters // ranks)
    bucket = zero.get("reduce_bucket_size", 500_000_000)
    sent = FP32 if engine_config.get("communication_data_type") == "fp32" else size
    weights, master = size * parameters, 3 * FP32 * part
    if stage == 3:
        gathers = 1 if parameters <= zero.get("stage3_max_reuse_distance", 10**9) else 2
        live = min(parameters, zero.get("stage3_max_live_parameters", 10**9))
        weights = size * (part + (live if ranks > 1 else 0))  # a rank alone gathers nothing
        engine = Engine(
            weights, master, gradients=FP32 * part, buffers=FP32 * bucket, reduced=sent * parameters
        )
        return engine._replace(scattered=True, gathered_per_micro_step=gathers * size * parameters)
    engine = Engine(weights, master, gradients=FP32 * part, buffers=0, reduced=sent * parameters)
    if stage == 1:
        kept = FP32 * parameters + (size * parameters if bf16 and accumulate else 0)
        return engine._replace(gradients=kept, reduced_each_micro_step=False, gathered_per_step=weights)

    # Their copies in fp32, which ranks sum, come when half of the activations are gone.
    buckets = bucket * size * (2 if zero.get("overlap_comm") and ranks > 1 else 1)
    return engine._replace(buffers=buckets, gradients_stay=accumulate, gathered_per_step=weights)


class Speeds(NamedTuple):
    """What is not counted but assumed, or measured by tools/benchmark.py."""

    student: float
    """Attained share of the data sheet."""
    teacher: float
    fp32: float = FP32_SHARE
    tf32: float = TF32_SHARE
    images_per_second: float = 2000.0
    """Images a second that a GPU's share of the loader prepares."""
    whole: float = 1.0
    """Measured over predicted speed of a whole step."""
    measured: tuple[str, ...] = ()
    """What was read, in words."""


class Cluster(NamedTuple):
    """GPUs in nodes, what links them, and what feeds them."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    link_gbit: float = 400
    """Gbit/s of a node's adapters together."""
    storage_gbyte_s: float = 2
    """GB/s that a node reads."""
    image_kbyte: float = 110
    """Mean size of a file: ImageNet-1k's."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def of(self, ranks: int) -> Cluster:
        """The same kind of cluster with so many GPUs, part of a node or whole ones."""
        each = min(ranks, self.gpus_per_node)
        assert ranks % each == 0
        return self._replace(nodes=ranks // each, gpus_per_node=each)

    def seconds(self, size: float, ranks: int, passes: int) -> float:
        """Seconds of a ring that takes `size` bytes round `passes` times.

        An all-reduce has 2 passes, a gather or a scatter 1.
        """
        if ranks == 1:
            return 0.0
        within = ranks <= self.gpus_per_node
        rate = 1e9 * (self.gpu.nvlink_gbyte_s if within else min(self.gpu.nvlink_gbyte_s, self.link_gbit / 8))
        return passes * (size * (ranks - 1) / ranks / (rate * LINK_SHARE) + math.log2(ranks) * HOP_SECONDS)


class Request(NamedTuple):
    """A recipe on a cluster, and the speeds that a plan of it rests on."""

    config: Config
    engine: dict[str, Any]
    cluster: Cluster
    images: int
    speeds: Speeds
    fixed: bool
    """Whether the user named the micro-batch."""

    @property
    def size(self) -> int:
        return 2 if self.engine.get("bf16", {}).get("enabled") else 4

    def with_micro(self, micro: int) -> Request:
        return self._replace(config=self.config.with_micro(micro))


def memory(request: Request, model: Student, goal: Target) -> dict[str, float]:
    """Bytes on one GPU at the peak of a micro-step, by what holds them."""
    config, cluster, micro = request.config, request.cluster, request.config.train.micro_batch_size
    accumulate = config.grad_accum_steps(cluster.ranks) > 1
    engine = engine_costs(request.engine, model.parameters, cluster.ranks, accumulate)
    group = {"none": 1, "node": cluster.gpus_per_node, "world": cluster.ranks}[config.teacher.shard]
    views = [config.model.img_size] + ([goal.view] if goal.view else [])
    batch = micro * sum(12 * view**2 for view in views)
    gathered = goal.sharded / 10 if group > 1 else 0  # the part in use, and the next
    both = sum if goal.ahead else max
    activations = both((model.peak(micro) + micro * goal.output, goal.peak(micro)))
    gradients = engine.gradients if engine.gradients_stay else max(0.0, engine.gradients - activations)
    return {
        "student weights": engine.weights + request.size * model.constants,
        "optimizer": engine.optimizer,
        "gradients": gradients,
        "reduction buckets": engine.buffers,
        "teacher": goal.sharded / group + gathered + goal.whole,
        "activations": activations,
        "images": (2 + goal.ahead) * batch,  # the present and the last, or the next
        "decoder": DECODER + config.data.prefetch * batch,
        "context": CONTEXT,
    }


def step_seconds(request: Request, model: Student, goal: Target) -> dict[str, float]:
    """Seconds of one update by what they go to; what is hidden behind something longer is left out."""
    config, cluster, speeds, gpu = request.config, request.cluster, request.speeds, request.cluster.gpu
    ranks, micro, accum = cluster.ranks, config.train.micro_batch_size, config.grad_accum_steps(cluster.ranks)
    engine = engine_costs(request.engine, model.parameters, ranks, accum > 1)
    peaks = {2: 1e12 * gpu.bf16_tflops, 4: 1e12 * gpu.fp32_tflops}
    learn = micro * (model.flops + model.recomputed) / (peaks[request.size] * speeds.student * speeds.whole)
    teach = micro * (goal.flops + 2 * goal.convolutions) / (peaks[2] * speeds.teacher * speeds.whole)
    exact = goal.fp32_flops / (peaks[4] * speeds.fp32) + goal.tf32_flops / (peaks[2] / 2 * speeds.tf32)
    assign = micro * exact / speeds.whole
    group = {"none": 1, "node": cluster.gpus_per_node, "world": ranks}[config.teacher.shard]
    weights = max(0.0, cluster.seconds(goal.sharded, group, 1) - teach)
    hides = 2 / 3 * learn if request.engine["zero_optimization"].get("overlap_comm") else 0.0
    reduce = cluster.seconds(engine.reduced, ranks, 1 if engine.scattered else 2)
    if engine.reduced_each_micro_step:
        reduce = accum * max(0.0, reduce - hides)
    reduce += accum * max(0.0, cluster.seconds(engine.gathered_per_micro_step, ranks, 1) - learn / 3)
    reduce += cluster.seconds(engine.gathered_per_step, ranks, 1)
    update = 40 * model.parameters / ranks  # bytes that AdamW, clipping and the cast read and write
    if goal.follows:
        reduce += cluster.seconds(goal.follows, ranks, 2)  # of the master weights
        update += 3 * goal.follows
    seconds = {
        "student": accum * learn, "teacher": accum * (teach + weights), "assignment": accum * assign,
        "optimizer": update / (1e9 * gpu.memory_gbyte_s * MEMORY_SHARE), "link": reduce,
    }  # fmt: skip
    seconds["launch"] = max(0.0, accum * LAUNCH_SECONDS - sum(seconds.values()))
    images = accum * micro
    stored = images * cluster.gpus_per_node * cluster.image_kbyte * 1e3 / (1e9 * cluster.storage_gbyte_s)
    seconds["input"] = max(
        0.0, stored - sum(seconds.values()), images / speeds.images_per_second - sum(seconds.values())
    )
    return seconds


def choose_micro(request: Request, model: Student, goal: Target) -> tuple[Request, int]:
    """The request with the micro-batch that the run should take, and the largest that fits.

    Raises:
        ConfigError: the GPUs don't divide the global batch, or none fits.
    """
    config, ranks, room = request.config, request.cluster.ranks, USABLE * request.cluster.gpu.gib * GIB
    whole, micro = config.train.global_batch_size, config.train.micro_batch_size
    if whole % ranks:
        near = max(ranks, round(whole / ranks) * ranks)
        raise ConfigError(
            f"train.global_batch_size = {whole} can't be divided among {ranks} GPUs; take "
            f"train.global_batch_size={near} (another batch, another run), or another number of GPUs."
        )
    each = whole // ranks
    possible = [m for m in range(each, 0, -1) if each % m == 0 and config.allows(m)]
    if not possible:
        most = next((whole // m for m in range(1, whole + 1) if whole % m == 0 and config.allows(m)), 0)
        alone = config.with_micro(each)
        broken = list(alone.method.rules(alone))
        raise ConfigError(
            "\n".join(
                [f"{ranks} GPUs leave {each} of {whole} images a step to each: at most {most} GPUs.", *broken]
            )
        )
    fitting = [m for m in possible if sum(memory(request.with_micro(m), model, goal).values()) <= room]
    if request.fixed and micro not in possible:
        raise ConfigError(
            f"train.micro_batch_size = {micro} does not divide the {each} images that each of {ranks} GPUs "
            f"has of a step; take one of {', '.join(map(str, possible[:8]))}."
        )
    if not fitting or (request.fixed and micro not in fitting):
        asked = micro if request.fixed else possible[-1]
        needs = sum(memory(request.with_micro(asked), model, goal).values()) / GIB
        cures = [f"train.micro_batch_size={fitting[0]}"] if fitting else []
        cures += [] if config.train.grad_checkpointing else ["train.grad_checkpointing=true"]
        cures += (
            [] if request.engine["zero_optimization"]["stage"] == 3 else ["--engine ds_configs/zero3.json"]
        )
        raise ConfigError(
            f"A micro-batch of {asked} needs {needs:.1f} GiB a GPU, of which {room / GIB:.1f} can be used; "
            f"try {' or '.join([*cures, 'a GPU with more memory'])}."
        )
    return request.with_micro(micro if micro in fitting else fitting[0]), fitting[0]


def predict(request: Request) -> dict[str, Any]:
    """The plan of one cluster.

    Raises:
        ConfigError: the recipe can't run there, or its costs can't be counted.
    """
    model, goal = student(request.config, request.size), target(request.config)
    request, largest = choose_micro(request, model, goal)
    config, cluster = request.config, request.cluster
    seconds, held = step_seconds(request, model, goal), memory(request, model, goal)
    step = sum(seconds.values())
    speed = config.train.global_batch_size / step
    steps = total_steps(config, request.images)
    peak = 1e12 * (cluster.gpu.bf16_tflops if request.size == 2 else cluster.gpu.fp32_tflops)

    # What a step waits for beyond all work on the GPU binds, however short the rest of the wait.
    waits = [name for name in ("input", "launch") if seconds[name] > 0]
    binds = waits[0] if waits else max(seconds, key=lambda name: seconds[name])
    return {
        "gpus": cluster.ranks,
        "parameters": model.parameters,
        "gflop_per_image": {
            "student": model.flops / 1e9, "student_minimum": model.minimum / 1e9,
            "recomputed": model.recomputed / 1e9,
            "teacher": goal.flops / 1e9, "fp32": goal.fp32_flops / 1e9,
            "tf32": (goal.tf32_flops + goal.convolutions) / 1e9,
        },
        "memory_gib": {name: size / GIB for name, size in held.items()} | {"total": sum(held.values()) / GIB},
        "micro_batch_size": config.train.micro_batch_size,
        "largest_micro_batch_size": largest,
        "grad_accum_steps": config.grad_accum_steps(cluster.ranks),
        "step_seconds": seconds | {"total": step},
        "images_per_second": speed,
        "mfu": model.flops * speed / (cluster.ranks * peak),
        "steps": steps,
        "hours": steps * step / 3600,
        "gpu_hours": steps * step / 3600 * cluster.ranks,
        "input_mbyte_s_per_node": speed / cluster.nodes * cluster.image_kbyte / 1e3,
        "binds": binds,
    }  # fmt: skip


CURVE = (
    "gpus", "micro_batch_size", "grad_accum_steps", "images_per_second", "hours", "gpu_hours", "binds",
)  # fmt: skip
"""The figures of a plan that the scaling curve shows."""


def scaling(request: Request) -> list[dict[str, Any]]:
    """The plan at 1 to 1,024 GPUs in nodes of the same kind; what can't run there says so."""
    curve, one, node = [], None, request.cluster.gpus_per_node
    parts = [2**i for i in range(11) if 2**i < node]
    for ranks in [*parts, *(node * 2**i for i in range(11) if node * 2**i <= LARGEST)]:
        try:
            plan = predict(request._replace(cluster=request.cluster.of(ranks), fixed=False))
        except ConfigError as error:
            curve.append({"gpus": ranks, "refused": str(error)})
            continue
        one = one or plan["images_per_second"] / ranks
        efficiency = plan["images_per_second"] / ranks / one
        curve.append({name: plan[name] for name in CURVE} | {"efficiency": efficiency})
    return curve


def assumptions(request: Request) -> list[str]:
    """What a plan rests on, in words."""
    known = f"measured: {'; '.join(request.speeds.measured)}; the rest ASSUMED"
    gpu, speeds, cluster = request.cluster.gpu, request.speeds, request.cluster
    lines = [
        f"{gpu.name}: {gpu.bf16_tflops:g} bf16 and {gpu.fp32_tflops:g} fp32 TFLOP/s, "
        f"{gpu.memory_gbyte_s:g} GB/s memory, {gpu.nvlink_gbyte_s:g} GB/s NVLink each way "
        f"(NVIDIA's data sheet, SXM, dense), {gpu.gib:g} GiB",
        f"attained: student {speeds.student:.2f}, teacher {speeds.teacher:.2f} of that, "
        f"fp32 {speeds.fp32:.2f}, TF32, half as fast as bf16, {speeds.tf32:.2f}; "
        + (known if speeds.measured else "ASSUMED, not yet measured (--calibrate)"),
        f"links at {LINK_SHARE:g} and memory at {MEMORY_SHARE:g} of their data sheet; rings, whose slowest "
        f"link is {cluster.link_gbit:g} Gbit/s of a node; {1e6 * HOP_SECONDS:g} us a hop",
        "gradients are summed behind the backward pass where overlap_comm is on (stages 2, 3), weights "
        "gathered in the open",
        f"a micro-step takes at least {1e3 * LAUNCH_SECONDS:g} ms: the host launches its kernels",
        f"{request.images} images (--images), a file of {cluster.image_kbyte:g} kB each (ImageNet-1k's mean)",
        f"a node reads {cluster.storage_gbyte_s:g} GB/s, and a GPU's loader prepares "
        f"{speeds.images_per_second:g} images/s, while the GPU computes",
        f"memory: {CONTEXT / GIB:g} GiB of contexts, {DECODER / GIB:g} GiB for DALI, {USABLE:.0%} of the GPU "
        "usable; activations as in eager mode (torch.compile keeps up to a sixth less, of ConMIM's half)",
    ]
    if target(request.config).ahead:
        lines.append(
            "teacher.ahead: the memory of teacher and student at once; what time it may save is not known "
            "and not counted"
        )
    return lines
