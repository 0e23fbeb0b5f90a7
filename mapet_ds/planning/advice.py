"""What would make a planned run faster, and the plan as a page of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mapet_ds.config import ConfigError
from mapet_ds.planning.forecast import Request, assumptions, predict


Plan = dict[str, Any]


def changes(request: Request, found: Plan) -> list[tuple[str, Plan]]:
    """What makes the planned run faster: words for the command line, and the plan with them."""
    results = []
    for words, other in _remedies(request, found):
        try:
            results.append((words, predict(other)))
        except ConfigError:
            continue  # not to be had here: no advice
    return [(words, other) for words, other in results if other["images_per_second"] > 1.01 * found["images_per_second"]]


def _remedies(request: Request, found: Plan) -> Iterator[tuple[str, Request]]:
    """What may help against what binds."""
    config, cluster, binds, largest = request.config, request.cluster, found["binds"], found["largest_micro_batch_size"]
    if binds in ("teacher", "assignment"):
        yield from _cheaper_targets(request)
    if config.train.grad_checkpointing and binds in ("student", "launch"):
        kept = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_checkpointing=False))
        yield "train.grad_checkpointing=false", request._replace(config=kept, fixed=False)
    if binds == "link" and request.engine["zero_optimization"]["stage"] > 1 and found["grad_accum_steps"] > 1:
        zero = request.engine | {"zero_optimization": request.engine["zero_optimization"] | {"stage": 1}}
        yield "--engine ds_configs/zero1.json (sums gradients once an update)", request._replace(engine=zero)
    if binds in ("link", "launch") and largest > found["micro_batch_size"]:
        yield f"train.micro_batch_size={largest}", request.with_micro(largest)
    if binds == "link":
        faster = cluster._replace(link_gbit=2 * cluster.link_gbit)
        yield "twice the link (--link_gbit)", request._replace(cluster=faster)
    if binds == "input":
        faster = cluster._replace(storage_gbyte_s=2 * cluster.storage_gbyte_s)
        prepared = request.speeds._replace(images_per_second=2 * request.speeds.images_per_second)
        yield "twice the storage rate: local disks, or shards (tools/make_shards.py)", request._replace(cluster=faster)
        yield "a loader twice as fast: data.workers, data.threads, smaller files", request._replace(speeds=prepared)
    if binds == "student":
        more = cluster._replace(nodes=2 * cluster.nodes)
        yield f"--nodes {more.nodes}", request._replace(cluster=more, fixed=False)


def _cheaper_targets(request: Request) -> Iterator[tuple[str, Request]]:
    config, grid = request.config, request.config.grid
    if config.method.uses_teacher(config) and config.teacher.name != "ViT-B-16-quickgelu":
        cheap = dataclasses.replace(config.teacher, name="ViT-B-16-quickgelu", img_size=16 * grid, layer=-1)
        words = f"teacher.name=ViT-B-16-quickgelu teacher.img_size={16 * grid} (other targets; a codebook of its own)"
        yield words, request._replace(config=dataclasses.replace(config, teacher=cheap))
    if config.method.predicts_ids and config.data.crop == "center":
        stored = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, ids="FOLDER"))
        yield "tokenizer.ids=FOLDER (written once by tools/tokenize_images.py)", request._replace(config=stored)


def report(request: Request, found: Plan, advice: list[tuple[str, Plan]], curve: list[Plan]) -> str:
    """The plan, what would make it faster, the scaling curve and all that they rest on, in lines of text."""
    cluster, config, gflop, step = request.cluster, request.config, found["gflop_per_image"], found["step_seconds"]
    parts = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in step.items() if name != "total" and value > 5e-5)
    speed = found["images_per_second"]
    held = [f"  {name:<20}{value:8.2f} GiB" for name, value in found["memory_gib"].items() if value >= 0.005]
    text = [
        f"PREDICTED for {config.objective}, {config.model.name}: {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}, "
        f"ZeRO-{request.engine['zero_optimization']['stage']}, {config.train.global_batch_size} images a step", "",
        f"trainable parameters  {found['parameters']:,}",
        f"GFLOP an image        student {gflop['student']:.1f} (at least {gflop['student_minimum']:.1f})"
        + (f" and {gflop['recomputed']:.1f} recomputed" if gflop["recomputed"] else "")
        + f", teacher {gflop['teacher']:.1f}, in fp32 {gflop['fp32']:.1f}, in TF32 {gflop['tf32']:.1f}",
        f"micro-batch           {found['micro_batch_size']} x {found['grad_accum_steps']} accumulated (largest that fits: "
        f"{found['largest_micro_batch_size']})", "memory of a GPU", *held,
        f"step                  {1e3 * step['total']:.1f} ms: {parts}",
        f"speed                 {speed:,.0f} images/s, {speed / found['gpus']:.0f} a GPU; MFU of the student {found['mfu']:.1%}",
        f"input                 {found['input_mbyte_s_per_node']:.0f} MB/s a node",
        f"run                   {found['steps']:,} steps, {found['hours']:,.1f} h ({found['hours'] / 24:.1f} days), "
        f"{found['gpu_hours']:,.0f} GPU-hours",
        f"binds                 {found['binds']}, {step[found['binds']] / step['total']:.0%} of the step",
        *(f"  change: {words}: {other['images_per_second']:,.0f} images/s" for words, other in advice), "",
        "  GPUs  micro x accum  images/s  of linear     hours  GPU-hours  binds",
    ]  # fmt: skip
    for row in curve:
        if "refused" in row:
            text.append(f"{row['gpus']:6}  {row['refused'].splitlines()[0]}")
            continue
        text.append(
            f"{row['gpus']:6}  {row['micro_batch_size']:5} x {row['grad_accum_steps']:<5}  {row['images_per_second']:8,.0f}  "
            f"{row['efficiency']:9.0%}  {row['hours']:8,.1f}  {row['gpu_hours']:9,.0f}  {row['binds']}"
        )
    return "\n".join([*text, "", "Assumptions", *(f"- {line}" for line in assumptions(request))])
