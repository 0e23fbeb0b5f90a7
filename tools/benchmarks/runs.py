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
from benchmarks import measuring
from benchmarks.measuring import Figures, Times, Work, in_turns, ratio, repeatedly, summary, timed
from benchmarks.roofline import breakdown, flops_by_part, show
from benchmarks.steps import check_twin, dense_twin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.sections import Config
from mapet_ds.draws import permutations
from mapet_ds.errors import ConfigError
from mapet_ds.launch import init_distributed
from mapet_ds.methods import build_objective
from mapet_ds.planning.counting import student as student_costs
from mapet_ds.planning.parts import GRADIENTS, Parts
from mapet_ds.run import Run
from mapet_ds.task import Pretraining
from mapet_ds.training.engine import gather_state

Flops = dict[str, float]


@contextlib.contextmanager
def open_run(arguments: argparse.Namespace) -> Iterator[Run]:
    """A run of the recipe, with one micro-batch a step on each rank, in a folder that is gone afterwards.

    Every rank must open it.
    """
    ranks = init_distributed()
    with contextlib.ExitStack() as stack:
        folder = ranks.from_first(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
        images = arguments.batch_size * ranks.world_size
        config = measuring.settings(
            arguments, f"data.train={json.dumps(arguments.data)}", f"run_dir={json.dumps(folder)}",
            "log.progress=false", "log.images_every_steps=0", "train.spike_factor=null",
            f"train.global_batch_size={images}",
        )  # fmt: skip
        run = Run(Pretraining, config, load_deepspeed_config(arguments.deepspeed_config), ranks)
        yield run
        run.watchdog.close()
        run.metrics.close()
        run.loader.close()
        dist.barrier(ranks.control)


def flops_per_image(run: Run, target: Tensor, batch: Any) -> Flops:
    """Counted FLOPs of the student's forward and backward, on one image on the CPU, and of its target."""
    student = build_objective(run.config, run.target.dim)
    draw = student.draw(0, 0, 1)
    images = torch.zeros(1, *batch.images.shape[1:])
    of_student = measuring.counted_flops(lambda: student(images, target[:1].cpu(), draw).loss.backward())
    return {
        "student": of_student,
        "target": measuring.counted_flops(lambda: run.target(batch)) / len(batch.index),
    }


class DenseMasks(Dataset):
    """The order of each image's patches and its two dense masks."""

    def __init__(self, masks: Callable[..., tuple[Tensor, ...]], config: Config, num_visible: int) -> None:
        self.masks, self.config, self.num_visible = masks, config, num_visible

    def __len__(self) -> int:
        return 2**40  # no benchmark comes to the end

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        order = torch.from_numpy(permutations(self.config.seed, 0, i, 1, self.config.num_patches))
        return order[0], *(mask[0] for mask in self.masks(order, self.num_visible))


def dense_step(run: Run) -> tuple[Callable[[], None], Iterator[Any]]:
    """A training step as published, and the batches of masks that it takes.

    It has raster order and a dense mask an image, and is never compiled. As many worker
    processes as the loader has threads make the masks ahead, two each.
    """
    device, config = run.ranks.device, run.config
    engine: Any = run.engine
    module, twin = engine.module, dense_twin(engine.module)
    masks_of, workers = DenseMasks(twin.masks, config, module.num_visible), config.data.threads
    drawn = iter(DataLoader(
        masks_of, config.train.micro_batch_size, num_workers=workers, pin_memory=device.type == "cuda",
        multiprocessing_context="spawn",
    ))  # fmt: skip

    def step() -> None:
        batch = next(run.loader).to(device)
        order, *masks = (x.to(device, non_blocking=True) for x in next(drawn))
        target = run.target(batch)
        module.forward = lambda images, ids, _: twin(images.to(module.mask_token.dtype), ids, order, masks)
        engine.backward(engine(batch.images, target, batch.draw))
        engine.step()
        del module.forward

    return step, drawn


def measure_train(arguments: argparse.Namespace) -> Figures | None:
    """A training step, its parts alone, and where in the student's modules its time goes; on rank 0.

    The parts say what they would take back to back, and how much of it the step hides.
    """
    check_twin(arguments, measuring.settings(arguments))
    with open_run(arguments) as run:
        ranks, engine = run.ranks, run.engine
        batch = next(run.loader).to(ranks.device)
        target = run.target(batch)

        def student() -> None:
            engine.backward(engine(batch.images, target, batch.draw).loss)
            engine.step()

        parts: dict[str, Work] = {
            "data": lambda: next(run.loader).to(ranks.device), "target": lambda: run.target(batch),
            "student": student, "train": run.train_step,
        }  # fmt: skip
        masks: Iterator[Any] = iter(())
        if arguments.against == "dense":
            parts["dense"], masks = dense_step(run)

        # Take the parts in turns; the first round is a warm-up.
        seconds: Times = {name: [] for name in parts}
        waits = []
        for repeat in range(arguments.repeats + 1):
            for name, part in parts.items():
                run.metrics.log(run.step, {})
                if name == "dense":
                    measuring.draw_batches(masks, 2 * run.config.data.threads)
                spent = timed(ranks.device, repeatedly, part, arguments.steps)[0] / arguments.steps
                if repeat:
                    seconds[name].append(spent)
            waits.append(run.metrics.log(run.step, {})["data_wait_percent"])

        # Compare them with what the chip can do.
        flops = flops_per_image(run, target, batch)
        dtype = torch.bfloat16 if run.identity["engine.bf16"] else torch.float32
        peak = measuring.ceiling(ranks.device, dtype)
        figures = train_figures(arguments, run, seconds, waits[1:], flops, peak)
        where = train_breakdown(arguments, run, flops["target"], peak)
        if figures is None:
            return None
        show(where, 1e12 * peak, arguments.plot)
        return figures | {"dtype": str(dtype), "breakdown": where}


def train_breakdown(arguments: argparse.Namespace, run: Run, target_flops: float, peak: float) -> Figures:
    """Where the time of a step goes whose parts follow each other, on this rank. Every rank must call it."""
    device, engine, config = run.ranks.device, run.engine, run.config
    objective: Any = engine.module

    def step(parts: Parts) -> None:
        with parts("data"):
            batch = next(run.loader).to(device)
        with parts("target"):
            target = run.target(batch)
        loss = engine(batch.images, target, batch.draw).loss
        with parts(GRADIENTS):
            engine.backward(loss)
        with parts("optimizer"):
            engine.step()

    flops = {"target": target_flops, **flops_by_part(config)}
    flops = {name: arguments.batch_size * count for name, count in flops.items()}
    whole = config.train.compile
    options = {"count_bytes": not whole, "trace": arguments.trace if run.ranks.rank == 0 else None}
    return breakdown(objective, step, flops, 1e12 * peak, device, arguments.steps, **options)


def train_figures(
    arguments: argparse.Namespace, run: Run, seconds: Times, waits: list[float], flops: Flops, peak: float
) -> Figures | None:
    """The figures of seconds a step by part, on rank 0; None elsewhere."""
    ranks, config = run.ranks, run.config
    if ranks.rank:
        return None
    speed = {name: [arguments.batch_size / each for each in values] for name, values in seconds.items()}
    everywhere = {name: [ranks.world_size * each for each in values] for name, values in speed.items()}
    flops["train"] = flops["student"] + flops["target"]
    parts = [target + student for target, student in zip(seconds["target"], seconds["student"], strict=True)]
    useful = student_costs(config).minimum + flops["target"]
    attained = {name: [flops[name] * each / 1e12 / peak for each in speed[name]] for name in flops}
    figures = measuring.circumstances(config, arguments) | {
        "objective": config.objective, "ranks": ranks.world_size,
        "images_per_second": {name: summary(values) for name, values in everywhere.items()},
        "target_and_student_over_train": ratio(parts, seconds["train"]),
        "data_wait_percent": summary(waits),
        "gflop_per_image": {name: count / 1e9 for name, count in flops.items()},
        "ceiling_tflops": peak,
        "mfu": summary([useful * each / 1e12 / peak for each in speed["train"]]),
        "share_of_ceiling": {name: summary(values) for name, values in attained.items()},
    }  # fmt: skip
    if "dense" in seconds:
        figures["dense_over_train"] = ratio(seconds["dense"], seconds["train"])
    if ranks.device.type == "cuda":
        figures["gpu_memory_gib"] = torch.cuda.max_memory_allocated(ranks.device) / 2**30
    return figures


def measure_checkpoint(arguments: argparse.Namespace) -> Figures | None:
    """What a save costs the training: the same steps with one written meanwhile, and without; on rank 0."""
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
        found, _ = in_turns(device, parts, arguments.repeats)
        pairs = zip(found["steps_with_save"], found["steps"], strict=True)
        cost = [saving - without for saving, without in pairs]
        written = sum(path.stat().st_size for path in (run.folder / "checkpoints").rglob("*.*"))
        if run.ranks.rank:
            return None
        return measuring.circumstances(run.config, arguments) | {
            "ranks": run.ranks.world_size, "checkpoint_bytes": written,
            "seconds": {name: summary(values) for name, values in found.items()} | {"cost": summary(cost)},
            "percent_of_ten_minutes": summary([each / 6 for each in cost]),
        }  # fmt: skip


def measure_scaling(arguments: argparse.Namespace) -> Figures:
    """`train` at 1, 2, 4 .. --ranks ranks of this host, in turns, with the same micro-batch on each."""
    numbers = [2**power for power in range(arguments.ranks.bit_length()) if 2**power <= arguments.ranks]
    speeds: dict[int, list[float]] = {number: [] for number in numbers}
    words = sys.argv[sys.argv.index("scaling") + 1 :]
    for own in ("--ranks", "--rounds"):
        if own in words:
            del words[words.index(own) : words.index(own) + 2]
    torchrun, one = [sys.executable, "-m", "torch.distributed.run", "--standalone"], Figures()
    for _ in range(arguments.rounds):
        for number in numbers:
            command = [*torchrun, f"--nproc_per_node={number}", sys.argv[0], "train", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                ended = f"`train` at {number} ranks ended with {done.returncode}"
                raise ConfigError(f"{ended}: its reason is above.")
            one = json.loads(done.stdout.strip().splitlines()[-1])
            speeds[number].append(one["images_per_second"]["train"]["median"])
    kept = ("hardware", "versions", "objective", "dtype", "gflop_per_image")
    return {key: one[key] for key in kept} | {
        "images_per_second": {number: summary(values) for number, values in speeds.items()},
        "weak_scaling": {n: ratio([v / n for v in values], speeds[1]) for n, values in speeds.items()},
    }
