"""Masked prediction of pixels, in SimMIM's way: a mask token for each hidden patch, and the L1 distance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mapet_ds.blocks import take_rows
from mapet_ds.config.knobs import Share, knobs
from mapet_ds.config.objectives import ObjectiveConfig
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import permutations
from mapet_ds.objectives.masks import hidden_rows
from mapet_ds.objectives.objective import Loss, Objective, depth_uniforms, mean_of
from mapet_ds.targets import features
from mapet_ds.vit import build_vit, embed, run_blocks


@knobs
class PixelsConfig(ObjectiveConfig):
    hidden_share: Share = 0.6
    """Share of the patches that is hidden."""
    predicts_ids = False


class Pixels(Objective):
    settings = PixelsConfig
    build_target = features.Pixels

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.config, self.num_hidden = config, config.method.num_hidden(config)
        self.vit = build_vit(config.model)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.vit.embed_dim))
        self.head = nn.Linear(self.vit.embed_dim, target_dim)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        place = (self.config.seed, step, first_slot, slots)
        mask = torch.from_numpy(permutations(*place, self.config.num_patches) < self.num_hidden)
        return Draw(mask=mask, order=None, keep=depth_uniforms(*place, len(self.vit.blocks)))

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        prefix, patches, _ = embed(self.vit, images, draw.mask, self.mask_token)
        x = run_blocks(self.vit, torch.cat([prefix, patches], dim=1), None, draw.keep)[:, prefix.shape[1] :]
        hidden, valid = hidden_rows(draw.mask, self.num_hidden)
        losses = (self.head(take_rows(x, hidden)).float() - take_rows(target, hidden)).abs().mean(dim=2)
        return Loss(mean_of(losses, valid), {})
