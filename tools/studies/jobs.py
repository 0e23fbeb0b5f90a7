"""The commands of a study: what each is, whether it is done or has changed, what it has cost and found."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trials.runner import reason_in

from mapet_ds.__main__ import programs
from mapet_ds.config.recipe import load_config
from mapet_ds.config.study import compared, differences
from mapet_ds.data.kinds import by_name, hidden, looked_at
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


def movable(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """The settings as JSON gives them back, with {out} for the study's folder, which may be moved."""
    return json.loads(json.dumps(settings, ensure_ascii=False).replace(f"{out}/", "{out}/"))


def change(job: Job, free: tuple[str, ...]) -> list[str]:
    """A line for each setting in which a job that has begun differs from what is asked for now.

    free: the settings of a training that may differ.
    """
    written, out = job.done.parent / "config.yaml", job.folder.parent
    if job.read and written.exists():
        config = load_config(written, cls=job.read)
        above = len(written.parent.relative_to(out).parts)
        then = movable(compared(config, free), Path(config.run_dir).parents[above - 1])
    elif job.done.exists() and job.name in records(job.folder):
        then = records(job.folder)[job.name]["settings"]
    else:
        return []
    lines = differences(then, movable(job.settings, out))
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
    start = time.monotonic()
    with job.log.open("a") as log:
        log.write(f"\n$ {shlex.join(job.words)}\n")
        log.flush()
        process = subprocess.Popen(job.words, stdout=log, stderr=subprocess.STDOUT)
        interrupted = None
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt as interrupt:
            interrupted, (_, status, usage) = interrupt, os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        record(job, time.monotonic() - start, usage.ru_utime + usage.ru_stime)
        if interrupted:
            raise interrupted
    if job.marked and code == 0:
        job.done.touch()
    if not job.done.exists():
        raise Failed(f"{reason_in(job.log)} ({job.log})")


def record(job: Job, seconds: float, cpu: float) -> None:
    """Adds what a command has taken to its record, with its settings: seconds of the clock, and of CPUs."""
    known = records(job.folder)
    old = known.get(job.name, {"seconds": 0.0, "cpu_seconds": 0.0})
    cost = {"seconds": old["seconds"] + seconds, "cpu_seconds": old["cpu_seconds"] + cpu}
    known[job.name] = {"settings": movable(job.settings, job.folder.parent), **cost}
    write_whole(job.folder / "jobs.json", json.dumps(known, indent=1) + "\n")


def trained(folder: Path, ranks: int) -> dict[str, float]:
    """What a finished training has recorded: its steps, its speed, its hours, its online probes.

    ranks: its number of them, where its settings don't name it.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {"steps": lines[-1]["step"]}
    figures["speed"] = statistics.median(line["images_per_second"] for line in lines)
    if "gpu_memory_gib" in lines[-1]:
        ranks = load_config(folder / "config.yaml").train.world_size or ranks
        figures["gpu_hours"] = sum(line["seconds"] for line in lines) * ranks / 3600
    elif "pretrain" in (known := records(folder)):
        figures["cpu_hours"] = known["pretrain"]["cpu_seconds"] / 3600
    for name in ("knn", "linear"):
        if (key := f"{name}_accuracy_percent") in lines[-1]:
            figures[f"online_{name}"] = lines[-1][key]
    return figures


def measured(folder: Path) -> dict[str, float]:
    """The accuracies that the measurements of a run have written so far, in percent."""
    figures = {}
    for name in ("knn", "linear"):
        if (path := folder / f"{name}.json").exists():
            figures[name] = json.loads(path.read_text())[f"{name}_accuracy_percent"]
    if (path := folder / "finetuned/results.json").exists():
        figures["finetune"] = json.loads(path.read_text())["val_top1"]
    return figures


def subset(source: str, number: int, out: Path) -> None:
    """Fills a folder with links to so many images, equally many of each class, the first by name.

    Classes and images are what an index takes for them.

    Raises:
        ConfigError: the source has no class folders, or too few images; the folder holds other images.
    """
    names = sorted(Path(source).iterdir(), key=os.fsencode) if Path(source).is_dir() else []
    found = [path for path in names if path.is_dir() and not hidden(os.fsencode(path.name))]
    if not found or number % len(found):
        raise ConfigError(
            f"{number} images of {source}: it has {len(found)} class folders, which must divide that number."
        )
    each, links = number // len(found), dict[Path, Path]()
    for folder in found:
        images = list(islice(filter(is_image, sorted(folder.iterdir(), key=os.fsencode)), each))
        if len(images) < each:
            raise ConfigError(f"{folder} has {len(images)} images; {each} of each class are asked for.")
        links |= {path.relative_to(source): path.resolve() for path in images}
    if out.is_dir():
        if {path.relative_to(out): path.readlink() for path in out.glob("*/*")} != links:
            raise ConfigError(
                f"{out} holds other images than the first {number} of {source}: name a new --out, or "
                "remove that folder and the runs that saw it."
            )
        return
    with whole_folder(out) as beside:
        for name, path in links.items():
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / name).symlink_to(path)


def is_image(path: Path) -> bool:
    """Whether an index takes a file for an image."""
    name = os.fsencode(path.name)
    return path.is_file() and not hidden(name) and (by_name(name) or looked_at(os.fsencode(path))) == "image"
