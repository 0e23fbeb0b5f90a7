"""Pre-train a Vision Transformer on a DeepSpeed engine.

    deepspeed --hostfile hosts mapet_ds/pretrain.py --config mapet_ds/recipes/mapet_vitb16.yaml
        --deepspeed_config ds_configs/zero2.json data.train=/data/imagenet/train run_dir=/runs/b16

The same command continues a run that was interrupted. torchrun and plain python start it too. The story is in run.py.
"""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

# The launchers run this file by its path, which puts its folder first: modules in it would shadow installed ones.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mapet_ds.config.rules import parse_command_line  # noqa: E402
from mapet_ds.config.sections import Config, ConfigError, RunConfig  # noqa: E402


def main(description: str = __doc__, settings: type[RunConfig] = Config, run: str = "mapet_ds.run:Run") -> int:
    """Exit code 0: the run is at its end or was asked to stop; 2: a setting, the data or a checkpoint must be corrected.

    run: where the class of the run is, which takes these settings.
    """
    config, engine_config = parse_command_line(sys.argv[1:], description, settings)
    # torch and DeepSpeed take seconds to import: a mistake in the recipe is answered before, and the loader's
    # spawned workers, which import this file, do without them.
    from mapet_ds.training.checkpoint import ResumeError
    from mapet_ds.data.index import DataError
    from mapet_ds.launch import init_distributed

    try:
        ranks = init_distributed(config.train.hang_seconds)
        pkgutil.resolve_name(run)(config, engine_config, ranks).train()
    except (ConfigError, DataError, ResumeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
