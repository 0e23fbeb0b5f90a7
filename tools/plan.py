"""Predict memory, speed, input and scaling of a recipe on a cluster, before any GPU is rented.

    tools/plan.py --config mapet_ds/recipes/mapet_vitb16.yaml --gpu h100 --nodes 8 --gpus_per_node 8

Costs are counted (mapet_ds/cost.py, mapet_ds/forecast.py); speeds are the data sheets' times a share that GPUs attain, which is
assumed until --calibrate gives lines that tools/benchmark.py printed on such a GPU. Every assumption is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_method
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.cost import student, target
from mapet_ds.errors import ConfigError
from mapet_ds.forecast import GPUS, Cluster, Gpu, Request, Speeds, assumptions, predict, scaling


def changes(request: Request, found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What would help against what binds: words for the command line, and the plan with them."""
    config, grid, tried = request.config, request.config.grid, []
    train, binds = config.train, found["binds"]
    if (
        binds in ("teacher", "assignment")
        and config.method.uses_teacher(config)
        and config.teacher.name != "ViT-B-16-quickgelu"
    ):
        cheap = dataclasses.replace(config.teacher, name="ViT-B-16-quickgelu", img_size=16 * grid, layer=-1)
        words = f"teacher.name=ViT-B-16-quickgelu teacher.img_size={16 * grid} (other targets; a codebook of its own)"
        tried.append((words, request._replace(config=dataclasses.replace(config, teacher=cheap))))
    if binds in ("teacher", "assignment") and config.method.predicts_ids and config.data.crop == "center":
        stored = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, ids="FOLDER"))
        tried.append(
            (
                "tokenizer.ids=FOLDER (written once by tools/tokenize_images.py)",
                request._replace(config=stored),
            )
        )
    if train.grad_checkpointing and binds in ("student", "launch"):
        stored = dataclasses.replace(train, grad_checkpointing=False)
        words, config_ = "train.grad_checkpointing=false", dataclasses.replace(config, train=stored)
        tried.append((words, request._replace(config=config_, fixed=False)))
    if binds == "link" and request.engine["zero_optimization"]["stage"] > 1 and found["grad_accum_steps"] > 1:
        zero = request.engine | {"zero_optimization": request.engine["zero_optimization"] | {"stage": 1}}
        tried.append(
            ("--engine ds_configs/zero1.json (sums gradients once an update)", request._replace(engine=zero))
        )
    if found["largest_micro_batch_size"] > found["micro_batch_size"] and binds in ("link", "launch"):
        words = f"train.micro_batch_size={found['largest_micro_batch_size']}"
        tried.append((words, request.with_micro(found["largest_micro_batch_size"])))
    if binds == "link":
        faster = request.cluster._replace(link_gbit=2 * request.cluster.link_gbit)
        tried.append(("twice the link (--link_gbit)", request._replace(cluster=faster)))
    if binds == "input":
        faster = request.cluster._replace(storage_gbyte_s=2 * request.cluster.storage_gbyte_s)
        tried.append(
            (
                "twice the storage rate: local disks, or shards (tools/make_shards.py)",
                request._replace(cluster=faster),
            )
        )
        prepared = request.speeds._replace(images_per_second=2 * request.speeds.images_per_second)
        tried.append(
            (
                "a loader twice as fast: data.workers, data.threads, smaller files",
                request._replace(speeds=prepared),
            )
        )
    if binds == "student":
        more = request._replace(
            cluster=request.cluster._replace(nodes=2 * request.cluster.nodes), fixed=False
        )
        tried.append((f"--nodes {2 * request.cluster.nodes}", more))
    if binds == "launch" and request.cluster.nodes % 2 == 0:
        fewer = request._replace(cluster=request.cluster.of(request.cluster.ranks // 2), fixed=False)
        tried.append(("half the nodes: so small a micro-batch leaves them waiting for the host", fewer))
    results = []
    for words, other in tried:
        try:
            results.append((words, predict(other)))
        except ConfigError:
            continue  # not to be had here: no advice
    return [
        (words, other)
        for words, other in results
        if other["images_per_second"] > 1.01 * found["images_per_second"]
    ]


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
                        f"{path} was measured on {device or 'a CPU'}, not on an {gpu.name}: its figures would mislead here."
                    )
                lines.append((f"{kind} of {path}", record))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--calibrate {path} does not hold lines that tools/benchmark.py prints: {type(error).__name__} {error}."
            ) from error
    return lines


