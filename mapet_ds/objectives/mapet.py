"""MaPeT: masked and permuted prediction of token ids, in rank order.

Each image has a random permutation of patches of its own. The patches of the first ranks are visible. Each
later one is predicted from the patches before it, and from the *positions* of itself and of those after it,
so that every prediction knows the whole layout. Attention does not depend on the order of rows: sorted by
rank, all images have the same attention masks, which are constants of the model.

The paper's ablations are settings: plain permuted prediction without those positions
(mapet.position_tokens), the raster order (mapet.permute), and how many of the last ranks are hidden
(mapet.hidden_share) and predicted (mapet.predicted_share).

Source: Baraldi et al., "Learning to Mask and Permute Visual Tokens for Vision Transformer Pre-Training",
arXiv 2306.07346.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_ds.blocks import Band, take_rows
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import permutations
from mapet_ds.objectives.objective import (
    Loss,
    Objective,
    TokenLoss,
    depth_uniforms,
    rank_quarters,
    token_losses,
)
from mapet_ds.vit import build_vit, embed, mask_token_and_head, run_blocks


def attention_mask(num_hidden: int, seen: int) -> Tensor:
    """The mask bool [2 t, 2 t + seen], True = may attend, with t = num_hidden.

    Rows: t hidden patches, then t queries. Keys: t position tokens, the `seen` prefix and visible patches, t
    hidden patches. Each row attends to t + seen consecutive keys. With ranks counted from the first hidden
    patch, a hidden patch reads the positions after its own rank, and the patches up to it; a query reads the
    positions from its rank on, and the patches before it.
    """
    rank, key = torch.arange(num_hidden), torch.arange(2 * num_hidden + seen)
    first = torch.cat([rank + 1, rank])[:, None]
    return (first <= key) & (key < first + num_hidden + seen)


class MaPeT(Objective):
    """The objective of MaPeT, in two streams of one sequence.

    Rows: [position tokens | prefix, visible patches | hidden patches | queries]. All but the queries are keys
    too. The first two groups attend to each other, densely; the others by `attention_mask`. The last block
    updates the queries alone, because nothing reads the other rows after it.

    Without position tokens their rows, and their columns of the mask, are missing. There is a query for each
    predicted patch: the last of the hidden ones.
    """

    attn_mask: Tensor

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.seed, self.permute = config.seed, config.mapet.permute
        self.vit = build_vit(config.model)
        self.mask_token, self.head = mask_token_and_head(self.vit.embed_dim, target_dim)
        self.loss = TokenLoss()

        hidden = config.mapet.num_hidden(config)
        self.num_visible = config.num_patches - hidden
        self.num_predicted = config.mapet.num_predicted(config)
        self.num_tokens = hidden if config.mapet.position_tokens else 0
        seen = self.vit.num_prefix_tokens + self.num_visible
        mask = attention_mask(hidden, seen)[:, hidden - self.num_tokens :]
        mask = torch.cat([mask[:hidden], mask[-self.num_predicted :]])
        self.register_buffer("attn_mask", mask, persistent=False)
        self.dense = slice(0, self.num_tokens + seen)
        self.keys = slice(0, self.dense.stop + hidden)
        self.queries = slice(self.keys.stop, self.keys.stop + self.num_predicted)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """A uniform permutation per slot, or the raster order. The mask has the predicted patches.

        See Objective.
        """
        place, patches = (self.seed, step, first_slot, slots), self.vit.patch_embed.num_patches
        if self.permute:
            order = torch.from_numpy(permutations(*place, patches))
        else:
            order = torch.arange(patches).repeat(slots, 1)
        return Draw(
            order >= patches - self.num_predicted, order, depth_uniforms(*place, len(self.vit.blocks))
        )

    def _bands(self) -> list[list[Band]]:
        both = Band(slice(self.dense.stop, self.queries.stop), self.keys, self.attn_mask)
        last = Band(self.queries, self.keys, self.attn_mask[-self.num_predicted :])
        return [[Band(self.dense, self.dense), both]] * (len(self.vit.blocks) - 1) + [[last]]

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """See Objective. target: token ids, long [B, L].

        Metrics: token_accuracy, and the loss of each quarter of the predicted ranks (1: least context).
        """
        assert draw.order is not None

        # Sort the patches by rank, and lay out the rows.
        prefix, patches, positions = embed(self.vit, images)
        by_rank = draw.order.argsort(dim=1)
        hidden = by_rank[:, self.num_visible :]
        predicted = by_rank[:, -self.num_predicted :]
        patches = take_rows(patches, by_rank)
        masks = self.mask_token + take_rows(positions.expand_as(patches), hidden)
        tokens, queries = masks[:, : self.num_tokens], masks[:, -self.num_predicted :]
        rows = torch.cat([tokens, prefix, patches, queries], dim=1)

        # Predict the ids, and put them back in raster order.
        x = run_blocks(self.vit, rows, self._bands(), draw.keep)
        ids = target.gather(1, predicted)
        losses, likeliest = token_losses(self.head, self.loss, x, ids)
        with torch.no_grad():
            metrics = {"token_accuracy": (likeliest == ids).float().mean(), **rank_quarters(losses)}
            prediction = torch.full_like(by_rank, -1).scatter(1, predicted, likeliest)
        return Loss(losses.mean(dim=1).mean(), metrics, prediction)
