"""Every knob of a segmentation run. RunConfig holds those that it shares with pre-training.

The other defaults are those of the frozen linear protocol, or of a ViT-B's fine-tuning on ADE20K where both
agree. Nothing here imports torch or timm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from mapet_ds.config.finetune import BackboneConfig, EvaluationLogConfig, LayerwiseOptimConfig
from mapet_ds.config.knobs import Natural, NonNegative, Positive, Share, knobs
from mapet_ds.config.running import RunConfig


class Release(NamedTuple):
    """Where a published data set keeps its images and masks."""

    images: str
    """The folder of a split's images, below the release's own."""
    masks: str
    splits: dict[str, str]
    """The release's name of `train` and `val`."""


RELEASES = {
    "ade20k": Release("images", "annotations", {"train": "training", "val": "validation"}),
    "cityscapes": Release("leftImg8bit", "gtFine", {"train": "train", "val": "val"}),
}


@knobs
class SegmenterConfig(BackboneConfig):
    """The backbone, a ViT, and the head that gives each pixel a class."""

    head: Literal["linear", "dpt", "upernet"] = "linear"
    """linear: BatchNorm and a 1 x 1 convolution on the last block's patches, through the final norm; dpt,
    upernet: decoders of four blocks (pip install 'mapet_ds[segment]')."""
    width: Positive = 512
    """Channels of the decoders dpt and upernet."""
    auxiliary_weight: NonNegative = 0.4
    """Weight of the loss of upernet's auxiliary head; that of the head is 1."""
    frozen: bool = True
    """Leave the backbone as it is, in evaluation mode; only the head learns."""
    bn_group: Annotated[int, Field(ge=2)] = 2
    """Neighbouring images of a step whose pixels the head's BatchNorm takes its mean and variance over. It
    divides the micro-batch, so that no split of a batch changes a loss."""


@knobs
class MaskedDataConfig:
    """Images, and for each a PNG of its own name that holds a class id for each pixel."""

    train: str = ""
    """Folder of images, or of a whole release that `release` names."""
    val: str = ""
    """The same of other images."""
    train_masks: str = ""
    """Folder of the masks of data.train, PNGs of the images' names; empty with a release."""
    val_masks: str = ""
    """Folder of the masks of data.val; empty with a release."""
    release: Literal["ade20k", "cityscapes"] | None = None
    """A published data set in its own folders; null: folders of images and of masks."""
    num_classes: Annotated[int, Field(ge=2, lt=2**15)] | None = None
    """Number of classes; null: the lines of the file of names, or what the release has."""
    classes: str = ""
    """File of the classes' names, a line each in the order of ids; empty: classes.txt among the masks or in
    the folder above, if there is one."""
    void_id: Annotated[int, Field(ge=0, lt=2**16)] | None = 255
    """Id of pixels that count nowhere; null: none."""
    reduce_zero_label: bool = False
    """Id 0 is void too, and all others are lowered by one."""
    short_side: Positive | None = None
    """Shorter side that an image is resized to, pixels; null: as it is stored."""
    long_side: Positive | None = None
    """Longer side that an image must not exceed then; null: any."""
    resize: tuple[float, float] = (0.5, 2.0)
    """Range of the random factor on that size in training."""
    max_class_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """A crop of which one class has more is drawn anew, up to ten times."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    distortion: bool = True
    """Change brightness, contrast, saturation and hue at random."""
    workers: Natural = 0
    """Processes per rank that read and augment; 0 does it in the rank's own process."""
    max_bad_share: Share = 0.01
    """The run stops when more than this share of a data set, rounded up to whole images, is unreadable."""

    def images_of(self, split: Literal["train", "val"]) -> str:
        """The folder of a split's images."""
        named: str = getattr(self, split)
        if not named or self.release is None:
            return named
        release = RELEASES[self.release]
        return str(Path(named) / release.images / release.splits[split])

    def masks_of(self, split: Literal["train", "val"]) -> str:
        """The folder of a split's masks."""
        if self.release is None:
            return self.train_masks if split == "train" else self.val_masks
        release = RELEASES[self.release]
        return str(Path(getattr(self, split)) / release.masks / release.splits[split])


