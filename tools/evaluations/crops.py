"""tools/evaluate.py crops: what a model has learnt of images without labels, beside fresh weights."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

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


def evaluate_crops(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """A sentence and the figures of the model and of fresh weights; empty but on rank 0.

    Every rank must call it.

    Raises:
        ConfigError: no such model, or it lacks --feature.
        DataError: images that can't be read, or too many unreadable ones.
    """
    import torch.distributed as dist

    from mapet_ds.config.finetune import FinetuneConfig, LabelledDataConfig
    from mapet_ds.config.running import TrainConfig
    from mapet_ds.data.index import open_index
    from mapet_ds.errors import ConfigError
    from mapet_ds.launch import init_distributed
    from mapet_ds.results.crops import judge_crops
    from mapet_ds.results.features import WORDS, judged_feature, kinds_of
    from mapet_ds.results.probe import device_of, load_timm

    device, found = device_of(arguments.device), dict[str, dict[str, Any]]()
    models = {
        weights: load_timm(arguments.model, arguments.arch, weights == "untrained", arguments.seed)
        for weights in ("trained", "untrained")
    }
    feature = arguments.feature or judged_feature(models["trained"])
    if feature != "mean" and "token" not in kinds_of(models["trained"]):
        raise ConfigError(f"--feature {feature}: this model has no class token; leave it out.")
    names = ("workers", "max_bad_share", "exif_orientation")
    data = LabelledDataConfig(train=arguments.images, **{name: getattr(arguments, name) for name in names})
    config = FinetuneConfig(data=data, train=TrainConfig(micro_batch_size=arguments.batch_size))
    ranks = init_distributed()._replace(device=device)
    try:
        with tempfile.TemporaryDirectory() as cache:
            index = ranks.first_then_all(lambda: open_index(arguments.images, Path(cache, "images")))
            for weights, model in models.items():
                found[weights] = judge_crops(config, model, index, arguments.max_images, feature, ranks)
    finally:
        dist.destroy_process_group()
    if ranks.rank != 0:
        return [], {}
    lines = [sentence(weights, WORDS[feature], figures) for weights, figures in found.items()]
    return lines, {"model": str(arguments.model), "feature": feature, **found}
