"""The document of a study: what is compared, what varies, what is measured. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.knobs import Natural, Positive, knobs
from mapet_ds.config.recipe import load_config
from mapet_ds.config.running import RunConfig, flatten
from mapet_ds.config.sections import Config
from mapet_ds.config.shipped import STUDIES
from mapet_ds.config.sources import Paths
from mapet_ds.errors import ConfigError

Settings = dict[str, Any]
"""Knobs by their dotted names, or nested; {out}, {train} and {val} in a text stand for folders."""


@knobs
class StudyDataConfig:
    """The labelled images that all runs share."""

    train: Paths = ""
    """data.train of every run; what the measurements learn labels from."""
    val: Paths = ""
    """The same classes, other images."""
    train_images: Positive | None = None
    """Take this many of a folder of class folders, equally many of each, the first by name; null: all."""
    val_images: Positive | None = None
    """The same of val."""
    count: Positive | None = None
    """Number of images in train, to plan where they are not; null: they are counted."""


@knobs
class StudyFinetuneConfig:
    """Fine-tuning of each run's weights by tools/finetune.py."""

    recipe: str = ""
    """Recipe of the fine-tuning: a file, or the name of a shipped one."""
    labels: Positive | None = None
    """Number of training images with a label, as data.train_images; null: all."""
    settings: Settings = Field(default_factory=dict)
    """Settings that replace the recipe's."""


@knobs
class MeasureConfig:
    """What is measured of each run's weights. Online probes come with settings of the runs themselves."""

    knn: Settings | None = None
    """Options of `tools/evaluate.py knn`, e.g. {k: 20}; null: not measured."""
    linear: Settings | None = None
    """Options of `tools/evaluate.py linear`, e.g. {solver: sgd, batch_norm: true}; null: not measured."""
    finetune: StudyFinetuneConfig | None = None
    """null: not measured."""


@knobs
class ClusterConfig:
    """The machine that is planned for, and that --slurm asks for."""

    gpu: str = "h100"
    """A name that tools/plan.py knows."""
    nodes: Positive = 1
    """Nodes of each run."""
    gpus_per_node: Positive = 8
    """GPUs of each node."""


