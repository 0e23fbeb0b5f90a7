"""The interface of an objective, and what several share: initial weights, means, the loss of token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mapet_ds.config.objectives import ObjectiveConfig
from mapet_ds.config.sections import LOGITS, Config
from mapet_ds.data.batch import Draw
from mapet_ds.draws import Purpose, uniforms
from mapet_ds.errors import ShapeError
from mapet_ds.vit import Graph, ViT


class Loss(NamedTuple):
    """The result of a forward. Means are per image, then over images: no split of a batch changes them."""

    loss: Tensor
    """Scalar with gradient."""
    metrics: dict[str, Tensor]
    """Detached device scalars. Reading one makes the host wait."""
    prediction: Tensor | None = None
    """Ids, long [B, L] in raster order, -1 where none is predicted; or logits, float [B, classes]."""


class Objective(nn.Module, ABC):
    """A module that owns the student, hides patches from it and returns the loss of its predictions.

    It is built as Objective(config, target_dim), see methods.build_objective.
    """

    settings: ClassVar[type[ObjectiveConfig]]
    """The section `own` of a recipe that names the class; those in the package have theirs in Config."""
    build_target: ClassVar[Callable[[Config, torch.device], Any]]
    """The target, where a recipe names the class; those in the package have theirs in methods.py."""
    vit: ViT

    @abstractmethod
    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """The draw of consecutive slots of a step, on the CPU. A thread calls it ahead of the step."""
        ...

    @abstractmethod
    def forward(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """The loss of images [B, 3, S, S]. Never makes the host wait.

        target: [B, L] or [B, L, C] in raster order. draw: the draw of these images.
        """
        ...

    def __call__(self, images: Tensor, target: Tensor, draw: Draw) -> Loss:
        """See forward.

        Raises:
            ShapeError: images, target and draw don't fit the student or each other.
        """
        embed: Any = self.vit.patch_embed
        side, patches = embed.img_size[0], embed.num_patches
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ShapeError(
                f"images have the shape {list(images.shape)}; the student takes [B, 3, {side}, {side}]."
            )
        batch = len(images)
        if target.shape[:2] != (batch, patches):
            raise ShapeError(
                f"target has the shape {list(target.shape)}; {batch} images of {patches} patches want "
                f"[{batch}, {patches}] ids, or [{batch}, {patches}, C] vectors."
            )
        for name, drawn in zip(Draw._fields, draw):
            if drawn is not None and len(drawn) != batch:
                raise ShapeError(
                    f"draw.{name} is of {len(drawn)} images, not {batch}: draw(0, 0, {batch}) fits."
                )
        return super().__call__(images, target, draw)

    @torch.no_grad()
    def patch_predictions(self, images: Tensor, target: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Each patch's prediction held against its target: [B, L] by name, in raster order. See forward.

        Of token ids: `prediction`, long, the likeliest id, -1 where nothing is predicted; `hit` and `top5`,
        bool, whether the target is the likeliest id or among the five likeliest. Of vectors: `distance`,
        float, 1 - cosine of prediction and target, NaN where nothing is predicted.

        The module `head` must make the predictions, for equally many patches in each image: the hidden ones
        by rank or in raster order, after visible ones where an image hides fewer.
        """
        assert draw.mask is not None
        outputs: list[Tensor] = []
        head = self.get_submodule("head")
        hook = head.register_forward_hook(lambda _, __, rows: outputs.append(rows.float()))
        loss = self(images, target, draw)
        hook.remove()

        # The patch of each row of the head.
        rows, num_patches = torch.cat(outputs), target.shape[1]
        rank = torch.arange(num_patches, device=target.device) if draw.order is None else draw.order
        patch = (rank + num_patches * draw.mask).argsort(dim=1)[:, -rows.shape[1] :]
        wanted = target.take_along_dim(patch if target.ndim == 2 else patch[:, :, None], dim=1)

        # From rows to patches.
        if target.is_floating_point():
            values, empty = 1 - F.cosine_similarity(rows, wanted.float(), dim=-1), torch.nan
        else:
            likeliest = rows.topk(min(5, rows.shape[2])).indices
            values, empty = (likeliest == wanted[:, :, None]).any(dim=-1), False
        values = values.where(draw.mask.gather(1, patch), empty)
        everywhere = values.new_full(draw.mask.shape, empty).scatter(1, patch, values)
        if target.is_floating_point():
            return {"distance": everywhere}
        assert loss.prediction is not None
        return {"prediction": loss.prediction, "hit": loss.prediction == target, "top5": everywhere}


def seed_weights(seed: int) -> None:
    """Sets torch's generator for the initial weights of a run."""
    torch.manual_seed(int(uniforms(seed, Purpose.INITIALISATION, 0, 0, 1, 1)[0, 0] * 2**53))


def depth_uniforms(seed: int, step: int, first_slot: int, slots: int, depth: int) -> Tensor:
    """`Draw.keep` for so many blocks: float32 [slots, 2 * depth]."""
    return torch.from_numpy(uniforms(seed, Purpose.DEPTH, step, first_slot, slots, 2 * depth)).float()


def widened(x: Tensor) -> Tensor:
    """x in fp32, or unchanged where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_of(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid rows of each image [B, n], then over images."""
    return ((values * valid).sum(dim=1) / valid.sum(dim=1)).mean()


def rank_quarters(losses: Tensor) -> dict[str, Tensor]:
    """Mean of each quarter of losses [B, n] in rank order, as loss_rank_quarter_1 (least context) .. 4."""
    quarters = losses.detach().tensor_split(4, dim=1)
    return {f"loss_rank_quarter_{i}": quarter.mean() for i, quarter in enumerate(quarters, start=1)}


class TokenLoss(Graph):
    """The cross-entropy of logits [B, n, K] at ids [B, n], fp32 or wider, and the likeliest ids."""

    def forward(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = widened(logits)  # bf16 can't tell 8192 logits apart
        losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return losses, logits.detach().argmax(dim=-1)


def token_losses(head: nn.Linear, loss: TokenLoss, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [B, n] of the head's logits for rows x [B, n, D] at ids [B, n], and the likeliest ids.

    Never more than LOGITS logits are held: beyond that, images are taken in groups whose logits the backward
    pass makes anew, which costs one more product with the head.
    """

    def score(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return loss(head(x), ids)

    images = max(1, LOGITS // (ids.shape[1] * head.out_features))
    if images >= len(x):
        return score(x, ids)
    groups = zip(x.split(images), ids.split(images), strict=True)
    parts = [checkpoint(score, *group, use_reentrant=False) for group in groups]
    losses, predicted = (torch.cat(part) for part in zip(*parts, strict=True))
    return losses, predicted
