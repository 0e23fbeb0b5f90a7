"""Compare methods by a document: train, measure and tabulate every run that it names.

    tools/study.py cifar10_cpu --plan data.train=cifar10/train data.val=cifar10/test
    tools/study.py cifar10_cpu --out runs/cifar10 data.train=cifar10/train data.val=cifar10/test

The first command says what the study will take. The second does one after another what is not done yet, and
the same command goes on where it was. OUT gets table.md, table.csv, report.html and a folder for each run.
docs/studies.md tells what a document may say.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mapet_ds.config.shipped import STUDIES, shipped_file, shipped_names
from mapet_ds.config.study import StudyConfig, load_study, row_settings
from mapet_ds.errors import ConfigError
from mapet_ds.files import write_whole
from mapet_ds.terminal import answer, option_parser

if TYPE_CHECKING:
    from studies.runs import Runs

# torch and what needs it are imported once the document is read, so that a mistake is answered at once.

SCRIPT = """#!/bin/bash
# The runs of {document}, one task each. Submit it from the repository's root:
#
{commands}
#
# Submitted again, it does only what is not done. This writes the table:
#
#   {again} --table
#
# Training alone is warned of the time limit (--signal), since it alone saves and queues itself again.
#SBATCH --job-name=study
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --open-mode=append
#SBATCH --output={out}/slurm-%A_%a.out

cd "${{SLURM_SUBMIT_DIR:?}}" || exit # SLURM runs a copy of this file, from elsewhere
export ENGINE={engine} DATA={data}
case ${{SLURM_ARRAY_TASK_ID:?}} in
{tasks}
esac
case ${{1:?shared, train, measure or untrained}} in
    shared) exec {again} --only shared ;;
    train) [[ -f $RUN_DIR/DONE ]] || exec bash slurm/launch.sh "${{settings[@]}}" ;;
    measure) [[ ! -f $RUN_DIR/DONE ]] || exec {again} --only "${{RUN_DIR##*/}}" ;;
    untrained) exec {again} --only "${{RUN_DIR##*/}}" ;;
esac
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__)
    named = f"a study: a file, or one of {', '.join(shipped_names(STUDIES))}"
    parser.add_argument("document", metavar="STUDY", help=named)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="replace the document's entries")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ and the document's name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="say runs, time, disk and FLOPs, and end")
    what.add_argument("--slurm", action="store_true", help="write OUT/study.sh, a SLURM array, and end")
    what.add_argument("--table", action="store_true", help="write the table of what is there, and end")
    only = "this run's folder alone, or `shared`: what comes before all runs"
    what.add_argument("--only", metavar="RUN", default="", help=only)
    arguments = parser.parse_intermixed_args(argv)
    arguments.out = arguments.out or Path("runs", Path(arguments.document).stem)
    return arguments


