"""Refuse a run before it starts: settings that contradict each other or the launch, and DeepSpeed JSONs.

Like config.py this imports neither torch nor open_clip: a mistake is answered in a fraction of a second.
"""

from __future__ import annotations

import os
from pathlib import Path

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.objectives import Rules
from mapet_ds.config.sections import Config, RunConfig
from mapet_ds.config.towers import teacher_grid, teacher_layers, teacher_model_config
from mapet_ds.errors import ConfigError


def _folder_rules(name: str, folder: str) -> Rules:
    example = f"{name}=/data/imagenet/{name.rpartition('.')[2]}"
    return [
        (not folder, f"{name} is empty: name the folder of images, {example}."),
        (
            bool(folder) and not Path(folder).is_dir(),
            f"{name} = {folder} is not a folder that this host can see.",
        ),
    ]


def _evaluate_rules(config: Config) -> Rules:
    folders = {"evaluate.train": config.evaluate.train, "evaluate.val": config.evaluate.val}
    rules: Rules = []
    for name, folder in folders.items() if any(folders.values()) else ():
        rules += [*_folder_rules(name, folder), _outside_rule(config, name, folder)]
    return rules


def _input_rules(config: Config) -> Rules:
    model, data = config.model, config.data
    return [
        *_folder_rules("data.train", data.train),
        (
            model.img_size % model.patch_size != 0,
            f"model.img_size = {model.img_size} is not a multiple of model.patch_size = {model.patch_size}.",
        ),
        (
            data.crop == "center" and data.flip > 0,
            f"data.flip = {data.flip} has no effect with data.crop = center; set data.crop=random or data.flip=0.",
        ),
        (
            not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1,
            f"data.crop_scale = {list(data.crop_scale)} must rise within (0, 1].",
        ),
        (
            not 0 < data.crop_ratio[0] <= data.crop_ratio[1],
            f"data.crop_ratio = {list(data.crop_ratio)} must be positive and rising.",
        ),
        (min(data.std) <= 0, f"data.std = {list(data.std)} must be positive."),
        (
            not 0 < data.strong.blur_sigma[0] <= data.strong.blur_sigma[1],
            f"data.strong.blur_sigma = {list(data.strong.blur_sigma)} must be positive and rising.",
        ),
        (
            max(data.strong.jitter[:3]) >= 1 or data.strong.jitter[3] > 0.5,
            f"data.strong.jitter = {list(data.strong.jitter)}: brightness, contrast, saturation below 1, hue at most 0.5.",
        ),
        (
            data.color_jitter >= 1,
            f"data.color_jitter = {data.color_jitter} would turn images black; stay below 1.",
        ),
    ]


def _teacher_rules(config: Config) -> Rules:
    teacher, grid, layers = config.teacher, teacher_grid(config.teacher), teacher_layers(config.teacher)
    vision = teacher_model_config(teacher.name)["vision_cfg"]
    plain = not isinstance(vision.get("layers"), list) and not vision.get("timm_model_name")
    known_layer = layers is None or -layers <= teacher.layer < layers
    per_patch = teacher.img_size // max(grid or 1, 1)
    return [
        (
            teacher.features != "tokens" and not plain,
            f"teacher.features = {teacher.features}, but {teacher.name} is not open_clip's own ViT: no ln_post.",
        ),
        (
            not known_layer,
            f"teacher.layer = {teacher.layer}, but {teacher.name} has {layers} layers, 0 (first) to -1 (last).",
        ),
        (
            known_layer
            and grid not in (None, config.grid)
            and config.model.img_size % config.model.patch_size == 0,
            f"The teacher's grid is {grid} x {grid} (teacher.img_size = {teacher.img_size}, layer {teacher.layer} of "
            f"{teacher.name}) but the student's is {config.grid} x {config.grid}: each patch needs one target. Set "
            f"teacher.img_size={per_patch * config.grid}, or change the layer or the student's size.",
        ),
    ]


