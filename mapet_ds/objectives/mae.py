"""MAE: pixels of hidden patches, from an encoder that sees the visible ones alone and a light decoder.

The encoder's rows are a quarter of the image's, so a step costs little. A decoder of narrower blocks of its
own gets its output, with a mask token in the place of each hidden patch. The ViT is the encoder.

Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mapet_ds.blocks import Band, take_rows
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import permutations
from mapet_ds.objectives.masks import hidden_rows
from mapet_ds.objectives.objective import Loss, Objective, depth_uniforms, widened
from mapet_ds.vit import build_vit, embed, mae_init, run_block, run_blocks, sincos_positions


class MAE(Objective):
    """The objective of MAE: vit is the encoder. Both halves have fixed sin-cos positions.

    Decoder rows: [prefix, visible patches | hidden patches]. All attend to all; the last block updates the
    hidden ones alone, because no loss reads the others. The decoder has neither LayerScale nor stochastic
    depth.

    Raises:
        ConfigError: a width that is no multiple of 4.
    """

    positions: Tensor

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.config, self.vit, section = config, build_vit(config.model), config.mae
        self.num_hidden, width = section.num_hidden(config), section.decoder_width
        sizes = {"depth": section.decoder_depth, "embed_dim": width, "num_heads": section.decoder_heads}
        model = dataclasses.replace(config.model, drop_path=0.0, layer_scale=None)
        decoder = build_vit(dataclasses.replace(model, args={**model.args, **sizes}))
        self.decoder_embed = nn.Linear(self.vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder, self.norm, self.head = decoder.blocks, decoder.norm, nn.Linear(width, target_dim)
        mae_init(self, self.vit)
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", sincos_positions(config.grid, width), persistent=False)
        keys = self.vit.num_prefix_tokens + config.num_patches
        self.last = Band(slice(keys - self.num_hidden, keys), slice(0, keys))

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """Uniformly random patches, equally many in each image. See Objective."""
        place = self.config.seed, step, first_slot, slots
        ranks = torch.from_numpy(permutations(*place, self.config.num_patches))
        return Draw(ranks < self.num_hidden, order=None, keep=depth_uniforms(*place, len(self.vit.blocks)))

    def encode(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The ViT's output for prefix and visible patches, and the patches: visible, then hidden ones.

        Gives [B, P + v, D] and long [B, L]; either part in raster order.
        """
        order, _ = hidden_rows(draw.mask, self.config.num_patches)
        prefix, patches, _ = embed(self.vit, images)
        rows = torch.cat([prefix, take_rows(patches, order[:, : -self.num_hidden])], dim=1)
        return run_blocks(self.vit, rows, None, draw.keep), order

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """See Objective. target: pixels [B, L, P]."""
        x, order = self.encode(images, draw)

        # Put mask tokens in, and say of each patch where it is.
        x = self.decoder_embed(x)
        prefix = x[:, : self.vit.num_prefix_tokens]
        masks = self.mask_token.expand(len(x), self.num_hidden, -1)
        patches = torch.cat([x[:, prefix.shape[1] :], masks], dim=1)
        positions = self.positions.to(patches.dtype)  # DeepSpeed casts weights to bf16, and no buffer
        patches = patches + take_rows(positions.expand_as(patches), order)

        # Decode, and compare.
        x = torch.cat([prefix, patches], dim=1)
        for i, block in enumerate(self.decoder, start=1):
            bands = [self.last] if i == len(self.decoder) else None
            x = run_block(block, x, bands, None, self.vit.grad_checkpointing)
        predicted = widened(self.head(self.norm(x)))
        wanted = take_rows(target, order[:, -self.num_hidden :]).to(predicted.dtype)
        return Loss(F.mse_loss(predicted, wanted), {})
