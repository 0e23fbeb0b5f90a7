"""How often a model knows an image again by another crop, for tools/evaluate.py."""

from __future__ import annotations

import argparse
import json
from typing import Any

from evaluations.figures import write_figures
from evaluations.images import opened, read_settings

from mapet_ds.errors import ConfigError

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.


def sentence(weights: str, words: str, figures: dict[str, Any]) -> str:
    """A line of what was found."""
    found, chance = figures["own_crop_percent"], figures["chance_percent"]
    rank, cosine = figures["effective_rank"], figures["feature_cosine"]
    most = min(figures["images"], figures["width"])
    return (
        f"Own crop found {found:.2f} % (by chance {chance:.2f} %), effective rank {rank:.1f} of {most}, mean "
        f"cosine {cosine:.3f} ({words}; {weights} weights; {figures['images']} images)"
    )


def evaluate_crops(arguments: argparse.Namespace) -> None:
    """Prints how often a crop finds its image, of a model and of fresh weights, and writes it to --out.

    Raises:
        ConfigError: no such model, or it lacks --feature.
        DataError: images that can't be read, or too many unreadable ones.
    """
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.crops import judge_crops
    from mapet_ds.results.features import WORDS, judged_feature, kinds_of
    from mapet_ds.results.probe import device_of, load_timm

    device, config = device_of(arguments.device), read_settings(arguments)
    models = {
        weights: load_timm(arguments.model, arguments.arch, weights == "untrained", arguments.seed)
        for weights in ("trained", "untrained")
    }
    feature = arguments.feature or judged_feature(models["trained"])
    if feature != "mean" and "token" not in kinds_of(models["trained"]):
        raise ConfigError(f"--feature {feature}: this model has no class token; leave it out.")
    ranks = init_distributed()._replace(device=device)
    try:
        with opened(arguments.images, ranks) as index:
            found = {
                weights: judge_crops(config, model, index, arguments.max_images, feature, ranks)
                for weights, model in models.items()
            }
    finally:
        dist.destroy_process_group()
    if ranks.rank != 0:
        return
    lines = [sentence(weights, WORDS[feature], figures) for weights, figures in found.items()]
    figures = {"model": str(arguments.model), "feature": feature, **found}
    print(json.dumps(figures) if arguments.json else "\n".join(lines))
    write_figures(arguments.out, figures)
