"""What would make a planned run faster, and the plan as a page of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mapet_ds.errors import ConfigError
from mapet_ds.planning.bound import bound, bound_report
from mapet_ds.planning.forecast import Request, assumptions, predict

Plan = dict[str, Any]


def changes(request: Request, plan: Plan) -> list[tuple[str, Plan]]:
    """Lists changes that make the planned run faster, each as words for the command line with its plan."""
    results = []
    for words, other in _remedies(request, plan):
        try:
            results.append((words, predict(other) | {"bound": bound(other)}))
        except ConfigError:
            continue  # not to be had here: no advice
    return [
        (words, other)
        for words, other in results
        if other["images_per_second"] > 1.01 * plan["images_per_second"]
    ]


def _remedies(request: Request, plan: Plan) -> Iterator[tuple[str, Request]]:
    """Yields changes that may help against what binds."""
    config, cluster, speeds, binds = request.config, request.cluster, request.speeds, plan["binds"]
    largest, zero = plan["largest_micro_batch_size"], request.engine["zero_optimization"]
    if binds in ("teacher", "assignment"):
        yield from _cheaper_targets(request)
    if config.train.grad_checkpointing and binds in ("student", "launch"):
        train = dataclasses.replace(config.train, grad_checkpointing=False)
        kept = request._replace(config=dataclasses.replace(config, train=train), fixed=False)
        yield "train.grad_checkpointing=false", kept
    if binds == "link" and zero["stage"] > 1 and plan["grad_accum_steps"] > 1:
        once = request._replace(engine=request.engine | {"zero_optimization": zero | {"stage": 1}})
        yield "--engine ds_configs/zero1.json (sums gradients once an update)", once
    if binds in ("link", "launch") and largest > plan["micro_batch_size"]:
        yield f"train.micro_batch_size={largest}", request.with_micro(largest)
    if binds == "link":
        faster = request._replace(cluster=cluster._replace(link_gbit=2 * cluster.link_gbit))
        yield "twice the link (--link_gbit)", faster
    if binds == "input":
        stored = request._replace(cluster=cluster._replace(storage_gbyte_s=2 * cluster.storage_gbyte_s))
        yield "twice the storage rate: local disks, or shards (tools/make_shards.py)", stored
        prepared = request._replace(speeds=speeds._replace(images_per_second=2 * speeds.images_per_second))
        yield "a loader twice as fast: data.workers, data.threads, smaller files", prepared
    if binds == "student":
        more = request._replace(cluster=cluster._replace(nodes=2 * cluster.nodes), fixed=False)
        yield f"--nodes {2 * cluster.nodes}", more


def _cheaper_targets(request: Request) -> Iterator[tuple[str, Request]]:
    config, side = request.config, 16 * request.config.grid
    if config.method.uses_teacher(config) and config.teacher.name != "ViT-B-16-quickgelu":
        teacher = dataclasses.replace(config.teacher, name="ViT-B-16-quickgelu", img_size=side, layer=-1)
        words = f"teacher.name=ViT-B-16-quickgelu teacher.img_size={side}"
        cheap = request._replace(config=dataclasses.replace(config, teacher=teacher))
        yield f"{words} (other targets; a codebook of its own)", cheap
    if config.method.predicts_ids and config.data.crop == "center":
        tokenizer = dataclasses.replace(config.tokenizer, ids="FOLDER")
        stored = request._replace(config=dataclasses.replace(config, tokenizer=tokenizer))
        yield "tokenizer.ids=FOLDER (written once by tools/tokenize_images.py)", stored


def report(request: Request, plan: Plan, advice: list[tuple[str, Plan]], curve: list[Plan]) -> str:
    """The plan, what would make it faster, the scaling curve and all that they rest on, in lines of text."""
    cluster, config, gflop = request.cluster, request.config, plan["gflop_per_image"]
    step, speed, hours = plan["step_seconds"], plan["images_per_second"], plan["hours"]
    spent = {name: value for name, value in step.items() if name != "total" and value > 5e-5}
    recomputed = f" and {gflop['recomputed']:.1f} recomputed" if gflop["recomputed"] else ""
    micro = plan["micro_batch_size"]
    say = "" if micro == config.train.micro_batch_size else f"; give the run train.micro_batch_size={micro}"
    return "\n".join([
        f"PREDICTED for {config.objective}, {config.model.name}: {cluster.nodes} x {cluster.gpus_per_node} "
        f"{cluster.gpu.name}, ZeRO-{request.engine['zero_optimization']['stage']}, "
        f"{config.train.global_batch_size} images a step",
        "",
        f"trainable parameters  {plan['parameters']:,}",
        f"GFLOP an image        student {gflop['student']:.1f} (at least {gflop['student_minimum']:.1f})"
        f"{recomputed}, teacher {gflop['teacher']:.1f}, in fp32 {gflop['fp32']:.1f}, "
        f"in TF32 {gflop['tf32']:.1f}",
        f"micro-batch           {micro} x {plan['grad_accum_steps']} accumulated "
        f"(largest that fits: {plan['largest_micro_batch_size']}){say}",
        "memory of a GPU",
        *(f"  {name:<20}{gib:8.2f} GiB" for name, gib in plan["memory_gib"].items() if gib >= 0.005),
        f"step                  {1e3 * step['total']:.1f} ms: "
        + ", ".join(f"{name} {1e3 * value:.1f}" for name, value in spent.items()),
        f"speed                 {speed:,.0f} images/s, {speed / plan['gpus']:.0f} a GPU; "
        f"MFU of the student {plan['mfu']:.1%}",
        f"input                 {plan['input_mbyte_s_per_node']:.0f} MB/s a node",
        f"run                   {plan['steps']:,} steps, {hours:,.1f} h ({hours / 24:.1f} days), "
        f"{plan['gpu_hours']:,.0f} GPU-hours",
        f"binds                 {plan['binds']}, {step[plan['binds']] / step['total']:.0%} of the step",
        *(
            f"  change: {words}: {other['images_per_second']:,.0f} images/s "
            f"(bound {other['bound']['images_per_second']:,.0f})"
            for words, other in advice
        ),
        "",
        *bound_report(request, plan),
        "",
        "  GPUs  micro x accum  images/s  of linear     hours  GPU-hours  binds",
        *map(_row, curve),
        "",
        "Assumptions",
        *(f"- {line}" for line in assumptions(request)),
    ])  # fmt: skip


def _row(row: Plan) -> str:
    """One line of the scaling curve."""
    if "refused" in row:
        return f"{row['gpus']:6}  {row['refused'].splitlines()[0]}"
    return (
        f"{row['gpus']:6}  {row['micro_batch_size']:5} x {row['grad_accum_steps']:<5}  "
        f"{row['images_per_second']:8,.0f}  {row['efficiency']:9.0%}  {row['hours']:8,.1f}  "
        f"{row['gpu_hours']:9,.0f}  {row['binds']}"
    )
