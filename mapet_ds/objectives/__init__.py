"""An objective hides patches and predicts a target for each of them; one method a file, looked up here by name.

docs/extending.md adds one: its file in this folder, a line in OBJECTIVES, its section in objective_config.py and Config.
"""

from __future__ import annotations

import pkgutil
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mapet_ds.config.sections import LOGITS, Config
from mapet_ds.draws import Purpose, block_masks, uniforms
from mapet_ds.config.objectives import BlockMaskConfig
from mapet_ds.vit import Band, beit_init, build_vit, embed, run_blocks, take_rows

OBJECTIVES = {
    # name: (objective, target)
    "mapet": ("mapet_ds.objectives.mapet:MaPeT", "mapet_ds.targets.targets:token_ids"),
    "beit": ("mapet_ds.objectives.beit:BEiT", "mapet_ds.targets.targets:token_ids"),
    "mvp": ("mapet_ds.objectives.mvp:MVP", "mapet_ds.targets.targets:TeacherFeatures"),
    "saim": ("mapet_ds.objectives.saim:SAIM", "mapet_ds.targets.targets:pixels_or_features"),
    "conmim": ("mapet_ds.objectives.conmim:ConMIM", "mapet_ds.targets.targets:MomentumTeacher"),
}


class Draw(NamedTuple):
    """The random decisions for one micro-batch, functions of (seed, step, slot)."""

    mask: Tensor | None
    """bool [B, L], True = hidden from the student, hence predicted; None where nothing is hidden."""
    order: Tensor | None
    """long [B, L], rank of each patch in its image's permutation, 0 first; None where nothing is permuted."""
    keep: Tensor
    """float [B, decisions], uniforms of the stochastic depth decisions, two a block."""

    def to(self, device: torch.device) -> Draw:
        return Draw(*(None if x is None else x.to(device, non_blocking=True) for x in self))


class Loss(NamedTuple):
    """What a forward gives: a mean per image first, then over images, so that no split of a batch changes it."""

    loss: Tensor
    """Scalar with gradient."""
    metrics: dict[str, Tensor]
    """Detached device scalars; reading them makes the host wait."""
    prediction: Tensor | None = None
    """For token targets: predicted ids, long [B, L] in raster order, -1 where nothing is predicted; for classes: float [B,
    classes], logits."""


class Objective(Protocol):
    """An nn.Module that owns the student."""

    vit: VisionTransformer

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """The draw of consecutive slots of a step, on the CPU."""

    def __call__(self, images: Tensor, target: Tensor, draw: Draw) -> Loss: ...


def build_objective(config: Config, target_dim: int) -> Objective:
    """The configured objective, initialised from the run's seed: equal on every rank.

    target_dim: what its target has for each patch: number of token ids, or width of a vector.
    """
    seed_weights(config.seed)
    return pkgutil.resolve_name(OBJECTIVES[config.objective][0])(config, target_dim)


def seed_weights(seed: int) -> None:
    """Set torch's generator for the initial weights of a run."""
    torch.manual_seed(int(uniforms(seed, Purpose.INITIALISATION, 0, 0, 1, 1)[0, 0] * 2**53))


def depth_uniforms(seed: int, step: int, first_slot: int, slots: int, depth: int) -> Tensor:
    """float32 [slots, 2 * depth] for Draw.keep."""
    return torch.from_numpy(uniforms(seed, Purpose.DEPTH, step, first_slot, slots, 2 * depth)).float()


def hidden_rows(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Patches of `count` rows, long [B, count], the hidden ones last; and which rows are hidden ones, bool [B, count].

    mask: bool [B, L], True = hidden, at most `count` in an image. Shapes don't depend on the mask: no host wait.
    """
    rows = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, -count:]
    return rows, mask.gather(1, rows)


def mean_of(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid rows of each image [B, n], then over images."""
    return ((values * valid).sum(dim=1) / valid.sum(dim=1)).mean()


def rank_quarters(losses: Tensor) -> dict[str, Tensor]:
    """Mean of each quarter of losses [B, n] in rank order, as loss_rank_quarter_1 (least context) .. 4."""
    quarters = losses.detach().tensor_split(4, dim=1)
    return {f"loss_rank_quarter_{i}": quarter.mean() for i, quarter in enumerate(quarters, start=1)}


def token_losses(head: nn.Module, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [B, n] of the head's logits of rows x [B, n, D] at ids [B, n], fp32 or wider; and the likeliest ids.

    Never more than LOGITS logits are held: beyond that, images are taken in groups whose logits the backward pass makes
    anew, one more product with the head.
    """

    def score(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 can't tell 8192 logits apart
        losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return losses, logits.detach().argmax(dim=-1)

    images = max(1, LOGITS // (ids.shape[1] * head.out_features))
    if images >= len(x):
        return score(x, ids)
    parts = [checkpoint(score, *part, use_reentrant=False) for part in zip(x.split(images), ids.split(images), strict=True)]
    losses, predicted = (torch.cat(part) for part in zip(*parts, strict=True))
    return losses, predicted


class BlockMasked(nn.Module):
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
        return Draw(mask=torch.from_numpy(mask), order=None, keep=depth_uniforms(*place, len(self.vit.blocks)))

    def rows(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """What the ViT makes of n patches of each image [B, n, D], all hidden ones among them; which they are; whether hidden."""
        prefix, patches, _ = embed(self.vit, images, draw.mask, self.mask_token)
        order, valid = hidden_rows(draw.mask, patches.shape[1])
        rows = torch.cat([prefix, take_rows(patches, order)], dim=1)
        count, keys = self.masked.num_hidden(self.config), rows.shape[1]
        last = Band(slice(keys - count, keys), slice(0, keys))
        x = run_blocks(self.vit, rows, [None] * (len(self.vit.blocks) - 1) + [[last]], draw.keep)
        return x, order[:, -count:], valid[:, -count:]
