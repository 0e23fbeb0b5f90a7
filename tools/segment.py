"""Train a head, or a whole ViT, to segment images, on the engine and with the exact resume of pre-training.

    deepspeed --num_gpus 1 tools/segment.py --config mapet_ds/recipes/segment_linear_vitb16_ade20k.yaml
        --deepspeed_config ds_configs/zero2.json
        model.path=/runs/b16/timm data.train=/data/ADEChallengeData2016 data.val=/data/ADEChallengeData2016
        run_dir=/runs/b16_ade20k

model.path is a folder that tools/export_timm.py wrote. The same command continues a run that was interrupted.

A run that is done is judged on other images by

    python tools/segment.py --evaluate RUN [--out FILE.json] data.val=IMAGES data.val_masks=MASKS
        evaluate.mode=whole evaluate.flip=true
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The launchers run this file by its path, which puts its folder first. Its programs would shadow modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mapet_ds.errors import ConfigError  # noqa: E402
from mapet_ds.segmentation.finished import evaluation_settings  # noqa: E402
from mapet_ds.terminal import answer, option_parser, refuse  # noqa: E402
from mapet_ds.training.command_line import SEGMENTATION, parse_command_line  # noqa: E402


def evaluate(argv: list[str]) -> int:
    """Judges a finished run as the command line says; gives the exit code. Every rank must call it."""
    parser = option_parser(__doc__)
    parser.add_argument("--evaluate", required=True, type=Path, metavar="RUN", help="the run_dir of a run")
    parser.add_argument("--out", type=Path, metavar="JSON", help="the file of figures to write")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the run's")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = evaluation_settings(arguments.evaluate, arguments.overrides)
        if arguments.out and not (arguments.out.parent.is_dir() and not arguments.out.is_dir()):
            raise ConfigError(
                f"--out {arguments.out} can't be written: name a file in a folder that is there."
            )
    except ConfigError as error:
        refuse(parser, error)

    def work() -> None:
        import torch.distributed as dist

        from mapet_ds.launch import init_distributed
        from mapet_ds.segmentation.finished import evaluate_finished, report

        ranks = init_distributed()
        try:
            figures = evaluate_finished(config, ranks)
        finally:
            dist.destroy_process_group()
        if ranks.rank == 0:
            report(figures, arguments.out)

    return answer(work, writes=arguments.out)


def main() -> int:
    """Train or evaluate as the command line says; see run.run for the exit code."""
    if any(word.partition("=")[0] == "--evaluate" for word in sys.argv[1:]):
        return evaluate(sys.argv[1:])
    config, engine_config = parse_command_line(sys.argv[1:], __doc__, SEGMENTATION)

    # Torch and DeepSpeed come late, so that a mistake in the recipe is answered at once.
    from mapet_ds.run import run
    from mapet_ds.segmentation.task import Segmentation

    return run(Segmentation, config, engine_config)


if __name__ == "__main__":
    sys.exit(main())
