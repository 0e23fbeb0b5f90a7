"""CAE: ids of hidden patches, from an encoder that sees the visible ones alone and a regressor in between.

The regressor asks, from the positions of hidden patches, what the encoder would say of them. An alignment
loss holds its answers against the encoder's own output for those patches, which no gradient reaches. A
decoder predicts ids from the answers alone. So the encoder needs to know nothing of the task. The ViT is the
encoder.

Source: Chen et al., Context Autoencoder for Self-Supervised Representation Learning, arXiv 2202.03026, and
its released code. Departures:

- The last rectangles are filled up with single patches, so that all images hide as many.
- The encoder's pass over hidden patches has no stochastic depth.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from mapet_ds.blocks import SparingMlp, take_rows
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import block_masks
from mapet_ds.objectives.masks import hidden_rows
from mapet_ds.objectives.objective import Loss, Objective, TokenLoss, depth_uniforms, token_losses, widened
from mapet_ds.vit import build_vit, embed, mae_init, run_block, run_blocks, stochastic_depth


class RegressorBlock(nn.Module):
    """A block of cross attention: rows of hidden patches read visible patches and one another.

    Positions are added to queries and keys, not to values.
    """

    def __init__(self, width: int, heads: int, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(4))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.mlp = SparingMlp(width, 4 * width)
        scales = (LayerScale(width, layer_scale) if layer_scale else nn.Identity() for _ in range(2))
        self.ls1, self.ls2 = scales
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, seen: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
        """[B, h, D] -> [B, h, D]. seen: visible patches [B, v, D]. positions: theirs, then those of x.

        kept: see StreamBlock.
        """
        rows = torch.cat([seen, x], dim=1)
        q = self.q(self.norm_q(x + positions[:, seen.shape[1] :]))
        k, v = self.k(self.norm_k(rows + positions)), self.v(self.norm_v(rows))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        residual = self.ls1(self.proj(read))
        x = self.norm2(x + (residual if kept is None else residual * kept[:, 0, None, None]))
        residual = self.ls2(self.mlp(x))
        return x + (residual if kept is None else residual * kept[:, 1, None, None])


class CAE(Objective):
    """The objective of CAE: vit is the encoder, with fixed sin-cos positions, which the other parts share.

    Raises:
        ConfigError: a width that is no multiple of 4.
    """

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.config, self.vit, section, model = config, build_vit(config.model), config.cae, config.model
        self.num_hidden, width = section.num_hidden(config), self.vit.embed_dim
        first: Any = self.vit.blocks[0]
        heads = first.attn.num_heads
        rates = torch.linspace(0, model.drop_path, section.regressor_depth).tolist()
        self.regressor = nn.ModuleList(
            RegressorBlock(width, heads, rate, model.layer_scale) for rate in rates
        )
        decoder = build_vit(dataclasses.replace(model, args={**model.args, "depth": section.decoder_depth}))
        self.regressor_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder, self.decoder_norm = decoder.blocks, decoder.norm
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.head, self.loss = nn.Linear(width, target_dim), TokenLoss()

        # Linear layers begin as MAE's do, the rest as BEiT's.
        mae_init(self, self.vit)
        for weight in (self.mask_token, self.vit.cls_token, self.vit.patch_embed.proj.weight):
            trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.vit.get_parameter("patch_embed.proj.bias"))

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """Rectangles at least as large a share of the image as 16 of 196 patches. See Objective."""
        config, place = self.config, (self.config.seed, step, first_slot, slots)
        min_block = max(1, round(16 / 196 * config.num_patches))
        mask = block_masks(*place, config.grid, self.num_hidden, min_block, exact=True)
        blocks = len(self.vit.blocks) + len(self.regressor) + len(self.decoder)
        return Draw(torch.from_numpy(mask), order=None, keep=depth_uniforms(*place, blocks))

    def encode(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The ViT's output for the visible patches alone, and for the hidden ones alone.

        Gives [B, v, D] and, without gradient, [B, h, D]; then the patches, visible and hidden, long [B, L],
        and their positions [B, L, D].
        """
        order, _ = hidden_rows(draw.mask, self.config.num_patches)
        prefix, patches, positions = embed(self.vit, images)
        parts = take_rows(patches, order).tensor_split([-self.num_hidden], dim=1)
        visible, hidden = (torch.cat([prefix, part], dim=1) for part in parts)
        keep = draw.keep[:, : 2 * len(self.vit.blocks)]
        seen = run_blocks(self.vit, visible, None, keep)[:, prefix.shape[1] :]
        with torch.no_grad():
            wanted = run_blocks(self.vit, hidden, None)[:, prefix.shape[1] :]
        return seen, wanted, order, take_rows(positions.expand_as(patches), order)

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """See Objective. target: token ids, long [B, L]. Metrics: token_accuracy, alignment."""
        seen, wanted, order, positions = self.encode(images, draw)
        recompute, hidden = self.vit.grad_checkpointing, order[:, -self.num_hidden :]
        keep = draw.keep[:, 2 * len(self.vit.blocks) :]
        kept = iter(stochastic_depth([*self.regressor, *self.decoder], keep, seen.dtype))

        # Regress what the encoder would say of hidden patches.
        x = self.mask_token.expand(*hidden.shape, -1)
        for block in self.regressor:
            x = block(x, seen, positions, next(kept))
        latent = self.regressor_norm(x)
        alignment = F.mse_loss(widened(latent), widened(wanted))

        # Decode their ids from that alone, and put them back in raster order.
        x = latent + positions[:, -self.num_hidden :]
        for block in self.decoder:
            x = run_block(block, x, None, next(kept), recompute)
        ids = target.gather(1, hidden)
        losses, predicted = token_losses(self.head, self.loss, self.decoder_norm(x), ids)
        with torch.no_grad():
            accuracy = (predicted == ids).float().mean()
            everywhere = torch.full_like(target, -1).scatter(1, hidden, predicted)
        metrics = {"token_accuracy": accuracy, "alignment": alignment.detach()}
        return Loss(losses.mean() + self.config.cae.align_weight * alignment, metrics, everywhere)
