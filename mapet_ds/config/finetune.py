"""Every knob of a fine-tuning run. RunConfig holds those that it shares with pre-training.

The other defaults are BEiT's for a ViT-B (arXiv 2106.08254), as ConMIM's program releases them. Nothing here
imports torch or timm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mapet_ds.config.knobs import Natural, NonNegative, Positive, Share, knobs
from mapet_ds.config.running import MetricsConfig, OptimConfig, RunConfig
from mapet_ds.config.sources import Paths


@knobs
class BackboneConfig:
    """A timm model that learns from labels: any whose whole state is its parameters, as a ViT's is."""

    path: str = ""
    """Folder of config.json and model.safetensors, as tools/export_timm.py writes it; or a file of weights
    for a model that `name` names."""
    name: str = ""
    """timm's name of the model; empty: the one in the folder's config.json."""
    untrained: bool = False
    """Begin from fresh weights, to compare, for the folder's architecture or `name`."""
    img_size: Positive | None = None
    """Side of the square images, pixels; null: the model's own. Positions are resampled."""
    drop_path: Share = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""

    @property
    def folder(self) -> Path:
        """The folder of config.json."""
        return Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent

    @property
    def weights(self) -> Path:
        """The file of weights."""
        return self.folder / "model.safetensors" if Path(self.path).is_dir() else Path(self.path)

    def rules(self) -> Iterator[str]:
        """Yields a sentence where no model is named, or what is named isn't there."""
        if not self.path:
            if not (self.untrained and self.name):
                yield (
                    "model.path is empty: name the folder that tools/export_timm.py wrote. "
                    "(model.untrained=true with model.name, timm's name, begins from nothing.)"
                )
        elif not Path(self.path).exists():
            yield f"model.path = {self.path} is neither a folder nor a file that this host can see."
        elif not self.name and not (self.folder / "config.json").is_file():
            yield (
                f"model.path = {self.path}: there is no config.json that tells the model; "
                "tools/export_timm.py writes one. For a file of weights alone, add model.name=, timm's name "
                "for it."
            )
        elif not self.untrained and not self.weights.is_file():
            yield (
                f"model.path = {self.path}: the weights are missing, {self.weights}; tools/export_timm.py "
                "writes them."
            )


@knobs
class ClassifierConfig(BackboneConfig):
    """The model that learns classes."""

    pool: Literal["avg", "token"] = "avg"
    """Input of the head. avg: the mean of the patch tokens, after a fresh norm; token: the class token."""
    head_scale: Annotated[float, Field(gt=0)] = 0.001
    """Factor on the initial weights of a fresh head."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Momentum, per step, of a moving average of the weights, which is evaluated and written in their place;
    null: none."""


@knobs
class LabelledDataConfig:
    """Images with labels. A label is the name of the first sub-folder, or `.cls` in tar shards."""

    train: Paths = ""
    """Folder of class folders, or of tar shards; or what else pre-training's data.train may name."""
    val: Paths = ""
    """The same classes, other images."""
    num_classes: Positive | None = None
    """Number of classes that the data must have; null takes what there is."""
    labels: str = ""
    """Text file that names the images of train to learn from, one a line, as the published 1 % and 10 % of
    ImageNet do; empty: all."""
    shots: Positive | None = None
    """Learn from so many images of each class of train, drawn by seed and data.draw; null: all."""
    draw: Natural = 0
    """Number of the draw of data.shots."""
    exif_orientation: bool = False
    """Turn images as EXIF's orientation says; false: pixels stay as they are stored."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop has."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of the policy; null: none."""
    erasing: Share = 0.25
    """Probability of a rectangle of noise."""
    mixup: NonNegative = 0.8
    """Both parameters of the beta distribution of a pair's weight; 0: never. With cutmix, each gets half of
    the pairs."""
    cutmix: NonNegative = 1.0
    """Both parameters of the beta distribution of the share that a pasted rectangle leaves; 0: never."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a target that all classes divide among themselves."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """Side of the central square that is evaluated over the image's shorter side; null: the model's own."""
    workers: Natural = 0
    """Processes per rank that read and augment; 0 does it in the rank's own process."""
    max_bad_share: Share = 0.01
    """The run stops when more than this share of a data set, rounded up to whole images, is unreadable."""
    cache_dir: str = ""
    """Folder on each host's own disk that keeps what is read of shards at an address; empty: none."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Largest size of cache_dir, in 10^9 bytes, for all ranks and runs of a host that use it."""


@knobs
class LayerwiseOptimConfig(OptimConfig):
    """AdamW whose learning rate falls from layer to layer."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    """Factor on the learning rate from each layer to the one below."""


@knobs
class EvaluationLogConfig(MetricsConfig):
    """The metrics and the evaluations of a fine-tuning run."""

    evaluate_every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between evaluations, each at the next line of metrics; the end has one too."""


@knobs
class FinetuneConfig(RunConfig):
    """The settings of a fine-tuning run."""

    model: ClassifierConfig = Field(default_factory=ClassifierConfig)
    data: LabelledDataConfig = Field(default_factory=LabelledDataConfig)
    optim: LayerwiseOptimConfig = Field(default_factory=LayerwiseOptimConfig)
    log: EvaluationLogConfig = Field(default_factory=EvaluationLogConfig)

    def rules(self) -> Iterator[str]:
        """Yields a sentence for each mistake in the model and in what is done to images."""
        data, micro = self.data, self.train.micro_batch_size
        yield from self.model.rules()
        if data.labels and data.shots:
            yield (f"data.labels = {data.labels} and data.shots = {data.shots} both choose images: take one.")
        if data.labels and not Path(data.labels).is_file():
            yield f"data.labels = {data.labels} is no file that this host can see."
        if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
            yield f"data.crop_scale = {list(data.crop_scale)} must rise within (0, 1]."
        if (data.mixup > 0 or data.cutmix > 0) and micro % 2 != 0:
            yield (
                f"train.micro_batch_size = {micro} is odd, but images are mixed in pairs: make it even, or "
                "set data.mixup=0 data.cutmix=0."
            )
