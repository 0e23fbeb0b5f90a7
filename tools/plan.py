"""Predict memory, speed, input and scaling of a recipe on a cluster, before any GPU is rented.

    tools/plan.py --config mapet_ds/recipes/mapet_vitb16.yaml --gpu h100 --nodes 8 --gpus_per_node 8

The costs of any objective, student and target are counted on tensors without values, in some ten seconds.
Speeds are the data sheets' times a share that GPUs attain, which is assumed until --calibrate gives lines
that tools/benchmark.py printed on such a GPU. Every assumption is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_method
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.planning.advice import changes, report
from mapet_ds.planning.calibration import calibrate
from mapet_ds.planning.forecast import GPUS, Cluster, Request, Speeds, assumptions, predict, scaling


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


def main(argv: list[str]) -> int:
    arguments = parse(argv)
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
    sys.exit(main(sys.argv[1:]))
