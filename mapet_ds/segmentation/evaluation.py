"""The prediction of whole images, whole or in windows, and the figures of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet_ds.config.segment import SegmentationEvaluateConfig
from mapet_ds.segmentation.masks import VOID
from mapet_ds.segmentation.segmenter import Segmenter, upsampled


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """The first pixels of windows that cover a length; the last one ends with it."""
    return [*range(0, max(0, length - size), stride), max(0, length - size)]


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    """An image [3, h, w] filled up below and to the right with zeros, the mean colour."""
    return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))


class Predictor:
    """Predicts images of any size by a segmenter in evaluation mode.

    batch: windows in a forward.
    """

    def __init__(self, model: Segmenter, settings: SegmentationEvaluateConfig, batch: int) -> None:
        self.model, self.settings, self.batch = model, settings, batch

    def __call__(self, image: Tensor, size: Sequence[int]) -> Tensor:
        """The likeliest class of each pixel, long [H, W] of `size`, of a normalised image [3, h, w]."""
        logits = upsampled(self.logits(image)[None], size)[0]
        if not self.settings.flip:
            return logits.argmax(dim=0)
        mirrored = upsampled(self.logits(image.flip(2)).flip(2)[None], size)[0]
        return (logits.softmax(dim=0) + mirrored.softmax(dim=0)).argmax(dim=0)

    @torch.no_grad()
    def logits(self, image: Tensor) -> Tensor:
        """Logits [classes, h, w] of a normalised image [3, h, w], averaged where windows overlap."""
        _, height, width = image.shape
        if self.settings.mode == "whole":
            multiple = self.model.multiple
            whole = _padded(image, *(-(-side // multiple) * multiple for side in (height, width)))
            return self.model.predict(whole[None])[0, :, :height, :width]

        # Windows, row by row.
        size = self.model.size
        stride = min(self.settings.stride or max(1, 2 * size // 3), size)
        image = _padded(image, max(height, size), max(width, size))
        starts = [window_starts(side, size, stride) for side in image.shape[1:]]
        places = [(top, left) for top in starts[0] for left in starts[1]]
        windows = torch.stack([image[:, top : top + size, left : left + size] for top, left in places])
        logits = torch.cat([self.model.predict(part) for part in windows.split(self.batch)])

        # Their mean.
        total, count = logits.new_zeros(logits.shape[1], *image.shape[1:]), image.new_zeros(image.shape[1:])
        for (top, left), part in zip(places, logits):
            total[:, top : top + size, left : left + size] += part
            count[top : top + size, left : left + size] += 1
        return (total / count)[:, :height, :width]


def confusion(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Numbers of pixels, int64 [classes, classes]: rows are true classes, columns predicted ones.

    Pixels whose true class is VOID don't count.
    """
    counted = truth != VOID
    pairs = truth[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


class Figures(NamedTuple):
    """Figures of a confusion matrix, in percent."""

    miou: float
    """The mean, over the classes that are true or predicted anywhere, of `iou`."""
    class_accuracy: float
    """The mean, over the classes that are true anywhere, of `accuracy`."""
    pixel_accuracy: float
    iou: list[float | None]
    """Of each class: pixels rightly of it over those truly or predicted of it; None where there are none."""
    accuracy: list[float | None]
    """Of each class: pixels rightly of it over those truly of it; None where there are none."""


def figures_of(matrix: Tensor) -> Figures:
    """The figures of a confusion matrix in which some pixel counts."""
    counts: Any = matrix.double()
    right, true, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    iou, accuracy = 100 * right / (true + predicted - right), 100 * right / true
    values = (iou.nanmean(), accuracy.nanmean(), 100 * right.sum() / true.sum())
    lists = ([None if x != x else x for x in each.tolist()] for each in (iou, accuracy))
    return Figures(*(value.item() for value in values), *lists)
