"""A study's runs, how long each is for equal work, and what all of it will take. Arithmetic on counts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.running import total_steps
from mapet_ds.config.sections import Config
from mapet_ds.config.study import StudyConfig, row_config, row_settings, words
from mapet_ds.errors import ConfigError
from mapet_ds.planning.counting import student, target
from mapet_ds.planning.forecast import Cluster, Request, Speeds, predict
from mapet_ds.planning.roofline import GPUS


class Row(NamedTuple):
    """What a line of the table is about: runs that differ in their seed alone."""

    name: str
    tokenizer: str = ""
    equal: str = "steps"

    @property
    def folder(self) -> str:
        """The name of its runs' folders, without the seed."""
        more = [self.tokenizer, "" if self.equal == "steps" else f"equal_{self.equal}"]
        return "_".join(filter(None, [self.name, *more]))

    @property
    def title(self) -> str:
        """Its name in the table."""
        return ", ".join(filter(None, [self.name, self.tokenizer]))


class Work(NamedTuple):
    """What a row's training takes, counted."""

    steps: int
    parameters: int
    flops_per_image: float
    """Of a forward and a backward pass, and of the target where it is computed on the fly."""
    flops: float
    """Of the whole training."""
    disk: float
    """Bytes that its checkpoints and its weights for timm take at most."""


def rows(study: StudyConfig, equal: str = "steps") -> Iterator[Row]:
    """Yields the rows that are trained, in the document's order; tokenizers only where ids are predicted."""
    for name in study.runs:
        predicts_ids = row_config(study, name, {}).method.predicts_ids
        for tokenizer in study.tokenizers if study.tokenizers and predicts_ids else [""]:
            yield Row(name, tokenizer, equal)


def base_row(study: StudyConfig) -> Row:
    """The row that others are compared to: the baseline with the first tokenizer, at its own steps."""
    return next(row for row in rows(study) if row.name == study.base)


def check_folders(study: StudyConfig) -> None:
    """Refuses rows whose runs would share a folder.

    Raises:
        ConfigError: naming both.
    """
    taken: dict[str, Row] = {}
    for row in (row for equal in dict.fromkeys(["steps", *study.equal]) for row in rows(study, equal)):
        other = taken.setdefault(row.folder, row)
        if other != row:
            both = " and ".join(f"'{each.title}', equal {each.equal}," for each in (other, row))
            raise ConfigError(f"The rows {both} would share the folder {row.folder}: rename one of them.")


def folders(study: StudyConfig, out: Path) -> dict[str, Any]:
    """What {out}, {train} and {val} stand for. Subsets of images lie in the study's own folder."""
    places: dict[str, Any] = {"out": os.path.abspath(out)}
    for split in ("train", "val"):
        few = getattr(study.data, f"{split}_images")
        places[split] = Path(places["out"], "images", split) if few else getattr(study.data, split)
    return places


def _key(values: dict[str, Any], out: Path) -> str:
    """A short name for what decides about a shared file, the same where the study's folder is moved."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    text = text.replace(f"{os.path.abspath(out)}/", "{out}/")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _images(config: Config, study: StudyConfig, row: Row, out: Path) -> str:
    """data.train of a row's runs: its own, the study's, or else the recipe's."""
    _, own = row_settings(study, row.name, study.tokenizers.get(row.tokenizer, {}))
    shared = folders(study, out)["train"]
    return config.data.train if "data.train" in own or not shared else str(shared)


def fitted(study: StudyConfig, row: Row, out: Path) -> Path | None:
    """The codebook that the study fits for a row; None where it needs none, or its document names one.

    Rows whose images, teacher, tokenizer and crops are the same share it.
    """
    config = row_config(study, row.name, study.tokenizers.get(row.tokenizer, {}), **folders(study, out))
    _, settings = row_settings(study, row.name, study.tokenizers.get(row.tokenizer, {}))
    needed = config.method.predicts_ids and config.tokenizer.name == "kclip" and not config.tokenizer.ids
    if not needed or "tokenizer.path" in settings:
        return None
    tokenizer = dataclasses.replace(config.tokenizer, path="", ids="")
    seen = ("crop", "crop_scale", "crop_ratio", "flip", "exif_orientation")
    parts = [dataclasses.asdict(config.teacher), dataclasses.asdict(tokenizer)]
    data = [_images(config, study, row, out), *(getattr(config.data, name) for name in seen)]
    key = _key({"parts": parts, "data": data, "grid": config.grid}, out)
    return Path(os.path.abspath(out), "shared", f"codebook_{key}.safetensors")


