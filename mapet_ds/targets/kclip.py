"""k-CLIP as a tokenizer: a frozen CLIP and a codebook of its features."""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import build_teacher, teacher_view


class KClip:
    """A `Tokenizer`: the nearest centroid of each patch feature of the teacher. Every rank must call it.

    Raises:
        ConfigError: no codebook, or one of another teacher, crop mode or size.

    Source: MaPeT (arXiv 2306.07346), k-CLIP.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.codebook = book = Codebook.load(config.tokenizer.path)
        self.teacher = teacher = build_teacher(config.teacher, device, config.train.compile)
        teacher.check_grid(config.grid)
        book.check(teacher.identity, config.data, config.tokenizer.vocab_size)
        book.to(device)
        self.view, self.vocab_size = teacher_view(config.teacher), len(book.centroids)
        self.identity = {"teacher": teacher.identity, "codebook": book.sha256, "dtype": str(teacher.dtype)}

    def __call__(self, images: Tensor) -> Tensor:
        return self.codebook.assign(self.teacher(images))
