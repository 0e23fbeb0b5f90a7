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
from benchmarks import measuring
from benchmarks.measuring import Figures, circumstances, device_of, in_turns, ratio, settings, summary

from mapet_ds.data.batch import View
from mapet_ds.data.index import open_index
from mapet_ds.errors import ConfigError
from mapet_ds.launch import init_distributed
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import build_teacher
from mapet_ds.targets.towers import teacher_mean_std


def measure_teacher(arguments: argparse.Namespace) -> Figures | None:
    """The recipe's teacher on noise, in fp32 and bf16; on rank 0, elsewhere None.

    On a CPU it is one of them, the recipe's: a product in bf16 may take minutes there.
    """
    device, ranks, figures, config = device_of(arguments.device), init_distributed(), {}, settings(arguments)
    device = ranks.device if device.type == "cuda" else device
    torch.set_num_threads(arguments.threads)
    asked, compiled = config.teacher.precision, config.train.compile
    if arguments.against == "eager" and not compiled:
        compared = "--against eager compares with a compiled teacher"
        raise ConfigError(f"{compared}, and train.compile = False: add train.compile=true.")
    for precision in ("fp32", "bf16") if device.type == "cuda" else ("bf16" if asked == "bf16" else "fp32",):
        config = settings(arguments, f"teacher.precision={precision}")
        teachers = [build_teacher(config.teacher, device, compiled)]
        if arguments.against == "eager":
            teachers.append(build_teacher(config.teacher, device))
        elif arguments.against == "unsharded":
            whole = dataclasses.replace(config.teacher, shard="none")
            teachers.append(build_teacher(whole, device, compiled))
        side = config.teacher.img_size
        images = torch.randn(arguments.batch_size, 3, side, side, device=device)
        figures["gflop_per_image"] = measuring.counted_flops(partial(teachers[-1], images[:1])) / 1e9
        peak = measuring.ceiling(device, teachers[0].dtype)
        works = {str(i): partial(teacher, images) for i, teacher in enumerate(teachers)}
        wall, _ = in_turns(device, works, arguments.repeats + 1)

        # The first of each is a warm-up.
        speeds = [[len(images) / each for each in seconds[1:]] for seconds in wall.values()]
        found = [
            {"images_per_second": summary(speed), "local_mib": teacher.local_bytes / 2**20}
            for speed, teacher in zip(speeds, teachers)
        ]
        shares = [figures["gflop_per_image"] * each / 1e3 / peak for each in speeds[0]]
        figures[precision] = found[0] | {"ceiling_tflops": peak, "share_of_ceiling": summary(shares)}
        if other := arguments.against:
            figures[precision] |= {other: found[1], f"speed_over_{other}": ratio(speeds[0], speeds[1])}
    about = {"teacher": config.teacher.name, "ranks": ranks.world_size, "compiled": compiled}
    return None if ranks.rank else circumstances(config, arguments) | about | figures


def measure_assign(arguments: argparse.Namespace) -> Figures:
    """How many of a codebook's ids change in bf16, and the time of teacher and assignment."""
    from mapet_ds.data.loader import Loader

    device, name = device_of(arguments.device), f"teacher.name={json.dumps(arguments.teacher)}"
    both = ("fp32", "bf16")
    configs = {each: settings(arguments, name, f"teacher.precision={each}") for each in both}
    config, codebook = configs["fp32"], Codebook.load(arguments.codebook)
    teachers = {f"teacher_{each}": build_teacher(configs[each].teacher, device) for each in both}
    codebook.check(teachers["teacher_fp32"].identity, config.data, len(codebook.centroids))
    codebook.to(device)
    assigns = {f"assign_{each}": f"teacher_{each}" for each in both}
    milliseconds: dict[str, list[float]] = {name: [] for name in (*teachers, *assigns)}

    # A teacher in bf16 changes ids; so do rounded features, and products in TF32, which a GPU takes for them.
    total = 0
    changed = {"bf16_teacher": 0, "bf16_features": 0, "bf16_in_tf32": 0}
    with tempfile.TemporaryDirectory() as cache:
        view = View(config.teacher.img_size, *teacher_mean_std(config.teacher))
        index = open_index(arguments.data, Path(cache) / "index")
        loader = Loader(config, index, student=False, teacher=view, **measuring.ALONE)
        with contextlib.closing(loader):
            for _ in range(1 + -(-arguments.images // arguments.batch_size)):
                images, found = next(loader).teacher_images, {}
                assert images is not None
                images = images.to(device)
                for name, teacher in teachers.items():
                    seconds, _, found[name] = measuring.timed(device, teacher, images)
                    milliseconds[name].append(1000 * seconds / len(images))
                for name, source in assigns.items():
                    seconds, _, found[name] = measuring.timed(device, codebook.assign, found[source])
                    milliseconds[name].append(1000 * seconds / len(images))
                ids, rounded = found["assign_fp32"], found["assign_bf16"]
                exact = codebook.assign(found["teacher_bf16"].float())
                features = codebook.assign(found["teacher_fp32"].bfloat16())
                changed["bf16_in_tf32"] += int((rounded != exact).sum())
                changed["bf16_teacher"] += int((rounded != ids).sum())
                changed["bf16_features"] += int((features != ids).sum())
                total += ids.numel()

    # The first of each time is a warm-up.
    return circumstances(config, arguments) | {
        "codes": len(codebook.centroids),
        "ids": total,
        "changed_share": {name: count / total for name, count in changed.items()},
        "ms_per_image": {name: summary(values[1:]) for name, values in milliseconds.items()},
    }
