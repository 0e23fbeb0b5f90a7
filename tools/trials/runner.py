"""The steps of a trial: how one is run, judged, recorded, and passed over where it is done already."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.files import write_whole

LIMIT = 540
"""Seconds that a step may take: a session of ten minutes holds any of them."""
SOURCES = ("mapet_ds", "tools", "tests", "ds_configs", "slurm", "requirements.txt")
"""What a step's outcome depends on; docs are what the trial writes."""
TORCHRUN = re.compile(r"^.*torch/distributed/elastic/.* failed \(exitcode", re.MULTILINE)
NOISE = re.compile(r"warnings\.warn|\[W|W\d{4} .*torch/distributed/|\^|pdsh@|.*\[launch\.py")
Figures = dict[str, Any]
Record = dict[str, Any]


class Failed(Exception):
    """A step has ended, and what it has left is not as it must be."""


class Step(NamedTuple):
    """Commands that follow each other, and what must be true after them.

    A word of a command may be a function: of the figures of the steps before, by name.
    """

    name: str
    commands: Sequence[Sequence[object]]
    lacks: str = ""
    """Why it can't run here; empty where it can."""
    after: tuple[str, ...] = ()
    """Steps that must have passed."""
    figures: Callable[[str], Figures] = lambda printed: last_line(printed)
    """What it has measured, of its standard output; raises Failed where it is not as it must be."""
    fresh: tuple[Path, ...] = ()
    """Folders that it writes: what an earlier try left there goes first."""
    calibrates: bool = False
    """Its figures tell plan.py how fast the recipe is."""
    unless: str = ""
    """It stands in for that step: where that one has passed, nothing is to do, and it counts as passed."""


def last_line(printed: str) -> Figures:
    """The JSON object of the last line; none where that is something else.

    Raises:
        Failed: nothing was printed.
    """
    lines = printed.strip().splitlines()
    if not lines:
        raise Failed("it printed nothing")
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(lines[-1]), dict):
            return found
    return {}


def commit() -> str | None:
    """The commit, and a checksum of what differs from it; None where there is no git."""
    try:
        texts = [
            subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("diff", "HEAD", "--", *SOURCES))
        ]
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    changed = f"+{hashlib.sha256(texts[1]).hexdigest()[:12]}" if texts[1] else ""
    return texts[0].decode().strip() + changed


def run_command(words: list[str], log: Any, seconds: float) -> tuple[int | None, str]:
    """Exit code and standard output of a command; None where it was ended for taking too long.

    Both of its streams go to the log. A launcher is told to end, because its ranks are in other groups.
    """
    log.write(f"$ {shlex.join(words)}\n")
    log.flush()
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=pipe, stderr=log, text=True, process_group=0)
    try:
        printed, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        end(process)
    log.write(printed)
    log.flush()
    return process.returncode, printed


