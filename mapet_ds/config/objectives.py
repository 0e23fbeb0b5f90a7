"""The section of each objective: its knobs, its need of a teacher, its hidden patches, its contradictions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from mapet_ds.config.knobs import NonNegative, Positive, Share, knobs

if TYPE_CHECKING:
    from mapet_ds.config.sections import Config


Init = Literal["timm", "beit"]


class ObjectiveConfig:
    """The section of one objective. Its name in Config is the objective's, or `own`."""

    predicts_ids: ClassVar[bool] = True
    """Whether a tokenizer takes part."""
    feature: ClassVar[str] = "mean"
    """What its ViT is judged by where nothing is named: mean of the patches, class token, or both."""
    needs_table: ClassVar[str] = ""
    """The reason why a student must have an absolute position table; empty: relative positions will do."""
    hidden_share: float
    """Share of the patches that is predicted. A section without this knob overrides `num_hidden` and
    `rules`."""

    def uses_teacher(self, config: Config) -> bool:
        """Whether the frozen open_clip tower takes part."""
        return self.predicts_ids and config.tokenizer.name == "kclip" and not config.tokenizer.ids

    def num_hidden(self, config: Config) -> int:
        """Number of patches of an image that are predicted, at most."""
        return round(self.hidden_share * config.num_patches)

    def rules(self, config: Config) -> Iterator[str]:
        """Yields a sentence for each contradiction between this section and the others."""
        hidden, patches = self.num_hidden(config), config.num_patches
        if not 1 <= hidden < patches:
            yield (
                f"{config.section}.hidden_share = {self.hidden_share} hides {hidden} of {patches} patches; "
                "at least one must be hidden and one visible."
            )


@knobs
class MaPeTConfig(ObjectiveConfig):
    """Masked and permuted prediction of token ids. MaPeT, arXiv 2306.07346."""

    hidden_share: Share = 0.75
    """Share of the patches that is hidden: the last ones of the permutation (147 of 196); 1: all of them."""
    predicted_share: Share | None = None
    """Share of the patches that is predicted, the last of the hidden ones; null: all hidden ones."""
    position_tokens: bool = True
    """Each row reads the positions of the patches that it doesn't see; false: plain permuted prediction."""
    permute: bool = True
    """A random order of the patches for each image; false: row by row from the top left."""
    needs_table: ClassVar[str] = "its two streams have rows in another order in each image"

    def num_predicted(self, config: Config) -> int:
        """Number of patches of an image that are predicted."""
        share = self.hidden_share if self.predicted_share is None else self.predicted_share
        return round(share * config.num_patches)

    def rules(self, config: Config) -> Iterator[str]:
        hidden, predicted, patches = self.num_hidden(config), self.num_predicted(config), config.num_patches
        if hidden < 1:
            yield f"mapet.hidden_share = {self.hidden_share} hides 0 of {patches} patches; hide one at least."
        elif not 1 <= predicted <= hidden:
            yield (
                f"mapet.predicted_share = {self.predicted_share} predicts {predicted} of {patches} patches, "
                f"and mapet.hidden_share = {self.hidden_share} hides {hidden} of them: predict one at least, "
                "and none that is not hidden."
            )


