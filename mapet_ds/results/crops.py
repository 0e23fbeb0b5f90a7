"""Whether a ViT knows an image again by another crop of it. No labels are needed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor
from torchvision.transforms import v2

from mapet_ds.data.index import Index, Numbered, Selection
from mapet_ds.launch import Ranks
from mapet_ds.results.collapse import collapse_figures
from mapet_ds.results.features import FEATURES, Features, chosen, labelled_features, unit_length

SCALE, JITTER = (0.2, 1.0), (0.4, 0.4, 0.4, 0.1)
"""Share of the image's area in a crop; how far brightness, contrast, saturation and hue move."""


def crop_transform(model: Any, view: int) -> Callable[[Image.Image], Tensor]:
    """A random crop of an image, flipped and in moved colours, float32 [3, S, S] as the model wants it.

    It is drawn by a key of the pixels and the view's number, so any rank and worker draws the same.
    """
    data = resolve_model_data_config(model)
    crop = v2.RandomResizedCrop(data["input_size"][-1], SCALE, interpolation=v2.InterpolationMode.BICUBIC)
    parts = [crop, v2.RandomHorizontalFlip(), v2.ColorJitter(*JITTER), v2.ToImage()]
    parts += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data["mean"], data["std"])]
    random_view = v2.Compose(parts)

    def transform(image: Image.Image) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(image.tobytes(), view))
            return random_view(image)

    return transform


def found_again(first: Features, second: Features) -> float:
    """The share, in percent, of rows [n, D] whose most similar row of `second` [n, D] is that of their place.

    Of equally similar rows the first counts, so features that are all alike find 1 in n, as chance does.
    """
    parts, others = np.array_split(unit_length(first), -(-len(first) // 4096)), unit_length(second).T
    nearest = np.concatenate([(part @ others).argmax(axis=1) for part in parts])
    return 100 * float(np.mean(nearest == np.arange(len(first))))


def judge_crops(
    config: Any, model: Any, images: Index, limit: int, feature: str, ranks: Ranks,
    doing: Callable[[str], Any] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """How many of at most `limit` images are found again by another crop, and signs of collapse; on rank 0.

    Two crops are drawn of each image. The first looks for the most similar among all second ones. Images are
    evenly spaced over the set. Every rank must call it, and computes its share.

    config, doing: as for labelled_features. feature: mean, token or both.

    Raises:
        DataError: more than data.max_bad_share of the images are unreadable.
    """
    numbered, views = Numbered(Selection(images, limit)), []
    for view in (1, 2):
        vectors, _ = labelled_features(
            config, model, numbered, crop_transform(model, view), ranks, doing, kinds=FEATURES[feature],
            start_method="fork", section="--",
        )  # fmt: skip
        views.append(chosen(vectors, feature, [0]) if ranks.rank == 0 else None)
    first, second = views
    if first is None or second is None:
        return {}
    figures = {"own_crop_percent": found_again(first, second), "chance_percent": 100 / len(first)}
    figures |= {"images": len(first), "unreadable": len(numbered) - len(first), "width": first.shape[1]}
    return figures | collapse_figures(first)
