"""The document of a suite: everything that is measured of one model. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mapet_ds.config.knobs import Natural, NonNegative, Positive, knobs
from mapet_ds.config.recipe import load_config
from mapet_ds.config.shipped import SUITES
from mapet_ds.config.sources import Paths
from mapet_ds.errors import ConfigError

Above0 = Annotated[float, Field(gt=0)]


@knobs
class SuiteDataConfig:
    """The labelled images by which a model is judged."""

    train: Paths = ""
    """What probes learn from: a folder of class folders, or what else pre-training's data.train may name."""
    val: Paths = ""
    """The same classes, other images."""


@knobs
class KnnConfig:
    """The vote of neighbours, as `tools/evaluate.py knn`."""

    k: list[Positive] = Field(default=[20])
    """Neighbours that vote; each number is measured."""
    temperature: Above0 = 0.07
    """A neighbour's vote is exp(cosine / temperature)."""


@knobs
class LinearConfig:
    """A linear classifier of frozen features, as `tools/evaluate.py linear`."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: logistic regression, solved whole on the CPU; sgd: as papers train it."""
    batch_norm: bool = False
    """sgd: BatchNorm without weights before the head."""
    learning_rates: list[Above0] | None = None
    """sgd: all tried at once; null: the probe's own."""
    epochs: Positive | None = None
    """sgd: passes over the features; null: the probe's own."""
    penalty: NonNegative = 1e-4
    """lbfgs: on the squared weights."""


@knobs
class AttentiveConfig:
    """A probe that pools patch tokens by attention, as `tools/evaluate.py attentive`."""

    learning_rates: list[Above0] | None = None
    """All tried at once; null: the probe's own."""
    epochs: Positive | None = None
    """Passes over the images; null: the probe's own."""
    memory_gb: NonNegative = 8.0
    """Patch tokens are kept in memory up to so many GB."""


@knobs
class FewConfig:
    """Probes that learn from few labels."""

    lists: list[str] = Field(default=[])
    """Text files that name training images, one a line."""
    shots: list[Positive] = Field(default=[])
    """Numbers of images of each class, drawn by seed."""
    draws: Positive = 3
    """Draws of each number of shots."""
    knn: KnnConfig | None = None
    """null: not measured."""
    linear: LinearConfig | None = Field(default_factory=LinearConfig)
    """null: not measured."""


@knobs
class SetConfig:
    """Images by whose classes a fine-tuned model is judged."""

    images: Paths = ""
    """Folders named by the model's classes, by wnid, or by ImageNet's number; or shards."""
    classes: str = ""
    """Only images of these classes, among which the model chooses: imagenet_a, imagenet_r, mini_imagenet, or
    a file of classes; empty: those of the images."""


@knobs
class AccuracyConfig:
    """Top-1 and top-5 of a fine-tuned model, as `tools/evaluate.py accuracy`."""

    val: bool = True
    """On data.val."""
    real: str | None = None
    """On data.val by ReaL's labels: the published real.json, or timm for timm's; null: not."""
    sets: dict[str, SetConfig] = Field(default_factory=dict)
    """Name of a row -> other images."""


@knobs
class SuiteConfig:
    """A suite: what is measured of a model, from features that are taken once."""

    data: SuiteDataConfig = Field(default_factory=SuiteDataConfig)
    seed: Natural = 0
    """Seed of the draws of few labels, and of probes by SGD."""
    features: list[Literal["mean", "token", "both"]] = Field(default=[])
    """Features that are judged; empty: the one that suits the objective of an export."""
    knn: KnnConfig | None = Field(default_factory=KnnConfig)
    """null: not measured."""
    linear: LinearConfig | None = Field(default_factory=LinearConfig)
    """null: not measured."""
    attentive: AttentiveConfig | None = None
    """null: not measured."""
    few: FewConfig = Field(default_factory=FewConfig)
    accuracy: AccuracyConfig | None = None
    """null: not measured. A model without a classifier has none."""

    def rules(self) -> Iterator[str]:
        """Yields a sentence for each mistake in the document."""
        for name in ("train", "val"):
            if not getattr(self.data, name):
                yield f"data.{name} is empty: name labelled images, data.{name}=/data/imagenet/{name}."
        for name, values in self._lists():
            if len(set(values)) < len(values):
                yield f"{name} = {values} must name each value once."
        for file in self.few.lists:
            if not Path(file).is_file():
                yield f"few.lists: {file} is no file that this host can see."
        names = [Path(file).name for file in self.few.lists]
        if len(set(names)) < len(names):
            yield f"few.lists = {self.few.lists}: two have one name, by which results tell them apart."
        if (self.few.lists or self.few.shots) and not (self.few.knn or self.few.linear):
            yield "few.knn and few.linear are both null: nothing learns from the few labels."
        for name, each in (self.accuracy.sets if self.accuracy else {}).items():
            if name == "val":
                yield "accuracy.sets.val: val is the name of data.val; take another."
            if not each.images:
                yield f"accuracy.sets.{name}.images is empty: name its images."
        if (
            self.accuracy
            and self.accuracy.real not in (None, "timm")
            and not Path(self.accuracy.real).is_file()
        ):
            yield f"accuracy.real = {self.accuracy.real} is no file that this host can see, nor timm."
        if not any(self._lists_of_work()):
            yield "The suite measures nothing: give it knn, linear, attentive, few.shots or accuracy."

    def _lists(self) -> Iterator[tuple[str, list[Any]]]:
        yield "features", self.features
        yield from (("few.lists", self.few.lists), ("few.shots", self.few.shots))
        for name, knn in (("knn", self.knn), ("few.knn", self.few.knn)):
            if knn:
                yield f"{name}.k", knn.k

    def _lists_of_work(self) -> list[Any]:
        top1 = self.accuracy and (self.accuracy.val or self.accuracy.real or self.accuracy.sets)
        return [self.knn, self.linear, self.attentive, self.few.lists, self.few.shots, top1]


def load_suite(document: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SuiteConfig:
    """Reads a suite with `a.b=value` overrides on top: a file, or the name of a shipped one.

    Raises:
        ConfigError: as load_config; or what is wrong with it, all of it.
    """
    suite: SuiteConfig = load_config(document, overrides, SuiteConfig, SUITES)
    if sentences := list(suite.rules()):
        raise ConfigError("\n".join(f"The suite {document}: {sentence}" for sentence in sentences))
    return suite
