"""ConMIM: each hidden patch must find its own place among all patches of the same image, as a momentum teacher sees them.

The teacher is fed the whole image in a strongly jittered view of the same crop; it is the ViT to export.

Source: Yi et al., Masked Image Modeling with Denoising Contrast, arXiv 2205.09616. Departures: learned absolute positions
instead of a relative position bias. They alone could tell a patch's place, whatever it shows (docs/log.md), so what all
images of a group have in common at a position is taken off queries and keys. BatchNorm over fixed groups of slots instead
of a GPU's batch, so that no split of a batch changes the loss; no stochastic depth in the teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import cell_masks
from mapet_ds.objectives.masks import hidden_rows
from mapet_ds.objectives.objective import Loss, Objective, depth_uniforms, mean_of
from mapet_ds.vit import beit_init, build_vit, embed, run_blocks, take_rows


class GroupBatchNorm(nn.Module):
    """BatchNorm over all rows of each `group` consecutive images, in fp32, always by the batch's own statistics.

    centre: first take off each position's mean over the group, what all images have in common there.
    """

    def __init__(self, width: int, group: int, affine: bool, centre: bool = False) -> None:
        super().__init__()
        self.group, self.centre = group, centre
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> the same; B is a multiple of the group."""
        rows = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, self.group))
        rows = (rows - rows.mean(dim=1, keepdim=True) if self.centre else rows).flatten(1, 2)
        variance, mean = torch.var_mean(rows, dim=1, keepdim=True, correction=0)
        rows = (rows - mean) * (variance + 1e-5).rsqrt()
        if self.weight is not None:
            rows = rows * self.weight + self.bias
        return rows.view(x.shape).to(x.dtype)


class ConMIM(Objective):
    """The student; the momentum teacher is a copy of all its parameters (targets.MomentumTeacher)."""

    def __init__(self, config: Config, target_dim: int) -> None:
        super().__init__()
        self.config = config
        settings = config.conmim
        self.vit = beit_init(build_vit(config.model))
        width, inner = self.vit.embed_dim, settings.projector_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.projector = nn.Sequential(
            nn.Linear(width, inner, bias=False), GroupBatchNorm(inner, settings.bn_group, affine=True), nn.ReLU(),
            nn.Linear(inner, inner, bias=False), GroupBatchNorm(inner, settings.bn_group, affine=True), nn.ReLU(),
            nn.Linear(inner, target_dim, bias=False), GroupBatchNorm(target_dim, settings.bn_group, affine=False, centre=True),
        )  # fmt: skip
        trunc_normal_(self.mask_token, std=0.02)
        for module in self.projector:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """Random square cells of patches, equally many in each image."""
        config, settings = self.config, self.config.conmim
        place = config.seed, step, first_slot, slots
        mask = torch.from_numpy(cell_masks(*place, config.grid, settings.cell, settings.hidden_share))
        return Draw(mask=mask, order=None, keep=depth_uniforms(*place, len(self.vit.blocks)))

    def project(self, images: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """images [B, 3, S, S] -> [B, L, target_dim] of length 1, fp32 or wider; BatchNorm sees the prefix tokens too."""
        prefix, patches, _ = embed(self.vit, images, mask, self.mask_token)
        x = self.projector(run_blocks(self.vit, torch.cat([prefix, patches], dim=1), None, keep))[
            :, prefix.shape[1] :
        ]
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

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
        """images [B, 3, S, S]; target: keys [B, L, target_dim] of length 1, of the teacher's full view. No host wait.

        Metrics: match_accuracy, the share of hidden patches that find their own place.
        """
        hidden, valid = hidden_rows(draw.mask, self.config.conmim.num_hidden(self.config))
        queries = take_rows(self.project(images, draw.mask, draw.keep), hidden)
        with torch.autocast(images.device.type, enabled=False):
            logits = queries @ target.to(queries.dtype).transpose(1, 2) / self.config.conmim.temperature
        losses = F.cross_entropy(logits.flatten(0, 1), hidden.flatten(), reduction="none").view(hidden.shape)
        found = (logits.detach().argmax(dim=-1) == hidden).float()
        return Loss(mean_of(losses, valid), {"match_accuracy": mean_of(found, valid)})