@knobs
class SegmentationOptimConfig(LayerwiseOptimConfig):
    """AdamW; a frozen backbone has no rate."""

    decay: Literal["linear", "cosine"] = "linear"
    """The fall of the rate after the warm-up."""

    def falling(self, done: float) -> float:
        return 1 - done if self.decay == "linear" else super().falling(done)


@knobs
class SegmentationLogConfig(EvaluationLogConfig):
    """The metrics, pictures and evaluations of a segmentation run."""

    images_every_steps: Natural = 1000
    """Steps between TensorBoard's images (crops, true masks, predicted masks); 0: never."""


@knobs
class SegmentationEvaluateConfig:
    """How an image of data.val is predicted."""

    mode: Literal["slide", "whole"] = "slide"
    """slide: in windows of model.img_size, whose logits are averaged where they overlap; whole: at once."""
    stride: Positive | None = None
    """Pixels from one window to the next; null: two thirds of a window, 341 of 512."""
    flip: bool = False
    """Average the probabilities of an image and of its mirror image."""


@knobs
class SegmentationConfig(RunConfig):
    """The settings of a segmentation run."""

    model: SegmenterConfig = Field(default_factory=SegmenterConfig)
    data: MaskedDataConfig = Field(default_factory=MaskedDataConfig)
    optim: SegmentationOptimConfig = Field(default_factory=SegmentationOptimConfig)
    log: SegmentationLogConfig = Field(default_factory=SegmentationLogConfig)
    evaluate: SegmentationEvaluateConfig = Field(default_factory=SegmentationEvaluateConfig)

    def rules(self) -> Iterator[str]:
        """Yields a sentence for each mistake in the model, the masks' folders and what is done to images."""
        model, data, micro = self.model, self.data, self.train.micro_batch_size
        yield from model.rules()
        for split in ("train", "val"):
            yield from self._mask_rules(split)
        if not 0 < data.resize[0] <= data.resize[1] < math.inf:
            yield f"data.resize = {list(data.resize)} must be positive and rising."
        if data.long_side is not None and data.long_side < (data.short_side or math.inf):
            yield (
                f"data.long_side = {data.long_side} bounds the image whose data.short_side = "
                f"{data.short_side or 'null'}: raise the one, or name the other."
            )
        if data.classes and not Path(data.classes).is_file():
            yield f"data.classes = {data.classes} is no file that this host can see: a name a line."
        if data.release and data.classes:
            yield f"data.classes = {data.classes}, but data.release = {data.release} brings its names."
        if micro % model.bn_group:
            yield (
                f"train.micro_batch_size = {micro} is not a multiple of model.bn_group = {model.bn_group}: "
                "BatchNorm takes whole groups of neighbouring images. Change one of the two."
            )

    def _mask_rules(self, split: Literal["train", "val"]) -> Iterator[str]:
        data, name = self.data, f"data.{split}"
        images, masks = data.images_of(split), data.masks_of(split)
        given = data.train_masks if split == "train" else data.val_masks
        if data.release and given:
            yield f"{name}_masks = {given}, but data.release = {data.release} says where its masks lie."
        if not images:
            return  # its own sentence says so
        if not data.release and not masks:
            yield (
                f"{name}_masks is empty: name the folder of the masks of {name}, PNGs of the images' names. "
                "(data.release=ade20k or cityscapes knows its own.)"
            )
        elif not Path(masks).is_dir():
            whose = f"data.release = {data.release}, {name} = {getattr(data, split)}" if data.release else ""
            yield f"{whose or f'{name}_masks = {masks}'}: {masks} is no folder that this host can see."
        elif Path(masks).resolve().is_relative_to(Path(images).resolve()):
            yield (
                f"{name}_masks = {masks} lies inside {name} = {images}: masks would count as images. Put "
                "images and masks beside each other."
            )
