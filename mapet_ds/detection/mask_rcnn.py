"""torchvision's Mask R-CNN on a plain ViT: the simple feature pyramid of ViTDet over an export's last map.

All blocks attend globally. ViTDet has window attention in most of them, which costs less and scores alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm.data
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from mapet_ds.config.finetune import BackboneConfig
from mapet_ds.config.rules import refuse_broken
from mapet_ds.errors import ConfigError
from mapet_ds.finetuning.backbone import create, load_weights


class SimpleFeaturePyramid(nn.Module):
    """Maps 4, 2, 1 and 1/2 times as large as the ViT's last one, and one of each second place of the last.

    With patches of 16 pixels their strides are 4, 8, 16, 32 and 64. The ViT's final norm is left out.

    Source: Li et al., arXiv 2203.16527, section 3; widths as in their release in detectron2.
    """

    def __init__(self, vit: Any, width: int = 256) -> None:
        super().__init__()
        vit.norm = nn.Identity()
        self.vit, self.out_channels, dim = vit, width, vit.embed_dim
        quadruple = nn.Sequential(
            _doubled(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), _doubled(dim // 2, dim // 4)
        )
        scales = [(quadruple, dim // 4), (_doubled(dim, dim // 2), dim // 2)]
        scales += [(nn.Identity(), dim), (nn.MaxPool2d(2), dim)]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale, nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width),
            )
            for scale, channels in scales
        )  # fmt: skip

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Five maps [B, width, h, w] of images [B, 3, S, S], the largest first, by torchvision's names."""
        (last,) = self.vit.forward_intermediates(images, 1, norm=False, intermediates_only=True)
        maps = {str(i): level(last) for i, level in enumerate(self.levels)}
        return maps | {"pool": maps["3"][..., ::2, ::2]}


def _doubled(channels: int, out: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, out, 2, stride=2)


def load_pyramid(
    export: str | Path, size: int, drop_path: float = 0.1, width: int = 256
) -> SimpleFeaturePyramid:
    """A fresh pyramid on the ViT of a folder that tools/export_timm.py wrote, or of any timm ViT's.

    size: the side of the square images that it takes, pixels. timm resamples positions to it, once.

    Raises:
        ConfigError: there is no such ViT, or its patches or the size don't suit a pyramid.
    """
    model = BackboneConfig(path=str(export), img_size=size, drop_path=drop_path)
    refuse_broken(model.rules())
    vit = create(model, 0, "token", drop_path_rate=drop_path)
    if not hasattr(vit, "forward_intermediates") or not hasattr(vit, "blocks"):
        raise ConfigError(
            f"{export}: {type(vit).__name__} has no blocks whose output is a map of patches: take a ViT."
        )
    patch = vit.patch_embed.patch_size[0]
    if patch & (patch - 1):
        raise ConfigError(
            f"{export} has patches of {patch} pixels, and torchvision pools from strides that are powers of "
            "two: take a ViT with patches of 8, 16 or 32."
        )
    if size % (4 * patch):
        raise ConfigError(
            f"A size of {size} pixels is not a multiple of {4 * patch}, the stride of the smallest map for "
            f"patches of {patch}: take {max(1, round(size / (4 * patch))) * 4 * patch}."
        )
    load_weights(vit, model, ("norm.",))
    return SimpleFeaturePyramid(vit, width)


def mask_rcnn(
    export: str | Path, classes: int, size: int = 1024, drop_path: float = 0.1, width: int = 256,
    **settings: Any,
) -> MaskRCNN:  # fmt: skip
    """torchvision's Mask R-CNN on the ViT of a timm folder, with fresh heads as ViTDet has them.

    It takes a list of images, float [3, h, w] in [0, 1], and in training their boxes [n, 4], labels [n] and
    masks [n, h, w]. An image is resized to a longer side of `size`, and filled up to a square, below and to
    the right, with the mean colour. Boxes and masks that it gives are in the image's own pixels.

    classes: labels are 1 to `classes`; 0 is the background.
    width: channels of the pyramid and of the heads.
    settings: torchvision's own, e.g. box_score_thresh.

    Raises:
        ConfigError: see `load_pyramid`.

    Source: Li et al., arXiv 2203.16527, and their release: two convolutions before the proposals, four before
    boxes, LayerNorm in all heads.
    """
    pyramid = load_pyramid(export, size, drop_path, width)
    patch, normal = pyramid.vit.patch_embed.patch_size[0], timm.data.resolve_model_data_config(pyramid.vit)
    sides = tuple((2 * patch * 2**i,) for i in range(5))
    anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=2),
        "box_predictor": FastRCNNPredictor(1024, classes + 1),
        "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
        "box_head": FastRCNNConvFCHead((width, 7, 7), [width] * 4, [1024], norm_layer=LayerNorm2d),
        "mask_head": MaskRCNNHeads(width, [width] * 4, 1, norm_layer=LayerNorm2d),
        "image_mean": normal["mean"],
        "image_std": normal["std"],
    }
    square = {"min_size": size, "max_size": size, "size_divisible": size}
    return MaskRCNN(pyramid, None, **square, **parts, **settings)
