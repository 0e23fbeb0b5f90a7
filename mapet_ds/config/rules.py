"""Refuse a run before it starts: settings that contradict each other or the launch, and DeepSpeed JSONs.

Like config.py this imports neither torch nor open_clip: a mistake is answered in a fraction of a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import psutil

from mapet_ds.config.sections import Config, ConfigError, RunConfig, TeacherConfig, TokenizerConfig
from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.data.stored_ids import StoredIds, check_storable
from mapet_ds.config.objectives import ObjectiveConfig, Rules
from mapet_ds.config.recipe import load_config


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


def teacher_layers(teacher: TeacherConfig) -> int | None:
    """How many layers teacher.layer chooses from; None where only building the tower can tell."""
    layers = teacher_model_config(teacher.name)["vision_cfg"].get("layers", 12)
    if teacher_model_config(teacher.name)["vision_cfg"].get("timm_model_name"):
        return None
    return 5 if isinstance(layers, list) else layers  # a ModifiedResNet: stem, layer1 .. layer4


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


def _folder_rules(name: str, folder: str) -> Rules:
    example = f"{name}=/data/imagenet/{name.rpartition('.')[2]}"
    return [
        (not folder, f"{name} is empty: name the folder of images, {example}."),
        (bool(folder) and not Path(folder).is_dir(), f"{name} = {folder} is not a folder that this host can see."),
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
        (data.color_jitter >= 1, f"data.color_jitter = {data.color_jitter} would turn images black; stay below 1."),
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
        (not known_layer, f"teacher.layer = {teacher.layer}, but {teacher.name} has {layers} layers, 0 (first) to -1 (last)."),
        (
            known_layer and grid not in (None, config.grid) and config.model.img_size % config.model.patch_size == 0,
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


def _refuse(rules: Rules) -> None:
    if found := [sentence for broken, sentence in rules if broken]:
        raise ConfigError("\n".join(found))


def check_inputs(config: Config) -> None:
    """Refuse data, teacher and view settings that don't fit together. Every rank may call it; no GPU is touched.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    _refuse(_input_rules(config) + (_teacher_rules(config) if config.tokenizer.name == "kclip" else []))


def check(config: Config, world_size: int) -> None:
    """Refuse settings that contradict each other or the launch. Every rank may call it; no GPU is touched.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    _refuse(_input_rules(config) + _method_rules(config) + _run_rules(config, world_size) + _evaluate_rules(config))


def check_method(config: Config) -> None:
    """Refuse an objective, a teacher and sizes that don't fit together, whatever the data and the launch.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    _refuse(_method_rules(config))


def _method_rules(config: Config) -> Rules:
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    objectives = [name for name, section in sections.items() if isinstance(section, ObjectiveConfig)]
    if config.objective not in objectives:
        raise ConfigError(f"objective = {config.objective} is not known; there are: {', '.join(objectives)}.")
    teacher = _teacher_rules(config) if config.method.uses_teacher(config) else []
    return teacher + _tokenizer_rules(config) + config.method.rules(config)


def check_tokenizer_file(tokenizer: TokenizerConfig) -> None:
    """Refuse a tokenizer whose file isn't there.

    Raises:
        ConfigError: no file at tokenizer.path.
    """
    writes = {"kclip": "tools/fit_codebook.py writes it", "vqkd": "BEiT v2 publishes it"}.get(tokenizer.name)
    if writes and not Path(tokenizer.path).is_file():
        found = "is empty" if not tokenizer.path else f"= {tokenizer.path} is not a file"
        raise ConfigError(f"tokenizer.path {found}: name the file that the {tokenizer.name} tokenizer reads; {writes}.")


def check_finetune(config: FinetuneConfig, world_size: int) -> None:
    """The same for the settings of fine-tuning.

    Raises:
        ConfigError: with one sentence per contradiction.
    """
    folders = _folder_rules("data.train", config.data.train) + _folder_rules("data.val", config.data.val)
    outside = [_outside_rule(config, "data.val", config.data.val)]
    _refuse(folders + config.rules() + _run_rules(config, world_size) + outside)


