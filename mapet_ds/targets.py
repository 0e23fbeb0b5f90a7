"""What is to be predicted for each patch."""

from __future__ import annotations

import pkgutil
from typing import Any, Protocol

import torch
from torch import Tensor

from mapet_ds.config import Config, ConfigError
from mapet_ds.data import Batch
from mapet_ds.objectives import OBJECTIVES
from mapet_ds.teacher import build_teacher, teacher_mean_std
from mapet_ds.tokenizer import Codebook


class Target(Protocol):
    """A function of a batch, without gradient."""

    teacher_view: tuple[int, tuple[float, ...], tuple[float, ...]] | None
    """Size, mean and std of the second view the loader must make; None for no second view."""
    uses_student: bool
    """False: may run a batch ahead of the student."""
    identity: dict[str, Any]
    """What a checkpoint must find unchanged at resume."""

    def __call__(self, batch: Batch) -> Tensor: ...

    def after_step(self, student: torch.nn.Module, step: int) -> None:
        """Called once after each update."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""

    def metrics(self) -> dict[str, float]:
        """Figures since the last call; every rank must call it; the host waits for the GPU."""


def build_target(config: Config, device: torch.device) -> Target:
    """The target of the configured objective. Every rank must call it."""
    return pkgutil.resolve_name(OBJECTIVES[config.objective][1])(config, device)


class TokenIds:
    """k-CLIP token ids, long [B, L], of the teacher's view: the same crop as the student's.

    Raises:
        ConfigError: no codebook, or one of another teacher, crop mode or size.
    """

    uses_student = False

    def __init__(self, config: Config, device: torch.device) -> None:
        if not config.tokenizer.path:
            raise ConfigError("tokenizer.path is empty: make a codebook with tools/fit_codebook.py and name it here.")
        self.codebook = Codebook.load(config.tokenizer.path)
        self.teacher = build_teacher(config.teacher, device)
        self.teacher.check_grid(config.grid)
        self.codebook.check(self.teacher.identity, config.data, config.tokenizer.vocab_size)
        self.codebook.to(device)
        self.teacher_view = (config.teacher.img_size, *teacher_mean_std(config.teacher))
        self.identity = {"teacher": self.teacher.identity, "codebook": self.codebook.sha256, "dtype": str(self.teacher.dtype)}
        self.counts = torch.zeros(config.tokenizer.vocab_size, device=device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        ids = self.codebook.assign(self.teacher(batch.teacher_images))
        flat = ids.flatten()
        self.counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=self.counts.dtype))
        return ids

    def after_step(self, student: torch.nn.Module, step: int) -> None:
        """Nothing moves: the teacher is frozen."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def metrics(self) -> dict[str, float]:
        """Perplexity of the ids seen by all ranks since the last call, and the share of codes among them."""
        counts = self.counts.clone()
        torch.distributed.all_reduce(counts)
        self.counts.zero_()
        share = counts / counts.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        used = (counts > 0).float().mean()
        return {"codebook_perplexity": entropy.exp().item(), "codebook_used": used.item()}
