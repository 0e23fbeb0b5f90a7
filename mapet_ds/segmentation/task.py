"""Segmentation as a Task: a run learns from masks, judges itself, and writes a program and figures."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor

from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.data.batch import unnormalised
from mapet_ds.data.index import Index, open_index
from mapet_ds.data.labelled import check_apart
from mapet_ds.errors import RunError
from mapet_ds.files import write_whole
from mapet_ds.finetuning.backbone import start_identity
from mapet_ds.finetuning.loader import TrainLoader
from mapet_ds.launch import Ranks
from mapet_ds.objectives.objective import Loss, Objective
from mapet_ds.segmentation.evaluation import Predictor
from mapet_ds.segmentation.export import export_segmenter
from mapet_ds.segmentation.judging import Judging
from mapet_ds.segmentation.loader import Augmentation, MaskedBatches
from mapet_ds.segmentation.masks import Split, classes_of, open_masks
from mapet_ds.segmentation.norm import MaskLabels
from mapet_ds.segmentation.pictures import rows, sheet
from mapet_ds.segmentation.segmenter import Segmenter, upsampled
from mapet_ds.targets.target import Target
from mapet_ds.training.checkpoint import newest
from mapet_ds.training.engine import student_weights
from mapet_ds.training.metrics import IMAGES_SHOWN, Show
from mapet_ds.training.optim import layerwise_groups, parameter_groups

FIGURES = ("val_miou", "val_class_accuracy", "val_pixel_accuracy", "val_images", "loss", "epoch", "step")


class Segmentation:
    """A Task: a ViT and a head learn a class for each pixel. It writes RUN/segmenter and RUN/results.json.

    Raises:
        UserError: images, masks or weights that the user can correct.
    """

    def __init__(self, config: SegmentationConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.folder = config, ranks, Path(config.run_dir)
        self.evaluate_every_epochs: float | None = config.log.evaluate_every_epochs
        data = config.data

        # Images and masks.
        def index(split: Split, name: str) -> Index:
            folder = data.images_of(split)
            return ranks.first_then_all(lambda: open_index(folder, self.folder / name, ranks.rank == 0))

        self.index, self.val = index("train", "index"), index("val", "index_val")
        self.classes = ranks.from_first(lambda: classes_of(data))
        self.masks = open_masks(data, "train", self.index, self.classes, ranks)
        self.val_masks = open_masks(data, "val", self.val, self.classes, ranks)
        check_apart(self.index, self.val, "data.", ranks)

        # The model, and the images that it takes.
        self.segmenter = Segmenter(config, len(self.classes.names))
        self.objective: Objective = self.segmenter
        self.judge = copy.deepcopy(self.segmenter).eval()
        normal = timm.data.resolve_model_data_config(self.segmenter.vit)
        self.mean, self.std = normal["mean"], normal["std"]
        self.judging = Judging(config, self.val, self.val_masks, (self.mean, self.std), ranks)
        if ranks.rank == 0:
            source = config.model.path or config.model.name
            begun = "fresh weights" if config.model.untrained else "its weights"
            held = ", which stay as they are" if config.model.frozen else ""
            print(f"{source}: {begun}{held}; a fresh head, {config.model.head}.", flush=True)

        # The target.
        identity = {"masks": self.masks.fingerprint, **start_identity(config.model)}
        self.target: Target = MaskLabels(self.segmenter, len(self.classes.names), identity)

    def parameter_groups(self) -> list[dict[str, Any]]:
        optim, model = self.config.optim, self.segmenter
        layers = layerwise_groups(model.vit, optim.weight_decay, optim.layer_decay)
        return layers + parameter_groups(model.head, optim.weight_decay)

    def begin(self) -> None:
        """See Task. The segmenter has its weights already, and the target's identity names them."""

    def loader(self, step: int, bad: Collection[int]) -> TrainLoader:
        transform = Augmentation(self.config.data, self.segmenter.size, self.mean, self.std)
        place = self.ranks.rank, self.ranks.world_size
        dataset = MaskedBatches(self.config, self.index, self.masks, transform, *place, bad)
        return TrainLoader(dataset, self.ranks, step, self.segmenter.draw)

    @torch.no_grad()
    def evaluate(self, engine: Any, doing: Callable[[str], None], show: Show) -> dict[str, float]:
        """See Task. The figures are those of all readable images of data.val, each counted once.

        Each rank judges its share by a copy of the weights, in fp32, so that no forward waits for another
        rank's. The figures of single classes go to RUN/classes.json.

        Raises:
            DataError: more than data.max_bad_share of the images are unreadable, or every pixel is void.
        """
        config, ranks = self.config, self.ranks
        self._load_judge(student_weights(engine), self.target.state_dict())
        self.judge.to(ranks.device)
        predict = Predictor(self.judge, config.evaluate, config.train.micro_batch_size)
        judged = self.judging(predict, doing)
        if ranks.rank == 0:
            by_class = json.dumps(judged.by_class(self.classes.names), indent=1)
            write_whole(self.folder / "classes.json", by_class + "\n")
            if config.log.images_every_steps:
                show("image_classes_predicted", self.judging.picture(predict))
        self.judge.cpu()
        return judged.means()

    def _load_judge(self, weights: Any, statistics: dict[str, Tensor]) -> None:
        """Takes what has learnt over. A frozen backbone is there already, and in fp32."""
        own = dict(self.judge.named_parameters()) | dict(self.judge.named_buffers())
        for name, tensor in (*weights, *statistics.items()):
            if not (self.config.model.frozen and name.startswith("vit.")):
                own[name].copy_(tensor)

    def picture(self, step: int, batch: Any, target: Tensor, loss: Loss) -> tuple[str, Tensor] | None:
        """See Task. Crops stand beside their true classes and the predicted ones."""
        every = self.config.log.images_every_steps
        if self.ranks.rank != 0 or not every or step % every:
            return None
        assert loss.prediction is not None
        truth = target[:IMAGES_SHOWN].long().cpu()
        predicted = upsampled(loss.prediction[:IMAGES_SHOWN], truth.shape[1:]).argmax(dim=1).cpu()
        views = unnormalised(batch.images[:IMAGES_SHOWN], self.mean, self.std)
        return "crop_classes_predicted", sheet(rows(views, truth, predicted))

    def hand_over(self, last_step: int) -> str:
        """See Task. RUN/segmenter comes from the last checkpoint, RUN/results.json from the last evaluation.

        Raises:
            RunError: the run's own files are gone.
        """
        config, last = self.config, newest(self.folder)
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        evaluated = [line for line in lines if line["step"] == last_step and "val_miou" in line]
        by_class = self.folder / "classes.json"
        if last is None or not evaluated or not by_class.is_file():
            problem = f"{self.folder} lacks its last checkpoint, metrics.jsonl's last line or classes.json"
            raise RunError(f"{problem}: nothing is written.")

        # The model.
        with torch.no_grad():
            self._load_judge(last.load("model").items(), last.load("target"))
        description = {
            "mean": self.mean, "std": self.std, "classes": self.classes.names,
            "short_side": config.data.short_side, "long_side": config.data.long_side,
            "head": config.model.head, "evaluate": config.to_dict()["evaluate"],
        }  # fmt: skip
        export_segmenter(self.judge, description, self.folder / "segmenter")

        # The figures.
        figures = {key: evaluated[0].get(key) for key in FIGURES}
        per_class = json.loads(by_class.read_text())
        absent = [name for name, values in per_class.items() if not values["pixels"]]
        results = figures | {
            "classes": per_class,
            "absent": absent,
            "train_images": len(self.index),
            "seed": config.seed,
            "model": config.model.path,
            "untrained": config.model.untrained,
            "head": config.model.head,
            "frozen": config.model.frozen,
            "evaluate": description["evaluate"],
            "start": self.target.identity,
        }
        write_whole(self.folder / "results.json", json.dumps(results, indent=1) + "\n")
        if absent:
            print(f"In no mask of data.val: {', '.join(absent)}.", file=sys.stderr, flush=True)
        accuracies = f"mIoU {figures['val_miou']:.2f} %, pixels {figures['val_pixel_accuracy']:.2f} %"
        return f"{accuracies} of {figures['val_images']} images; {self.folder / 'segmenter'}"
