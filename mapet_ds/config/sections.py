"""Every knob of pre-training: frozen dataclasses, which recipe.py fills.

A dataclass owns a knob's type, default, unit, meaning and source. A DeepSpeed JSON owns engine knobs only.
Nothing in config/ imports torch or open_clip, so that a mistake in a recipe is answered in a fraction of a
second.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pydantic
from pydantic import Field

from mapet_ds.config.knobs import Natural, NonNegative, Positive, Share, Triple, knobs
from mapet_ds.config.objectives import (
    BEiTConfig,
    CAEConfig,
    ConMIMConfig,
    MAEConfig,
    MaPeTConfig,
    MVPConfig,
    ObjectiveConfig,
    SAIMConfig,
    StrongViewConfig,
)  # fmt: skip
from mapet_ds.config.own import own_objective
from mapet_ds.config.running import MetricsConfig, RunConfig, flatten
from mapet_ds.config.sources import Paths
from mapet_ds.errors import ConfigError

TIMM = "timm:"
"""Prefix that marks a name of timm's weights where a path could stand."""
REPOSITORY = Path(__file__).resolve().parents[2]
LOGITS = 2**24
"""Number of logits that a loss holds at once: 64 MiB of fp32, and as much again for their gradient."""


@knobs
class ModelConfig:
    """The student: any plain timm VisionTransformer with a class token, or timm's BEiT."""

    name: str = "vit_base_patch16_224"
    """timm's name of the ViT."""
    img_size: Positive = 224
    """Side of the student's square view, pixels."""
    patch_size: Positive = 16
    """Side of a square patch, pixels."""
    drop_path: Share = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    layer_scale: Annotated[float, Field(gt=0)] | None = 0.1
    """Initial LayerScale of both residual branches (timm's init_values); null leaves it out."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm's VisionTransformer or Beit, e.g. {depth: 6}."""
    init_from: str | None = None
    """Weights to begin from: a folder of tools/export_timm.py or import_weights.py, a file of timm's weights
    of this model, or timm:NAME.TAG; null: fresh ones. A resumed run has its own and doesn't read them."""

    @property
    def relative(self) -> bool:
        """Whether the student is timm's BEiT, whose positions are relative."""
        return self.name.startswith(("beit_", "beitv2_"))

    @property
    def timm_args(self) -> dict[str, Any]:
        """args, for a BEiT with the final norm over all rows, as every ViT has it."""
        return {"global_pool": "token", **self.args} if self.relative else self.args

    def init_rules(self) -> Iterator[str]:
        """Yields a sentence where a run can't start from init_from, as far as a look at the path tells."""
        source = self.init_from
        if source is None or (source.startswith(TIMM) and source != TIMM):
            return
        path = Path(source)
        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if not source or not path.exists():
            yield (
                f"model.init_from = {source or '(empty)'} is neither a folder nor a file that this host can "
                f"see, nor {TIMM}NAME.TAG; null begins from fresh weights."
            )
        elif path.is_dir() and missing:
            yield (
                f"model.init_from = {source} is no timm model: it lacks {' and '.join(missing)}. A run or a "
                f"checkpoint becomes one by python tools/export_timm.py {source} OUT; then "
                "model.init_from=OUT."
            )


@knobs
class DataConfig:
    """The images, and the two views of one crop that are made of each."""

    train: Paths = ""
    """Folder of images (labels optional: the name of the first sub-folder) or of tar shards; or a shard, a
    pattern ('/data/train-{0000..1023}.tar', '/data/*.tar'), a text file of paths, or a list of such things,
    of which 'PATH x3' is had three times an epoch."""
    shuffle_window: Natural = 0
    """Samples among which the order is shuffled: those of neighbouring chunks of 256, themselves in random
    order, so that storage is read nearly in sequence. Rounded up to whole chunks; 0: the whole data set."""
    crop: Literal["center", "random"] = "center"
    """center: the largest central square (published MaPeT); random: scale, ratio and flip below."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area, for crop: random."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height, for crop: random."""
    flip: Share = 0.0
    """Probability of a horizontal flip, the same for both views; for crop: random."""
    color_jitter: NonNegative = 0.4
    """Brightness, contrast and saturation factors are uniform in 1 +- this; student's view only."""
    strong: StrongViewConfig = Field(default_factory=StrongViewConfig)
    mean: Triple = (0.485, 0.456, 0.406)
    """Subtracted from the student's view per channel, whose values are in 0 .. 1."""
    std: Triple = (0.229, 0.224, 0.225)
    """Divisor of the student's view per channel, after the mean."""
    exif_orientation: bool = False
    """Turn images as EXIF's orientation says; false: pixels stay as they are stored (published runs)."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where JPEGs are decoded; auto: gpu where the rank has one."""
    threads: Positive = 2
    """DALI's CPU threads per rank. Without workers, three were fastest on two cores (docs/benchmarks.md)."""
    workers: Natural = 0
    """Processes per rank that read and check files; 0 reads in the rank's own process."""
    prefetch: Positive = 2
    """Micro-batches prepared ahead."""
    max_bad_share: Share = 0.01
    """The run stops when more than this share of the data set, rounded up to whole images, is unreadable."""
    cache_dir: str = ""
    """Folder on each host's own disk that keeps what is read of shards at an address (s3://, https://);
    empty: none. Not used for files."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Largest size of cache_dir, in 10^9 bytes, for all ranks and runs of a host that use it."""