@knobs
class BlockMaskConfig(ObjectiveConfig):
    """What the objectives that hide BEiT's rectangles have in common."""

    hidden_share: Share = 0.383
    """Share of the patches that is hidden by rectangles (75 of 196)."""
    exact: bool = False
    """Hide exactly that many; else up to that many, as published, where no further rectangle fits."""
    init: Init = "timm"
    """The spread of the initial weights: timm's; or beit, cut at one standard deviation as BEiT's program
    does, the patch embedding and the tokens alike."""


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
    """Prediction of every patch from those before it in a random order. SAIM, arXiv 2212.01610."""

    target: Literal["pixels", "features"] = "pixels"
    """pixels: blurred and normalised per patch; features: the frozen CLIP's (SemAIM)."""
    loss: Literal["mse", "l1", "cosine"] = "mse"
    """cosine: the squared distance of vectors of length 1, SemAIM's for features."""
    query_depth: Positive | None = None
    """Blocks of the decoder, a divisor of the model's depth; null: as many."""
    predicts_ids: ClassVar[bool] = False
    needs_table: ClassVar[str] = MaPeTConfig.needs_table

    def uses_teacher(self, config: Config) -> bool:
        return self.target == "features"

    def num_hidden(self, config: Config) -> int:
        return config.num_patches

    def rules(self, config: Config) -> Iterator[str]:
        yield from ()


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
    """The teacher's momentum at the first step; a cosine takes it to 1 at the last."""
    projector_dim: Positive = 4096
    """Width of the projector's two hidden layers; its output has 256."""
    bn_group: Positive = 64
    """Consecutive images of the global batch that share BatchNorm statistics; divides the micro-batch."""
    centre: bool = True
    """Take off queries and keys what a group's images have in common at a position; false: as published."""
    init: Init = "timm"
    """See beit.init; beit: as published, the projector alike."""
    teacher_drop_path: bool = False
    """The momentum teacher has the student's stochastic depth, by draws of its own; true: as published."""
    predicts_ids: ClassVar[bool] = False

    def num_hidden(self, config: Config) -> int:
        return math.ceil(self.hidden_share * (config.grid // self.cell) ** 2) * self.cell**2

    def rules(self, config: Config) -> Iterator[str]:
        yield from super().rules(config)
        if config.grid % self.cell != 0:
            yield (
                f"conmim.cell = {self.cell} does not divide the student's grid of {config.grid} patches a "
                "side."
            )
        micro = config.train.micro_batch_size
        if micro % self.bn_group != 0:
            yield (
                f"conmim.bn_group = {self.bn_group} does not divide train.micro_batch_size = {micro}; "
                "BatchNorm is over whole groups. Keep the group through a run, e.g. "
                f"conmim.bn_group={math.gcd(micro, self.bn_group)}."
            )


@knobs
class MAEConfig(ObjectiveConfig):
    """Prediction of pixels by an encoder of the visible patches alone. MAE, arXiv 2111.06377."""

    hidden_share: Share = 0.75
    """Share of the patches that is hidden (147 of 196)."""
    decoder_depth: Positive = 8
    """Blocks of the decoder."""
    decoder_width: Positive = 512
    """Width of the decoder's rows."""
    decoder_heads: Positive = 16
    """Attention heads of a decoder's block."""
    predicts_ids: ClassVar[bool] = False
    needs_table: ClassVar[str] = "its encoder has rows for the visible patches alone, others in each image"

    def rules(self, config: Config) -> Iterator[str]:
        yield from super().rules(config)
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            yield (
                f"mae.decoder_width = {self.decoder_width} must be a multiple of mae.decoder_heads = "
                f"{self.decoder_heads}, and of 4 for its sin-cos positions."
            )


@knobs
class CAEConfig(ObjectiveConfig):
    """Prediction of token ids through what an encoder would say of hidden patches. CAE, arXiv 2202.03026."""

    hidden_share: Share = 0.5
    """Share of the patches that is hidden by rectangles (98 of 196)."""
    regressor_depth: Positive = 4
    """Blocks of the regressor, as wide as the model's."""
    decoder_depth: Positive = 4
    """Blocks of the decoder, as wide as the model's."""
    align_weight: NonNegative = 2.0
    """Weight of the alignment loss; that of the ids' is 1."""
    needs_table: ClassVar[str] = MAEConfig.needs_table


@knobs
class StrongViewConfig:
    """The teacher's view in objectives that ask for a strong one: its colours change, its geometry is shared.

    Source: ConMIM's released settings (Yi et al., arXiv 2205.09616).
    """

    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.2, 0.1)
    """Factors of brightness, contrast and saturation are uniform in 1 +- this; hue in +- this share of a
    turn."""
    jitter_share: Share = 0.8
    """Share of the views whose colours are jittered."""
    grey_share: Share = 0.2
    """Share of the views that are grey."""
    blur_share: Share = 0.1
    """Share of the views that are blurred."""
    blur_sigma: tuple[NonNegative, NonNegative] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation, pixels of the view."""
    solarize_share: Share = 0.2
    """Share of the views whose bright half of grey levels is inverted."""
