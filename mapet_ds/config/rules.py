"""The checks before a run starts: settings that contradict each other or the launch are refused.

Nothing here imports torch or open_clip, so that a mistake is answered in a fraction of a second. Each
function named `..._rules` yields a sentence for each contradiction.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.running import RunConfig
from mapet_ds.config.sections import TIMM, Config
from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.config.sources import sources
from mapet_ds.config.towers import teacher_grid, teacher_layers, teacher_model_config, timm_patch
from mapet_ds.errors import ConfigError, DataError


def folder_rules(name: str, named: str) -> Iterator[str]:
    """Yields a sentence where a knob, `name`, names no images."""
    if not named:
        example = f"{name}=/data/imagenet/{name.rpartition('.')[2]}"
        yield f"{name} is empty: name the folder of images, {example}."
        return
    try:
        sources(named)
    except DataError as error:
        yield f"{name} = {error}"


def _outside_rules(config: RunConfig, name: str, named: str) -> Iterator[str]:
    folder = Path(os.path.abspath(config.run_dir))
    try:
        around = next((source for source, _ in sources(named) if folder.is_relative_to(source)), None)
    except DataError:  # `folder_rules` says it
        return
    if around:
        yield (
            f"run_dir = {config.run_dir} lies inside {name} = {around}: what a run writes would lie among "
            "the images. Name a folder outside."
        )


def _evaluate_rules(config: Config) -> Iterator[str]:
    folders = {"evaluate.train": config.evaluate.train, "evaluate.val": config.evaluate.val}
    for name, folder in folders.items() if any(folders.values()) else ():
        yield from folder_rules(name, folder)
        yield from _outside_rules(config, name, folder)


def _input_rules(config: Config) -> Iterator[str]:
    model, data, strong = config.model, config.data, config.data.strong
    yield from folder_rules("data.train", data.train)
    for name in (name for name in model.args if not name.isidentifier()):
        yield f"model.args has the key '{name}'; YAML wants a space after a colon, model.args='{{depth: 6}}'."
    if model.img_size % model.patch_size != 0:
        yield f"model.img_size = {model.img_size} is not a multiple of model.patch_size = {model.patch_size}."
    if data.crop == "center" and data.flip > 0:
        yield (
            f"data.flip = {data.flip} has no effect with data.crop = center; set data.crop=random or "
            "data.flip=0."
        )
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        yield f"data.crop_scale = {list(data.crop_scale)} must rise within (0, 1]."
    if not 0 < data.crop_ratio[0] <= data.crop_ratio[1]:
        yield f"data.crop_ratio = {list(data.crop_ratio)} must be positive and rising."
    if min(data.std) <= 0:
        yield f"data.std = {list(data.std)} must be positive."
    if not 0 < strong.blur_sigma[0] <= strong.blur_sigma[1]:
        yield f"data.strong.blur_sigma = {list(strong.blur_sigma)} must be positive and rising."
    if max(strong.jitter[:3]) >= 1 or strong.jitter[3] > 0.5:
        yield (
            f"data.strong.jitter = {list(strong.jitter)}: brightness, contrast, saturation below 1, "
            "hue at most 0.5."
        )
    if data.color_jitter >= 1:
        yield f"data.color_jitter = {data.color_jitter} would turn images black; stay below 1."


def _teacher_rules(config: Config) -> Iterator[str]:
    teacher, model = config.teacher, config.model
    grid, layers = teacher_grid(teacher), teacher_layers(teacher)
    vision = teacher_model_config(teacher.name)["vision_cfg"]
    resnet, timm = isinstance(vision.get("layers"), list), bool(vision.get("timm_model_name"))
    if teacher.features != "tokens" and (resnet or (timm and teacher.features == "projected")):
        has = "a ResNet: no final norm" if resnet else "a tower of timm's: no projection of patches"
        yield f"teacher.features = {teacher.features}, but {teacher.name} is {has}."
    patch = timm_patch(vision)
    if teacher.name.startswith(TIMM) and patch and teacher.img_size % patch:
        yield (
            f"teacher.img_size = {teacher.img_size} is not a multiple of {teacher.name}'s patch of {patch} "
            f"pixels: set teacher.img_size={patch * config.grid}, for the student's {config.grid} x "
            f"{config.grid} patches."
        )
    if layers is not None and not -layers <= teacher.layer < layers:
        yield (
            f"teacher.layer = {teacher.layer}, but {teacher.name} has {layers} layers, 0 (first) to -1 "
            "(last)."
        )
    elif grid not in (None, config.grid) and model.img_size % model.patch_size == 0:
        yield (
            f"The teacher's grid is {grid} x {grid} (teacher.img_size = {teacher.img_size}, layer "
            f"{teacher.layer} of {teacher.name}) but the student's is {config.grid} x {config.grid}: each "
            f"patch needs one target. Set teacher.img_size={teacher.img_size // max(grid, 1) * config.grid}, "
            "or change the layer or the student's size."
        )


def _tokenizer_rules(config: Config) -> Iterator[str]:
    name = config.tokenizer.name
    if config.method.predicts_ids and name not in ("kclip", "vqkd", "dalle") and ":" not in name:
        yield (
            f"tokenizer.name = {name} is not known; there are kclip, vqkd, dalle and package.module:factory."
        )


def _method_rules(config: Config, teacher: bool = True) -> Iterator[str]:
    try:
        method = config.method
    except ConfigError as error:
        yield str(error)
        return
    if config.model.relative and (reason := method.needs_table):
        fit = ", ".join(name for name in config.objectives if not getattr(config, name).needs_table)
        yield (
            f"model.name = {config.model.name} has relative positions, which objective = {config.objective} "
            f"can't carry along: {reason}. Take a ViT, model.name=vit_base_patch16_224, or one of {fit}."
        )
    if teacher and method.uses_teacher(config):
        yield from _teacher_rules(config)
    yield from _tokenizer_rules(config)
    yield from method.rules(config)


def _tracker_rules(trackers: Iterable[str]) -> Iterator[str]:
    known = ("wandb", "trackio", "mlflow")
    for name in trackers:
        if ":" in name:
            continue
        if name not in known:
            yield f"log.trackers names {name}; there are {', '.join(known)} and package.module:factory."
        elif not find_spec(name):
            yield f"log.trackers names {name}, which is not installed: pip install 'mapet_ds[{name}]'."


def _run_rules(config: RunConfig, world_size: int) -> Iterator[str]:
    train, optim, checkpoint, log = config.train, config.optim, config.checkpoint, config.log
    per_step = train.micro_batch_size * world_size
    if not config.run_dir:
        yield "run_dir is empty: name the folder this run writes to, run_dir=/runs/name."
    if train.global_batch_size % per_step != 0:
        yield (
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size} x {world_size} ranks = {per_step}; change one "
            "of the two."
        )
    if train.world_size not in (None, world_size):
        yield (
            f"train.world_size = {train.world_size}, but the launcher started {world_size} ranks: "
            "look at the hostfile, the allocation and the number of GPUs per node."
        )
    if optim.warmup_epochs >= train.epochs:
        yield f"optim.warmup_epochs = {optim.warmup_epochs} leaves nothing of train.epochs = {train.epochs}."
    if train.spike_factor is not None and checkpoint.every_steps % log.every_steps != 0:
        yield (
            f"checkpoint.every_steps = {checkpoint.every_steps} is not a multiple of log.every_steps = "
            f"{log.every_steps}: a checkpoint would hold steps whose loss nobody has judged yet. Change one "
            "of the two, or set train.spike_factor=null."
        )
    if train.spike_factor is not None and checkpoint.keep == 1:
        yield (
            "checkpoint.keep = 1 may leave no checkpoint from before a jump of the loss: keep 2, or set "
            "train.spike_factor=null."
        )
    yield from _tracker_rules(log.trackers)
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr = {optim.min_lr} is above optim.lr = {optim.lr}."


def refuse_broken(sentences: Iterable[str]) -> None:
    """Raises ConfigError with these sentences, where there is one."""
    if message := "\n".join(sentences):
        raise ConfigError(message)


def check_inputs(config: Config) -> None:
    """Refuses data, teacher and view settings that contradict each other.

    Every rank may call it; no GPU is touched.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    kclip = config.tokenizer.name == "kclip"
    refuse_broken(chain(_input_rules(config), _teacher_rules(config) if kclip else ()))


def check_method(config: Config) -> None:
    """Refuses an objective, a teacher and sizes that contradict each other, whatever the data and the launch.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    refuse_broken(_method_rules(config))


def check(config: Config, world_size: int, teacher: bool = True) -> None:
    """Refuses settings of pre-training that contradict each other or the launch.

    Every rank may call it; no GPU is touched.

    teacher: False where its folder is yet to be made; what only that folder tells is then not checked.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    inputs, outside = _input_rules(config), _outside_rules(config, "data.train", config.data.train)
    own, of_run = _method_rules(config, teacher), _run_rules(config, world_size)
    refuse_broken(chain(inputs, own, of_run, outside, _evaluate_rules(config)))


def check_labelled(config: FinetuneConfig | SegmentationConfig, world_size: int) -> None:
    """Refuses settings of a run on labels or masks that contradict each other or the launch.

    Every rank may call it; no GPU is touched.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    folders = {"data.train": config.data.train, "data.val": config.data.val}
    present = chain.from_iterable(folder_rules(*folder) for folder in folders.items())
    outside = chain.from_iterable(_outside_rules(config, *folder) for folder in folders.items())
    refuse_broken(chain(present, config.rules(), _run_rules(config, world_size), outside))
