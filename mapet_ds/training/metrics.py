"""Meters that stay on the device, and the reports of them: metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from mapet_ds.config.running import RunConfig
from mapet_ds.config.sections import Config
from mapet_ds.files import whole_file, write_whole
from mapet_ds.training.trackers import Trackers

if TYPE_CHECKING:
    from mapet_ds.launch import Ranks

Show = Callable[[str, Tensor], None]
"""Takes a name and a picture [3, H, W] in [0, 1]."""
IMAGES_SHOWN = 8
NOT_PREDICTED = -1


def cut_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, and one that is unfinished: a resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(kept))


def _events(path: Path) -> Iterator[tuple[Event, bytes]]:
    """Yields TensorBoard's events of a file, each with its record, up to the first that is damaged.

    A record is 8 bytes of length, 4 of a checksum, the event, 4 of a checksum.
    """
    data, start = path.read_bytes(), 0
    while len(data) - start > 12:
        end = start + 16 + int.from_bytes(data[start : start + 8], "little")
        if end > len(data):
            return
        try:
            event = Event.FromString(data[start + 12 : end - 4])
        except DecodeError:
            return
        yield event, data[start:end]
        start = end


def keep_events(folder: Path, step: int) -> None:
    """Leaves of TensorBoard's files one, with the pictures and curves up to a step, in the order of steps.

    It sorts before any other, so what follows is read after it, whatever the clock says. TensorBoard itself
    would pass over later steps only where it reads the files in the order in which they were written.
    """
    old = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not old:
        return
    version, kept = b"", {}
    for event, record in (each for path in old for each in _events(path)):
        if event.HasField("file_version"):
            version = record
        elif event.step <= step:
            kept.update({(value.tag, event.step): record for value in event.summary.value})
    first = folder / "events.out.tfevents.0000000000.resumed"
    with whole_file(first) as beside:
        beside.write_bytes(version + b"".join(kept[key] for key in sorted(kept, key=lambda key: key[1])))
    for path in (path for path in old if path != first):
        path.unlink()


def newest_pictures(run_dir: Path) -> dict[str, tuple[int, bytes]]:
    """The step and the PNG of the latest picture of each name among a run's TensorBoard files."""
    found: dict[str, tuple[int, bytes]] = {}
    for path in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
        for event, _ in _events(path):
            for value in event.summary.value:
                if value.HasField("image") and event.step >= found.get(value.tag, (0,))[0]:
                    found[value.tag] = event.step, value.image.encoded_image_string
    return found


def token_colours(ids: Tensor) -> Tensor:
    """A fixed colour for each token id, never a grey; grey for -1: long [...] -> float [..., 3] in [0, 1]."""
    number = ids.double() + 1
    hue = number * 0.618034 % 1  # the golden ratio spreads neighbouring ids over the circle
    value = 0.6 + 0.4 * (number * 0.754878 % 1)
    saturation = torch.where(ids == NOT_PREDICTED, 0.0, 0.8)
    distance = (torch.tensor([5.0, 3.0, 1.0], dtype=hue.dtype, device=ids.device) + 6 * hue[..., None]) % 6
    falls = torch.minimum(distance, 4 - distance).clamp(0, 1)
    return (value[..., None] * (1 - saturation[..., None] * falls)).float()


@torch.no_grad()
def token_picture(config: Config, views: Tensor, target: Tensor, prediction: Tensor | None) -> Tensor:
    """The first views [B, 3, S, S], each beside its token map and the predicted one: [3, H, W] in [0, 1].

    Ids are long [B, L]; -1, not predicted, is grey. Other targets are not shown. The host waits for the GPU.
    """
    views = views[:IMAGES_SHOWN].float().cpu()
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
    columns = [(views * std + mean).clamp(0, 1)]
    for ids in (target, prediction):
        if ids is not None and not ids.is_floating_point():
            grid = ids[:IMAGES_SHOWN].cpu().unflatten(1, (config.grid, config.grid))
            columns.append(F.interpolate(token_colours(grid).movedim(3, 1), size=views.shape[2:]))
    return make_grid(torch.stack(columns, dim=1).flatten(0, 1), nrow=len(columns), padding=1)