def plan(runs: Runs) -> str:
    """What the study takes, a line for each row: runs, steps, FLOPs, disk, hours where they are known."""
    from mapet_ds.planning.study import gpu_hours, lasting

    lines = ["| row | equal | runs | steps | GFLOP an image | PFLOP | disk, GiB | hours |", "|---" * 8 + "|"]
    total = {"runs": 0, "flops": 0.0, "disk": 0.0, "hours": 0.0}
    unknown = []
    seeds = len(runs.study.seeds)
    rows = dict.fromkeys(row for row, _ in runs.trainings())
    for row in rows:
        steps, alike = runs.steps(row), row._replace(equal="steps")
        if steps is None:
            lines.append(f"| {row.title} | {row.equal} | {seeds} | as long as the baseline's | | | | |")
            continue
        work, speed = lasting(runs.works[alike], steps), runs.speed(alike)
        if runs.study.cluster:
            hours = gpu_hours(runs.study, row, runs.out, steps)
        else:
            hours = steps / speed / 3600 if speed else None
        if hours is None:
            unknown.append(row.title)
        shown = "" if hours is None else f"{seeds * hours:.3g}"
        cells = [row.title, row.equal, seeds, f"{steps:,}", f"{work.flops_per_image / 1e9:.4g}"]
        cells += [f"{seeds * work.flops / 1e15:.4g}", f"{seeds * work.disk / 2**30:.3g}", shown]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        amounts = {"runs": seeds, "flops": seeds * work.flops, "disk": seeds * work.disk}
        total = {name: total[name] + amounts.get(name, seeds * (hours or 0)) for name in total}
    lines += [
        f"| {row.title} | not counted yet: {reason} | | | | | | |" for row, reason in runs.uncounted.items()
    ]
    whose = "hours of this host, at the speed of the runs that are done"
    if runs.study.cluster:
        whose = f"GPU-hours of {runs.study.cluster.gpu}, predicted"
    took = f", {total['hours']:.3g} {whose}" if total["hours"] else ""
    lines += [
        f"\n{total['runs']} runs of training, {total['flops'] / 1e15:.4g} PFLOP, at most "
        f"{total['disk'] / 2**30:.3g} GiB of checkpoints and weights{took}.",
        "Time and disk of what is measured afterwards (features, fine-tuning), of codebooks and of stored "
        "ids are not counted here.",
    ]
    if len(rows) > total["runs"] / seeds or runs.uncounted:
        lines.append("Rows without figures are in none of these sums.")
    if unknown:
        lines.append(f"No run is done of {', '.join(dict.fromkeys(unknown))}: their hours are not known yet.")
    return "\n".join(lines)


def write_tables(runs: Runs, document: Path, outcomes: list) -> str:
    """Writes table.md, table.csv and report.html; gives the first."""
    from mapet_ds.results.report.study import comma_separated, markdown, page, table

    baseline = runs.base.title
    lines = table(outcomes, baseline)
    text = markdown(lines, baseline)
    write_whole(runs.out / "table.md", text)
    write_whole(runs.out / "table.csv", comma_separated(lines))
    entries = yaml.safe_dump(runs.study.to_dict(), sort_keys=False)
    write_whole(runs.out / "report.html", page(document.stem, lines, baseline, entries))
    return text


def slurm(arguments: argparse.Namespace, runs: Runs) -> str:
    """Writes the SLURM array of all runs; gives the commands that submit it, and what it lacks.

    A task whose run is done ends at once.

    Raises:
        ConfigError: the document names no cluster.
    """
    from mapet_ds.planning.study import load_row, stored

    study, place = runs.study, runs.study.cluster
    if place is None:
        raise ConfigError("--slurm needs the section cluster: cluster.gpu=h100 cluster.nodes=2.")
    # Runs, then what is measured without a training.
    lacking = [f"Not in the array, {row.title}: {reason}" for row, reason in runs.uncounted.items()]
    tasks = []
    for row, seed in runs.trainings():
        if runs.steps(row) is None:
            name = runs.folder(row.folder, seed).name
            lacking.append(f"Not in the array, {name}: the speed of its run of equal steps is not known.")
            continue
        recipe, _ = row_settings(study, row.name, {})
        # launch.sh fits the codebook that CODEBOOK names; the settings come later, and have the last word.
        path, ids = load_row(study, row, runs.out, seed).tokenizer.path, stored(study, row, runs.out)
        own = [*runs.overrides(row, seed), f"tokenizer.path={path}"]
        names = {"RECIPE": recipe, "RUN_DIR": runs.folder(row.folder, seed), "CODEBOOK": path or "/dev/null"}
        names |= {"IDS": ids} if ids else {}
        exports = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in names.items())
        tasks.append(f"{exports} settings=({shlex.join(own)})")
    trained = len(tasks)
    tasks += [f"RUN_DIR={shlex.quote(str(runs.folder(name, seed)))}" for name, seed, _ in runs.untrained()]

    # The script, and the commands that submit it.
    path, words = runs.out / "study.sh", [sys.executable, __file__, arguments.document]
    again = shlex.join([*words, "--out", str(runs.out), *arguments.overrides])
    commands = submission(shlex.quote(str(path)), trained, len(tasks))
    text = SCRIPT.format(
        document=arguments.document, commands="\n".join(f"#   {command}" for command in commands),
        again=again, out=runs.out, nodes=place.nodes, gpus=place.gpus_per_node,
        tasks="\n".join(f"    {i}) export {task} ;;" for i, task in enumerate(tasks)),
        engine=shlex.quote(study.engine), data=shlex.quote(str(runs.images["train"])),
    )  # fmt: skip
    runs.out.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return "\n".join([*commands, *lacking])


