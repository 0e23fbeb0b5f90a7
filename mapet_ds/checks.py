"""Refuse a run before it starts: settings that contradict each other or the launch, and DeepSpeed JSONs.

Like config.py this imports neither torch nor open_clip: a mistake is answered in a fraction of a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any

from mapet_ds.config import Config, ConfigError, ObjectiveConfig, Rules, teacher_grid, teacher_model_config
from mapet_ds.recipe import load_config


def _input_rules(config: Config) -> Rules:
    model, data = config.model, config.data
    return [
        (not data.train, "data.train is empty: name the folder of images, data.train=/data/imagenet/train."),
        (
            bool(data.train) and not Path(data.train).is_dir(),
            f"data.train = {data.train} is not a folder that this host can see.",
        ),
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
        (data.color_jitter >= 1, f"data.color_jitter = {data.color_jitter} would turn images black; stay below 1."),
    ]


def _teacher_rules(config: Config) -> Rules:
    grid, vision = teacher_grid(config.teacher), teacher_model_config(config.teacher.name)["vision_cfg"]
    plain = not isinstance(vision.get("layers"), list) and not vision.get("timm_model_name")
    return [
        (
            config.teacher.features != "tokens" and not plain,
            f"teacher.features = {config.teacher.features}, but {config.teacher.name} is not open_clip's own ViT: no ln_post.",
        ),
        (
            grid not in (None, config.grid),
            f"The teacher's grid is {grid} x {grid} (teacher.img_size = {config.teacher.img_size}, {config.teacher.name}) "
            f"but the student's is {config.grid} x {config.grid}: each patch needs one target. Change teacher.img_size "
            f"to {config.teacher.img_size * config.grid // max(grid or 1, 1)}, or the student's size.",
        ),
    ]


def _run_rules(config: Config, world_size: int) -> Rules:
    train, optim = config.train, config.optim
    per_step = train.micro_batch_size * world_size
    return [
        (
            config.method.predicts_ids and config.tokenizer.name not in ("kclip", "vqkd") and ":" not in config.tokenizer.name,
            f"tokenizer.name = {config.tokenizer.name} is not known; there are kclip, vqkd and package.module:factory.",
        ),
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
        (optim.min_lr > optim.lr, f"optim.min_lr = {optim.min_lr} is above optim.lr = {optim.lr}."),
    ]


def _refuse(rules: Rules) -> None:
    if found := [sentence for broken, sentence in rules if broken]:
        raise ConfigError("\n".join(found))


def check_inputs(config: Config) -> None:
    """Refuse data, teacher and view settings that don't fit together. Every rank may call it; no GPU is touched.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    _refuse(_input_rules(config) + _teacher_rules(config))


def check(config: Config, world_size: int) -> None:
    """Refuse settings that contradict each other or the launch. Every rank may call it; no GPU is touched.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    objectives = [name for name, section in sections.items() if isinstance(section, ObjectiveConfig)]
    if config.objective not in objectives:
        raise ConfigError(f"objective = {config.objective} is not known; there are: {', '.join(objectives)}.")
    teacher = _teacher_rules(config) if config.method.uses_teacher(config) else []
    _refuse(_input_rules(config) + teacher + _run_rules(config, world_size) + config.method.rules(config))


ENGINE_KEYS = {
    "zero_optimization", "bf16", "data_types", "communication_data_type", "wall_clock_breakdown", "comms_logger",
    "flops_profiler", "memory_breakdown", "dump_state", "prescale_gradients", "gradient_predivide_factor",
}  # fmt: skip
OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size", "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "optimizer": "optim", "scheduler": "optim", "gradient_clipping": "optim.clip_grad",
    "activation_checkpointing": "train.grad_checkpointing", "tensorboard": "log",
}  # fmt: skip


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON that holds engine knobs only: DeepSpeed itself ignores misspelt keys.

    Raises:
        ConfigError: unreadable, unknown keys, keys that the recipe owns, a ZeRO stage other than 1, 2, 3.
    """
    try:
        engine = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"The DeepSpeed config {path} can't be read: {error}.") from error
    if not isinstance(engine, dict):
        raise ConfigError(f"The DeepSpeed config {path} must be a JSON object.")
    for key in engine:
        if key in OWNED_KEYS:
            raise ConfigError(f"{path} sets {key}, which belongs to the recipe: use {OWNED_KEYS[key]} there.")
        if key not in ENGINE_KEYS:
            close = difflib.get_close_matches(key, ENGINE_KEYS, n=1)
            raise ConfigError(f"{path} sets {key}, which is not an engine knob{f' (meant {close[0]}?)' if close else ''}.")
    zero = engine.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage must be 1, 2 or 3.")
    for key in ("offload_optimizer", "offload_param"):
        if key in zero:
            raise ConfigError(f"{path} sets zero_optimization.{key}: offloading uses an Adam that can't resume exactly.")
    return engine


def parse_command_line(argv: list[str], description: str) -> tuple[Config, dict[str, Any]]:
    """Config and DeepSpeed JSON of a training command, both checked; a mistake ends the program with code 2 and a sentence.

    Takes what the launchers pass: `--local_rank` from deepspeed, the world size from the environment.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="a recipe, e.g. mapet_ds/recipes/mapet_vitb16.yaml")
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="engine knobs, e.g. ds_configs/zero2.json")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        check(config, int(os.environ.get("WORLD_SIZE", "1")))
        return config, load_deepspeed_config(arguments.deepspeed_config)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