class _Report:
    """The files and the bar, on rank 0. A full disk stops nothing: lines wait, and curves get a gap."""

    def __init__(self, config: RunConfig, total_steps: int, first_step: int) -> None:
        self.folder = Path(config.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path, self.waiting = self.folder / "metrics.jsonl", ""
        cut_after(self.path, first_step)
        self.path.touch()
        self.boards = self.folder / "tensorboard"
        try:
            keep_events(self.boards, first_step)
        except OSError as error:
            print(f"{self.boards} keeps steps that are made anew: {error}.", file=sys.stderr, flush=True)
        self.tensorboard: SummaryWriter | None = SummaryWriter(self.boards, purge_step=first_step + 1)
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30, disable=not config.log.progress,
            bar_format="{percentage:3.0f}%|{bar:20}| step {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def write(self, record: dict[str, Any], epochs: float) -> None:
        step = record["step"]

        # A line of metrics.jsonl, after those that have waited for room.
        self.waiting += json.dumps(record) + "\n"
        size = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.write(self.waiting)
            self.waiting = ""
        except OSError as error:
            os.truncate(self.path, size)
            self.bar.write(f"NOT WRITTEN yet, {self.path} up to step {step}: {error}.", file=sys.stderr)

        # Curves.
        values = {name: value for name, value in record.items() if name != "step"}
        self.draw(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])

        # The bar.
        self.bar.update(step - self.bar.n)
        parts = [f"epoch {min(record['epoch'], epochs):.2f}/{epochs:g}"]
        parts += [f"loss {record['loss']:.4f}"] if "loss" in record else []
        parts += [
            f"{record['images_per_second']:.1f} img/s",
            f"data wait {record['data_wait_percent']:.0f} %",
        ]
        self.bar.set_postfix_str(", ".join(parts))

    def draw(self, add: Callable[[SummaryWriter], Any]) -> None:
        """Adds to TensorBoard's files. A writer that failed stays useless: the next call gets another."""
        try:
            self.tensorboard = self.tensorboard or SummaryWriter(self.boards)
            add(self.tensorboard)
            self.tensorboard.flush()
        except OSError as error:
            self.bar.write(f"NOT WRITTEN, {self.boards}: {error}.", file=sys.stderr)
            self.tensorboard = None

    def close(self) -> None:
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()


class Metrics:
    """The meters of one rank, averaged over micro-steps and ranks at log steps, and reported by rank 0.

    A line of metrics.jsonl has the step (updates done), means over the steps since the line before, and what
    is measured: images_per_second (all ranks), data_wait_percent (of the wall clock, mean of ranks), seconds
    (wall clock since the line before), gpu_memory_gib (peak of rank 0). Floats have all their digits; NaN and
    Infinity are written as Python's json does.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, total_steps: int, steps_per_epoch: float, first_step: int = 0,
        trackers: Trackers | None = None,
    ) -> None:  # fmt: skip
        """trackers: those of rank 0, which outlive the meters; None: none."""
        self.config, self.ranks, self.steps_per_epoch = config, ranks, steps_per_epoch
        self._report = _Report(config, total_steps, first_step) if ranks.rank == 0 else None
        self._trackers = trackers
        self._grad_accum_steps = config.grad_accum_steps(ranks.world_size)
        self._micro_steps = 0
        self.logged_step = first_step
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._waited = 0.0
        self._began = time.perf_counter()

    def add(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Counts one micro-batch, with the same names on every rank. The host does not wait for the GPU."""
        for name, value in scalars.items():
            value = value.detach().double() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._micro_steps += 1
        if self._report and self._micro_steps % self._grad_accum_steps == 0:
            self._report.bar.update()

    def data_wait(self, seconds: float) -> None:
        """Counts the time that this rank has waited for a batch."""
        self._waited += seconds

    def leave_out(self, seconds: float) -> None:
        """Don't count this time, in which the run did something other than training."""
        self._began += seconds

    def log(self, step: int, extra: Mapping[str, Tensor | float]) -> dict[str, Any]:
        """Reads the meters, reports them with `extra` of rank 0, and starts them anew; gives the report.

        Every rank must call it, for one all-reduce on the control group. The host waits for the GPU.
        """
        # Means over micro-steps and ranks.
        names = sorted(self._sums)
        sums, counts = [float(self._sums[name]) for name in names], [self._counts[name] for name in names]
        seconds = time.perf_counter() - self._began
        vector = torch.tensor([*sums, *counts, self._waited, seconds], dtype=torch.float64)
        dist.all_reduce(vector, group=self.ranks.control)
        totals, numbers, (waited, elapsed) = vector.split([len(names), len(names), 2])
        means = dict(zip(names, (totals / numbers).tolist(), strict=True))

        # The report.
        record: dict[str, Any] = {"step": step, "epoch": step / self.steps_per_epoch, **means}
        record |= {
            name: value.item() if isinstance(value, Tensor) else value for name, value in extra.items()
        }
        images = (step - self.logged_step) * self.config.train.global_batch_size
        record["images_per_second"] = images / seconds
        record["data_wait_percent"] = 100 * (waited / elapsed).item()
        record["seconds"] = seconds
        if self.ranks.device.type == "cuda":
            record["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        if self._report:
            self._report.write(record, self.config.train.epochs)
        if self._trackers:
            self._trackers.log(record)
        self.logged_step = step
        self._reset()
        return record

    def show(self, step: int, name: str, picture: Tensor) -> None:
        """Shows a picture [3, H, W] in [0, 1] in TensorBoard and trackers. On other ranks it does nothing."""
        if self._report:
            self._report.draw(lambda board: board.add_image(name, picture, step))
        if self._trackers:
            self._trackers.show(step, name, picture)

    def close(self) -> None:
        """Finishes the files and the bar."""
        if self._report:
            self._report.close()