@knobs
class StudyConfig:
    """A study: runs that differ in what is named, each with every seed, measured in the same way."""

    recipe: str = ""
    """The base recipe: a file, or the name of a shipped one."""
    engine: str = "zero2"
    """The DeepSpeed JSON of every run: a file, or the name of a shipped one."""
    ranks: Positive = 1
    """Ranks of each run where it runs here."""
    at_once: Positive = 1
    """Runs that go side by side where they run here, on a host without GPUs."""
    settings: Settings = Field(default_factory=dict)
    """Settings that replace the recipes', in every run."""
    runs: dict[str, Settings] = Field(default_factory=dict)
    """Name of a row -> the settings in which it differs; the key `recipe` names another recipe."""
    tokenizers: dict[str, Settings] = Field(default_factory=dict)
    """Name -> settings; a row that predicts ids is run with each of them. Empty: with the recipe's."""
    seeds: list[Natural] = Field(default=[0, 1, 2])
    """Each row is run with each seed. Three is the least by which one row is called better than another."""
    equal: list[Literal["steps", "flops", "time"]] = Field(default=["steps"])
    """What every row has as much of as the baseline: one group of columns each."""
    baseline: str = ""
    """The row to which the others are compared; empty: the first."""
    untrained: Settings | None = None
    """A row of fresh weights; the mapping replaces settings of its fine-tuning. null: no such row."""
    teacher: bool = False
    """A row of the baseline's frozen teacher, by k-NN and linear."""
    store_ids: bool = False
    """Write the ids once for all runs whose ids are the same in every epoch (data.crop: center)."""
    prepare: list[str] = Field(default=[])
    """Commands of the product, without `mapet`, that come once before the runs: 'make_demo {out}/demo'."""
    data: StudyDataConfig = Field(default_factory=StudyDataConfig)
    measure: MeasureConfig = Field(default_factory=MeasureConfig)
    cluster: ClusterConfig | None = None
    """null: this host's CPU or GPU."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, as the page shows them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def base(self) -> str:
        """The row to which the others are compared."""
        return self.baseline or next(iter(self.runs))

    def rules(self) -> Iterator[str]:
        """Yields a sentence for each contradiction in the document."""
        if not self.recipe:
            yield "recipe is empty: name the recipe that all runs begin from, recipe: mapet_vitb16."
        if not self.runs:
            yield "runs is empty: name at least one row, runs: {mapet: {}}."
        elif self.base not in self.runs:
            yield f"baseline = {self.baseline} is no row of runs; there are {', '.join(self.runs)}."
        for name in [*self.runs, *self.tokenizers]:
            if not name.replace("-", "_").isidentifier() or name in ("untrained", "teacher", "shared"):
                yield (
                    f"'{name}' can't be a row: it names a folder. Use letters, digits, - and _; untrained, "
                    "teacher and shared are taken."
                )
        for name in ("seeds", "equal"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                yield f"{name} = {values} must name each value once, and one at least."
        if "time" in self.equal and "steps" not in self.equal:
            yield (
                f"equal = {self.equal} has time without steps, whose runs give the speeds that time needs: "
                "add steps."
            )
        if "time" in self.equal and self.at_once > 1:
            yield (
                f"at_once = {self.at_once} runs side by side have no speed of their own, which equal = time "
                "needs: at_once=1."
            )
        finetune = self.measure.finetune
        if finetune and not finetune.recipe:
            yield "measure.finetune.recipe is empty: name a recipe of fine-tuning, finetune_mapet_vitb16."


def words(settings: Settings, **folders: Any) -> list[str]:
    """The settings as `a.b=value`, as a user would write them; {out} and the like become folders."""
    overrides = []
    for name, value in flatten(settings).items():
        if isinstance(value, str):
            for folder, path in folders.items():
                value = value.replace(f"{{{folder}}}", str(path))
        overrides.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return overrides


def load_study(document: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> StudyConfig:
    """Reads a study with `a.b=value` overrides on top: a file, or the name of a shipped one.

    Every run's recipe and settings are read, too, so that a wrong name is answered before anything runs.

    Raises:
        ConfigError: as load_config; or rows that contradict each other.
    """
    study: StudyConfig = load_config(document, overrides, StudyConfig, STUDIES)
    if sentences := list(study.rules()):
        raise ConfigError("\n".join(f"The study {document}: {sentence}" for sentence in sentences))
    for name, own in study.runs.items():
        for tokenizer in [{}, *study.tokenizers.values()]:
            row_config(study, name, tokenizer)
    if finetune := study.measure.finetune:
        settings = words(finetune.settings) + words(study.untrained or {})
        load_config(finetune.recipe, settings, FinetuneConfig)
    return study


def row_settings(study: StudyConfig, name: str, tokenizer: Settings) -> tuple[str, Settings]:
    """The recipe of a row, and the settings that replace the recipe's, the row's own last."""
    own = flatten(study.runs[name])
    recipe = str(own.pop("recipe", study.recipe))
    return recipe, {**flatten(study.settings), **flatten(tokenizer), **own}


def row_config(study: StudyConfig, name: str, tokenizer: Settings, **folders: Any) -> Config:
    """The settings of a row's runs.

    Raises:
        ConfigError: naming the row.
    """
    recipe, settings = row_settings(study, name, tokenizer)
    try:
        return load_config(recipe, words(settings, **folders))
    except ConfigError as error:
        raise ConfigError(f"runs.{name}: {error}") from error


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that differs, with both values."""
    names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    return [f"  {name}: {then.get(name)} then, {now.get(name)} now" for name in names]


def compared(config: RunConfig, free: tuple[str, ...]) -> dict[str, Any]:
    """The settings that make a run what it is, flat: without `free` ones and other objectives' sections."""
    left_out = {*free, *config.idle_sections}
    flat = flatten(config.to_dict())
    return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{name}.") for name in left_out)}
