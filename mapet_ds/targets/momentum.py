"""Moving averages of the student: ConMIM's momentum teacher, and the model that fine-tuning evaluates."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch, View
from mapet_ds.objectives.conmim import ConMIM
from mapet_ds.objectives.objective import seed_weights
from mapet_ds.targets.target import Target, teacher_dtype
from mapet_ds.vit import compile_blocks


class MovingAverage(Target):
    """A whole fp32 copy of the student on every rank; an update makes it m copy + (1 - m) student."""

    ahead = False  # each update changes the next target

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.model, self.momentum = model.requires_grad_(False), momentum

    def momentum_at(self, progress: float) -> float:
        """m, when this share of the run is done."""
        return self.momentum

    @torch.no_grad()
    def after_step(self, weights: Iterable[tuple[str, Tensor]], progress: float) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            own[name].lerp_(weight.float(), 1 - self.momentum_at(progress))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.cpu().clone() for name, parameter in self.model.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


class MomentumTeacher(MovingAverage):
    """A moving average of the student, fed the whole image in a strong view. It gives keys [B, L, 256], fp32.

    Keys have length 1. Its forward is in teacher.precision. m rises along a cosine from conmim.momentum to 1
    at the run's end.

    Source: ConMIM, arXiv 2205.09616, released settings.
    """

    dim = 256
    model: ConMIM

    def __init__(self, config: Config, device: torch.device) -> None:
        seed_weights(config.seed)  # the student's first weights
        super().__init__(ConMIM(config, self.dim).to(device), config.conmim.momentum)
        if config.train.compile:
            compile_blocks(self.model)
        self.dtype = teacher_dtype(config.teacher, device)
        self.teacher_view = View(config.model.img_size, config.data.mean, config.data.std, strong=True)
        self.identity = {"dtype": str(self.dtype)}
        self.drops = config.conmim.teacher_drop_path

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        images, keep = batch.teacher_images, None
        assert images is not None
        if self.drops and batch.draw is not None:
            keep = batch.draw.keep[:, 2 * len(self.model.vit.blocks) :]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.model.project(images, keep=keep).float()

    def momentum_at(self, progress: float) -> float:
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
