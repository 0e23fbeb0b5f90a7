"""A whole run, step by step, beside its parts alone; its checkpoint; more ranks of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.measuring import (
    Figures,
    ceiling,
    circumstances,
    counted_flops,
    draw_batches,
    ratio,
    repeatedly,
    settings,
    summary,
    timed,
)
from benchmarks.roofline import GRADIENTS, Parts, breakdown, flops_by_part, show
from benchmarks.steps import check_twin, dense_twin
from torch.utils.data import DataLoader, Dataset

from mapet_ds.checks import load_deepspeed_config
from mapet_ds.config import Config, ConfigError
from mapet_ds.draws import permutations
from mapet_ds.engine import gather_state
from mapet_ds.launch import init_distributed
from mapet_ds.objectives import build_objective
from mapet_ds.planning.counting import student as student_costs
from mapet_ds.run import Run


@contextlib.contextmanager
def open_run(arguments: argparse.Namespace) -> Iterator[Run]:
    """A run of the recipe in a folder that is gone afterwards; one micro-batch a step on each rank. Every rank must open it."""
    ranks = init_distributed()
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory()) if ranks.rank == 0 else None]
        dist.broadcast_object_list(folders, src=0, group=ranks.control)
        images = arguments.batch_size * ranks.world_size
        config = settings(
            arguments, f"data.train={json.dumps(arguments.data)}", f"run_dir={json.dumps(folders[0])}", "log.progress=false",
            "log.images_every_steps=0", "train.spike_factor=null", f"train.global_batch_size={images}",
        )  # fmt: skip
        run = Run(config, load_deepspeed_config(arguments.deepspeed_config), ranks)
        yield run
        run.watchdog.close()
        run.metrics.close()
        run.loader.close()
        dist.barrier(ranks.control)


def flops_per_image(run: Run, target: torch.Tensor, batch: Any) -> dict[str, float]:
    """Counted: of the student's forward and backward, on one image on the CPU, and of its target."""
    student = build_objective(run.config, run.target.dim)
    draw = student.draw(0, 0, 1)
    images = torch.zeros(1, *batch.images.shape[1:])
    of_student = counted_flops(lambda: student(images, target[:1].cpu(), draw).loss.backward())
    return {"student": of_student, "target": counted_flops(lambda: run.target(batch)) / len(batch.index)}


class DenseMasks(Dataset):
    """Of image i, its patches' order and its two dense masks."""

    def __init__(self, masks: Callable[..., tuple[torch.Tensor, ...]], config: Config, num_visible: int) -> None:
        self.masks, self.config, self.num_visible = masks, config, num_visible

    def __len__(self) -> int:
        return 2**40  # no benchmark comes to the end

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        order = torch.from_numpy(permutations(self.config.seed, 0, i, 1, self.config.num_patches))
        return order[0], *(mask[0] for mask in self.masks(order, self.num_visible))


def dense_step(run: Run) -> tuple[Callable[[], None], Iterator[Any]]:
    """A training step as published, raster order and a dense mask an image, never compiled; and the batches of masks it takes,
    which as many worker processes as the loader has threads make ahead, two each."""
    engine, device, config = run.engine, run.ranks.device, run.config
    module, twin = engine.module, dense_twin(engine.module)
    drawn = iter(DataLoader(
        DenseMasks(twin.masks, config, module.num_visible), config.train.micro_batch_size, num_workers=config.data.threads,
        pin_memory=device.type == "cuda", multiprocessing_context="spawn",
    ))  # fmt: skip

    def step() -> None:
        batch = next(run.loader).to(device)
        order, *masks = (x.to(device, non_blocking=True) for x in next(drawn))
        target = run.target(batch)
        module.forward = lambda images, ids: twin(images.to(module.mask_token.dtype), ids, order, masks)
        engine.backward(engine(batch.images, target))
        engine.step()
        del module.forward

    return step, drawn


def measure_train(arguments: argparse.Namespace) -> Figures | None:
    """A training step, its parts alone (what they would take back to back, and how much of it the step hides), and where in
    the student's modules its time goes."""
    check_twin(arguments, settings(arguments))
    with open_run(arguments) as run:
        ranks, engine = run.ranks, run.engine
        batch = next(run.loader).to(ranks.device)
        target = run.target(batch)
        draw = engine.module.draw(0, 0, len(batch.index)).to(ranks.device)

        def student() -> None:
            engine.backward(engine(batch.images, target, draw).loss)
            engine.step()

        parts = {
            "data": lambda: next(run.loader).to(ranks.device), "target": lambda: run.target(batch), "student": student,
            "train": run.train_step,
        }  # fmt: skip
        if arguments.against == "dense":
            parts["dense"], masks = dense_step(run)
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        waits = []
        for repeat in range(arguments.repeats + 1):
            for name, part in parts.items():
                run.metrics.log(run.step, {})
                if name == "dense":
                    draw_batches(masks, 2 * run.config.data.threads)
                spent = timed(ranks.device, repeatedly, part, arguments.steps)[0] / arguments.steps
                if repeat:  # the first round is a warm-up
                    seconds[name].append(spent)
            waits.append(run.metrics.log(run.step, {})["data_wait_percent"])
        flops = flops_per_image(run, target, batch)
        dtype = torch.bfloat16 if run.identity["engine.bf16"] else torch.float32
        peak = ceiling(ranks.device, dtype)
        figures = train_figures(arguments, run, seconds, waits[1:], flops, peak)
        where = train_breakdown(arguments, run, flops["target"], peak)
        if figures is None:
            return None
        show(where, 1e12 * peak, arguments.plot)
        return figures | {"dtype": str(dtype), "breakdown": where}


