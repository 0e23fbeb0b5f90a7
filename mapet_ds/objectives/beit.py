"""BEiT-style: masked prediction of token ids, one stream, block masks; MaPeT's baseline under equal settings.

Source: Bao et al., BEiT, arXiv 2106.08254. Departure: a plain ViT with learned absolute positions instead of a relative
position bias, so that timm's plain model takes the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mapet_ds.config import Config
from mapet_ds.objectives import Draw, Loss, block_draw, hidden_rows, mean_of
from mapet_ds.vit import beit_init, build_vit, embed, run_blocks, take_rows


class BEiT(nn.Module):
    """A mask token takes the place of each hidden patch before positions are added; a linear head names its id."""

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
        return block_draw(self.config, self.config.beit, step, first_slot, slots, len(self.vit.blocks))

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """images [B, 3, S, S]; target: token ids, long [B, L] in raster order. No host wait. Metrics: token_accuracy."""
        prefix, patches, _ = embed(self.vit, images, draw.mask, self.mask_token)
        x = run_blocks(self.vit, torch.cat([prefix, patches], dim=1), None, draw.keep)
        hidden, valid = hidden_rows(draw.mask, self.config.beit.num_hidden(self.config))
        logits = self.head(take_rows(x[:, prefix.shape[1] :], hidden))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = target.gather(1, hidden)
        losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        with torch.no_grad():
            predicted = logits.argmax(dim=-1)
            accuracy = mean_of((predicted == ids).float(), valid)
            everywhere = torch.full_like(target, -1).scatter(1, hidden, torch.where(valid, predicted, -1))
        return Loss(mean_of(losses, valid), {"token_accuracy": accuracy}, everywhere)
