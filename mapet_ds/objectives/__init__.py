"""An objective hides patches and predicts a target for each of them; one method a file, looked up here by name.

To add one: its file in this folder, a line in OBJECTIVES, its section in config.py, a recipe.
"""

from __future__ import annotations

import pkgutil
from typing import NamedTuple, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet_ds.config import Config
from mapet_ds.draws import Purpose, uniforms

OBJECTIVES = {
    # name: (objective, target)
    "mapet": ("mapet_ds.objectives.mapet:MaPeT", "mapet_ds.targets:TokenIds"),
}


class Draw(NamedTuple):
    """The random decisions for one micro-batch, functions of (seed, step, slot)."""

    mask: Tensor
    """bool [B, L], True = hidden from the student, hence predicted."""
    order: Tensor | None
    """long [B, L], rank of each patch in its image's permutation, 0 first; None where nothing is permuted."""
    keep: Tensor
    """float [B, 2 * depth], uniforms of the stochastic depth decisions."""

    def to(self, device: torch.device) -> Draw:
        return Draw(*(None if x is None else x.to(device, non_blocking=True) for x in self))


class Loss(NamedTuple):
    """What a forward gives: a mean per image first, then over images, so that no split of a batch changes it."""

    loss: Tensor
    """Scalar with gradient."""
    metrics: dict[str, Tensor]
    """Detached device scalars; reading them makes the host wait."""
    prediction: Tensor | None = None
    """For token targets: predicted ids, long [B, L] in raster order, -1 where nothing is predicted."""


class Objective(Protocol):
    """An nn.Module that owns the student."""

    vit: VisionTransformer

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """The draw of consecutive slots of a step, on the CPU."""

    def __call__(self, images: Tensor, target: Tensor, draw: Draw) -> Loss: ...


def build_objective(config: Config) -> Objective:
    """The configured objective, initialised from the run's seed: equal on every rank."""
    torch.manual_seed(int(uniforms(config.seed, Purpose.INITIALISATION, 0, 0, 1, 1)[0, 0] * 2**53))
    return pkgutil.resolve_name(OBJECTIVES[config.objective][0])(config)


def depth_uniforms(seed: int, step: int, first_slot: int, slots: int, depth: int) -> Tensor:
    """float32 [slots, 2 * depth] for Draw.keep."""
    return torch.from_numpy(uniforms(seed, Purpose.DEPTH, step, first_slot, slots, 2 * depth)).float()
