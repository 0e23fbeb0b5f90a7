"""Fine-tune a timm model on labelled images, on the engine and with the exact resume of pre-training.

    deepspeed --num_gpus 8 tools/finetune.py --config mapet_ds/recipes/finetune_mapet_vitb16.yaml
        --deepspeed_config ds_configs/zero2.json
        model.path=/runs/b16/timm data.train=/data/imagenet/train data.val=/data/imagenet/val run_dir=/runs/b16_finetuned

model.path is a folder that tools/export_timm.py wrote. The same command continues a run that was interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The launchers run this file by its path, which puts its folder first: programs in it would shadow installed modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mapet_ds.config.finetune import FinetuneConfig  # noqa: E402
from mapet_ds.pretrain import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(__doc__, FinetuneConfig, "mapet_ds.finetuning.task:Finetuning"))
