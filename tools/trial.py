"""Try everything once on a new machine, step by step: the first hour with a GPU, the first day on a cluster.

    tools/trial.py gpu runs/trial           what `make gpu` runs: tests, real runs, benchmarks, a profile
    tools/trial.py gpu runs/trial --cpu     the same steps in small shapes, where there is no GPU
    tools/trial.py cluster OUT --config RECIPE --data DIR ...    what slurm/first_day.sh runs in its job

Each step takes less than nine minutes and leaves a line in OUT/steps.jsonl and a log in OUT/logs/. The same
command again does only what has not passed yet, with this commit, on this hardware. At the end there is a
table of verdicts; the exit code is 0 where nothing failed, 1 where a step failed, 2 where no GPU is seen.

Images, teacher and codebook of `gpu` are made on the spot: figures of speed hold, those of learning don't.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from trials.runner import Trial, report
from trials.tables import write_tables

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.terminal import answer, number, option_parser

BENCHMARKS = REPOSITORY / "docs/benchmarks.md"
ENGINE = "ds_configs/zero2.json"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("where", choices=["gpu", "cluster"])
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for all that is written")
    parser.add_argument("--cpu", action="store_true", help="gpu: small shapes on the CPU")
    docs = "the page whose tables are written; default docs/benchmarks.md, with --cpu a copy in OUT"
    parser.add_argument("--docs", type=Path, metavar="MD", help=docs)
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps alone")
    parser.add_argument("--config", type=Path, metavar="YAML", help="cluster: the recipe to be trained")
    parser.add_argument("--deepspeed_config", default=ENGINE, metavar="JSON", help="cluster: its engine")
    parser.add_argument("--data", type=Path, metavar="DIR", help="cluster: its images")
    parser.add_argument("--nodes", type=number(int, 1), default=2, help="cluster: of the job")
    parser.add_argument("--gpus_per_node", type=number(int, 1), default=8, help="cluster: ranks on each")
    settings = "cluster: settings that replace the recipe's"
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help=settings)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.where == "cluster" and not (arguments.config and arguments.data):
        parser.error("cluster needs --config and --data.")
    return arguments


def folder_of(path: Path) -> Path:
    """The folder as commands name it: below the repository, if it lies there."""
    path = path.resolve()
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def try_all(arguments: argparse.Namespace) -> int:
    """Does the steps that are not done, writes what they have measured, and prints the verdicts."""
    from trials import cluster, gpu  # they import torch

    # Commands run in the repository's root, and so do the looks at what they leave.
    out, where, docs = folder_of(arguments.out), arguments.where, arguments.docs and arguments.docs.resolve()
    os.chdir(REPOSITORY)
    machine = gpu.Machine.here(arguments.cpu) if where == "gpu" else cluster.machine()
    setup = machine.setup() if where == "gpu" else cluster.setup(arguments, machine)
    steps = gpu.steps(machine, out) if where == "gpu" else cluster.steps(arguments, machine, out)
    if unknown := set(arguments.only) - {step.name for step in steps}:
        known = ", ".join(step.name for step in steps)
        raise ConfigError(f"--only {' '.join(sorted(unknown))}: there is no such step; there are {known}.")
    trial = Trial(REPOSITORY / out, setup)
    records = trial.run(steps, arguments.only)

    # What was measured goes where it is read.
    copy = trial.folder / "benchmarks.md"
    page = docs or (BENCHMARKS if machine.gpu and where == "gpu" else copy)
    write_tables(where, records, page, BENCHMARKS)
    print(report(records, trial.folder, page))
    return 1 if any(record["verdict"] == "FAILED" for record in records) else 0


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    stopped = "Stopped: the same command goes on with the step that was in hand."
    sys.exit(answer(lambda: try_all(words), stopped=stopped))
