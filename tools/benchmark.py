"""Measure on this machine, each sub-command printing one JSON line.

    tools/benchmark.py loader --data DIR      img/s of the loader, of DALI's own file reader in several ways, of torchvision
    tools/benchmark.py bad --data DIR         img/s of the loader where 5 % of the images are unreadable
    tools/benchmark.py index --images N       an index of so many: opening, look-ups, order, first batch, memory
    tools/benchmark.py step                   forward and backward, by part; MaPeT's also as published
    tools/benchmark.py attention              ways to compute the attention of MaPeT's hidden patches and queries
    tools/benchmark.py teacher                the recipe's frozen teacher, compiled if the recipe is
    tools/benchmark.py assign --teacher NAME --data DIR --codebook FILE    ids that change in bf16
    tools/benchmark.py train --data DIR       a whole training step, and its parts alone (also under torchrun)
    tools/benchmark.py scaling --data DIR     the same at 1, 2, 4 .. ranks of this host
    tools/benchmark.py checkpoint --data DIR  what a save costs the training

What is compared is measured in turns in one process, so that ratios hold on a machine that others use too; CPU seconds
count all threads and child processes. Settings are a recipe's with `a.b=value` on top.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.attentions import measure_attention
from benchmarks.indexes import measure_index
from benchmarks.loaders import OTHERS, measure_bad, measure_loader
from benchmarks.measuring import Figures
from benchmarks.runs import measure_checkpoint, measure_scaling, measure_train
from benchmarks.steps import measure_step
from benchmarks.teachers import measure_assign, measure_teacher

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError, DataError


def count(text: str) -> int:
    """A number from 1 on."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)

    def command(name: str, measure: Callable[..., Figures], batch_size: int, **options: Any) -> Any:
        made = commands.add_parser(name, **options)
        made.set_defaults(measure=measure)
        recipe = REPOSITORY / "mapet_ds/recipes/mapet_vitb16.yaml"
        made.add_argument(
            "--config", default=recipe, metavar="YAML", type=Path, help="a recipe; default: ViT-B/16's"
        )
        made.add_argument("--batch_size", type=count, default=batch_size)
        made.add_argument("--threads", type=count, default=2, help="CPU threads; torchvision's workers")
        made.add_argument("--device", default="auto", help="cuda, cpu or auto")
        made.add_argument(
            "overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's"
        )
        return made

    loader = command("loader", measure_loader, 32, help="images per second of three loaders")
    bad = command("bad", measure_bad, 32, help="images per second with 5 %% of unreadable images")
    for made in (loader, bad):
        made.add_argument("--data", required=True, help="folder of images")
        made.add_argument(
            "--batches", type=count, default=16, help="timed, a multiple of --threads: workers come in turns"
        )
        made.add_argument("--repeats", type=count, default=5)
    said = "default: dali and torchvision; _whole: cut out of the whole image; _hw, _preallocated: for a GPU's JPEG decoder"
    loader.add_argument("--against", action="append", choices=list(OTHERS), help=said)
    index = command("index", measure_index, 128, help="an index of many images: time, memory, order")
    index.add_argument(
        "--images", type=count, default=20_000_000, help="65 bytes each are written to $TMPDIR, and deleted"
    )
    index.add_argument("--repeats", type=count, default=20, help="of the order's figures")
    step = command(
        "step", measure_step, 8, help="one step of the recipe's objective, by part; MaPeT's as published, too"
    )
    step.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast")
    attention = command("attention", measure_attention, 8, help="ways to compute MaPeT's attention, in turns")
    attention.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    attention.add_argument("--repeats", type=count, default=9)
    for made in (step, attention):
        made.add_argument("--model", default="vit_base_patch16_224", help="timm model name")
    step.add_argument("--repeats", type=count, default=3)
    step.add_argument(
        "--against", default="dense", choices=["dense", "none"], help="dense: MaPeT as published"
    )
    assign = command("assign", measure_assign, 32, help="token ids that change in bf16")
    assign.add_argument("--teacher", required=True, help="open_clip model name, or local-dir:PATH")
    assign.add_argument("--data", required=True, help="folder of images")
    assign.add_argument("--codebook", required=True, help="fitted on this teacher's fp32 features")
    assign.add_argument("--images", type=count, default=256)
    teacher = command("teacher", measure_teacher, 32, help="images per second of the recipe's teacher")
    teacher.add_argument("--repeats", type=count, default=5)
    teacher.add_argument(
        "--against", choices=["eager", "unsharded"], help="not compiled; under torchrun: whole on every rank"
    )
    train = command("train", measure_train, 32, help="a whole training step and its parts")
    train.add_argument(
        "--against",
        default="none",
        choices=["dense", "none"],
        help="dense: MaPeT as published, from the loader on",
    )
    scaling = command("scaling", measure_scaling, 32, help="`train` at 1, 2, 4 .. ranks of this host")
    scaling.add_argument("--ranks", type=count, default=2, help="the most")
    scaling.add_argument("--rounds", type=count, default=2)
    checkpoint = command("checkpoint", measure_checkpoint, 2, help="what a save costs the training")
    for made in (step, train):
        made.add_argument("--plot", metavar="FILE.png", type=Path, help="the breakdown as a picture")
    for made in (train, scaling, checkpoint):
        made.add_argument("--data", required=True, help="folder of images")
        made.add_argument(
            "--deepspeed_config", default=REPOSITORY / "ds_configs/zero2.json", metavar="JSON", type=Path
        )
        made.add_argument("--repeats", type=count, default=5)
        made.add_argument("--steps", type=count, default=10, help="a repeat")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse(sys.argv[1:])
    try:
        if figures := arguments.measure(arguments):
            print(json.dumps(figures))
    except (ConfigError, DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
