"""Pre-train a Vision Transformer on a DeepSpeed engine.

    deepspeed --hostfile hosts mapet_ds/pretrain.py --config mapet_ds/recipes/mapet_vitb16.yaml
        --deepspeed_config ds_configs/zero2.json data.train=/data/imagenet/train run_dir=/runs/b16

The same command continues a run that was interrupted. torchrun and plain python start it too.
The loop is in run.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The launchers run this file by its path, which puts its folder first: modules in it would shadow others.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mapet_ds.training.command_line import PRETRAINING, parse_command_line  # noqa: E402


def main() -> int:
    """Pre-train by the command line; gives the exit code of run.run."""
    config, engine_config = parse_command_line(sys.argv[1:], __doc__, PRETRAINING)

    # torch and DeepSpeed take seconds to import. A mistake in the recipe is answered before, and the loader's
    # workers, which import this file, do without them.
    from mapet_ds.run import run
    from mapet_ds.task import Pretraining

    return run(Pretraining, config, engine_config)


if __name__ == "__main__":
    sys.exit(main())
