"""The fastest that a recipe can be on a cluster's GPUs, computed from counted FLOPs and bytes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mapet_ds.planning.counting import student, target
from mapet_ds.planning.forecast import Request
from mapet_ds.planning.roofline import KINDS, Kernels


def bound(request: Request) -> dict[str, Any]:
    """The bound of an update from the work of the GPUs: links, host and loader are free.

    `changes` has the images/s that the bound would be if something were otherwise.

    Raises:
        ConfigError: the recipe's costs can't be counted.
    """
    config, gpu, ranks = request.config, request.cluster.gpu, request.cluster.ranks
    model, goal = student(config, request.size), target(config)
    whole = config.train.global_batch_size
    form = "compiled" if config.train.compile else "eager"
    learns = "eager" if request.engine["zero_optimization"]["stage"] == 3 else form  # as the run does

    def least(kernels: Kernels, form: str) -> dict[str, float]:
        spent = kernels.seconds(form, gpu.rates)
        return {kind: whole / ranks * spent.get(kind, 0.0) for kind in KINDS}

    # Weights and both moments are read and written, and the gradient is read for its norm and its use.
    weight = 24 + 2 * request.size + (request.size if request.size == 2 else 0)
    update = (weight * model.parameters / ranks + 3 * goal.follows) / gpu.rates.memory
    learn, teach = least(model.kernels, learns), least(goal.kernels, form)
    forward_backward, total = sum(learn.values()), sum(learn.values()) + sum(teach.values()) + update

    # What would be gained at most.
    again = whole / ranks * model.kernels.seconds(learns, gpu.rates, "phase").get("again", 0.0)
    saved = {
        "the blocks compiled": forward_backward - sum(least(model.kernels, "compiled").values()),
        "all of the student compiled": forward_backward - sum(least(model.kernels, "whole").values()),
        "nothing made anew in the backward pass": again,
        "attention that takes no time": learn["attention"],
        "the student's products in fp8, twice as fast": learn["products"] / 2,
        "no other work in the student than products and attention": learn["moves"],
        "targets that take no time": sum(teach.values()),
    }
    return {
        "product_tflops": gpu.product_tflops, "memory_gbyte_s": gpu.memory_gbyte_s,
        "step_seconds": {"student": learn, "target": teach, "update": update, "total": total},
        "images_per_second": whole / total,
        "mfu": model.flops * whole / total / (ranks * 1e12 * gpu.product_tflops),
        "kernels": {"student": model.kernels.launches(learns), "target": goal.kernels.launches(form)},
        "changes": {
            words: whole / (total - seconds) for words, seconds in saved.items() if seconds > 0.005 * total
        },
    }  # fmt: skip


def bound_report(request: Request, plan: dict[str, Any]) -> Iterator[str]:
    """A plan's bound as lines of text."""
    found, gpu = plan["bound"], request.cluster.gpu
    seconds, speed = found["step_seconds"], found["images_per_second"]
    basis = "measured on such a GPU" if gpu.measured_tflops else "of the data sheet"
    yield (
        f"BOUND, computed       {speed:,.0f} images/s, {speed / plan['gpus']:.0f} a GPU; MFU of the student "
        f"{found['mfu']:.1%}; the prediction is {plan['images_per_second'] / speed:.0%} of it"
    )
    for name in ("student", "target"):
        whole = sum(seconds[name].values())
        kinds = ", ".join(f"{kind} {1e3 * part:.1f}" for kind, part in seconds[name].items())
        kernels = f"at least {found['kernels'][name]:,} kernels a micro-step"
        yield f"  {name:<20}{1e3 * whole:8.1f} ms, {whole / seconds['total']:.0%}: {kinds}; {kernels}"
    yield f"  {'update':<20}{1e3 * seconds['update']:8.1f} ms"
    for words, faster in found["changes"].items():
        yield f"  with {words}: {faster:,.0f} images/s"
    yield (
        f"  It rests on bf16 products at the {gpu.product_tflops:g} TFLOP/s {basis} and memory at "
        f"{gpu.memory_gbyte_s:g} GB/s, links, host and loader free."
    )
