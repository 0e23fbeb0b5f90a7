"""A timm ViT and a head that gives each pixel a class: the objective of segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.data.batch import Draw
from mapet_ds.errors import ConfigError
from mapet_ds.finetuning.backbone import OnTimm, create, load_weights, refuse_more_state
from mapet_ds.objectives.objective import Loss, seed_weights
from mapet_ds.segmentation.heads import HEADS
from mapet_ds.segmentation.masks import VOID
from mapet_ds.segmentation.norm import group_norms


class Segmenter(OnTimm):
    """Cross-entropy of each pixel's class, on the logits of `head` brought to the size of the image.

    A pixel that is void adds nothing to the sum over pixels, and counts in their number, as in released
    programs. So the loss is a mean per image, and no split of a batch changes it.

    Raises:
        ConfigError: timm can't build the ViT, or the weights are of another architecture.
    """

    def __init__(self, config: SegmentationConfig, num_classes: int) -> None:
        seed_weights(config.seed)
        model = config.model
        vit = _build_backbone(config)
        super().__init__(config.seed, vit)
        self.frozen, self.auxiliary_weight = model.frozen, model.auxiliary_weight
        self.head = HEADS[model.head](vit, num_classes, model.width)
        if self.size % self.multiple:
            raise ConfigError(
                f"model.img_size = {self.size} is not a multiple of {self.multiple}, which model.head = "
                f"{model.head} needs."
            )
        group_norms(self.head, model.bn_group)
        if model.frozen:
            vit.requires_grad_(False)
        if not self.head.normed:
            vit.norm.requires_grad_(False)  # no loss reads it

    @property
    def size(self) -> int:
        """Side of the square images that are learnt from, pixels."""
        return self.vit.patch_embed.img_size[0]

    @property
    def multiple(self) -> int:
        """What height and width of an image must be a multiple of, pixels."""
        return math.lcm(self.vit.patch_embed.patch_size[0], self.head.multiple)

    def train(self, mode: bool = True) -> Segmenter:
        """Sets the mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.vit.eval()
        return self

    def logits(self, images: Tensor, draw: Draw | None = None) -> list[Tensor]:
        """Logits [B, classes, h, w] of images [B, 3, H, W], at the head's own sizes; see Head.

        Without a draw nothing is dropped.
        """
        images = self.prepare(images, None if self.frozen else draw)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            levels = self.vit.forward_intermediates(
                images, self.head.blocks, return_prefix_tokens=True, norm=self.head.normed,
                intermediates_only=True,
            )  # fmt: skip
        return self.head(levels)

    def predict(self, images: Tensor) -> Tensor:
        """fp32 logits [B, classes, H, W] of images [B, 3, H, W], in evaluation mode."""
        return upsampled(self.logits(images)[0], images.shape[2:])

    def forward(self, images: Tensor, target: Tensor, draw: Draw | None = None) -> Loss:
        """The loss of images [B, 3, S, S] at classes int16 [B, S, S], VOID where none counts.

        The host waits for nothing.
        """
        logits, truth = self.logits(images, draw), target.long()
        losses = [
            F.cross_entropy(
                upsampled(each, truth.shape[1:]), truth, ignore_index=VOID, reduction="none"
            ).mean()
            for each in logits
        ]
        main, *auxiliary = losses
        loss = main + self.auxiliary_weight * sum(auxiliary)
        metrics = {"loss_auxiliary": auxiliary[0].detach()} if auxiliary else {}
        return Loss(loss, metrics, logits[0].detach())


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B, classes, h, w] at another size, (height, width), in fp32."""
    return F.interpolate(logits.float(), size=[*size], mode="bilinear")


def _build_backbone(config: SegmentationConfig) -> Any:
    """The timm ViT with its weights loaded."""
    model, depth = config.model, config.model.drop_path
    vit = create(model, 0, "token", drop_path_rate=depth)
    if config.evaluate.mode == "whole":
        if not hasattr(vit, "dynamic_img_size"):
            raise ConfigError(
                f"evaluate.mode = whole resamples positions to each image, and timm's {type(vit).__name__} "
                "can't: take evaluate.mode=slide."
            )
        vit = create(model, 0, "token", drop_path_rate=depth, dynamic_img_size=True)
    refuse_more_state(vit)
    if not hasattr(vit, "forward_intermediates") or not hasattr(vit, "blocks"):
        raise ConfigError(f"{type(vit).__name__} has no blocks whose output is a map of patches: take a ViT.")
    if not model.untrained:
        load_weights(vit, model, () if HEADS[model.head].normed else ("norm.",))
    return vit
