"""Experiment trackers (wandb, trackio, mlflow, or one's own) beside metrics.jsonl and TensorBoard.

Each has a thread of rank 0, so whatever its package raises or waits for, no step waits. Its state,
RUN/trackers/NAME.json, holds the run's id there, so that a run goes on in it, and the last step that it was
told: a step that is made anew after a kill or a rollback is not told again.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mapet_ds.config.own import resolve
from mapet_ds.config.running import RunConfig, flatten
from mapet_ds.config.shipped import SHIPPED
from mapet_ds.errors import UserError
from mapet_ds.files import write_whole

PROJECT = "mapet_ds"
BACKLOG = 1000
"""Records and pictures that wait for a tracker; more are dropped."""
PATIENCE_S = 120
"""Time that the end of a run waits for its trackers."""
FAILURES = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError)
"""What a tracker may raise, answered with a sentence. Anything else ends its thread, with a traceback."""


class TrackedRun(NamedTuple):
    """What a tracker is told when it begins or goes on with a run."""

    name: str
    """The last part of run_dir."""
    folder: Path
    """RUN/trackers, for what the tracker writes itself."""
    settings: dict[str, Any]
    """The run's settings by their dotted names."""
    id: str | None
    """What the tracker's `id` was when the run began; None: it begins."""


class Tracker(Protocol):
    """What log.trackers=package.module:factory gives, called as factory(TrackedRun) in its own thread."""

    id: str
    """The run's name in the tracker."""

    def log(self, record: dict[str, float], step: int) -> None:
        """Takes a line of metrics. Steps rise."""

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        """Takes a picture."""

    def page(self, path: Path) -> None:
        """Takes the report of a run that is done, an HTML file."""

    def close(self) -> None:
        """Ends, at the end of the run or where it is asked to stop."""


class WandB:
    """Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and all its variables hold."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.name, id=run.id, resume="allow",
            dir=str(run.folder), config=run.settings, allow_val_change=True, reinit="create_new",
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.id = self._run.id

    def log(self, record: dict[str, float], step: int) -> None:
        self._run.log(record, step=step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def page(self, path: Path) -> None:
        self._run.log({"report": self._wandb.Html(str(path), inject=False)})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio, on this machine or in a Space (TRACKIO_SPACE_ID). TRACKIO_PROJECT names the project."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio, self.id = trackio, run.id or f"{run.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=self.id, config=run.settings,
            resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, record: dict[str, float], step: int) -> None:
        self._run.log(record, step=step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._trackio.Image(picture)}, step=step)

    def page(self, path: Path) -> None:
        self._run.log_artifact(path, name=f"{self.id}-report", type="report")

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, where MLFLOW_TRACKING_URI says. MLFLOW_EXPERIMENT_NAME names the experiment."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, mlflow.MlflowClient()
        if run.id:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:6000]) for key, value in run.settings.items()]
        for first in range(0, len(params), 100):  # its limit
            self._client.log_batch(self.id, params=params[first : first + 100])

    def log(self, record: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(
            self.id, [self._metric(key, float(value), now, step) for key, value in record.items()]
        )

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self._client.log_image(self.id, picture, key=name, step=step)

    def page(self, path: Path) -> None:
        self._client.log_artifact(self.id, str(path))

    def close(self) -> None:
        self._client.set_terminated(self.id)


KNOWN: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


def own_errors(name: str) -> tuple[type[Exception], ...]:
    """The errors of a known tracker's package that are none of FAILURES."""
    if name == "wandb":
        from wandb.errors import Error
    elif name == "mlflow":
        from mlflow.exceptions import MlflowException as Error
    elif name == "trackio":
        from trackio.exceptions import TrackioAPIError as Error  # pyright: ignore[reportMissingImports]
    else:
        return ()
    return (Error,)