def end(process: subprocess.Popen[str]) -> None:
    """Ends a command that still runs: in order, and after half a minute at once."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reason_in(log: Path) -> str:
    """The last line of a log that says something: a program's sentence, or an exception's.

    torchrun's own account of a rank that failed comes after the rank's, and is passed over.
    """
    text = log.read_text(errors="replace").rpartition("\n$ ")[2]
    lines = [line.strip() for line in TORCHRUN.split(text)[0].splitlines()[1:]]
    said = [line for line in lines if line and not NOISE.match(line)]
    return said[-1][:300] if said else "it said nothing"


class Trial:
    """The folder of a trial: steps.jsonl, logs/, calibration.jsonl for plan.py, and what the steps write.

    setup: what an outcome rests on, beside the step. A line of another setup is no outcome here.
    """

    def __init__(self, folder: Path, setup: Figures) -> None:
        self.folder, self.setup = folder, setup | {"commit": commit()}
        self.lines = folder / "steps.jsonl"
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def passed(self) -> dict[str, Record]:
        """The steps that have passed with this setup, by name. A line cut short by a crash is none."""
        found = {}
        for line in self.lines.read_text().splitlines() if self.lines.exists() else ():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["setup"] == self.setup:
                    found[record["step"]] = record
        return {name: record for name, record in found.items() if record["verdict"] == "passed"}

    def run(self, steps: list[Step], only: Sequence[str] = ()) -> list[Record]:
        """Runs the steps that have not passed yet, in turn; gives the record of each.

        only: names of steps; of the others those count that have passed.
        """
        done, records, lines, verdicts = self.passed(), list[Record](), list[str](), dict[str, str]()
        for i, step in enumerate(steps, start=1):
            record = done.get(step.name)
            if record is None and only and step.name not in only:
                continue
            print(f"[{i}/{len(steps)}] {step.name:<20}", end=" ", flush=True)
            if record is None:
                record = self._take(step, verdicts, {each["step"]: each["figures"] for each in records})
                with self.lines.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                reason = f": {record['reason']}" if record["reason"] else ""
                print(f"{record['verdict']}, {record['seconds']:.0f} s{reason}", flush=True)
            else:
                print("passed before", flush=True)
            stood_in = verdicts.get(step.unless) == "passed"
            verdicts[step.name] = "passed" if stood_in else record["verdict"]
            records.append(record)
            if step.calibrates and record["verdict"] == "passed":
                lines.append(json.dumps(record["figures"]) + "\n")
                write_whole(self.folder / "calibration.jsonl", "".join(lines))
        return records

    def _take(self, step: Step, verdicts: dict[str, str], known: dict[str, Figures]) -> Record:
        """Runs one step; gives its record."""
        record: Record = {"step": step.name, "verdict": "left out", "reason": step.lacks, "seconds": 0.0}
        record |= {"commands": [], "setup": self.setup, "figures": {}}
        missing = [name for name in step.after if verdicts.get(name) != "passed"]
        if missing and not step.lacks:
            record["reason"] = f"{missing[0]} has not passed"
        if verdicts.get(step.unless) == "passed":
            record["reason"] = f"{step.unless} has passed"
        if record["reason"]:
            return record
        start, log = time.monotonic(), self.folder / "logs" / f"{step.name}.log"
        commands = [
            [str(word(known) if callable(word) else word) for word in words] for words in step.commands
        ]
        record["commands"] = list(map(shlex.join, commands))
        for folder in step.fresh:
            shutil.rmtree(REPOSITORY / folder, ignore_errors=True)
        try:
            record |= {"verdict": "passed", "figures": self._figures(step, commands, log)}
        except Failed as failed:
            record |= {"verdict": "FAILED", "reason": str(failed)}
        return record | {"seconds": round(time.monotonic() - start, 1)}

    def _figures(self, step: Step, commands: list[list[str]], log: Path) -> Figures:
        """Runs the commands of a step; gives what they have measured."""
        deadline, printed = time.monotonic() + LIMIT, ""
        log.unlink(missing_ok=True)
        with log.open("a") as file:  # the commands write their errors to it, too
            for words in commands:
                code, printed = run_command(words, file, deadline - time.monotonic())
                if code is None:
                    raise Failed(f"it took longer than {LIMIT} s")
                if code:
                    raise Failed(f"exit code {code}: {reason_in(log)}")
        try:
            return step.figures(printed)
        except (OSError, ValueError, KeyError) as error:
            raise Failed(f"it left no figures: {type(error).__name__} {error}") from error


def report(records: list[Record], folder: Path, page: Path) -> str:
    """The table of verdicts, and where everything lies."""
    form = "{step:<20}{verdict:<10}{seconds:6.0f} s  {reason}"
    lines = [form.format(**record).rstrip() for record in records]
    verdicts = [record["verdict"] for record in records]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in ("passed", "FAILED", "left out")]
    lines.append(", ".join(counts))
    lines.append(f"lines, logs, calibration.jsonl for plan.py: {folder}; tables: {page}")
    return "\n" + "\n".join(lines)
