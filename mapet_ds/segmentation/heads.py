"""The heads that make logits of a ViT's feature maps.

UPerNet's and DPT's are those of transformers and segmentation_models_pytorch. They get feature maps alone, so
that the backbone is always this run's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mapet_ds.errors import ConfigError

Level = tuple[Tensor, Tensor]
"""A block's output: patches [B, D, h, w], and prefix tokens [B, P, D]."""


class Head(nn.Module):
    """Logits of the feature maps of a timm ViT, made with fresh weights.

    width: channels, where it has a choice.

    Raises:
        ConfigError: its library is not installed, or the ViT doesn't suit it.
    """

    blocks: Sequence[int]
    """The blocks whose output it takes, in order."""
    normed = False
    """Whether that output goes through the ViT's final norm."""
    multiple = 1
    """What the sides of images must be a multiple of, pixels, beside the patch."""

    def __init__(self, vit: Any, num_classes: int, width: int) -> None:
        super().__init__()

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        """Logits [B, classes, h, w]; behind them, in training, those of an auxiliary head, if it has one."""
        raise NotImplementedError


class Linear(Head):
    """BatchNorm and a linear layer on each patch of the last block.

    Source: DINOv2, arXiv 2304.07193, the linear protocol, as its program releases it.
    """

    normed = True

    def __init__(self, vit: Any, num_classes: int, width: int) -> None:
        super().__init__(vit, num_classes, width)
        self.blocks = [len(vit.blocks) - 1]
        self.norm, self.classifier = nn.BatchNorm2d(vit.embed_dim), nn.Conv2d(vit.embed_dim, num_classes, 1)
        _begin(self.classifier)

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        return [self.classifier(self.norm(levels[0][0]))]


class DPT(Head):
    """The decoder of Dense Prediction Transformers, with the class token read out by concatenation.

    Departure: no dropout, because it would not draw by slots.

    Source: Ranftl et al., arXiv 2103.13413; segmentation_models_pytorch's code.
    """

    multiple = 32

    def __init__(self, vit: Any, num_classes: int, width: int) -> None:
        super().__init__(vit, num_classes, width)
        decoder = _library("segmentation_models_pytorch.decoders.dpt.decoder", "dpt")
        initialization = _library("segmentation_models_pytorch.base.initialization", "dpt")
        patch, dim = vit.patch_embed.patch_size[0], vit.embed_dim
        if patch not in (4, 8, 16, 32):
            raise ConfigError(
                f"model.head = dpt doubles and halves feature maps, and patches of {patch} pixels don't "
                "become a quarter of an image by that: take upernet, or a ViT with patches of 8 or 16."
            )
        self.blocks = four_blocks(len(vit.blocks))
        self.decoder = decoder.DPTDecoder(
            [dim] * 4, [patch] * 4, vit.num_prefix_tokens > 0, "cat", [dim] * 4, width
        )
        self.classifier = decoder.DPTSegmentationHead(width, num_classes, upsampling=1)
        initialization.initialize_decoder(self.decoder)
        for dropout in (module for module in self.classifier.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        _begin(self.classifier.head[-1])

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        patches, prefixes = zip(*levels)
        return [self.classifier(self.decoder(list(patches), list(prefixes)))]


class UPerNet(Head):
    """Pyramid pooling and a feature pyramid over maps of four blocks, made 4, 2, 1 and 1/2 times as large.

    An auxiliary head of one convolution reads the third map. Departure: no dropout, because it would not draw
    by slots.

    Source: Xiao et al., arXiv 1807.10221; BEiT, arXiv 2106.08254, for the four maps; transformers' code.
    """

    def __init__(self, vit: Any, num_classes: int, width: int) -> None:
        super().__init__(vit, num_classes, width)
        upernet = _library("transformers.models.upernet.modeling_upernet", "upernet")
        dim = vit.embed_dim
        settings = _library("transformers", "upernet").UperNetConfig(
            num_labels=num_classes, hidden_size=width, auxiliary_in_channels=dim
        )
        self.blocks = four_blocks(len(vit.blocks))
        double, again = (nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(2))
        self.neck = nn.ModuleList([
            nn.Sequential(double, nn.BatchNorm2d(dim), nn.GELU(), again),
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            nn.Identity(),
            nn.MaxPool2d(2),
        ])  # fmt: skip
        self.decoder = upernet.UperNetHead(settings, [dim] * 4)
        self.auxiliary = upernet.UperNetFCNHead(settings, [dim] * 4)
        _begin(self.decoder.classifier)
        _begin(self.auxiliary.classifier)

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        maps = [scale(patches) for scale, (patches, _) in zip(self.neck, levels)]
        logits = [self.decoder(maps)]
        return [*logits, self.auxiliary(maps)] if self.training else logits


def _begin(classifier: Any) -> None:
    """Initialises the layer that makes the logits, as MMSegmentation's heads do."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)


def four_blocks(depth: int) -> list[int]:
    """The last blocks of a third, a half, two thirds and the whole: 3, 5, 7 and 11 of 12.

    Of less than 6 they are the last four.

    Source: BEiT's released settings for 12 and 24 blocks.

    Raises:
        ConfigError: there are less than four.
    """
    if depth < 4:
        raise ConfigError(
            f"The ViT has {depth} blocks, and this head takes four: model.head=linear takes one."
        )
    return (
        [depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1]
        if depth >= 6
        else [*range(depth)][-4:]
    )


def _library(name: str, head: str) -> Any:
    """A module of an optional library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"model.head = {head} needs {name.partition('.')[0]} ({error}): pip install 'mapet_ds[segment]'."
        ) from error


HEADS: dict[str, type[Head]] = {"linear": Linear, "dpt": DPT, "upernet": UPerNet}
"""By model.head."""
