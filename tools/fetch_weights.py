"""Fetch the weights that a recipe names, for nodes without a network.

    HF_HOME=/shared/huggingface python tools/fetch_weights.py --config RECIPE [a.b=value ...]
    HF_HOME=/shared/huggingface python tools/fetch_weights.py --offline --config RECIPE [a.b=value ...]

The first command downloads the teacher's weights and those of model.init_from, where the recipe names a tag.
The second one asks no network, and ends with code 2 where a job on such a node would lack a file.
"""

from __future__ import annotations

import os
import sys

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_method
from mapet_ds.config.sections import TIMM
from mapet_ds.terminal import answer, recipe_parser

NOWHERE = "http://127.0.0.1:9"
"""A proxy that is not there: what is not fetched through Hugging Face's library finds no network either."""


def fetch(path: str, overrides: list[str]) -> None:
    """Prints the file of each weight that the recipe names.

    Raises:
        ConfigError: a mistake in the recipe, or weights that can't be had.
    """
    config = load_config(path, overrides)
    check_method(config)
    found = {}
    if config.method.uses_teacher(config) and config.teacher.weights != "random":
        from mapet_ds.targets.towers import weights_file

        found[f"teacher {config.teacher.name}"] = weights_file(config.teacher)
    if (source := config.model.init_from or "").startswith(TIMM):
        from mapet_ds.weights import timm_tag_file

        found[f"model.init_from = {source}"] = str(
            timm_tag_file(source.removeprefix(TIMM), f"model.init_from = {source}")
        )
    for name, file in found.items():
        print(f"{name}: {file}")
    if not found:
        print("This recipe names no weights that would be downloaded.")


def main(argv: list[str]) -> int:
    parser = recipe_parser(__doc__)
    parser.add_argument(
        "--offline", action="store_true", help="ask no network: only look whether all is there"
    )
    arguments = parser.parse_intermixed_args(argv)
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one rank of a host looks
        return 0
    if arguments.offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "http_proxy": NOWHERE, "https_proxy": NOWHERE}
    return answer(lambda: fetch(arguments.config, arguments.overrides))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
