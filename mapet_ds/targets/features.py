"""Vectors as targets: the frozen CLIP's features, or the student's own pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch
from mapet_ds.targets.target import Target
from mapet_ds.targets.teacher import build_teacher, teacher_view


class TeacherFeatures(Target):
    """The frozen CLIP's patch features [B, L, C], in its precision, of the same crop as the student."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.teacher = build_teacher(config.teacher, device, config.train.compile)
        self.teacher.check_grid(config.grid)
        self.dim, self.ahead = self.teacher.embed_dim, config.teacher.ahead
        self.teacher_view = teacher_view(config.teacher)
        self.identity = {"teacher": self.teacher.identity, "dtype": str(self.teacher.dtype)}

    def __call__(self, batch: Batch) -> Tensor:
        return self.teacher(batch.teacher_images)


class Pixels(Target):
    """The student's view in patches of mean 0 and variance 1: float32 [B, L, 3 * patch_size ** 2].

    Values of a patch run over rows, columns, channels.

    blur: first blur the normalised image, which is zero beyond its border, by a 9 x 9 Gaussian with a sigma
        of one pixel.

    Source: SAIM, arXiv 2212.01610, released settings; MAE, arXiv 2111.06377, without blur.
    """

    teacher_view = None

    def __init__(self, config: Config, device: torch.device, blur: bool = True) -> None:
        self.patch, self.blur = config.model.patch_size, blur
        self.dim, self.identity = 3 * self.patch**2, {}
        line = torch.exp(-torch.arange(-4.0, 5.0, device=device).square() / 2)
        kernel = torch.outer(line, line)
        self.kernel = (kernel / kernel.sum()).expand(3, 1, 9, 9)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        image = F.conv2d(batch.images, self.kernel, padding=4, groups=3) if self.blur else batch.images
        patches = F.pixel_unshuffle(image, self.patch).unflatten(1, (3, -1)).flatten(3)
        patches = patches.permute(0, 3, 2, 1).flatten(2)  # from [B, channels, rows and columns, L]
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) * (variance + 1e-6).rsqrt()


def pixels_or_features(config: Config, device: torch.device) -> Target:
    """SAIM's target, which saim.target names."""
    return (Pixels if config.saim.target == "pixels" else TeacherFeatures)(config, device)