def submission(script: str, trained: int, tasks: int) -> list[str]:
    """The commands that submit an array, each stage after the one that it needs.

    trained, tasks: the number of runs, with which the tasks begin, and of all tasks.
    """
    array = f"--array=0-{trained - 1} --dependency"
    commands = [
        f"shared=$(sbatch --parsable --array=0 {script} shared)",
        f"trained=$(sbatch --parsable {array}=afterok:$shared --signal=B:USR1@300 {script} train)",
        f"measured=$(sbatch --parsable {array}=aftercorr:$trained {script} measure)",
    ]
    if tasks > trained:  # fresh weights are built like the baseline's, which are exported there
        rest = f"--array={trained}-{tasks - 1} --dependency=afterany:$measured"
        commands.append(f"sbatch {rest} {script} untrained")
    return commands


def begin(runs: Runs, shared_alone: bool) -> None:
    """Checks everything that can be checked, then does what all runs share, and checks what came of it.

    Raises:
        ConfigError: what the user can correct.
    """
    from studies.checks import check_rules, check_unchanged

    if (together := runs.study.at_once) > 1:  # torch else takes every core for each
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // together)))
    runs.link()
    runs.count()
    check_rules(runs)
    check_unchanged(runs)
    runs.prepare()
    if runs.uncounted and not shared_alone:  # the teacher may be there now
        runs.count()
        check_rules(runs)
        check_unchanged(runs)


def work(arguments: argparse.Namespace, study: StudyConfig) -> int:
    """Does what the command asks for; gives the exit code, which is 1 where a run has failed.

    Raises:
        ConfigError: what the user can correct.
    """
    from studies.checks import check_options, check_unchanged
    from studies.runs import Runs

    runs, document = Runs(study, arguments.out), shipped_file(arguments.document, STUDIES)
    only = arguments.only
    if only and only not in (known := ["shared", *runs.named()]):
        raise ConfigError(f"--only {only} is no run of this study; there are {', '.join(known)}.")
    check_options(study)
    if arguments.plan or arguments.slurm or arguments.table:
        runs.count()
    else:
        begin(runs, only == "shared")
    if only == "shared":
        return 0
    if arguments.plan:
        print(plan(runs))
        return 0
    if reason := runs.uncounted.get(runs.base):
        cure = " What `prepare` makes comes by --only shared." if study.prepare else ""
        raise ConfigError(f"The baseline can't be counted: {reason}{cure}")
    if arguments.slurm:
        print(slurm(arguments, runs))
        return 0
    if arguments.table:
        check_unchanged(runs)
    failed = runs.alone(only) if only else ""
    go, outcomes = not (only or arguments.table), []
    for outcome in runs.outcomes(go):
        outcomes.append(outcome)
        if go:
            write_tables(runs, document, outcomes)
    print(write_tables(runs, document, outcomes))
    return int(bool(failed) or (not only and any(outcome.failed for outcome in outcomes)))


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    stopped = "Stopped: the same command goes on with the run that was in hand."
    sys.exit(answer(lambda: work(chosen, load_study(chosen.document, chosen.overrides)), chosen.out, stopped))
