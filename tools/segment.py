"""Train a head, or a whole ViT, to segment images, on the engine and with the exact resume of pre-training.

    deepspeed --num_gpus 1 tools/segment.py --config mapet_ds/recipes/segment_linear_vitb16_ade20k.yaml
        --deepspeed_config ds_configs/zero2.json
        model.path=/runs/b16/timm data.train=/data/ADEChallengeData2016 data.val=/data/ADEChallengeData2016
        run_dir=/runs/b16_ade20k

model.path is a folder that tools/export_timm.py wrote. The same command continues a run that was interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The launchers run this file by its path, which puts its folder first. Its programs would shadow modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mapet_ds.training.command_line import SEGMENTATION, parse_command_line  # noqa: E402


def main() -> int:
    """Train as the command line says; see run.run for the exit code."""
    config, engine_config = parse_command_line(sys.argv[1:], __doc__, SEGMENTATION)

    # Torch and DeepSpeed come late, so that a mistake in the recipe is answered at once.
    from mapet_ds.run import run
    from mapet_ds.segmentation.task import Segmentation

    return run(Segmentation, config, engine_config)


if __name__ == "__main__":
    sys.exit(main())
