"""Write a codebook that stands in for a fitted one where speed is tried: centroids drawn about its features.

    python tools/trials/stand_in.py --config RECIPE tokenizer.path=FILE [a.b=value ...]

It needs neither images nor FAISS: the teacher sees noise. No run that should learn may rest on it.
"""

from __future__ import annotations

import sys

import torch

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import Config
from mapet_ds.launch import use_gpu
from mapet_ds.targets.codebook import Codebook, source_of
from mapet_ds.targets.teacher import build_teacher
from mapet_ds.terminal import answer, recipe_parser


def write(config: Config) -> None:
    """Writes tokenizer.path; this recipe's teacher is accepted with it.

    Raises:
        ConfigError: no such teacher, or its weights can't be had.
    """
    device = torch.device("cuda" if use_gpu() else "cpu")
    teacher, generator = build_teacher(config.teacher, device), torch.Generator().manual_seed(config.seed)
    side = config.teacher.img_size
    features = teacher(torch.randn(4, 3, side, side, generator=generator).to(device)).float().cpu()
    features = features.flatten(0, 1)
    drawn = torch.randn(config.tokenizer.vocab_size, features.shape[1], generator=generator)
    centroids = features.mean(0) + features.std(0) * drawn
    source = source_of(teacher.identity, config.data)
    sizes = {"tokenizer.vocab_size": config.tokenizer.vocab_size, "points": 0, "made_by": "stand_in.py"}
    Codebook(centroids, source | sizes).save(config.tokenizer.path)
    print(f"{config.tokenizer.path}: {len(centroids)} centroids drawn at random, to try speeds with.")


if __name__ == "__main__":
    arguments = recipe_parser(__doc__).parse_intermixed_args(sys.argv[1:])
    sys.exit(answer(lambda: write(load_config(arguments.config, arguments.overrides))))
