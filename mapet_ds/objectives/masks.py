"""BEiT's way of hiding patches: a mask token takes their place."""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_ds.blocks import Band, take_rows
from mapet_ds.config.objectives import BlockMaskConfig
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import block_masks
from mapet_ds.objectives.objective import Objective, depth_uniforms
from mapet_ds.vit import beit_init, build_vit, embed, mask_token_and_head, run_blocks


def hidden_rows(mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """`count` patches of each image, long [B, count], the hidden ones last; and whether each is hidden, bool.

    mask: a `Draw.mask`, True = hidden, at most `count` an image. Shapes don't depend on it: no host wait.
    """
    assert mask is not None
    rows = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, -count:]
    return rows, mask.gather(1, rows)


class BlockMasked(Objective):
    """An objective that hides rectangles of patches and applies a linear head to the ViT's output.

    A mask token takes the place of each hidden patch before positions are added. Rows: [prefix, visible
    patches, hidden patches]. The last group has equally many rows in each image, filled up with visible
    patches; the last block updates these rows alone, because nothing reads the others after it.

    Where positions are relative, patches stay in raster order, so that one bias serves all images. The last
    block picks the same rows, each with its line of the bias.
    """

    def __init__(self, config: Config, masked: BlockMaskConfig, target_dim: int) -> None:
        super().__init__()
        self.config, self.masked = config, masked
        self.vit = build_vit(config.model)
        self.mask_token, self.head = mask_token_and_head(self.vit.embed_dim, target_dim)
        beit_init(self, self.vit, masked.init)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """Rectangles at least as large a share of the image as 16 of 196 patches. See Objective."""
        config, place = self.config, (self.config.seed, step, first_slot, slots)
        min_block = max(1, round(16 / 196 * config.num_patches))
        mask = block_masks(*place, config.grid, self.masked.num_hidden(config), min_block, self.masked.exact)
        return Draw(torch.from_numpy(mask), order=None, keep=depth_uniforms(*place, len(self.vit.blocks)))

    def rows(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """The ViT's output for n patches of each image, all hidden ones among them.

        Gives the output [B, n, D], the patches, long [B, n], and which of them are hidden, bool [B, n].
        """
        prefix, patches, _ = embed(self.vit, images, draw.mask, self.mask_token)
        order, valid = hidden_rows(draw.mask, patches.shape[1])
        count, first = self.masked.num_hidden(self.config), prefix.shape[1]
        keys = first + patches.shape[1]
        if self.config.model.relative:
            last = first + order[:, -count:]
        else:
            patches, last = take_rows(patches, order), [Band(slice(keys - count, keys), slice(0, keys))]
        rows, dense = torch.cat([prefix, patches], dim=1), [None] * (len(self.vit.blocks) - 1)
        x = run_blocks(self.vit, rows, [*dense, last], draw.keep)
        return x, order[:, -count:], valid[:, -count:]
