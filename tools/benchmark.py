"""Measure on this machine, each sub-command printing one JSON line.

    tools/benchmark.py loader --data DIR      img/s of the loader, of DALI's own reader, of torchvision
    tools/benchmark.py bad --data DIR         img/s of the loader where 5 % of the images are unreadable
    tools/benchmark.py index --images N       an index of so many: opening, look-ups, order, first batch
    tools/benchmark.py step                   forward and backward, by part; MaPeT's also as published
    tools/benchmark.py teacher                the recipe's frozen teacher, compiled if the recipe is
    tools/benchmark.py assign --teacher NAME --data DIR --codebook FILE    ids that change in bf16
    tools/benchmark.py train --data DIR       a whole training step, and its parts alone (also under torchrun)
    tools/benchmark.py scaling --data DIR     the same at 1, 2, 4 .. ranks of this host
    tools/benchmark.py checkpoint --data DIR  what a save costs the training
    tools/benchmark.py machine                versions, tools, and the ceilings of a GPU (also under torchrun)
    tools/benchmark.py allreduce              bytes a second of a sum over all ranks (under torchrun)
    tools/benchmark.py storage --data DIR     bytes a second of the images (also under torchrun)

What is compared is measured in turns in one process, so that ratios hold on a machine that others use too.
CPU seconds count all threads and child processes. Settings are a recipe's with `a.b=value` on top.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.loaders import OTHERS

from mapet_ds.config.shipped import ENGINES, RECIPES
from mapet_ds.errors import UserError
from mapet_ds.terminal import answer, number, option_parser

RECIPE = RECIPES / "mapet_vitb16.yaml"
ENGINE = ENGINES / "zero2.json"
count = number(int, 1)


def add_machines(command: Callable[..., Any]) -> None:
    """Adds the benchmarks of the machine itself: its GPUs, links and storage."""
    command("machine", "machines", 1, "what the GPUs, the links and the tools here are")
    allreduce = command("allreduce", "machines", 1, "bytes a second of a sum over all ranks")
    allreduce.add_argument("--repeats", type=count, default=20)
    allreduce.add_argument("--mebibytes", type=count, nargs="+", default=[1, 16, 256])
    storage = command("storage", "machines", 1, "bytes a second of the images, read in random order")
    storage.add_argument("--repeats", type=count, default=3)
    storage.add_argument("--data", required=True, help="folder of images")
    storage.add_argument("--images", type=count, default=2000, help="read a repeat by each host")
    storage.add_argument("--index", type=Path, metavar="DIR", help="the list of the images, kept there")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)

    def command(name: str, module: str, batch_size: int, summary: str) -> Any:
        made = commands.add_parser(name, help=summary)
        made.set_defaults(module=module)
        option = made.add_argument
        option("--config", default=RECIPE, metavar="YAML", type=Path, help="a recipe; default: ViT-B/16's")
        option("--batch_size", type=count, default=batch_size)
        option("--threads", type=count, default=2, help="CPU threads; torchvision's workers")
        option("--device", default="auto", help="cuda, cpu or auto")
        option("overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's")
        return made

    loader = command("loader", "loaders", 32, "images per second of three loaders")
    bad = command("bad", "loaders", 32, "images per second with 5 %% of unreadable images")
    index = command("index", "indexes", 128, "an index of many images: time, memory, order")
    step = command("step", "steps", 8, "one step of the recipe's objective, by part")
    assign = command("assign", "teachers", 32, "token ids that change in bf16")
    teacher = command("teacher", "teachers", 32, "images per second of the recipe's teacher")
    train = command("train", "runs", 32, "a whole training step and its parts")
    scaling = command("scaling", "runs", 32, "`train` at 1, 2, 4 .. ranks of this host")
    checkpoint = command("checkpoint", "runs", 2, "what a save costs the training")

    repeats = {loader: 5, bad: 5, index: 20, step: 3, teacher: 5, train: 5, scaling: 5, checkpoint: 5}
    for made, times in repeats.items():
        made.add_argument("--repeats", type=count, default=times)
    for made in (loader, bad, assign, train, scaling, checkpoint):
        made.add_argument("--data", required=True, help="folder of images")
    for made in (loader, bad):
        turns = "timed, a multiple of --threads: workers come in turns"
        made.add_argument("--batches", type=count, default=16, help=turns)
    for made in (step, train):
        made.add_argument("--plot", metavar="FILE.png", type=Path, help="the breakdown as a picture")
        made.add_argument("--trace", metavar="FILE.json.gz", type=Path, help="its steps, for Perfetto")
    for made in (train, scaling, checkpoint):
        made.add_argument("--deepspeed_config", default=ENGINE, metavar="JSON", type=Path)
        made.add_argument("--steps", type=count, default=10, help="a repeat")

    readers = "default: dali and torchvision; _whole: cut from the whole image; others: a GPU's decoder"
    loader.add_argument("--against", action="append", choices=list(OTHERS), help=readers)
    index.add_argument("--images", type=count, default=20_000_000, help="65 bytes each, in $TMPDIR")
    step.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast")
    step.add_argument("--model", default="vit_base_patch16_224", help="timm model name")
    for made, default in ((step, "dense"), (train, "none")):
        twin = "dense: MaPeT as published"
        made.add_argument("--against", default=default, choices=["dense", "none"], help=twin)
    assign.add_argument("--teacher", required=True, help="open_clip model name, or local-dir:PATH")
    assign.add_argument("--codebook", required=True, help="fitted on this teacher's fp32 features")
    assign.add_argument("--images", type=count, default=256)
    other = "not compiled; under torchrun: whole on every rank"
    teacher.add_argument("--against", choices=["eager", "unsharded"], help=other)
    scaling.add_argument("--ranks", type=count, default=2, help="the most")
    scaling.add_argument("--rounds", type=count, default=2)
    add_machines(command)
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> None:
    """Prints the figures of a benchmark; ranks other than the first have none.

    Its module is imported here: a benchmark needs no more of DALI, DeepSpeed and FAISS than it measures.
    """
    module = importlib.import_module(f"benchmarks.{vars(arguments).pop('module')}")
    try:
        figures = getattr(module, f"measure_{arguments.benchmark}")(arguments)
    except OSError as error:
        raise UserError(str(error)) from error
    if figures:
        print(json.dumps(figures))


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    sys.exit(answer(lambda: measure(words)))
