"""Images with their masks: augmented by torchvision for training, resized for evaluation.

torchvision's transforms draw from torch's generator, which AugmentedBatches seeds anew for each image.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mapet_ds.config.segment import MaskedDataConfig, SegmentationConfig
from mapet_ds.data.formats import BadImage
from mapet_ds.data.index import Index
from mapet_ds.data.labelled import Bad, Batches, decode
from mapet_ds.finetuning.loader import AugmentedBatches, LabelledBatch
from mapet_ds.segmentation.masks import VOID, Masks

CROP_TRIES = 10


def resized(size: tuple[int, int], data: MaskedDataConfig, factor: float = 1.0) -> list[int]:
    """Height and width of an image of this size, (height, width), as the settings ask for, times a factor."""
    scale = factor
    if data.short_side is not None:
        scale = factor * data.short_side / min(size)
        if data.long_side is not None:
            scale = min(scale, factor * data.long_side / max(size))
    return [max(1, round(side * scale)) for side in size]


class RandomScale(v2.Transform):
    """Resizes an image and its mask by a uniform random factor on top of the size that is asked for."""

    def __init__(self, data: MaskedDataConfig) -> None:
        super().__init__()
        self.data = data

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.data.resize
        factor = low + (high - low) * torch.rand(()).item()
        return {"size": resized(F.get_size(flat_inputs[0]), self.data, factor)}  # pyright: ignore

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params["size"])


class RandomCropOfClasses(v2.Transform):
    """A random square, or less of a smaller image, that no class fills up by more than a share."""

    def __init__(self, size: int, max_share: float) -> None:
        super().__init__()
        self.size, self.max_share = size, max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image, mask = flat_inputs
        height, width = F.get_size(image)
        h, w = min(self.size, height), min(self.size, width)
        for _ in range(CROP_TRIES):
            top = int(torch.randint(height - h + 1, ()))
            left = int(torch.randint(width - w + 1, ()))
            part = mask[top : top + h, left : left + w]
            counts = torch.bincount(part[part != VOID].long())
            if len(counts) and counts.max() <= self.max_share * counts.sum():
                break
        return {"top": top, "left": left, "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class Distortion(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue, each changed with a probability of a half.

    Departure: brightness has a factor of 1 +- 0.125, where released programs add up to 32 of 255.
    """

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class PadTo(v2.Transform):
    """Fills an image up with zeros, which are the mean colour, and its mask with void, to a square."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        fill = VOID if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, [0, 0, self.size - width, self.size - height], fill=fill)


class Augmentation:
    """The training transform: size, crop, flip, colours, normalisation, padding.

    Source: MMSegmentation's pipeline for ADE20K, which BEiT and DINOv2 release theirs for.
    """

    def __init__(self, data: MaskedDataConfig, size: int, mean: Any, std: Any) -> None:
        distortion = [Distortion()] if data.distortion else []
        self.steps = v2.Compose([
            RandomScale(data), RandomCropOfClasses(size, data.max_class_share),
            v2.RandomHorizontalFlip(data.flip), *distortion, *normalising(mean, std), PadTo(size),
        ])  # fmt: skip

    def __call__(self, image: Image.Image, mask: NDArray[np.int16]) -> tuple[Tensor, Tensor]:
        """The image float32 [3, S, S], normalised, and its classes int16 [S, S]."""
        both = self.steps(tv_tensors.Image(F.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(mask)))
        return both[0].as_subclass(Tensor), both[1].as_subclass(Tensor)


def normalising(mean: Any, std: Any) -> list[v2.Transform]:
    """From 8-bit values to floats less the mean over the deviation; masks stay."""
    floats = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return [floats, v2.Normalize(list(mean), list(std))]


class MaskedBatches(AugmentedBatches):
    """A rank's micro-batches of augmented images and masks."""

    def __init__(
        self, config: SegmentationConfig, index: Index, masks: Masks, transform: Augmentation, rank: int,
        world_size: int, bad: Collection[int],
    ) -> None:  # fmt: skip
        super().__init__(config, index, transform, rank, world_size, bad)
        self.masks = masks

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.int16]]:
        image = decode(self.index.read(index))
        return image, self.masks.read(index, image.size)

    def batch(self, number: int) -> LabelledBatch:
        """The micro-batch of this number, without its draw. See `augmented`."""
        made = self.augmented(number)
        images, masks = (torch.stack(part) for part in zip(*made.samples))
        return LabelledBatch(images, masks, made.index, made.bad, made.place)


class WholeImage(NamedTuple):
    """An image to be judged."""

    image: Tensor
    """float32 [3, h, w], resized and normalised."""
    mask: Tensor
    """Its classes, int16 [H, W], at the size that is stored."""


class WholeImages(Batches):
    """A rank's share of a data set, an image an item; one rank may have an image more than another."""

    def __init__(
        self, data: MaskedDataConfig, index: Index, masks: Masks, mean: Any, std: Any, rank: int,
        world_size: int,
    ) -> None:  # fmt: skip
        self.data, self.index, self.masks, self.rank, self.world_size = data, index, masks, rank, world_size
        self.normalise = v2.Compose(normalising(mean, std))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.index), self.world_size))

    def batch(self, number: int) -> WholeImage | Bad:
        """The image of this number, or its place and the reason why it can't be read."""
        place = number * self.world_size + self.rank
        try:
            image = decode(self.index.read(place))
            mask = self.masks.read(place, image.size)
        except BadImage as reason:
            return [(place, str(reason))]
        tensor = tv_tensors.Image(F.pil_to_tensor(image))
        size = resized((image.height, image.width), self.data)
        tensor = tensor if size == [*tensor.shape[1:]] else F.resize(tensor, size)
        return WholeImage(self.normalise(tensor).as_subclass(Tensor), torch.from_numpy(mask))
