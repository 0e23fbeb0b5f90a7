"""Every knob of a run: frozen dataclasses, filled from a YAML recipe and `a.b=value` overrides.

A dataclass owns a knob's type, default, unit, meaning and source; a DeepSpeed JSON owns engine knobs only.
Imports neither torch nor open_clip, so that a mistake in a recipe is answered in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import ConfigDict, Field

REPOSITORY = Path(__file__).resolve().parent.parent


class ConfigError(Exception):
    """A setting the user can correct; the message names key, value, source and cure."""


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Triple = tuple[float, float, float]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def knobs(cls: type) -> type:
    """Class decorator: a frozen, strictly typed dataclass that refuses unknown keys."""
    return pydantic.dataclasses.dataclass(cls, frozen=True, config=STRICT)


@knobs
class ModelConfig:
    """The student: any plain timm VisionTransformer with a class token."""

    name: str = "vit_base_patch16_224"
    img_size: Positive = 224
    """Side of the student's square view, pixels."""
    patch_size: Positive = 16
    drop_path: Share = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    layer_scale: Annotated[float, Field(gt=0)] | None = 0.1
    """Initial LayerScale of both residual branches (timm's init_values); null leaves it out."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm's VisionTransformer, e.g. {depth: 6}."""


@knobs
class DataConfig:
    """Images in, two views of one crop out."""

    train: str = ""
    """Folder of images (labels optional: the name of the first sub-folder) or of tar shards."""
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
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where JPEGs are decoded; auto: gpu where the rank has one."""
    threads: Positive = 2
    """DALI's CPU threads per rank."""
    workers: Natural = 0
    """Processes per rank that read and check files; 0 reads in the rank's own process."""
    prefetch: Positive = 2
    """Micro-batches prepared ahead."""
    max_bad_share: Share = 0.01
    """The run stops when more than this share of the data set is unreadable."""


@knobs
class TeacherConfig:
    """The frozen open_clip image tower whose dense features become targets."""

    name: str = "RN50x64"
    """open_clip model name, or local-dir:PATH (open_clip_config.json and weights beside it)."""
    weights: str = "openai"
    """open_clip tag, a local file, or `random` (asked for by name: the targets are then noise).
    Not read for local-dir:, which brings its own."""
    img_size: Positive = 448
    """Side of the teacher's square view, pixels."""
    layer: int = -1
    """Index into the tower's intermediates; -1 is the last (layer4 of a ResNet, before pooling)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    shard: Literal["none", "node", "world"] = "node"
    """Spread the weights over the ranks of a node (replicated across nodes), over all, or not."""


@knobs
class TokenizerConfig:
    """The k-CLIP codebook. Published: Euclidean k-means, 8192, 20 iterations, best of 5, 512 points each."""

    path: str = ""
    """codebook.safetensors: written by tools/fit_codebook.py, read by pretrain.py."""
    vocab_size: Positive = 8192
    iterations: Positive = 20
    redo: Positive = 5
    points_per_centroid: Positive = 512


class ObjectiveConfig:
    """The section of one objective; its name in Config is the objective's name."""


@knobs
class MaPeTConfig(ObjectiveConfig):
    hidden_share: Share = 0.75
    """Share of the patches that is predicted: the last ones of the permutation (147 of 196)."""


@knobs
class OptimConfig:
    """AdamW with linear warm-up and cosine decay per step. Learning rates are absolute."""

    lr: Annotated[float, Field(gt=0)] = 1.5e-3
    warmup_lr: NonNegative = 1e-6
    """Learning rate of the first step."""
    min_lr: NonNegative = 1e-5
    warmup_epochs: NonNegative = 10.0
    weight_decay: NonNegative = 0.05
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: NonNegative = 3.0
    """Largest norm of the whole gradient; 0 never clips."""
    adamw: Literal["auto", "deepspeed", "torch"] = "auto"
    """deepspeed: FusedAdam, compiled once per node; torch: torch's own (fused on a GPU), no compiler.
    auto: deepspeed on a GPU with nvcc, else torch."""


@knobs
class TrainConfig:
    epochs: Annotated[float, Field(gt=0)] = 300.0
    global_batch_size: Positive = 2048
    """Images per update over all ranks."""
    micro_batch_size: Positive = 128
    """Images per forward on one rank; accumulation is global / (micro * ranks)."""
    world_size: Positive | None = None
    """Ranks this run must have; null takes what the launcher gives."""
    compile: bool = False
    """torch.compile the blocks."""
    grad_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    deterministic: bool = False
    """Deterministic GPU kernels, at a price in speed. On a CPU runs are deterministic anyway."""
    stop_at_step: Positive | None = None
    """Save and leave, in order, after this step; the schedule is unchanged."""
    max_skipped_steps: Natural = 10
    """Steps in a row with a non-finite gradient that are skipped before the run stops."""