def train_breakdown(arguments: argparse.Namespace, run: Run, target_flops: float, peak: float) -> Figures:
    """Of a step's parts one after the other; this rank's. Every rank must call it."""
    device, engine, config = run.ranks.device, run.engine, run.config

    def step(parts: Parts) -> None:
        with parts("data"):
            batch = next(run.loader).to(device)
        with parts("target"):
            target = run.target(batch)
        loss = engine(batch.images, target, engine.module.draw(0, 0, len(batch.index)).to(device)).loss
        with parts(GRADIENTS):
            engine.backward(loss)
        with parts("optimizer"):
            engine.step()

    flops = {name: arguments.batch_size * count for name, count in ({"target": target_flops} | flops_by_part(config)).items()}
    return breakdown(engine.module, step, flops, 1e12 * peak, device, arguments.steps, count_bytes=not config.train.compile)


def train_figures(
    arguments: argparse.Namespace, run: Run, seconds: dict[str, list[float]], waits: list[float], flops: dict[str, float],
    peak: float,
) -> Figures | None:
    """On rank 0, with seconds a step by part; None elsewhere."""
    ranks, config = run.ranks, run.config
    speed = {name: [arguments.batch_size / each for each in values] for name, values in seconds.items()}
    flops["train"] = flops["student"] + flops["target"]
    parts = [target + student for target, student in zip(seconds["target"], seconds["student"], strict=True)]
    if ranks.rank:
        return None
    figures = circumstances(config, arguments) | {
        "objective": config.objective, "ranks": ranks.world_size,
        "images_per_second": {name: summary([ranks.world_size * each for each in values]) for name, values in speed.items()},
        "target_and_student_over_train": ratio(parts, seconds["train"]),
        **({"dense_over_train": ratio(seconds["dense"], seconds["train"])} if "dense" in seconds else {}),
        "data_wait_percent": summary(waits),
        "gflop_per_image": {name: count / 1e9 for name, count in flops.items()},
        "ceiling_tflops": peak,
        "mfu": summary([(student_costs(config).minimum + flops["target"]) * each / 1e12 / peak for each in speed["train"]]),
        "share_of_ceiling": {name: summary([flops[name] * each / 1e12 / peak for each in speed[name]]) for name in flops},
    }  # fmt: skip
    if ranks.device.type == "cuda":
        figures["gpu_memory_gib"] = torch.cuda.max_memory_allocated(ranks.device) / 2**30
    return figures


def measure_checkpoint(arguments: argparse.Namespace) -> Figures | None:
    """What a save costs the training: the same steps with one written meanwhile, and without."""
    with open_run(arguments) as run:
        device, steps = run.ranks.device, arguments.steps

        def with_save() -> None:
            run.save()
            repeatedly(run.train_step, steps)
            run.settle()

        def alone() -> None:
            run.save()
            run.settle()

        parts = {
            "gather": lambda: gather_state(run.engine, run.ranks.rank), "save_alone": alone,
            "steps": lambda: repeatedly(run.train_step, steps), "steps_with_save": with_save,
        }  # fmt: skip
        run.train_step()
        found: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(arguments.repeats):
            for name, part in parts.items():
                found[name].append(timed(device, part)[0])
        cost = [saving - without for saving, without in zip(found["steps_with_save"], found["steps"], strict=True)]
        written = sum(path.stat().st_size for path in (run.folder / "checkpoints").rglob("*.*"))
        if run.ranks.rank:
            return None
        return circumstances(run.config, arguments) | {
            "ranks": run.ranks.world_size, "checkpoint_bytes": written,
            "seconds": {name: summary(values) for name, values in found.items()} | {"cost": summary(cost)},
            "percent_of_ten_minutes": summary([each / 6 for each in cost]),
        }  # fmt: skip


def measure_scaling(arguments: argparse.Namespace) -> Figures:
    """`train` at 1, 2, 4 .. --ranks ranks of this host, in turns, the same micro-batch on each."""
    numbers = [2**power for power in range(arguments.ranks.bit_length()) if 2**power <= arguments.ranks]
    speeds: dict[int, list[float]] = {number: [] for number in numbers}
    words = sys.argv[sys.argv.index("scaling") + 1 :]
    for own in ("--ranks", "--rounds"):
        if own in words:
            del words[words.index(own) : words.index(own) + 2]
    for _ in range(arguments.rounds):
        for number in numbers:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
            done = subprocess.run([*launch, sys.argv[0], "train", *words], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise ConfigError(f"`train` at {number} ranks ended with {done.returncode}: its reason is above.")
            one = json.loads(done.stdout.strip().splitlines()[-1])
            speeds[number].append(one["images_per_second"]["train"]["median"])
    kept = ("hardware", "versions", "objective", "dtype", "gflop_per_image")
    return {key: one[key] for key in kept} | {
        "images_per_second": {number: summary(values) for number, values in speeds.items()},
        "weak_scaling": {number: ratio([v / number for v in values], speeds[1]) for number, values in speeds.items()},
    }
