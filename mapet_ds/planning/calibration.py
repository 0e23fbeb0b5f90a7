"""Learn the speeds that a plan assumes from lines that tools/benchmark.py has printed on such a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mapet_ds.errors import ConfigError
from mapet_ds.planning.counting import student, target
from mapet_ds.planning.forecast import Request, predict
from mapet_ds.planning.roofline import Gpu


def number(record: dict[str, Any], name: str) -> float:
    """The median of an entry."""
    return float(record[name]["median"])


def read_lines(paths: list[Path], gpu: Gpu) -> list[tuple[str, dict[str, Any]]]:
    """The lines of benchmark files, each with its name for the user.

    Raises:
        ConfigError: no such file, no such lines, or measured elsewhere than on this GPU.
    """
    lines = []
    for path in paths:
        try:
            records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            for record in records:
                kind, device = record["settings"]["benchmark"], record["hardware"]["gpu"]
                if not device or gpu.name not in device:
                    raise ConfigError(
                        f"{path} was measured on {device or 'a CPU'}, not on an {gpu.name}: "
                        "its figures would mislead here."
                    )
                lines.append((f"{kind} of {path}", record))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--calibrate {path} does not hold lines that tools/benchmark.py prints: "
                f"{type(error).__name__} {error}."
            ) from error
    return lines


def learn(record: dict[str, Any], request: Request) -> dict[str, float]:
    """The fields of Speeds that a line tells about this recipe; none where it is about another one."""
    settings, config, gpu = record["settings"], request.config, request.cluster.gpu
    kind, peak, goal = settings["benchmark"], 1e12 * gpu.bf16_tflops, target(config)
    same_model, speeds = settings.get("model") == config.model.name, {}
    if kind == "step" and same_model and settings["dtype"] == "bf16":
        each = number(record["seconds"], "step") / settings["batch_size"]
        model = student(dataclasses.replace(config, objective=record["objective"]))
        speeds = {"student": model.flops / each / peak}
    elif kind == "teacher" and goal.flops and record["teacher"] == config.teacher.name:
        speeds = {"teacher": goal.flops * number(record["bf16"], "images_per_second") / peak}
    elif kind == "assign" and goal.tf32_flops and settings["teacher"] == config.teacher.name:
        times = record["ms_per_image"]
        speeds = {"teacher": goal.flops / number(times, "teacher_bf16") / (peak / 1e3)}
        exact = goal.tf32_flops / 2  # one product, where TF32 takes two
        speeds["fp32"] = exact / number(times, "assign_fp32") / (1e9 * gpu.fp32_tflops)
        speeds["tf32"] = goal.tf32_flops / number(times, "assign_bf16") / (peak / 2e3)
    elif kind == "loader":
        views = record["two_views" if goal.view else "one_view"]
        speeds = {"images_per_second": number(views["images_per_second"], "ours")}
    elif (
        kind == "train"
        and same_model
        and record["objective"] == config.objective
        and record["dtype"] == "torch.bfloat16"
    ):
        alone = request._replace(cluster=request.cluster.of(1), fixed=False)
        measured = number(record["images_per_second"], "train") / record["ranks"]
        speeds = {"whole": measured / predict(alone)["images_per_second"]}
    return speeds


def calibrate(request: Request, paths: list[Path]) -> Request:
    """The request with speeds measured on such a GPU; lines about whole steps are read last.

    Raises:
        ConfigError: files that can't be read or used.
    """
    lines = read_lines(paths, request.cluster.gpu)
    for name, record in sorted(lines, key=lambda line: line[1]["settings"]["benchmark"] == "train"):
        try:
            learnt = learn(record, request)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--calibrate: the line {name} lacks an entry: {type(error).__name__} {error}."
            ) from error
        if learnt:
            figures = ", ".join(f"{field} {value:.3g}" for field, value in learnt.items())
            measured = (*request.speeds.measured, f"{name} ({figures})")
            request = request._replace(speeds=request.speeds._replace(**learnt, measured=measured))
    if not request.speeds.measured:
        raise ConfigError(
            "--calibrate found no line about this recipe: step (bf16, this model), teacher or assign (this "
            "teacher), loader, train (this model)."
        )
    return request
