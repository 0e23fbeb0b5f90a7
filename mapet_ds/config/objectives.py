"""The section of each objective: its knobs, whether the teacher takes part, how many patches it hides, what contradicts it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from mapet_ds.config.knobs import Positive, Share, knobs

if TYPE_CHECKING:
    from mapet_ds.config.sections import Config

Rules = list[tuple[bool, str]]
"""(broken, the sentence for it) of each thing that must hold."""


class ObjectiveConfig:
    """The section of one objective; its name in Config is the objective's name."""

    predicts_ids: ClassVar[bool] = True
    """Whether a tokenizer takes part."""
    hidden_share: float
    """Share of the patches that is predicted; a section without this knob says by itself how many are hidden."""

    def uses_teacher(self, config: Config) -> bool:
        """Whether the frozen open_clip tower takes part."""
        return self.predicts_ids and config.tokenizer.name == "kclip" and not config.tokenizer.ids

    def num_hidden(self, config: Config) -> int:
        """Patches of an image that are predicted, at most."""
        return round(self.hidden_share * config.num_patches)

    def rules(self, config: Config) -> Rules:
        hidden, where = self.num_hidden(config), f"{config.objective}.hidden_share = {self.hidden_share}"
        return [
            (
                not 1 <= hidden < config.num_patches,
                f"{where} hides {hidden} of {config.num_patches} patches; at least one must be hidden and one visible.",
            )
        ]


@knobs
class MaPeTConfig(ObjectiveConfig):
    hidden_share: Share = 0.75
    """Share of the patches that is predicted: the last ones of the permutation (147 of 196)."""


@knobs
class BlockMaskConfig(ObjectiveConfig):
    hidden_share: Share = 0.383
    """Share of the patches that is hidden by rectangles (75 of 196)."""
    exact: bool = False
    """Hide exactly that many; else up to that many, as published, where no further rectangle fits."""


@knobs
class BEiTConfig(BlockMaskConfig):
    """Masked prediction of token ids, MaPeT's baseline. BEiT, arXiv 2106.08254."""


@knobs
class MVPConfig(BlockMaskConfig):
    """Masked regression of CLIP's features (teacher.features says which). MVP, arXiv 2203.05175."""

    loss: Literal["cosine", "smooth_l1"] = "cosine"
    """1 - cosine; or smooth L1 on features with mean 0 and variance 1 (MaskDistill)."""
    predicts_ids: ClassVar[bool] = False

    def uses_teacher(self, config: Config) -> bool:
        return True


@knobs
class SAIMConfig(ObjectiveConfig):
    """Every patch from those before it in a random order. SAIM, arXiv 2212.01610."""

    target: Literal["pixels", "features"] = "pixels"
    """pixels: blurred and normalised per patch; features: the frozen CLIP's (SemAIM)."""
    loss: Literal["mse", "l1", "cosine"] = "mse"
    """cosine: the squared distance of vectors of length 1, SemAIM's for features."""
    query_depth: Positive | None = None
    """Blocks of the decoder, a divisor of the model's depth; null: as many."""
    predicts_ids: ClassVar[bool] = False

    def uses_teacher(self, config: Config) -> bool:
        return self.target == "features"

    def num_hidden(self, config: Config) -> int:
        return config.num_patches

    def rules(self, config: Config) -> Rules:
        return []


@knobs
class ConMIMConfig(ObjectiveConfig):
    """Patch-level InfoNCE inside the image against a momentum teacher. ConMIM, arXiv 2205.09616."""

    hidden_share: Share = 0.75
    """Share of the cells that is hidden, rounded up (37 of 49)."""
    cell: Positive = 2
    """Patches along one side of a cell."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Cosines are divided by it before the softmax."""
    momentum: Share = 0.996
    """Of the teacher at the first step; a cosine takes it to 1 at the last."""
    projector_dim: Positive = 4096
    """Width of the projector's two hidden layers; its output has 256."""
    bn_group: Positive = 64
    """Consecutive images of the global batch that share BatchNorm statistics; divides the micro-batch."""
    predicts_ids: ClassVar[bool] = False

    def num_hidden(self, config: Config) -> int:
        return math.ceil(self.hidden_share * (config.grid // self.cell) ** 2) * self.cell**2

    def rules(self, config: Config) -> Rules:
        micro = config.train.micro_batch_size
        return [
            *super().rules(config),
            (
                config.grid % self.cell != 0,
                f"conmim.cell = {self.cell} does not divide the student's grid of {config.grid} patches a side.",
            ),
            (
                micro % self.bn_group != 0,
                f"conmim.bn_group = {self.bn_group} does not divide train.micro_batch_size = {micro}; BatchNorm is over whole "
                f"groups. Keep the group through a run, e.g. conmim.bn_group={math.gcd(micro, self.bn_group)}.",
            ),
        ]
