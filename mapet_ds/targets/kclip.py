"""k-CLIP as a tokenizer: a frozen CLIP and a codebook of its features."""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import View
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import build_teacher, teacher_mean_std


class KClip:
    """A `Tokenizer`: the nearest centroid of each of the teacher's patch features. Every rank must build and call it.

    Raises:
        ConfigError: no codebook, or one of another teacher, crop mode or size.

    Source: MaPeT (arXiv 2306.07346), k-CLIP.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.codebook = Codebook.load(config.tokenizer.path)
        self.teacher = build_teacher(config.teacher, device, config.train.compile)
        self.teacher.check_grid(config.grid)
        self.codebook.check(self.teacher.identity, config.data, config.tokenizer.vocab_size)
        self.codebook.to(device)
        self.view = View(config.teacher.img_size, *teacher_mean_std(config.teacher))
        self.vocab_size = len(self.codebook.centroids)
        teacher = self.teacher
        self.identity = {
            "teacher": teacher.identity,
            "codebook": self.codebook.sha256,
            "dtype": str(teacher.dtype),
        }

    def __call__(self, images: Tensor) -> Tensor:
        return self.codebook.assign(self.teacher(images))
