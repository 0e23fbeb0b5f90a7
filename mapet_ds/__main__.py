"""Each program by its name, from any folder: `mapet pretrain`, `mapet evaluate` or `python -m mapet_ds plan`.

    mapet PROGRAM [options]         `mapet PROGRAM --help` lists them
    torchrun --nproc_per_node 8 --no-python mapet pretrain --config mapet_vitb16 --deepspeed_config zero2
    deepspeed --no_python mapet pretrain --config mapet_vitb16 --deepspeed_config zero2

Programs:
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

from mapet_ds import __version__
from mapet_ds.config.shipped import ENGINES, PACKAGE, RECIPES, SHIPPED, STUDIES, SUITES, shipped_names


def programs() -> dict[str, Path]:
    """The file of each program."""
    tools = sorted((SHIPPED / "tools").glob("*.py"))
    return {"pretrain": PACKAGE / "pretrain.py", **{path.stem: path for path in tools}}


def overview() -> str:
    """What there is: programs with the first line of each, recipes, DeepSpeed JSONs, scripts for SLURM."""
    summaries = {
        name: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        for name, path in programs().items()
    }
    lines = [f"  {name:<16}{summary}" for name, summary in summaries.items()]
    lines += ["", "--config takes a file or one of: " + ", ".join(shipped_names(RECIPES)) + "."]
    lines += ["--deepspeed_config takes a file or one of: " + ", ".join(shipped_names(ENGINES)) + "."]
    lines += ["study takes a file or one of: " + ", ".join(shipped_names(STUDIES)) + "."]
    lines += ["evaluate suite --suite takes a file or one of: " + ", ".join(shipped_names(SUITES)) + "."]
    lines += [f"Scripts for SLURM are in {SHIPPED / 'slurm'}.", f"This is version {__version__}."]
    return f"{__doc__}" + "\n".join(lines)


def main() -> int:
    """Runs the program that the first word names, as the script that it is; gives the exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(overview())
        return 0
    name, found = sys.argv[1], programs()
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"Did you mean {close[0]}?" if close else "`mapet --help` lists them."
        print(f"mapet {name}: there is no such program. {hint}", file=sys.stderr)
        return 2
    sys.argv = [str(found[name]), *sys.argv[2:]]
    sys.path[0] = str(found[name].parent)  # as Python does for a script
    runpy.run_path(str(found[name]), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
