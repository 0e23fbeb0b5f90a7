"""The heads that make logits of a ViT's feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

Level = tuple[Tensor, Tensor]
"""A block's output: patches [B, D, h, w], and prefix tokens [B, P, D]."""


class Linear(nn.Module):
    """BatchNorm and a linear layer on each patch.

    Source: DINOv2, arXiv 2304.07193, "semantic segmentation", the linear protocol and its released head.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.classifier = nn.BatchNorm2d(width), nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, levels: Sequence[Level]) -> Tensor:
        """Logits [B, classes, h, w] of the last level."""
        return self.classifier(self.norm(levels[-1][0]))
