"""Predict memory, speed, input and scaling of a recipe on a cluster, before any GPU is rented.

    tools/plan.py --config mapet_ds/recipes/mapet_vitb16.yaml --gpu h100 --nodes 8 --gpus_per_node 8

The costs of any objective, student and target are counted on tensors without values, in some ten seconds.
Speeds are the data sheets' times a share that GPUs attain, which is assumed until --calibrate gives lines
that tools/benchmark.py printed on such a GPU. Every assumption is printed. The bound beside them is computed:
each kernel at the full rate of the products, or of the memory, whichever is slower.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_method
from mapet_ds.config.shipped import ENGINES
from mapet_ds.errors import ConfigError
from mapet_ds.planning.advice import changes, report
from mapet_ds.planning.bound import bound
from mapet_ds.planning.calibration import calibrate
from mapet_ds.planning.forecast import Cluster, Request, Speeds, assumptions, predict, scaling
from mapet_ds.planning.roofline import GPUS
from mapet_ds.terminal import answer, number, recipe_parser


def parse(argv: list[str]) -> Any:
    parser = recipe_parser(__doc__)
    count, amount = number(int, 1), number(float, 0, above=True)
    parser.add_argument("--gpu", required=True, help=", ".join(GPUS))
    parser.add_argument("--nodes", type=count, default=1)
    parser.add_argument("--gpus_per_node", type=count, default=8)
    engine = ENGINES / "zero2.json"
    parser.add_argument("--engine", default=engine, metavar="JSON", help="default: ZeRO-2")
    parser.add_argument("--images", type=count, default=1_281_167, help="of the data set; ImageNet-1k's")
    for name, text in {
        "image_kbyte": "mean size of a file",
        "link_gbit": "Gbit/s of a node's adapters together",
        "storage_gbyte_s": "GB/s that a node reads",
    }.items():
        parser.add_argument(f"--{name}", type=amount, default=Cluster._field_defaults[name], help=text)
    parser.add_argument(
        "--calibrate", nargs="+", type=Path, default=[], metavar="JSON", help="lines of tools/benchmark.py"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    return parser.parse_intermixed_args(argv)


def plan(arguments: Any) -> None:
    """Prints the plan of a recipe.

    Raises:
        ConfigError: settings, files or sizes that the user can correct.
    """
    if arguments.gpu not in GPUS:
        raise ConfigError(f"--gpu {arguments.gpu} is not known; there are: {', '.join(GPUS)}.")
    config = load_config(arguments.config, arguments.overrides)
    check_method(config)
    gpu, engine = GPUS[arguments.gpu], load_deepspeed_config(arguments.engine)
    sizes = ("nodes", "gpus_per_node", "link_gbit", "storage_gbyte_s", "image_kbyte")
    cluster = Cluster(gpu, *(getattr(arguments, name) for name in sizes))
    fixed = any(word.startswith("train.micro_batch_size=") for word in arguments.overrides)
    request = Request(config, engine, cluster, arguments.images, Speeds(gpu.share, gpu.share), fixed)
    if arguments.calibrate:
        request = calibrate(request, arguments.calibrate)

    prediction: dict[str, Any] = predict(request) | {"bound": bound(request)}
    advice = changes(request.with_micro(prediction["micro_batch_size"]), prediction)
    curve = scaling(request)
    if arguments.json:
        changed = {words: other["images_per_second"] for words, other in advice}
        bounds = {words: other["bound"]["images_per_second"] for words, other in advice}
        line = {"predicted": prediction, "changes": changed, "bounds": bounds, "scaling": curve}
        print(json.dumps(line | {"assumptions": assumptions(request)}))
    else:
        print(report(request, prediction, advice, curve))


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    return answer(lambda: plan(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
