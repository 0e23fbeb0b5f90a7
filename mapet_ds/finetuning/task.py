"""Fine-tuning as a Task: a run learns from labels, evaluates itself, and writes a timm model and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import timm.data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.data.few_labels import drawn, listed
from mapet_ds.data.index import Index, open_index
from mapet_ds.data.index_files import write_part
from mapet_ds.data.labelled import (
    Bad,
    EvaluationBatches,
    check_apart,
    check_classes,
    report_unreadable,
    served,
)
from mapet_ds.data.range_cache import RangeCache
from mapet_ds.errors import ConfigError, RunError
from mapet_ds.files import write_whole
from mapet_ds.finetuning.backbone import start_identity
from mapet_ds.finetuning.classifier import AveragedLabels, Classifier, Labels, export_classifier
from mapet_ds.finetuning.loader import TrainBatches, TrainLoader, train_transform
from mapet_ds.launch import Ranks
from mapet_ds.objectives.objective import Loss, Objective
from mapet_ds.targets.target import Target
from mapet_ds.training.checkpoint import newest
from mapet_ds.training.metrics import Show
from mapet_ds.training.optim import layerwise_groups

FIGURES = ("val_top1", "val_top5", "val_loss", "val_images", "loss", "epoch", "step")


class Finetuning:
    """A Task: a timm model learns the classes of labelled images. It writes RUN/timm and RUN/results.json.

    Raises:
        UserError: images, labels or weights that the user can correct.
    """

    def __init__(self, config: FinetuneConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.folder = config, ranks, Path(config.run_dir)
        self.evaluate_every_epochs: float | None = config.log.evaluate_every_epochs

        # Images and classes.

        def index(named: str, name: str) -> Index:
            ranges = RangeCache.of(config.data)
            return ranks.first_then_all(
                lambda: open_index(named, self.folder / name, ranks.rank == 0, ranges)
            )

        self.index, self.val = index(config.data.train, "index"), index(config.data.val, "index_val")
        check_classes(self.index, self.val, num_classes=config.data.num_classes)
        check_apart(self.index, self.val, "data.", ranks)
        if config.data.labels or config.data.shots:
            self.index = self._few_labels()
        classes = len(self.index.classes)

        # The model, and the images that it takes.
        self.objective: Objective = Classifier(config, classes)
        size = config.model.img_size
        asked = {"input_size": size and (3, size, size), "crop_pct": config.data.crop_pct}
        self.data_config = timm.data.resolve_model_data_config(self.objective.vit, args=asked)
        try:
            self.transform = train_transform(config.data, self.data_config)
        except (AssertionError, ValueError, KeyError) as error:
            problem = f"data.rand_augment = {config.data.rand_augment} is no policy that timm knows"
            raise ConfigError(f"{problem}: {error}.") from error
        if ranks.rank == 0:
            self._print_fresh(self.objective.fresh)

        # The target.
        start = start_identity(config.model)
        self.target: Target = Labels(classes, start)
        if config.model.ema is not None:
            average = Classifier(config, classes).to(ranks.device)
            self.target = AveragedLabels(average, config.model.ema, classes, start)

    def _few_labels(self) -> Index:
        """The index of the images whose labels are used. Every rank must call it."""
        data, whole, folder = self.config.data, self.index, self.folder / "index_labels"

        def write() -> None:
            if data.shots:
                named = "data.shots", "data.train"
                places = drawn(whole, data.shots, self.config.seed, data.draw, named)
                words = f"{data.shots} images of each class, draw {data.draw} of seed {self.config.seed}"
            else:
                named = "data.labels", "data.train"
                places = listed(whole, Path(data.labels), named, data.max_bad_share).draws[0]
                words = f"images that {data.labels} names"
            write_part(whole.folder, places, folder)
            print(f"Learns from {len(places)} of {len(whole)} images: {words}.", flush=True)

        self.ranks.from_first(write)
        return Index(folder, whole.root, whole.ranges)

    def _print_fresh(self, names: list[str]) -> None:
        model, modules = self.config.model, sorted({name.rpartition(".")[0] for name in names})
        fresh = "all weights are fresh" if model.untrained else f"fresh are {', '.join(modules) or 'none'}"
        print(f"{model.path or model.name}: {fresh}.", flush=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        optim = self.config.optim
        return layerwise_groups(self.objective.vit, optim.weight_decay, optim.layer_decay)

    def begin(self) -> None:
        """See Task. The classifier has its weights already, and the target's identity names them."""

    def loader(self, step: int, bad: Collection[int]) -> TrainLoader:
        place = self.ranks.rank, self.ranks.world_size
        dataset = TrainBatches(self.config, self.index, self.transform, *place, bad)
        return TrainLoader(dataset, self.ranks, step, self.objective.draw)

    @torch.no_grad()
    def evaluate(self, engine: Any, doing: Callable[[str], None], show: Show) -> dict[str, float]:
        """See Task. The figures are accuracy and loss on data.val, each readable image counted once.

        Raises:
            DataError: more than data.max_bad_share of the images are unreadable.
        """
        config, ranks, classes = self.config, self.ranks, len(self.val.classes)
        transform: Any = timm.data.create_transform(**self.data_config)
        dataset = EvaluationBatches(config, self.val, transform, ranks.rank, ranks.world_size)
        model = self.target.model if isinstance(self.target, AveragedLabels) else engine
        model.eval()

        # Sums of this rank's share.
        sums, bad = torch.zeros(4, dtype=torch.float64), Bad()
        for number, batch in enumerate(served(dataset, range(len(dataset)), config.data.workers, ranks)):
            doing(f"evaluating batch {number} of {len(dataset)}")
            target = F.one_hot(batch.label.clamp(min=0), classes).float()
            logits = model(batch.images.to(ranks.device), target.to(ranks.device)).prediction.cpu()

            counted = batch.label >= 0
            logits, label = logits[counted], batch.label[counted]
            hits = logits.topk(min(5, classes)).indices == label[:, None]
            loss = F.cross_entropy(logits.double(), label, reduction="sum")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, counted.sum()])
            bad += batch.bad
        engine.train()

        # Means over all ranks.
        dist.all_reduce(sums, group=ranks.control)
        report_unreadable(config, self.val, bad, ranks)
        top1, top5, loss, images = sums.tolist()
        accuracies = {"val_top1": 100 * top1 / images, "val_top5": 100 * top5 / images}
        return {**accuracies, "val_loss": loss / images, "val_images": int(images)}

    def picture(self, step: int, batch: Any, target: Tensor, loss: Loss) -> None:
        """See Task. Fine-tuning shows none."""

    def hand_over(self, last_step: int) -> str:
        """See Task. RUN/timm comes from the last checkpoint, RUN/results.json from the last evaluation.

        Raises:
            RunError: the run's own files are gone.
        """
        config, last = self.config, newest(self.folder)
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        evaluated = [line for line in lines if line["step"] == last_step and "val_top1" in line]
        if last is None or not evaluated:
            problem = f"{self.folder} lacks its last checkpoint or the last line of metrics.jsonl"
            raise RunError(f"{problem}: nothing is written.")

        # The model.
        state = last.load("model" if config.model.ema is None else "target")
        state = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
        out = self.folder / "timm"
        export_classifier(config, state, self.index.classes, self.data_config, out)

        # The figures.
        figures = {key: evaluated[0].get(key) for key in FIGURES}
        results = figures | {
            "classes": len(self.index.classes),
            "train_images": len(self.index),
            "labels": config.data.labels,
            "shots": config.data.shots,
            "draw": config.data.draw,
            "seed": config.seed,
            "model": config.model.path,
            "untrained": config.model.untrained,
            "ema": config.model.ema,
            "start": self.target.identity,
        }
        write_whole(self.folder / "results.json", json.dumps(results, indent=1) + "\n")
        accuracies = f"Top-1 {figures['val_top1']:.2f} %, top-5 {figures['val_top5']:.2f} %"
        return f"{accuracies} of {figures['val_images']} images; {out}"
