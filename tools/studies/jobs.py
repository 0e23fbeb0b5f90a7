"""The commands of a study: what each is, whether it is done, whether it has changed, what it has cost."""

from __future__ import annotations

import contextlib
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from trials.runner import reason_in

from mapet_ds.__main__ import programs
from mapet_ds.config.recipe import load_config
from mapet_ds.config.study import compared, differences
from mapet_ds.errors import ConfigError
from mapet_ds.files import whole_folder, write_whole


class Job(NamedTuple):
    """A command that writes a folder of the study, and its record to jobs.json there."""

    name: str
    words: list[str]
    folder: Path
    done: Path
    """What is there once it is done."""
    settings: dict[str, Any]
    """What makes it what it is, and may not change."""
    read: type[Any] | None = None
    """The settings of a training, which has written its own to config.yaml beside `done`."""
    marked: bool = False
    """Nothing that it leaves tells that it is done, so `done` is made when it has ended."""

    @property
    def log(self) -> Path:
        """What the command has said."""
        return self.folder / "logs" / f"{self.name}.log"


class Failed(Exception):
    """A command has ended with an error; the message is its last sentence."""


def program(name: str, *rest: object, ranks: int = 1) -> list[str]:
    """A command of the product, as the user would launch it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words = [*(launcher if ranks > 1 else []), programs()[name], *rest]
    return [sys.executable, *map(str, words)]


def options(settings: dict[str, Any]) -> list[str]:
    """The options of a program: {k: 20, batch_norm: true} is --k 20 --batch_norm."""
    words: list[str] = []
    for name, value in settings.items():
        if value is not False and value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def records(folder: Path) -> dict[str, Any]:
    """What jobs have recorded in a folder, by name: their settings, and seconds of the clock and of CPUs."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((folder / "jobs.json").read_text())
    return {}


def change(job: Job, free: tuple[str, ...]) -> list[str]:
    """A line for each setting in which a job that has begun differs from what is asked for now.

    free: the settings of a training that may differ.
    """
    written = job.done.parent / "config.yaml"
    if job.read and written.exists():
        then = compared(load_config(written, cls=job.read), free)
    elif job.done.exists() and job.name in records(job.folder):
        then = records(job.folder)[job.name]["settings"]
    else:
        return []
    lines = differences(json.loads(json.dumps(then)), json.loads(json.dumps(job.settings)))
    return [f"{job.folder}, {job.name}:", *lines] if lines else []


def run(job: Job) -> None:
    """Runs a job that is not done, and adds what it has cost to its record.

    An interrupt of the terminal reaches the command, too, which saves; it is waited for.

    Raises:
        Failed: its exit code is not 0, or it has not left what it is for.
    """
    if job.done.exists():
        return
    job.log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {job.folder.name}, {job.name}", flush=True)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with job.log.open("a") as log:
        log.write(f"\n$ {shlex.join(job.words)}\n")
        log.flush()
        process = subprocess.Popen(job.words, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            _record(job, time.monotonic() - start, before)
    if job.marked and code == 0:
        job.done.touch()
    if not job.done.exists():
        raise Failed(f"{reason_in(job.log)} ({job.log})")


def _record(job: Job, seconds: float, before: Any) -> None:
    after, known = resource.getrusage(resource.RUSAGE_CHILDREN), records(job.folder)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    old = known.get(job.name, {"seconds": 0.0, "cpu_seconds": 0.0})
    cost = {"seconds": old["seconds"] + seconds, "cpu_seconds": old["cpu_seconds"] + cpu}
    known[job.name] = {"settings": job.settings, **cost}
    write_whole(job.folder / "jobs.json", json.dumps(known, indent=1) + "\n")


def subset(source: str, number: int, out: Path) -> None:
    """Fills a folder with links to so many images, equally many of each class, the first by name.

    Raises:
        ConfigError: the source has no class folders, or too few images; the folder holds another number.
    """
    if out.is_dir():
        if (there := sum(1 for _ in out.glob("*/*"))) != number:
            raise ConfigError(f"{out} holds {there} images, not {number}: name a new --out.")
        return
    found = sorted(path for path in Path(source).iterdir() if path.is_dir()) if Path(source).is_dir() else []
    if not found or number % len(found):
        raise ConfigError(
            f"{number} images of {source}: it has {len(found)} class folders, which must divide that number."
        )
    each = number // len(found)
    with whole_folder(out) as beside:
        for folder in found:
            images = sorted(path for path in folder.iterdir() if path.is_file())[:each]
            if len(images) < each:
                raise ConfigError(f"{folder} has {len(images)} images; {each} of each class are asked for.")
            (beside / folder.name).mkdir()
            for path in images:
                (beside / folder.name / path.name).symlink_to(path.resolve())