def learn(record: dict[str, Any], request: Request) -> dict[str, float]:
    """The fields of Speeds that a line tells about this recipe; none where it is about another one."""
    settings, config, gpu = record["settings"], request.config, request.cluster.gpu
    kind, peak, goal = settings["benchmark"], 1e12 * gpu.bf16_tflops, target(config)
    same_model, found = settings.get("model") == config.model.name, {}
    if kind == "step" and same_model and settings["dtype"] == "bf16":
        each = number(record["seconds"], "step") / settings["batch_size"]
        found = {
            "student": student(dataclasses.replace(config, objective=record["objective"])).flops / each / peak
        }
    elif kind == "teacher" and goal.flops and record["teacher"] == config.teacher.name:
        found = {"teacher": goal.flops * number(record["bf16"], "images_per_second") / peak}
    elif kind == "assign" and goal.tf32_flops and settings["teacher"] == config.teacher.name:
        times = record["ms_per_image"]
        found = {"teacher": goal.flops / number(times, "teacher_bf16") / (peak / 1e3)}
        found["fp32"] = target(config, 4).fp32_flops / number(times, "assign_fp32") / (1e9 * gpu.fp32_tflops)
        found["tf32"] = goal.tf32_flops / number(times, "assign_bf16") / (peak / 2e3)
    elif kind == "loader":
        views = record["two_views" if goal.sharded else "one_view"]
        found = {"images_per_second": number(views["images_per_second"], "ours")}
    elif (
        kind == "train"
        and same_model
        and record["objective"] == config.objective
        and record["dtype"] == "torch.bfloat16"
    ):
        alone = request._replace(cluster=request.cluster.of(1), fixed=False)
        found = {
            "whole": number(record["images_per_second"], "train")
            / record["ranks"]
            / predict(alone)["images_per_second"]
        }
    return found


def calibrate(request: Request, paths: list[Path]) -> Request:
    """The request with speeds measured on such a GPU; lines about whole steps come last, on top of the others.

    Raises:
        ConfigError: files that can't be read or used.
    """
    lines = read_lines(paths, request.cluster.gpu)
    for name, record in sorted(lines, key=lambda line: line[1]["settings"]["benchmark"] == "train"):
        try:
            found = learn(record, request)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--calibrate: the line {name} lacks an entry: {type(error).__name__} {error}."
            ) from error
        if found:
            said = f"{name} ({', '.join(f'{field} {value:.3g}' for field, value in found.items())})"
            request = request._replace(
                speeds=request.speeds._replace(**found, measured=(*request.speeds.measured, said))
            )
    if not request.speeds.measured:
        raise ConfigError(
            "--calibrate found no line about this recipe: step (bf16, this model), teacher or assign (this teacher), loader, "
            "train (this model)."
        )
    return request


def report(
    request: Request,
    found: dict[str, Any],
    advice: list[tuple[str, dict[str, Any]]],
    curve: list[dict[str, Any]],
) -> str:
    cluster, config, gflop, step = (
        request.cluster,
        request.config,
        found["gflop_per_image"],
        found["step_seconds"],
    )
    parts = ", ".join(
        f"{name} {1e3 * value:.1f}" for name, value in step.items() if name != "total" and value > 5e-5
    )
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


def positive(kind: type) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="a recipe")
    parser.add_argument("--gpu", required=True, help=", ".join(GPUS))
    parser.add_argument("--nodes", type=positive(int), default=1)
    parser.add_argument("--gpus_per_node", type=positive(int), default=8)
    parser.add_argument(
        "--engine", default=REPOSITORY / "ds_configs/zero2.json", metavar="JSON", help="default: ZeRO-2"
    )
    parser.add_argument(
        "--images", type=positive(int), default=1_281_167, help="in the data set; default: ImageNet-1k's"
    )
    parser.add_argument("--image_kbyte", type=positive(float), default=110, help="mean size of a file")
    parser.add_argument(
        "--link_gbit", type=positive(float), default=400, help="Gbit/s of a node, all its adapters together"
    )
    parser.add_argument("--storage_gbyte_s", type=positive(float), default=2, help="GB/s that a node reads")
    parser.add_argument(
        "--calibrate", nargs="+", type=Path, default=[], metavar="JSON", help="lines of tools/benchmark.py"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's"
    )
    return parser.parse_intermixed_args(argv)


def main() -> int:
    arguments = parse(sys.argv[1:])
    try:
        if arguments.gpu not in GPUS:
            raise ConfigError(f"--gpu {arguments.gpu} is not known; there are: {', '.join(GPUS)}.")
        config = load_config(arguments.config, arguments.overrides)
        check_method(config)
        gpu, fixed = (
            GPUS[arguments.gpu],
            any(word.startswith("train.micro_batch_size=") for word in arguments.overrides),
        )
        cluster = Cluster(
            gpu,
            arguments.nodes,
            arguments.gpus_per_node,
            arguments.link_gbit,
            arguments.storage_gbyte_s,
            arguments.image_kbyte,
        )
        engine, speeds = load_deepspeed_config(arguments.engine), Speeds(gpu.share, gpu.share)
        request = Request(config, engine, cluster, arguments.images, speeds, fixed)
        if arguments.calibrate:
            request = calibrate(request, arguments.calibrate)
        found = predict(request)
        advice, curve = changes(request.with_micro(found["micro_batch_size"]), found), scaling(request)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        changed = {words: other["images_per_second"] for words, other in advice}
        line = {"predicted": found, "changes": changed, "scaling": curve, "assumptions": assumptions(request)}
        print(json.dumps(line))
    else:
        print(report(request, found, advice, curve))
    return 0


if __name__ == "__main__":
    sys.exit(main())
