"""The Task protocol, what a run trains, and pre-training as a Task.

Fine-tuning is in finetuning/task.py, segmentation in segmentation/task.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mapet_ds.config.running import total_steps
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch
from mapet_ds.data.index import Index, open_index
from mapet_ds.data.loader import Loader
from mapet_ds.data.range_cache import RangeCache
from mapet_ds.launch import Ranks
from mapet_ds.methods import build_objective, build_target
from mapet_ds.objectives.objective import Loss, Objective
from mapet_ds.results.init_from import begin_from
from mapet_ds.results.online_probe import OnlineProbe
from mapet_ds.targets.target import Target
from mapet_ds.training.engine import student_weights
from mapet_ds.training.metrics import Show, token_picture
from mapet_ds.training.optim import parameter_groups


class BatchLoader(Protocol):
    """An endless iterator of this rank's micro-batches, each with its place and its draw."""

    def __next__(self) -> Any: ...

    def new_bad(self) -> list[tuple[int, str]]:
        """(index, reason) of the images that this rank found unreadable since the last call."""
        ...

    def close(self) -> None:
        """Ends the workers."""


class Task(Protocol):
    """The data, target and objective of a run, and what comes of it.

    Every rank must build one and call its methods alike; `hand_over` is for rank 0 only.
    """

    index: Index
    """The images that the run learns from."""
    target: Target
    objective: Objective
    """It has its first weights and lies on the CPU."""
    evaluate_every_epochs: float | None
    """Epochs from one evaluation to the next; None where there is no evaluation."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups of the objective's parameters; a group may have an `lr_scale`."""
        ...

    def begin(self) -> str | None:
        """Puts the weights that a new run begins from into objective and target.

        Gives the sha256 of their file; None where the weights stay as they are.
        """

    def loader(self, step: int, bad: Collection[int]) -> BatchLoader:
        """This rank's micro-batches from a step on, without the images that are known to be bad."""
        ...

    def evaluate(self, engine: Any, doing: Callable[[str], None], show: Show) -> dict[str, float]:
        """Figures of the present weights. The host waits for the GPU.

        doing: called with a phrase for what goes on, which the watchdog then knows.
        show: takes a name and a picture [3, H, W] in [0, 1]; on other ranks than 0 it does nothing.
        """
        ...

    def picture(self, step: int, batch: Any, target: Tensor, loss: Loss) -> tuple[str, Tensor] | None:
        """A name and a picture [3, H, W] in [0, 1] of the micro-batch after which the run is at `step`.

        None on other ranks than 0, and where no picture is due.
        """

    def hand_over(self, last_step: int) -> str:
        """Writes what comes of a run whose steps are all done and saved; gives a sentence about it."""
        ...


class Pretraining:
    """A Task: an objective predicts a target of images without labels.

    Raises:
        UserError: images, teacher, tokenizer or sizes that the user can correct.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks, self.folder = config, ranks, Path(config.run_dir)
        first = ranks.rank == 0
        self.index = ranks.first_then_all(
            lambda: open_index(config.data.train, self.folder / "index", first, RangeCache.of(config.data))
        )
        self.probe: OnlineProbe | None = None
        self.evaluate_every_epochs: float | None = None
        if config.evaluate.train:
            self.probe = OnlineProbe(config, self.index, self.folder, ranks)
            self.evaluate_every_epochs = config.evaluate.every_epochs
        self.target = build_target(config, ranks.device)
        self.objective = build_objective(config, self.target.dim)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.objective, self.config.optim.weight_decay)

    def begin(self) -> str | None:
        """See Task. A momentum teacher begins from the same weights."""
        source = self.config.model.init_from
        if source is None:
            return None
        sha256, notes = begin_from(self.objective.vit, self.config)
        if self.target.state_dict():
            self.target.load_state_dict(self.objective.state_dict())
        if self.ranks.rank == 0:
            print("; ".join([f"Beginning from {source}, sha256 {sha256[:12]}", *notes]) + ".", flush=True)
        return sha256

    def loader(self, step: int, bad: Collection[int]) -> Loader:
        return Loader(
            self.config, self.index, student=True, teacher=self.target.teacher_view, rank=self.ranks.rank,
            world_size=self.ranks.world_size, local_rank=self.ranks.local_rank, first_step=step, bad=bad,
            draw=self.objective.draw,
        )  # fmt: skip

    def evaluate(self, engine: Any, doing: Callable[[str], None], show: Show) -> dict[str, float]:
        """See Task. It judges the ViT that an export takes: a momentum teacher's, else the student's."""
        assert self.probe is not None
        state = self.target.state_dict()
        averaged = {name: tensor for name, tensor in state.items() if name.startswith("vit.")}
        return self.probe(averaged.items() or student_weights(engine), doing)

    def picture(self, step: int, batch: Batch, target: Tensor, loss: Loss) -> tuple[str, Tensor] | None:
        """See Task. Views stand beside their token maps and the predicted ones."""
        every, total = self.config.log.images_every_steps, total_steps(self.config, len(self.index))
        last = min(total, self.config.train.stop_at_step or total)
        if self.ranks.rank != 0 or not every or (step % every and step not in (1, last)):
            return None
        assert batch.images is not None
        picture = token_picture(self.config, batch.images, target, loss.prediction)
        return "view_tokens_predicted", picture

    def hand_over(self, last_step: int) -> str:
        return f"To timm: python tools/export_timm.py {self.folder} OUT"
