"""Pictures of classes: an image beside the true ones and those that are predicted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from mapet_ds.data.batch import unnormalised
from mapet_ds.segmentation.loader import WholeImage
from mapet_ds.training.metrics import token_colours

LONGEST = 384
"""The longer side at which a whole image is shown, at most, pixels."""


def overlay(views: Tensor, classes: Tensor) -> Tensor:
    """Views [B, 3, H, W] in [0, 1] under the colours of classes, long [B, H, W]; VOID is grey."""
    return 0.4 * views + 0.6 * token_colours(classes).movedim(3, 1)


def rows(views: Tensor, truth: Tensor, predicted: Tensor) -> Tensor:
    """Views [B, 3, H, W] in [0, 1], each beside the same under true and predicted classes: [B, 3, 3, H, W].

    Classes are long [B, H, W].
    """
    return torch.stack([views, overlay(views, truth), overlay(views, predicted)], dim=1)


def whole_row(item: WholeImage, predicted: Tensor, mean: Any, std: Any) -> Tensor:
    """An image, its true classes and the predicted ones, long [H, W], made small: [3, 3, h, w]."""
    scale = min(1.0, LONGEST / max(item.mask.shape))
    size = [max(1, round(side * scale)) for side in item.mask.shape]
    view = F.interpolate(
        unnormalised(item.image, mean, std)[None], size=size, mode="bilinear", antialias=True
    )
    maps = torch.stack([item.mask, predicted]).float()[:, None]
    truth, predicted = F.interpolate(maps, size=size, mode="nearest").long()
    return rows(view.clamp(0, 1), truth, predicted)[0]


def sheet(each: Iterable[Tensor]) -> Tensor:
    """Rows of pictures [3, 3, h, w] of any sizes below each other, on white: [3, H, W]."""
    parts = [*each]
    height, width = (max(part.shape[i] for part in parts) for i in (2, 3))
    filled = [F.pad(part, (0, width - part.shape[3], 0, height - part.shape[2]), value=1.0) for part in parts]
    return make_grid(torch.cat(filled), nrow=3, padding=2, pad_value=1.0)
