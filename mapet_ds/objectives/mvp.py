"""MVP: masked regression of a frozen CLIP's patch features, one stream, block masks.

Source: Wei et al., MVP, arXiv 2203.05175. Neither its code nor the text of its loss could be read. So the
loss is the negative cosine that EVA (arXiv 2211.07636) describes, on CLIP's patch tokens after ln_post and
projection (teacher.features). Relative positions, as BEiT has them, are timm's BEiT's (model.name).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mapet_ds.blocks import take_rows
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.objectives.masks import BlockMasked
from mapet_ds.objectives.objective import Loss, mean_of, widened


class MVP(BlockMasked):
    """The objective whose head predicts the teacher's feature of each hidden patch."""

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__(config, config.mvp, target_dim)

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """See Objective. target: teacher features [B, L, C]. Metrics: cosine."""
        x, hidden, valid = self.rows(images, draw)
        predicted = widened(self.head(x))
        target = take_rows(target, hidden).to(predicted.dtype)
        cosine = F.cosine_similarity(predicted, target, dim=-1)
        if self.config.mvp.loss == "cosine":
            losses = 1 - cosine
        else:
            normed = F.layer_norm(target, target.shape[-1:])
            losses = F.smooth_l1_loss(predicted, normed, reduction="none").mean(dim=-1)
        return Loss(mean_of(losses, valid), {"cosine": mean_of(cosine.detach(), valid)})
