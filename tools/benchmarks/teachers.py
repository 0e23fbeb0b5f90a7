"""The frozen teacher: its speed, and the ids that its precision changes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from benchmarks.measuring import (
    Figures,
    ceiling,
    circumstances,
    counted_flops,
    device_of,
    ratio,
    settings,
    summary,
    timed,
)

from mapet_ds.data.batch import View
from mapet_ds.data.index import open_index
from mapet_ds.data.loader import Loader
from mapet_ds.errors import ConfigError
from mapet_ds.launch import init_distributed
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import build_teacher, teacher_mean_std


def measure_teacher(arguments: argparse.Namespace) -> Figures | None:
    """The recipe's teacher on noise, in fp32 and bf16; on a CPU, which may take minutes for a product in bf16, in one of them."""
    device, ranks, figures = device_of(arguments.device), init_distributed(), {}
    device = ranks.device if device.type == "cuda" else device
    torch.set_num_threads(arguments.threads)
    asked, compiled = settings(arguments).teacher.precision, settings(arguments).train.compile
    if arguments.against == "eager" and not compiled:
        raise ConfigError(
            "--against eager compares with a compiled teacher, and train.compile = False: add train.compile=true."
        )
    for precision in ("fp32", "bf16") if device.type == "cuda" else ("bf16" if asked == "bf16" else "fp32",):
        config = settings(arguments, f"teacher.precision={precision}")
        teachers = [build_teacher(config.teacher, device, compiled)]
        if arguments.against == "eager":
            teachers.append(build_teacher(config.teacher, device))
        elif arguments.against == "unsharded":
            teachers.append(
                build_teacher(dataclasses.replace(config.teacher, shard="none"), device, compiled)
            )
        images = torch.randn(
            arguments.batch_size, 3, config.teacher.img_size, config.teacher.img_size, device=device
        )
        figures["gflop_per_image"] = counted_flops(partial(teachers[-1], images[:1])) / 1e9
        peak = ceiling(device, teachers[0].dtype)
        speeds: list[list[float]] = [[] for _ in teachers]
        for _ in range(arguments.repeats + 1):
            for teacher, speed in zip(teachers, speeds):
                speed.append(len(images) / timed(device, teacher, images)[0])
        speeds = [speed[1:] for speed in speeds]  # the first is a warm-up
        figures[precision] = {
            "images_per_second": summary(speeds[0]), "ceiling_tflops": peak, "local_mib": teachers[0].local_bytes / 2**20,
            "share_of_ceiling": summary([figures["gflop_per_image"] * each / 1e3 / peak for each in speeds[0]]),
        }  # fmt: skip
        if arguments.against:
            other = {"images_per_second": summary(speeds[1]), "local_mib": teachers[1].local_bytes / 2**20}
            figures[precision] |= {
                arguments.against: other,
                f"speed_over_{arguments.against}": ratio(speeds[0], speeds[1]),
            }
    about = {"teacher": config.teacher.name, "ranks": ranks.world_size, "compiled": compiled}
    return None if ranks.rank else circumstances(config, arguments) | about | figures


def measure_assign(arguments: argparse.Namespace) -> Figures:
    device, name = device_of(arguments.device), f"teacher.name={json.dumps(arguments.teacher)}"
    configs = {
        precision: settings(arguments, name, f"teacher.precision={precision}")
        for precision in ("fp32", "bf16")
    }
    config, codebook = configs["fp32"], Codebook.load(arguments.codebook)
    teachers = {
        f"teacher_{precision}": build_teacher(configs[precision].teacher, device) for precision in configs
    }
    codebook.check(teachers["teacher_fp32"].identity, config.data, len(codebook.centroids))
    codebook.to(device)
    assigns = {f"assign_{precision}": f"teacher_{precision}" for precision in configs}
    milliseconds, total = {name: [] for name in (*teachers, *assigns)}, 0
    # ids changed by: a teacher in bf16; rounding fp32 features; products in TF32, which only a GPU takes for features in bf16
    changed = {"bf16_teacher": 0, "bf16_features": 0, "bf16_in_tf32": 0}
    with tempfile.TemporaryDirectory() as cache:
        view = View(config.teacher.img_size, *teacher_mean_std(config.teacher))
        index = open_index(arguments.data, Path(cache) / "index")
        loader = Loader(config, index, student=False, teacher=view, rank=0, world_size=1, local_rank=0)
        with contextlib.closing(loader):
            for _ in range(1 + -(-arguments.images // arguments.batch_size)):
                images, found = next(loader).teacher_images.to(device), {}
                for name, teacher in teachers.items():
                    seconds, _, found[name] = timed(device, teacher, images)
                    milliseconds[name].append(1000 * seconds / len(images))
                for name, source in assigns.items():
                    seconds, _, found[name] = timed(device, codebook.assign, found[source])
                    milliseconds[name].append(1000 * seconds / len(images))
                ids = found["assign_fp32"]
                exact = codebook.assign(found["teacher_bf16"].float())
                changed["bf16_in_tf32"] += int((found["assign_bf16"] != exact).sum())
                changed["bf16_teacher"] += int((found["assign_bf16"] != ids).sum())
                changed["bf16_features"] += int(
                    (codebook.assign(found["teacher_fp32"].bfloat16()) != ids).sum()
                )
                total += ids.numel()
    return circumstances(config, arguments) | {
        "codes": len(codebook.centroids),
        "ids": total,
        "changed_share": {name: count / total for name, count in changed.items()},
        "ms_per_image": {
            name: summary(values[1:]) for name, values in milliseconds.items()
        },  # the first is a warm-up
    }
