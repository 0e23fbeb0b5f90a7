"""MaPeT: masked and permuted prediction of token ids, in rank order.

Each image has its own random permutation of patches. The first ranks are visible; each later one is predicted from the
patches before it and from the *positions* of itself and those after it, so that every prediction knows the whole layout.
Attention does not care for the order of rows: sorted by rank, the attention masks are constants of the model.

Source: Baraldi et al., "Learning to Mask and Permute Visual Tokens for Vision Transformer Pre-Training", arXiv 2306.07346.
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import permutations
from mapet_ds.objectives.objective import Loss, Objective, depth_uniforms, rank_quarters, token_losses
from mapet_ds.vit import Band, build_vit, embed, run_blocks, take_rows


def attention_mask(num_hidden: int, seen: int) -> Tensor:
    """bool [2 t, 2 t + seen], True = may attend: t hidden content rows, then t query rows, each over t + seen consecutive keys
    of [t position tokens | seen, the prefix and visible patches | t hidden patches].

    With ranks counted from the first hidden patch: a content row reads the positions after its own rank, and patches up to
    it; a query row the positions from its rank on, and patches before it.
    """
    rank, key = torch.arange(num_hidden), torch.arange(2 * num_hidden + seen)
    first = torch.cat([rank + 1, rank])[:, None]
    return (first <= key) & (key < first + num_hidden + seen)


class MaPeT(Objective):
    """Rows: [position tokens | prefix, visible patches | hidden patches | queries]; keys: all but the queries.

    So each row attends to consecutive keys, as many as there are patches and prefix tokens; the first two groups to each
    other, densely. In the last block only the queries are updated: nothing reads the other rows after it.
    """

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.seed = config.seed
        self.vit = build_vit(config.model)
        width = self.vit.embed_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.head = nn.Linear(width, target_dim)
        trunc_normal_(self.mask_token, std=0.02)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

        hidden = round(config.mapet.hidden_share * config.num_patches)
        self.num_visible = config.num_patches - hidden
        seen = self.vit.num_prefix_tokens + self.num_visible
        self.register_buffer("attn_mask", attention_mask(hidden, seen), persistent=False)
        self.dense = slice(0, hidden + seen)
        self.keys = slice(0, 2 * hidden + seen)
        self.queries = slice(2 * hidden + seen, 3 * hidden + seen)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """A uniform permutation per slot; hidden are the ranks from num_visible on."""
        num_patches = self.vit.patch_embed.num_patches
        order = torch.from_numpy(permutations(self.seed, step, first_slot, slots, num_patches))
        keep = depth_uniforms(self.seed, step, first_slot, slots, len(self.vit.blocks))
        return Draw(mask=order >= self.num_visible, order=order, keep=keep)

    def _bands(self) -> list[list[Band]]:
        hidden = self.queries.stop - self.queries.start
        both = Band(slice(self.dense.stop, self.queries.stop), self.keys, self.attn_mask)
        last = Band(self.queries, self.keys, self.attn_mask[hidden:])
        return [[Band(self.dense, self.dense), both]] * (len(self.vit.blocks) - 1) + [[last]]

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """images [B, 3, S, S]; target: token ids, long [B, L] in raster order. No host wait.

        Metrics: token_accuracy, and the loss of each quarter of the predicted ranks (1: least context).
        """
        prefix, patches, positions = embed(self.vit, images)
        by_rank = draw.order.argsort(dim=1)
        hidden = by_rank[:, self.num_visible :]
        patches = take_rows(patches, by_rank)
        masks = self.mask_token + take_rows(positions.expand_as(patches), hidden)
        rows = torch.cat([masks, prefix, patches, masks], dim=1)
        x = run_blocks(self.vit, rows, self._bands(), draw.keep)
        target = target.gather(1, hidden)
        losses, predicted = token_losses(self.head, x, target)
        loss = losses.mean(dim=1).mean()
        with torch.no_grad():
            metrics = {"token_accuracy": (predicted == target).float().mean(), **rank_quarters(losses)}
            prediction = torch.full_like(by_rank, -1).scatter(1, hidden, predicted)
        return Loss(loss, metrics, prediction)