class _Sender(threading.Thread):
    """The thread of one tracker. It ends with the tracker's first failure, which it says."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)
        self.tracker, self.tracked, self.path = name, run, run.folder / f"{name.replace(':', '.')}.json"
        self.state: dict[str, Any] = {"id": None}
        self.work: queue.Queue[Callable[[Tracker], Any] | None] = queue.Queue(BACKLOG)
        self.dropped = 0
        self.start()

    def put(self, work: Callable[[Tracker], Any] | None) -> None:
        """Has the tracker do this after all before it; None ends it. It waits for nothing."""
        if self.is_alive():
            try:
                self.work.put_nowait(work)
            except queue.Full:
                self.dropped += 1

    def new(self, kind: str, step: int) -> bool:
        """Whether the tracker has not been told this yet. From now on it has."""
        if step <= self.state.get(kind, 0):
            return False
        self.state[kind] = step
        write_whole(self.path, json.dumps(self.state))
        return True

    def run(self) -> None:
        errors: tuple[type[Exception], ...] = FAILURES
        try:
            errors += own_errors(self.tracker)
            if self.path.is_file():
                self.state |= json.loads(self.path.read_text())
            factory = KNOWN.get(self.tracker) or resolve("log.trackers", self.tracker)
            tracker: Tracker = factory(self.tracked._replace(id=self.state["id"]))
            self.state["id"] = tracker.id
            write_whole(self.path, json.dumps(self.state))
            while (work := self.work.get()) is not None:
                work(tracker)
            tracker.close()
        except (*errors, UserError) as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())
            _say(f"The tracker {self.tracker} fails, and gets nothing more until the next start: {reason}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


class Trackers:
    """All trackers of a run. For rank 0 only. No call waits but `close`."""

    def __init__(self, config: RunConfig) -> None:
        self._run = folder = Path(config.run_dir).absolute()
        run = TrackedRun(folder.name, folder / "trackers", flatten(config.to_dict()), None)
        if config.log.trackers:
            run.folder.mkdir(exist_ok=True)
        self._senders = [_Sender(name, run) for name in config.log.trackers]

    def log(self, record: dict[str, Any]) -> None:
        """Tells a line of metrics."""
        step, values = record["step"], {name: value for name, value in record.items() if name != "step"}
        for sender in self._senders:
            sender.put(lambda tracker, to=sender: to.new("record", step) and tracker.log(values, step))

    def show(self, step: int, name: str, picture: Tensor) -> None:
        """Shows a picture [3, H, W] in [0, 1]. The host waits for the GPU if it is there."""
        image = to_pil_image(picture.cpu())
        for sender in self._senders:
            sender.put(
                lambda tracker, to=sender: (
                    to.new(f"picture {name}", step) and tracker.image(name, image, step)
                )
            )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes at the run's end, done or not, and where the run can't go on. A crash waits for nobody."""
        if kind is None or issubclass(kind, UserError):
            self.close(done=kind is None and (self._run / "DONE").exists())

    def close(self, done: bool) -> None:
        """Ends all trackers, with the report of a run that is done. Waits for them, at most PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        page = self._page() if done and self._senders else None
        for sender in self._senders:
            if page:
                sender.put(lambda tracker, to=sender: to.new("page", 1) and tracker.page(page))
            sender.put(None)
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
            if sender.is_alive() or sender.dropped:
                late = f"{sender.work.qsize() + sender.dropped} of its records and pictures are lost"
                _say(f"The tracker {sender.tracker} has not kept pace: {late}. metrics.jsonl has all.")

    def _page(self) -> Path | None:
        """RUN/report.html, written by a process of its own, whose failure is only said."""
        page = self._run / "report.html"
        torch.cuda.empty_cache()  # it may need the room
        command = [sys.executable, str(SHIPPED / "tools/report.py"), str(self._run), "--out", str(page)]
        path = os.pathsep.join(each for each in sys.path if each)
        try:
            made = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
                timeout=PATIENCE_S / 2,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            reason = f"it takes more than {PATIENCE_S // 2} s. tools/report.py writes it"
        else:
            if made.returncode == 0:
                return page
            reason = (made.stderr.strip() or "killed").splitlines()[-1]
        _say(f"{page} is missing for the trackers: {reason}.")
        return None
