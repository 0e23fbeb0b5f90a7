"""BEiT-style masked prediction of token ids: one stream, block masks; MaPeT's baseline at equal settings.

Source: Bao et al., BEiT, arXiv 2106.08254. Its relative positions are timm's BEiT's (model.name); a plain ViT
has learned absolute ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.objectives.masks import BlockMasked
from mapet_ds.objectives.objective import Loss, TokenLoss, mean_of, token_losses


class BEiT(BlockMasked):
    """The objective whose head predicts the token id of each hidden patch."""

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__(config, config.beit, target_dim)
        self.loss = TokenLoss()

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """See Objective. target: token ids, long [B, L]. Metrics: token_accuracy."""
        x, hidden, valid = self.rows(images, draw)
        ids = target.gather(1, hidden)
        losses, predicted = token_losses(self.head, self.loss, x, ids)
        with torch.no_grad():
            accuracy = mean_of((predicted == ids).float(), valid)
            everywhere = torch.full_like(target, -1).scatter(1, hidden, torch.where(valid, predicted, -1))
        return Loss(mean_of(losses, valid), {"token_accuracy": accuracy}, everywhere)