@knobs
class TeacherConfig:
    """The frozen image tower, of open_clip or timm, whose dense features become targets."""

    name: str = "RN50x64"
    """open_clip model name, timm:NAME (a ViT of timm's), or local-dir:PATH (open_clip_config.json and weights
    beside it)."""
    weights: str = "openai"
    """A tag of that model in open_clip or timm, a local file, or `random` (asked for by name: the targets are
    then noise). Not read for local-dir:, which brings its own."""
    img_size: Positive = 448
    """Side of the teacher's square view, pixels."""
    layer: int = -1
    """Index into the tower's intermediates; -1 is the last (layer4 of a ResNet, before pooling)."""
    features: Literal["tokens", "normed", "projected"] = "tokens"
    """tokens: the layer's output; normed: after the tower's last norm (ViTs); projected: where CLIP
    compares (open_clip's own ViTs)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    shard: Literal["none", "node", "world"] = "node"
    """Spread the weights over the ranks of a node (replicated across nodes), over all, or not."""
    ahead: bool = False
    """Compute the next micro-batch's target on its own GPU stream while the student learns from this one.
    Not done where the target follows the student (conmim) or costs next to nothing (pixels, stored ids). With
    a sharded teacher two groups of ranks then communicate at a time, which has not been tried with NCCL."""


@knobs
class TokenizerConfig:
    """The tokenizer, which gives each patch an id, and the published fit of k-CLIP's codebook."""

    name: str = "kclip"
    """kclip: the nearest k-means centroid of the teacher's feature; vqkd: BEiT v2's, dalle: BEiT's tokenizer,
    neither with a teacher; package.module:factory: your own, called as factory(config, device)."""
    path: str = ""
    """kclip: codebook.safetensors of tools/fit_codebook.py; vqkd: its published .pth or safetensors;
    dalle: the encoder as safetensors (docs/extending.md)."""
    ids: str = ""
    """Folder of ids of tools/tokenize_images.py for all of data.train; empty: computed on the fly."""
    vocab_size: Positive = 8192
    """Number of ids."""
    iterations: Positive = 20
    """Iterations of k-means."""
    redo: Positive = 5
    """Times that k-means begins anew; the best is kept."""
    points_per_centroid: Positive = 512
    """Largest number of patch features that k-means takes for each centroid."""


@knobs
class LogConfig(MetricsConfig):
    """The metrics of a pre-training run."""

    images_every_steps: Natural = 1000
    """Steps between TensorBoard's images (views, token map, predicted token map), beside those of the first
    and the last step; 0: never."""


@knobs
class EvaluateConfig:
    """k-NN and a linear probe of the features while pre-training runs, which learns nothing from either."""

    train: Paths = ""
    """Folder of class folders, or of tar shards with `.cls`, to learn from; may be data.train. Empty: no
    evaluation."""
    val: Paths = ""
    """The same classes, other images."""
    every_epochs: Annotated[float, Field(gt=0)] = 10.0
    """Epochs between evaluations, each at the next line of metrics; the end has one too."""
    max_images: Positive = 10_000
    """Largest number of images of each folder, evenly spaced over its sorted names: always the same ones."""


@knobs
class Config(RunConfig):
    """The settings of a pre-training run."""

    objective: str = "mapet"
    """mapet, beit, mvp, saim, conmim, mae, cae, or your own as package.module:Class (docs/extending.md)."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    mapet: MaPeTConfig = Field(default_factory=MaPeTConfig)
    beit: BEiTConfig = Field(default_factory=BEiTConfig)
    mvp: MVPConfig = Field(default_factory=MVPConfig)
    saim: SAIMConfig = Field(default_factory=SAIMConfig)
    conmim: ConMIMConfig = Field(default_factory=ConMIMConfig)
    mae: MAEConfig = Field(default_factory=MAEConfig)
    cae: CAEConfig = Field(default_factory=CAEConfig)
    own: dict[str, Any] = Field(default_factory=dict)
    """Settings of an objective of your own, checked by its class and filled up with its defaults."""
    log: LogConfig = Field(default_factory=LogConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)

    @property
    def objectives(self) -> list[str]:
        """The names of all objectives: each has a section of its name."""
        return [name for name, section in vars(self).items() if isinstance(section, ObjectiveConfig)]

    @property
    def idle_sections(self) -> set[str]:
        """The sections of other objectives."""
        return {*self.objectives, "own"} - {self.section}

    def defaults(self) -> dict[str, Any]:
        """See RunConfig. Those of an objective of one's own are its class's."""
        own = dataclasses.asdict(cast(Any, type(self.method)())) if self.section == "own" else {}
        return super().defaults() | flatten({"own": json.loads(json.dumps(own))})

    def with_micro(self, micro: int) -> Config:
        """The same settings with another micro-batch."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, micro_batch_size=micro))

    def allows(self, micro: int) -> bool:
        """Whether nothing that the objective's section says contradicts this micro-batch."""
        other = self.with_micro(micro)
        return not any(other.method.rules(other))

    @property
    def section(self) -> str:
        """The name of the section of this run's objective."""
        return "own" if ":" in self.objective else self.objective

    @property
    def method(self) -> ObjectiveConfig:
        """The section of this run's objective.

        Raises:
            ConfigError: there is no such objective.
        """
        if self.section == "own":
            settings = own_objective(self.objective).settings
            return pydantic.TypeAdapter(settings).validate_json(json.dumps(self.own))
        self.check_objective()
        return getattr(self, self.objective)

    @property
    def objective_name(self) -> str:
        """The objective's name without the module of one's own, for tags and titles."""
        return self.objective.rpartition(":")[2]

    def check_objective(self) -> None:
        """Refuses a name that no objective in the package has, by a ConfigError."""
        if self.section not in {*self.objectives, "own"}:
            raise ConfigError(
                f"objective = {self.objective} is not known; there are: {', '.join(self.objectives)}, or "
                "name your own as package.module:Class."
            )

    @property
    def grid(self) -> int:
        """Number of patches along one side of the student's view."""
        return self.model.img_size // self.model.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches of the student's view."""
        return self.grid**2
