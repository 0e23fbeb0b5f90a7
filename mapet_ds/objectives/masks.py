"""BEiT's way of hiding patches: a mask token takes their place."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mapet_ds.config.objectives import BlockMaskConfig
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import block_masks
from mapet_ds.objectives.objective import Objective, depth_uniforms
from mapet_ds.vit import Band, beit_init, build_vit, embed, run_blocks, take_rows


def hidden_rows(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Patches of `count` rows, long [B, count], the hidden ones last; and which rows are hidden ones, bool [B, count].

    mask: bool [B, L], True = hidden, at most `count` in an image. Shapes don't depend on the mask: no host wait.
    """
    rows = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, -count:]
    return rows, mask.gather(1, rows)


class BlockMasked(Objective):
    """BEiT's way: a mask token takes the place of each patch that a rectangle hides, before positions are added, and a linear
    head is applied to what the ViT makes of it.

    Rows: [prefix, visible patches, hidden patches], as many of the last in each image, filled up with visible ones; they
    alone are updated in the last block, after which nothing reads the others.
    """

    def __init__(self, config: Config, masked: BlockMaskConfig, target_dim: int) -> None:
        super().__init__()
        self.config, self.masked = config, masked
        self.vit = beit_init(build_vit(config.model))
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.vit.embed_dim))
        self.head = nn.Linear(self.vit.embed_dim, target_dim)
        trunc_normal_(self.mask_token, std=0.02)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """Rectangles at least as large a share of the image as 16 of 196 patches."""
        config, place = self.config, (self.config.seed, step, first_slot, slots)
        min_block = max(1, round(16 / 196 * config.num_patches))
        mask = block_masks(*place, config.grid, self.masked.num_hidden(config), min_block, self.masked.exact)
        return Draw(
            mask=torch.from_numpy(mask), order=None, keep=depth_uniforms(*place, len(self.vit.blocks))
        )

    def rows(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """What the ViT makes of n patches of each image [B, n, D], all hidden ones among them; which they are; whether hidden."""
        prefix, patches, _ = embed(self.vit, images, draw.mask, self.mask_token)
        order, valid = hidden_rows(draw.mask, patches.shape[1])
        rows = torch.cat([prefix, take_rows(patches, order)], dim=1)
        count, keys = self.masked.num_hidden(self.config), rows.shape[1]
        last = Band(slice(keys - count, keys), slice(0, keys))
        x = run_blocks(self.vit, rows, [None] * (len(self.vit.blocks) - 1) + [[last]], draw.keep)
        return x, order[:, -count:], valid[:, -count:]
