"""k-CLIP as a tokenizer: a frozen CLIP and a codebook of its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import build_teacher
from mapet_ds.targets.towers import teacher_view
from mapet_ds.weights import shapes_only


class KClip:
    """A `Tokenizer`: the nearest centroid of each patch feature of the teacher. Every rank must call it.

    Raises:
        ConfigError: no codebook, or one of another teacher, crop mode or size.

    Source: MaPeT (arXiv 2306.07346), k-CLIP.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        book = None if shapes_only() else Codebook.load(config.tokenizer.path)
        self.teacher = teacher = build_teacher(config.teacher, device, config.train.compile)
        teacher.check_grid(config.grid)
        self.identity: dict[str, Any] = {"teacher": teacher.identity, "dtype": str(teacher.dtype)}
        if book:
            book.check(teacher.identity, config.data, config.tokenizer.vocab_size)
            self.identity["codebook"] = book.sha256
        else:
            book = Codebook(torch.empty(config.tokenizer.vocab_size, teacher.embed_dim), {})
        self.codebook = book.to(device)
        self.view, self.vocab_size = teacher_view(config.teacher), len(book.centroids)

    def __call__(self, images: Tensor) -> Tensor:
        return self.codebook.assign(self.teacher(images))