def stored(study: StudyConfig, row: Row, out: Path) -> Path | None:
    """The folder of ids that the study writes for a row; None where its ids differ from epoch to epoch."""
    config = row_config(study, row.name, study.tokenizers.get(row.tokenizer, {}), **folders(study, out))
    static = study.store_ids and config.method.predicts_ids and config.data.crop == "center"
    if not static or config.tokenizer.ids:
        return None
    tokenizer = [config.tokenizer.name, config.tokenizer.path, str(fitted(study, row, out))]
    teacher = dataclasses.asdict(config.teacher) if config.tokenizer.name == "kclip" else {}
    data = [_images(config, study, row, out), config.data.exif_orientation, config.grid]
    key = _key({"teacher": teacher, "tokenizer": tokenizer, "data": data}, out)
    return Path(os.path.abspath(out), "shared", f"ids_{key}")


def settings_of(study: StudyConfig, row: Row, out: Path, seed: int, steps: int | None = None) -> list[str]:
    """What replaces the recipe's settings in a run, as the user would write it."""
    _, own = row_settings(study, row.name, study.tokenizers.get(row.tokenizer, {}))
    places = folders(study, out)
    overrides = [*words(own, **places), f"seed={seed}"]
    if places["train"] and "data.train" not in own:
        overrides.append(f"data.train={places['train']}")
    if codebook := fitted(study, row, out):
        overrides.append(f"tokenizer.path={codebook}")
    if steps is not None:
        overrides.append(f"train.epochs={_epochs(study, row, steps)}")
    return overrides


def _epochs(study: StudyConfig, row: Row, steps: int) -> float:
    """Epochs that make so many steps. Half a step less: a rounded product never gives one too many."""
    config = row_config(study, row.name, {})
    return round((steps - 0.5) * config.train.global_batch_size / (study.data.count or 1), 8)


def load_row(study: StudyConfig, row: Row, out: Path, seed: int, steps: int | None = None) -> Config:
    """The settings of a run."""
    recipe, _ = row_settings(study, row.name, {})
    return load_config(recipe, settings_of(study, row, out, seed, steps))


def counted(study: StudyConfig, row: Row, out: Path) -> Work:
    """What a row's training takes for as many steps as its recipe says.

    Raises:
        ConfigError: it can't be built, so it can't be counted either.
    """
    assert study.data.count
    config = load_row(study, row, out, study.seeds[0])
    model = student(config, 2 if load_deepspeed_config(study.engine).get("bf16", {}).get("enabled") else 4)
    each, follows = model.flops + model.recomputed, 0
    if not (stored(study, row, out) or (config.method.predicts_ids and config.tokenizer.ids)):
        goal = target(config)
        each += goal.flops + goal.fp32_flops + goal.tf32_flops + goal.convolutions
        follows = goal.follows
    steps = total_steps(config, study.data.count)
    kept = (config.checkpoint.keep + 1) * (12 * model.parameters + 4 * model.constants + follows)
    flops = each * steps * config.train.global_batch_size
    return Work(steps, model.parameters, each, flops, kept + 4 * model.parameters)


def equal_flops(work: Work, base: Work) -> int:
    """The steps in which a row's training takes as many FLOPs as the baseline's, to the nearest step."""
    return max(1, round(base.flops * work.steps / work.flops))


def equal_time(work: Work, speed: float, base: Work, base_speed: float) -> int:
    """The steps in which a row's training takes as long as the baseline's.

    speed, base_speed: steps a second that were measured.
    """
    return max(1, round(base.steps / base_speed * speed))


def lasting(work: Work, steps: int) -> Work:
    """The same training with another number of steps."""
    return work._replace(steps=steps, flops=work.flops * steps / work.steps)


def gpu_hours(study: StudyConfig, row: Row, out: Path, steps: int) -> float:
    """The GPU-hours of one run on the study's cluster, as tools/plan.py predicts them.

    Raises:
        ConfigError: the GPU is not known, or the run does not fit.
    """
    place = study.cluster
    assert place and study.data.count
    if place.gpu not in GPUS:
        raise ConfigError(f"cluster.gpu = {place.gpu} is not known; there are: {', '.join(GPUS)}.")
    gpu = GPUS[place.gpu]
    config = load_row(study, row, out, study.seeds[0], steps)
    cluster = Cluster(gpu, place.nodes, place.gpus_per_node)
    speeds, engine = Speeds(gpu.share, gpu.share), load_deepspeed_config(study.engine)
    return predict(Request(config, engine, cluster, study.data.count, speeds, fixed=False))["gpu_hours"]
