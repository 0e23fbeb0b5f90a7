"""What the programs share at the terminal: their options, and a mistake as a sentence with exit code 2.

Imports neither torch nor the settings, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mapet_ds.errors import ConfigError, UserError


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the description line by line as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def recipe_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a recipe, of settings that replace the recipe's, and of what the deepspeed launcher adds.

    Call its parse_intermixed_args: users write settings before and after other options.
    """
    parser = option_parser(description)
    recipe = "a recipe: a file, or the name of a shipped one, e.g. mapet_vitb16"
    parser.add_argument("--config", required=True, metavar="YAML", help=recipe)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's"
    )
    return parser


def number(kind: Callable[[str], Any], least: float, above: bool = False) -> Callable[[str], Any]:
    """A type for argparse: a finite number that is at least `least`, or above it."""

    def parse_number(text: str) -> Any:
        value = kind(text)
        if not (value > least or (value == least and not above)) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {least}")
        return value

    parse_number.__name__ = getattr(kind, "__name__", "number")  # argparse names it where text is no number
    return parse_number


def answer(
    work: Callable[[], int | None], writes: Path | None = None, stopped: str = "Stopped by Ctrl-C."
) -> int:
    """Does a program's work; gives its exit code, which is 2 where the user can correct what stderr says.

    It is 1 where standard output was closed before the program had said all.

    writes: what the work writes. Where it can't, the storage's error becomes a sentence, too.
    stopped: what is said after Ctrl-C, which ends the process without a traceback.
    """
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough; at its exit Python would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # the process still dies by the signal, so that a shell's loop ends with it
        said = f"\n{stopped}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else ""
        sys.excepthook = lambda *_: print(said, end="", file=sys.stderr)
        raise
    except UserError as error:
        message = str(error)
        if error.printed_elsewhere:
            return 2
    except OSError as error:
        if writes is None:
            raise
        message = f"{writes} can't be written: {error}."
    print(message, file=sys.stderr, flush=True)
    return 2


def refuse(parser: argparse.ArgumentParser, error: ConfigError) -> NoReturn:
    """Ends the program with code 2 and the sentence, which one rank of each host prints."""
    parser.exit(2, f"{error}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else None)


def loading(folder: Path) -> str:
    """The lines that show how to load a timm model of a folder."""
    return f"""Load it with:
  import timm
  model = timm.create_model("local-dir:{folder.resolve()}", pretrained=True)
  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"""