@knobs
class CheckpointConfig:
    every_steps: Positive = 1000
    keep: Positive = 2
    """Newest checkpoints kept."""


@knobs
class LogConfig:
    every_steps: Positive = 50
    images_every_steps: Natural = 1000
    """TensorBoard images: views, token map, predicted token map; 0 for never."""
    progress: bool = True


@knobs
class Config:
    objective: str = "mapet"
    run_dir: str = ""
    """Everything a run writes. On a cluster: a path that all hosts share."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest whole checkpoint in run_dir, else start; never: refuse a used run_dir."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    mapet: MaPeTConfig = Field(default_factory=MaPeTConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @property
    def grid(self) -> int:
        """Patches along one side of the student's view."""
        return self.model.img_size // self.model.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    def grad_accum_steps(self, world_size: int) -> int:
        """Forwards per update on each rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * world_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, as they are written to the run folder."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML alone reads 1e-3 as a string."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=RecipeLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{source} is not valid YAML: {where}.") from error


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} can't be read: {error}. Shipped ones: mapet_ds/recipes/.") from error
    recipe = _parse_yaml(text, f"The recipe {path}")
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ConfigError(f"The recipe {path} must be a mapping of keys to values, not {type(recipe).__name__}.")
    return recipe


def _apply_override(values: dict[str, Any], override: str) -> str:
    key, equals, text = override.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"'{override}' is not of the form a.b=value, e.g. optim.lr=1e-3.")
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise ConfigError(f"'{override}': {parent} is a single value and has no keys of its own.")
        values = values[parent]
    values[leaf] = _parse_yaml(text, f"The value of '{override}'")
    return key


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """All knobs as dotted names."""
    keys = []
    for name, field in cls.__pydantic_fields__.items():
        if dataclasses.is_dataclass(field.annotation):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _sentence(error: Any, recipe: str, overridden: set[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    source = "the command line" if any(k == key or key.startswith(k + ".") for k in overridden) else recipe
    value = json.dumps(error["input"], default=str)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = difflib.get_close_matches(key, known_keys(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ". docs/design.md lists the knobs."
        return f"{key} = {value} (from {source}) is not a knob{hint}"
    return f"{key} = {value} (from {source}): {error['msg'][0].lower()}{error['msg'][1:]}."


def load_config(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The typed settings of a recipe with `a.b=value` overrides on top. Not yet checked against each other.

    Raises:
        ConfigError: unreadable file, bad YAML, unknown key, wrong type or range.
    """
    values = _read_recipe(Path(recipe))
    overridden = {_apply_override(values, override) for override in overrides}
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The recipe {recipe} holds a value that is no number, string or list: {error}.") from error
    try:
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as errors:
        raise ConfigError("\n".join(_sentence(e, str(recipe), overridden) for e in errors.errors())) from errors


def teacher_model_config(name: str) -> dict[str, Any]:
    """open_clip's own description of a model, read from its JSON without importing it.

    Raises:
        ConfigError: no such model, or no open_clip_config.json in the folder.
    """
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not path.is_file():
            raise ConfigError(f"teacher.name = {name}: there is no {path}. tools/make_demo.py writes such a folder.")
        try:
            model = json.loads(path.read_text())["model_cfg"]
            return {**model, "vision_cfg": dict(model["vision_cfg"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} does not describe an open_clip model: {type(error).__name__} {error}.") from error
    folder = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0]) / "model_configs"
    path = folder / f"{name}.json"
    if not path.is_file():
        close = difflib.get_close_matches(name, [p.stem for p in folder.glob("*.json")], n=3)
        raise ConfigError(f"teacher.name = {name} is not an open_clip model; close: {', '.join(close) or 'none'}.")
    return json.loads(path.read_text())


def teacher_grid(teacher: TeacherConfig) -> int | None:
    """Patches along one side of the teacher's feature map; None where only building it can tell."""
    vision = teacher_model_config(teacher.name)["vision_cfg"]
    if isinstance(vision.get("layers"), list):  # ModifiedResNet: stem 4, then 1, 2, 4, 8
        stage = teacher.layer % 5  # stem, layer1 .. layer4
        return teacher.img_size // (4 * 2 ** max(stage - 1, 0))
    if patch := vision.get("patch_size"):
        return teacher.img_size // patch
    match = re.search(r"patch(\d+)", vision.get("timm_model_name") or "")
    return teacher.img_size // int(match[1]) if match else None


def total_steps(config: Config, num_samples: int) -> int:
    """Updates in the whole run: epochs * samples / global batch, rounded up."""
    return math.ceil(config.train.epochs * num_samples / config.train.global_batch_size)
