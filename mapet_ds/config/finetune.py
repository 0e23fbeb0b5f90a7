"""Every knob of a fine-tuning run. What it shares with pre-training is config.RunConfig.

Defaults of what is only here are BEiT's for a ViT-B (arXiv 2106.08254), as ConMIM's program releases them. Imports neither torch
nor timm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mapet_ds.config.knobs import Natural, NonNegative, Positive, Share, knobs
from mapet_ds.config.objectives import Rules
from mapet_ds.config.sections import OptimConfig, RunConfig


@knobs
class ClassifierConfig:
    """The model: any timm model whose whole state is its parameters, as a ViT's is."""

    path: str = ""
    """Folder of config.json and model.safetensors, as tools/export_timm.py writes it; or a file of weights, with `name`."""
    name: str = ""
    """timm's name of the model; empty: as the folder says."""
    untrained: bool = False
    """Fresh weights from the seed, to compare: of the folder's architecture, or of `name`."""
    img_size: Positive | None = None
    """Side of the square images, pixels; null: the model's own. Positions are resampled."""
    pool: Literal["avg", "token"] = "avg"
    """What the head sees. avg: the mean of the patch tokens, after a fresh norm; token: the class token."""
    drop_path: Share = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    head_scale: Annotated[float, Field(gt=0)] = 0.001
    """Factor on the initial weights of a fresh head."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Momentum, per step, of a moving average of the weights, which is then what is evaluated and written; null: none."""

    @property
    def folder(self) -> Path:
        """Where config.json is."""
        return Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent

    @property
    def weights(self) -> Path:
        """The file of weights."""
        return self.folder / "model.safetensors" if Path(self.path).is_dir() else Path(self.path)


@knobs
class LabelledDataConfig:
    """Images with labels: the name of the first sub-folder, or `.cls` in tar shards."""

    train: str = ""
    """Folder of class folders, or of tar shards."""
    val: str = ""
    """The same classes, other images."""
    num_classes: Positive | None = None
    """Classes there must be; null takes what there is."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop has."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of the policy; null: none."""
    erasing: Share = 0.25
    """Probability of a rectangle of noise."""
    mixup: NonNegative = 0.8
    """Both parameters of the beta distribution of a pair's weight; 0: never. Where cutmix is on too, half of the pairs each."""
    cutmix: NonNegative = 1.0
    """The same, of the share that a pasted rectangle leaves."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a target that all classes divide among themselves."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """Side of the evaluated central square over the image's shorter one; null: the model's own."""
    workers: Natural = 0
    """Processes per rank that read and augment; 0 does it in the rank's own process."""
    max_bad_share: Share = 0.01
    """The run stops when more than this share of a data set, rounded up to whole images, is unreadable."""


@knobs
class LayerwiseOptimConfig(OptimConfig):
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    """Factor on the learning rate from each layer to the one below."""


@knobs
class EvaluationLogConfig:
    every_steps: Positive = 50
    """Steps from one line of metrics to the next, also a window whose mean loss is judged for a jump."""
    evaluate_every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Evaluation is at the first line of metrics after so many epochs, and at the end."""
    progress: bool = True
    """Show a progress bar."""


@knobs
class FinetuneConfig(RunConfig):
    """A fine-tuning run."""

    model: ClassifierConfig = Field(default_factory=ClassifierConfig)
    data: LabelledDataConfig = Field(default_factory=LabelledDataConfig)
    optim: LayerwiseOptimConfig = Field(default_factory=LayerwiseOptimConfig)
    log: EvaluationLogConfig = Field(default_factory=EvaluationLogConfig)

    def rules(self) -> Rules:
        """What must hold of the model, and of what is done to images."""
        model, data = self.model, self.data
        known = bool(model.path) and Path(model.path).exists()
        described = bool(model.name) or (model.folder / "config.json").is_file()
        return [
            (
                not model.path and not (model.untrained and model.name),
                "model.path is empty: name the folder that tools/export_timm.py wrote. (model.untrained=true with model.name, "
                "timm's name, begins from nothing.)",
            ),
            (
                bool(model.path) and not known,
                f"model.path = {model.path} is neither a folder nor a file that this host can see.",
            ),
            (
                known and not described,
                f"model.path = {model.path}: there is no config.json that tells the model; tools/export_timm.py writes one. For a "
                "file of weights alone, add model.name=, timm's name for it.",
            ),
            (
                known and described and not model.untrained and not model.weights.is_file(),
                f"model.path = {model.path}: the weights are missing, {model.weights}; tools/export_timm.py writes them.",
            ),
            (
                not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1,
                f"data.crop_scale = {list(data.crop_scale)} must rise within (0, 1].",
            ),
            (
                (data.mixup > 0 or data.cutmix > 0) and self.train.micro_batch_size % 2 != 0,
                f"train.micro_batch_size = {self.train.micro_batch_size} is odd, but images are mixed in pairs: make it even, or "
                "set data.mixup=0 data.cutmix=0.",
            ),
        ]
