"""MVP: masked regression of a frozen CLIP's own patch features, one stream, block masks.

Source: Wei et al., MVP, arXiv 2203.05175, of which neither code nor the text of the loss could be read: the loss is the
negative cosine that EVA (arXiv 2211.07636) describes, on ln_post and projection of CLIP's patch tokens (teacher.features).
Departure: learned absolute positions instead of a relative position bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mapet_ds.config import Config
from mapet_ds.objectives import Draw, Loss, block_draw, hidden_rows, mean_of
from mapet_ds.vit import beit_init, build_vit, embed, run_blocks, take_rows


class MVP(nn.Module):
    """A mask token takes the place of each hidden patch before positions are added; a linear head gives its feature."""

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.config = config
        self.vit = beit_init(build_vit(config.model))
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.vit.embed_dim))
        self.head = nn.Linear(self.vit.embed_dim, target_dim)
        trunc_normal_(self.mask_token, std=0.02)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        return block_draw(self.config, self.config.mvp, step, first_slot, slots, len(self.vit.blocks))

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """images [B, 3, S, S]; target: teacher features [B, L, C] in raster order. No host wait. Metrics: cosine."""
        prefix, patches, _ = embed(self.vit, images, draw.mask, self.mask_token)
        x = run_blocks(self.vit, torch.cat([prefix, patches], dim=1), None, draw.keep)
        hidden, valid = hidden_rows(draw.mask, self.config.mvp.num_hidden(self.config))
        predicted = self.head(take_rows(x[:, prefix.shape[1] :], hidden))
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        target = take_rows(target, hidden).to(predicted.dtype)
        cosine = F.cosine_similarity(predicted, target, dim=-1)
        if self.config.mvp.loss == "cosine":
            losses = 1 - cosine
        else:
            normed = F.layer_norm(target, target.shape[-1:])
            losses = F.smooth_l1_loss(predicted, normed, reduction="none").mean(dim=-1)
        return Loss(mean_of(losses, valid), {"cosine": mean_of(cosine.detach(), valid)})
