"""A data set judged by a segmenter: each image once over all ranks, and a few of them as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.data.index import Index
from mapet_ds.data.labelled import Bad, report_unreadable, served
from mapet_ds.errors import DataError
from mapet_ds.launch import Ranks
from mapet_ds.segmentation.evaluation import Figures, Predictor, confusion, figures_of
from mapet_ds.segmentation.loader import WholeImage, WholeImages
from mapet_ds.segmentation.masks import Masks
from mapet_ds.segmentation.pictures import sheet, whole_row

SHOWN = 4
"""The first images of a data set that are shown."""


class Judged(NamedTuple):
    """What all ranks have found of a data set."""

    figures: Figures
    matrix: Tensor
    """As `confusion` gives it."""
    images: int
    """Those that were readable."""

    def means(self) -> dict[str, float]:
        """The figures of all classes, in percent, and the number of images."""
        accuracies = {"val_class_accuracy": self.figures.class_accuracy}
        accuracies["val_pixel_accuracy"] = self.figures.pixel_accuracy
        return {"val_miou": self.figures.miou, **accuracies, "val_images": self.images}

    def by_class(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """IoU and accuracy of each class, in percent or None, and the pixels that are truly of it."""
        iou, accuracy = self.figures.iou, self.figures.accuracy
        return {
            name: {"iou": iou[i], "accuracy": accuracy[i], "pixels": int(self.matrix[i].sum())}
            for i, name in enumerate(names)
        }


class Judging:
    """data.val, as a segmenter is judged by it.

    normal: mean and deviation that images are normalised by.
    """

    def __init__(
        self, config: SegmentationConfig, index: Index, masks: Masks, normal: tuple[Any, Any], ranks: Ranks
    ) -> None:
        self.config, self.index, self.masks, self.normal, self.ranks = config, index, masks, normal, ranks

    def _images(self, rank: int, world_size: int) -> WholeImages:
        return WholeImages(self.config.data, self.index, self.masks, *self.normal, rank, world_size)

    def __call__(self, predict: Predictor, doing: Callable[[str], None]) -> Judged:
        """The figures of all readable images, each counted once. Every rank must call it.

        Raises:
            DataError: more than data.max_bad_share of the images are unreadable, or every pixel is void.
        """
        ranks, classes = self.ranks, len(self.masks.classes.names)

        # This rank's share.
        images = self._images(ranks.rank, ranks.world_size)
        matrix, counted, bad = torch.zeros(classes, classes, dtype=torch.int64), 0, Bad()
        for number, item in enumerate(served(images, range(len(images)), self.config.data.workers, ranks)):
            doing(f"evaluating image {number} of {len(images)}")
            if not isinstance(item, WholeImage):
                bad += item
                continue
            prediction = predict(item.image.to(ranks.device), item.mask.shape)
            matrix += confusion(prediction.cpu(), item.mask, classes)
            counted += 1

        # All ranks', in whole numbers.
        total = torch.cat([matrix.flatten(), torch.tensor([counted])])
        dist.all_reduce(total, group=ranks.control)
        report_unreadable(self.config, self.index, bad, ranks)
        matrix, counted = total[:-1].view(classes, classes), int(total[-1])
        if not matrix.any():
            folder = self.masks.folder
            raise DataError(f"data.val_masks = {folder}: every pixel is void, so nothing can be judged.")
        return Judged(figures_of(matrix), matrix, counted)

    def picture(self, predict: Predictor) -> Tensor:
        """The first readable images beside true and predicted classes, [3, H, W]: the same on any ranks.

        One rank is enough. It predicts them anew, as some of them are in other ranks' shares.
        """
        images = self._images(0, 1)
        items = (item for i in range(len(images)) if isinstance(item := images[i], WholeImage))
        return sheet(
            whole_row(item, predict(item.image.to(self.ranks.device), item.mask.shape).cpu(), *self.normal)
            for item in itertools.islice(items, SHOWN)
        )