def _tokenizer_rules(config: Config) -> Rules:
    name = config.tokenizer.name
    return [
        (
            config.method.predicts_ids and name not in ("kclip", "vqkd") and ":" not in name,
            f"tokenizer.name = {name} is not known; there are kclip, vqkd and package.module:factory.",
        )
    ]


def _outside_rule(config: RunConfig, name: str, folder: str) -> tuple[bool, str]:
    return (
        bool(folder) and Path(os.path.abspath(config.run_dir)).is_relative_to(os.path.abspath(folder)),
        f"run_dir = {config.run_dir} lies inside {name} = {folder}: what a run writes would lie among the images. Name a "
        "folder outside.",
    )


def _run_rules(config: RunConfig, world_size: int) -> Rules:
    train, optim = config.train, config.optim
    per_step = train.micro_batch_size * world_size
    return [
        (not config.run_dir, "run_dir is empty: name the folder this run writes to, run_dir=/runs/name."),
        (
            train.global_batch_size % per_step != 0,
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {world_size} ranks = {per_step}; change one of the two.",
        ),
        (
            train.world_size not in (None, world_size),
            f"train.world_size = {train.world_size}, but the launcher started {world_size} ranks: "
            "look at the hostfile, the allocation and the number of GPUs per node.",
        ),
        (
            optim.warmup_epochs >= train.epochs,
            f"optim.warmup_epochs = {optim.warmup_epochs} leaves nothing of train.epochs = {train.epochs}.",
        ),
        (
            train.spike_factor is not None and config.checkpoint.every_steps % config.log.every_steps != 0,
            f"checkpoint.every_steps = {config.checkpoint.every_steps} is not a multiple of log.every_steps = "
            f"{config.log.every_steps}: a checkpoint would hold steps whose loss nobody has judged yet. Change one of the two, or "
            "set train.spike_factor=null.",
        ),
        (
            train.spike_factor is not None and config.checkpoint.keep == 1,
            "checkpoint.keep = 1 may leave no checkpoint from before a jump of the loss: keep 2, or set train.spike_factor=null.",
        ),
        _outside_rule(config, "data.train", config.data.train),
        (optim.min_lr > optim.lr, f"optim.min_lr = {optim.min_lr} is above optim.lr = {optim.lr}."),
    ]


def refuse_broken(rules: Rules) -> None:
    if found := [sentence for broken, sentence in rules if broken]:
        raise ConfigError("\n".join(found))


def check_inputs(config: Config) -> None:
    """Refuse data, teacher and view settings that don't fit together. Every rank may call it; no GPU is touched.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    refuse_broken(_input_rules(config) + (_teacher_rules(config) if config.tokenizer.name == "kclip" else []))


def check(config: Config, world_size: int) -> None:
    """Refuse settings that contradict each other or the launch. Every rank may call it; no GPU is touched.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    refuse_broken(
        _input_rules(config)
        + _method_rules(config)
        + _run_rules(config, world_size)
        + _evaluate_rules(config)
    )


def check_method(config: Config) -> None:
    """Refuse an objective, a teacher and sizes that don't fit together, whatever the data and the launch.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    refuse_broken(_method_rules(config))


def _method_rules(config: Config) -> Rules:
    if config.objective not in config.objectives:
        raise ConfigError(
            f"objective = {config.objective} is not known; there are: {', '.join(config.objectives)}."
        )
    teacher = _teacher_rules(config) if config.method.uses_teacher(config) else []
    return teacher + _tokenizer_rules(config) + config.method.rules(config)


def check_finetune(config: FinetuneConfig, world_size: int) -> None:
    """The same for the settings of fine-tuning.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    folders = _folder_rules("data.train", config.data.train) + _folder_rules("data.val", config.data.val)
    outside = [_outside_rule(config, "data.val", config.data.val)]
    refuse_broken(folders + config.rules() + _run_rules(config, world_size) + outside)
