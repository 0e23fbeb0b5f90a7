"""SAIM: the patches of an image predicted one after the other in random order, each from those before it.

An encoder reads the patches so far, class token first. A decoder of blocks of its own asks, from a patch's
position alone, what comes there. Sorted by rank, both are plain causal attention: a content row of rank r
reads the class token and ranks 0 .. r, a query row of rank r the class token and ranks 0 .. r - 1.

Source: Qi et al., Exploring Stochastic Autoregressive Image Modeling for Visual Representation, arXiv
2212.01610. With saim.target = features, targets are the frozen CLIP's, as in SemAIM (arXiv 2312.10457).
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
from mapet_ds.errors import ConfigError
from mapet_ds.objectives.objective import Loss, Objective, depth_uniforms, rank_quarters, widened
from mapet_ds.vit import build_vit, embed, mae_init, run_block, stochastic_depth


class SAIM(Objective):
    """The objective of SAIM: vit is the encoder; its final norm goes over the decoder's query rows.

    Positions are a fixed sin-cos table, zero for the class token, that no gradient reaches. It has the
    published numbers in another order of channels.

    Raises:
        ConfigError: register tokens, no class token's position, or a width or depth that does not divide.
    """

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.config, model = config, config.model
        self.vit = vit = build_vit(model)
        depth, width = len(vit.blocks), vit.embed_dim
        queries = config.saim.query_depth or depth

        # Refuse what the streams or the table can't take.
        if vit.num_prefix_tokens != 1:
            raise ConfigError(
                "saim takes no register tokens: its streams are causal from the class token on (model.args)."
            )
        if model.args.get("no_embed_class"):
            raise ConfigError(
                "saim gives the class token a position, of zero: leave no_embed_class out of model.args."
            )
        if depth % queries:
            raise ConfigError(f"saim.query_depth = {queries} does not divide the model's depth, {depth}.")

        # Build the decoder, whose rates of stochastic depth are the encoder's first, and the head.
        drop_path = model.drop_path * ((queries - 1) / max(1, depth - 1))
        shallow = dataclasses.replace(model, drop_path=drop_path, args={**model.args, "depth": queries})
        self.decoder = build_vit(shallow).blocks
        self.head = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, target_dim))
        mae_init(self, vit, split_qkv=True)

        patches = config.num_patches
        self.content = [Band(slice(0, 1 + patches), slice(0, 1 + patches), causal=True)]
        self.query = [Band(slice(patches, 2 * patches), slice(0, patches), causal=True)]

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """A uniform permutation per slot; every patch is predicted. See Objective."""
        place = self.config.seed, step, first_slot, slots
        order = torch.from_numpy(permutations(*place, self.config.num_patches))
        keep = depth_uniforms(*place, len(self.vit.blocks) + len(self.decoder))
        return Draw(torch.ones_like(order, dtype=torch.bool), order, keep)

    def streams(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The decoder's query rows [B, L, D] in rank order, and the patch of each rank, long [B, L]."""
        assert draw.order is not None
        prefix, patches, positions = embed(self.vit, images)
        by_rank = draw.order.argsort(dim=1)
        h = torch.cat([prefix, take_rows(patches, by_rank)], dim=1)
        g = take_rows(positions.expand_as(patches), by_rank)
        depth, every = len(self.vit.blocks), len(self.vit.blocks) // len(self.decoder)
        kept = stochastic_depth([*self.vit.blocks, *self.decoder], draw.keep, h.dtype)
        recompute = self.vit.grad_checkpointing
        for i, block in enumerate(self.vit.blocks):
            h = run_block(block, h, self.content, kept[i], recompute)
            if (i + 1) % every == 0:
                j = i // every
                rows = torch.cat([h[:, :-1], g], dim=1)  # the patch of the last rank is nobody's context
                g = run_block(self.decoder[j], rows, self.query, kept[depth + j], recompute)
        return g, by_rank

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """See Objective. target: pixels or features [B, L, P]. Metrics: the loss by quarter of the ranks."""
        g, by_rank = self.streams(images, draw)
        predicted = widened(self.head(self.vit.norm(g)))
        target = take_rows(target, by_rank).to(predicted.dtype)
        if self.config.saim.loss == "cosine":
            losses = 2 - 2 * F.cosine_similarity(predicted, target, dim=-1)
        else:
            distance = F.mse_loss if self.config.saim.loss == "mse" else F.l1_loss
            losses = distance(predicted, target, reduction="none").mean(dim=-1)
        return Loss(losses.mean(dim=1).mean(), rank_quarters(losses))