def check_run_dir(config: RunConfig) -> None:
    """Refuse a run whose folder can't be used, as far as a look at the path tells. Every rank may call it.

    Raises:
        ConfigError: run_dir can't be made or written.
    """
    folder = Path(os.path.abspath(config.run_dir))
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written" if there.is_dir() else "is not a folder"
        raise ConfigError(f"run_dir = {config.run_dir} can't be used: {there} {why}.")


def check_files(config: Config) -> None:
    """Refuse a run whose codebook, ids, weights to begin from or folder can't be used, as far as a look at the paths tells.

    Every rank may call it.

    Raises:
        ConfigError: no file at tokenizer.path; no ids of this recipe at tokenizer.ids; no weights at model.init_from, where the
            run starts; run_dir can't be made or written.
    """
    if not any((Path(config.run_dir) / "checkpoints").glob("step_*")):
        _refuse(config.model.init_rules())
    if config.method.predicts_ids and config.tokenizer.ids:
        check_storable(config)
        StoredIds(config.tokenizer.ids).check(config)
    elif config.method.predicts_ids:
        check_tokenizer_file(config.tokenizer)
    check_run_dir(config)


DEEPSPEED = {"deepspeed", "ds", "deepspeed.launcher.launch", "deepspeed.launcher.runner"}


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # another user's, or it has just ended
        return []


def ancestors() -> list[list[str]]:
    """The command lines of the processes above this one."""
    return [command_line(process) for process in psutil.Process().parents()]


def runs_one_of(words: list[str], programs: set[str]) -> bool:
    return any(Path(word).name in programs for word in words)


def check_hostfile(command_lines: list[list[str]]) -> None:
    """Refuse a launch whose hostfile is missing: DeepSpeed 0.19.8 only warns and trains on the local node alone.

    command_lines: those of this process's ancestors; only deepspeed's are looked at (mpirun's -H lists hosts).

    Raises:
        ConfigError: a `--hostfile` or `-H` of deepspeed names a file that is not there.
    """
    for words in (words for words in command_lines if runs_one_of(words, DEEPSPEED)):
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name not in ("--hostfile", "-H"):
                continue
            path = value if equals else words[i + 1] if i + 1 < len(words) else ""
            if not Path(path).is_file():
                raise ConfigError(
                    f"The hostfile {path or '(no name)'} does not exist, and DeepSpeed would train on this host alone. "
                    "Write it (one line a host: NAME slots=GPUS), or leave --hostfile out to use one host."
                )


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


CHECKS = {Config: (check, check_files), FinetuneConfig: (check_finetune, check_run_dir)}


def parse_command_line(argv: list[str], description: str, settings: type[RunConfig] = Config) -> tuple[Any, dict[str, Any]]:
    """Settings and DeepSpeed JSON of a training command, both checked; a mistake ends the program with code 2 and a sentence.

    Takes what the launchers pass: `--local_rank` from deepspeed, the world size from the environment.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="a recipe, e.g. mapet_ds/recipes/mapet_vitb16.yaml")
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="engine knobs, e.g. ds_configs/zero2.json")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    try:
        check_hostfile(ancestors())
        config = load_config(arguments.config, arguments.overrides, settings)
        check_settings, check_paths = CHECKS[settings]
        check_settings(config, int(os.environ.get("WORLD_SIZE", "1")))
        engine_config = load_deepspeed_config(arguments.deepspeed_config)
        check_paths(config)
        return config, engine_config
    except ConfigError as error:
        refuse(parser, error)


def refuse(parser: argparse.ArgumentParser, error: ConfigError) -> NoReturn:
    """End the program with code 2 and the sentence, which one rank of each host says."""
    parser.exit(2, f"{error}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else None)
