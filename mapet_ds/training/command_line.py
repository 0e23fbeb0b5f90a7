"""The command line of a training program: settings and DeepSpeed JSON, checked before torch is imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.knobs import describe, known_keys
from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check, check_labelled, refuse_broken
from mapet_ds.config.running import RunConfig
from mapet_ds.config.sections import Config, TokenizerConfig
from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.data.stored_ids import StoredIds, check_storable
from mapet_ds.errors import ConfigError
from mapet_ds.launchers import ancestors, check_hostfile
from mapet_ds.terminal import recipe_parser, refuse


def check_tokenizer_file(tokenizer: TokenizerConfig) -> None:
    """Refuses a tokenizer whose file isn't there, by a ConfigError."""
    origins = {
        "kclip": "tools/fit_codebook.py writes it", "vqkd": "BEiT v2 publishes it",
        "dalle": "docs/extending.md has the lines that make it of OpenAI's",
    }  # fmt: skip
    writes = origins.get(tokenizer.name)
    if writes and not Path(tokenizer.path).is_file():
        state = f"= {tokenizer.path} is not a file" if tokenizer.path else "is empty"
        cure = f"name the file that the {tokenizer.name} tokenizer reads; {writes}"
        raise ConfigError(f"tokenizer.path {state}: {cure}.")


def check_run_dir(config: RunConfig) -> None:
    """Refuses a run whose folder can't be made or written, as far as its path shows, by a ConfigError.

    Every rank may call it.
    """
    folder = Path(os.path.abspath(config.run_dir))
    if config.resume == "never" and any((folder / "checkpoints").glob("step_*")):
        raise ConfigError(f"run_dir = {folder} holds a run and resume is never; name a new run_dir.")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "may not be written" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"run_dir = {config.run_dir} can't be used: {existing} {why}.")


def check_files(config: Config) -> None:
    """Refuses a run whose codebook, ids, first weights or folder can't be used, as far as their paths show.

    Weights to begin from matter only where the run starts. Every rank may call it.

    Raises:
        ConfigError: no file at tokenizer.path, no ids of this recipe at tokenizer.ids, no weights at
            model.init_from, or a run_dir that can't be made or written.
    """
    if not any((Path(config.run_dir) / "checkpoints").glob("step_*")):
        refuse_broken(config.model.init_rules())
    if config.method.predicts_ids and config.tokenizer.ids:
        check_storable(config)
        StoredIds(config.tokenizer.ids).check(config)
    elif config.method.predicts_ids:
        check_tokenizer_file(config.tokenizer)
    check_run_dir(config)


class Command(NamedTuple):
    """The settings that a training program takes, and what it refuses before torch is imported."""

    settings: type[RunConfig]
    check: Callable[[Any, int], None]
    """Called with the settings and the number of ranks; refuses what doesn't fit together."""
    check_files: Callable[[Any], None]
    """Called with the settings; refuses what the paths in them show to be unusable."""


PRETRAINING = Command(Config, check, check_files)
FINETUNING = Command(FinetuneConfig, check_labelled, check_run_dir)
SEGMENTATION = Command(SegmentationConfig, check_labelled, check_run_dir)


class _ShowKnobs(argparse.Action):
    """The option --knobs [SECTION]: it prints the knobs and ends the program."""

    def __init__(self, *args: Any, settings: type[RunConfig], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        text = describe(self.settings, values)
        if not text:
            sections = ", ".join(dict.fromkeys(key.partition(".")[0] for key in known_keys(self.settings)))
            parser.exit(2, f"--knobs {values}: there is no such section or knob; there are {sections}.\n")
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` has seen enough; at its exit Python would flush once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(0)


def parse_command_line(
    argv: list[str], description: str | None, command: Command
) -> tuple[Any, dict[str, Any]]:
    """The settings and the DeepSpeed JSON of a training command.

    A mistake ends the program with code 2 and a sentence. It takes what the launchers pass: `--local_rank`
    from deepspeed, the number of ranks from the environment.
    """
    parser = recipe_parser(description)
    engine = "engine knobs: a file, or the name of a shipped one, e.g. zero2"
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help=engine)
    parser.add_argument(
        "--check", action="store_true", help="check settings, files and folders, say so and end"
    )
    parser.add_argument(
        "--knobs", nargs="?", const="", action=_ShowKnobs, settings=command.settings, metavar="SECTION",
        help="list the knobs, or those of a section, and end",
    )  # fmt: skip
    arguments = parser.parse_intermixed_args(argv)

    try:
        check_hostfile(ancestors())
        config = load_config(arguments.config, arguments.overrides, command.settings)
        # A check without a launcher takes the number of ranks from the recipe, where it has one.
        alone = config.train.world_size if arguments.check else None
        world_size = int(os.environ.get("WORLD_SIZE") or alone or 1)
        command.check(config, world_size)
        engine_config = load_deepspeed_config(arguments.deepspeed_config)
        command.check_files(config)
    except ConfigError as error:
        refuse(parser, error)
    if arguments.check:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        rest = (
            "What DeepSpeed, timm, the codebook, the images and a checkpoint have to say comes at the start"
        )
        print(f"Settings, files and folders are sound for {ranks}. {rest}.")
        parser.exit(0)
    return config, engine_config
