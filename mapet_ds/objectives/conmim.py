"""ConMIM: each hidden patch must find its place among its image's patches, as a momentum teacher sees them.

The teacher sees the whole image, in a strongly jittered view of the same crop. Its ViT is the one to export.

Source: Yi et al., Masked Image Modeling with Denoising Contrast, arXiv 2205.09616. Departure: BatchNorm sees
fixed groups of slots, not a GPU's batch, so that no split of a batch changes the loss.

Positions alone could tell a patch's place, whatever it shows (docs/log.md). With conmim.centre, what a
group's images have in common at a position is therefore taken off queries and keys. The published program
does not do so. It has relative positions, which timm's BEiT has too (model.name).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mapet_ds.blocks import take_rows
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import cell_masks
from mapet_ds.errors import ShapeError
from mapet_ds.objectives.masks import hidden_rows
from mapet_ds.objectives.objective import Loss, Objective, depth_uniforms, mean_of, widened
from mapet_ds.vit import Graph, beit_init, build_vit, embed, run_blocks


class GroupBatchNorm(nn.Module):
    """BatchNorm over all rows of each `group` consecutive images, in fp32, always by their own statistics.

    centre: first subtract each position's mean over the group, which all its images have in common.
    """

    def __init__(self, width: int, group: int, affine: bool = True, centre: bool = False) -> None:
        super().__init__()
        self.group, self.centre = group, centre
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D].

        Raises:
            ShapeError: B is no multiple of the group.
        """
        if len(x) % self.group:
            raise ShapeError(
                f"{len(x)} images are no multiple of conmim.bn_group = {self.group}: BatchNorm is over whole "
                "groups. Take more images, or set conmim.bn_group to a divisor of their number."
            )
        rows = widened(x).unflatten(0, (-1, self.group))
        rows = (rows - rows.mean(dim=1, keepdim=True) if self.centre else rows).flatten(1, 2)
        variance, mean = torch.var_mean(rows, dim=1, keepdim=True, correction=0)
        rows = (rows - mean) * (variance + 1e-5).rsqrt()
        if self.weight is not None and self.bias is not None:
            rows = rows * self.weight + self.bias
        return rows.view(x.shape).to(x.dtype)


class Projector(Graph, nn.Sequential):
    """Three linear layers, each with its BatchNorm."""


class ConMIM(Objective):
    """The student of ConMIM. Its momentum teacher is a copy of all its parameters (targets/momentum.py)."""

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.config = config
        self.vit = build_vit(config.model)
        width, inner = self.vit.embed_dim, config.conmim.projector_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        linear, norm = partial(nn.Linear, bias=False), partial(GroupBatchNorm, group=config.conmim.bn_group)
        first = linear(width, inner), norm(inner), nn.ReLU()
        second = linear(inner, inner), norm(inner), nn.ReLU()
        last = linear(inner, target_dim), norm(target_dim, affine=False, centre=config.conmim.centre)
        self.projector = Projector(*first, *second, *last)
        trunc_normal_(self.mask_token, std=0.02)
        for module in self.projector:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
        beit_init(self, self.vit, config.conmim.init)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """Random square cells of patches, equally many in each image. See Objective.

        With conmim.teacher_drop_path, `keep` goes on with the teacher's blocks.
        """
        config, place = self.config, (self.config.seed, step, first_slot, slots)
        mask = cell_masks(*place, config.grid, config.conmim.cell, config.conmim.hidden_share)
        blocks = len(self.vit.blocks) * (2 if config.conmim.teacher_drop_path else 1)
        return Draw(torch.from_numpy(mask), order=None, keep=depth_uniforms(*place, blocks))

    def project(self, images: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """images [B, 3, S, S] -> one vector a patch, [B, L, target_dim] of length 1, fp32 or wider.

        mask, keep: as in Draw. None hides nothing, keeps all residuals. BatchNorm sees the prefix tokens too.
        """
        prefix, patches, _ = embed(self.vit, images, mask, self.mask_token)
        x = run_blocks(self.vit, torch.cat([prefix, patches], dim=1), None, keep)
        return F.normalize(widened(self.projector(x)[:, prefix.shape[1] :]), dim=-1)

    @torch.no_grad()
    def patch_predictions(self, images: Tensor, target: Tensor, draw: Draw) -> dict[str, Tensor]:
        """See Objective. Gives `distance`, and `hit`: whether a patch finds its own place in its image."""
        assert draw.mask is not None
        queries = self.project(images, draw.mask)
        own = torch.arange(target.shape[1], device=target.device)
        matched = (queries @ target.transpose(1, 2)).argmax(dim=-1) == own
        distance = 1 - F.cosine_similarity(queries, target, dim=-1)
        return {"hit": matched & draw.mask, "distance": distance.where(draw.mask, torch.nan)}

    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """See Objective. target: the teacher's keys of its full view, [B, L, target_dim] of length 1.

        Metrics: match_accuracy, the share of hidden patches that find their own place.
        """
        hidden, valid = hidden_rows(draw.mask, self.config.conmim.num_hidden(self.config))
        keep = draw.keep[:, : 2 * len(self.vit.blocks)]
        queries = take_rows(self.project(images, draw.mask, keep), hidden)
        with torch.autocast(images.device.type, enabled=False):
            logits = queries @ target.to(queries.dtype).transpose(1, 2) / self.config.conmim.temperature
        losses = F.cross_entropy(logits.flatten(0, 1), hidden.flatten(), reduction="none").view(hidden.shape)
        matched = (logits.detach().argmax(dim=-1) == hidden).float()
        return Loss(mean_of(losses, valid), {"match_accuracy": mean_of(matched, valid)})
