"""Moving averages of the student: ConMIM's momentum teacher, and what fine-tuning evaluates."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch, View
from mapet_ds.objectives.conmim import ConMIM
from mapet_ds.objectives.objective import seed_weights
from mapet_ds.vit import compile_blocks


class MovingAverage:
    """A whole fp32 copy of the student on every rank, of which each update moves it closer: theta <- m theta + (1 - m) student."""

    ahead = False  # the next target is another one after the update

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.model, self.momentum = model.requires_grad_(False), momentum

    def note(self, target: Tensor) -> None:
        pass

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

    def metrics(self) -> dict[str, float]:
        return {}


class MomentumTeacher(MovingAverage):
    """A moving average of the student, shown the whole image in a strong view: keys [B, L, 256] of length 1, fp32.

    teacher.precision is that of its forward; m rises along a cosine from conmim.momentum to 1 at the run's end.

    Source: ConMIM, arXiv 2205.09616, released settings.
    """

    dim = 256

    def __init__(self, config: Config, device: torch.device) -> None:
        seed_weights(config.seed)  # the student's first weights
        super().__init__(ConMIM(config, self.dim).to(device), config.conmim.momentum)
        if config.train.compile:
            compile_blocks(self.model)
        bf16 = config.teacher.precision == "bf16" or (
            config.teacher.precision == "auto" and device.type == "cuda"
        )
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.teacher_view = View(config.model.img_size, config.data.mean, config.data.std, strong=True)
        self.identity = {"dtype": str(self.dtype)}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        images = batch.teacher_images
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.model.project(images).float()

    def momentum_at(self, progress: float) -> float:
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
