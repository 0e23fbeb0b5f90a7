"""Fine-tuning: a Run that learns from labels, evaluates itself, and leaves a timm model and its figures."""

from __future__ import annotations

import json

import timm.data
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mapet_ds.training.checkpoint import newest
from mapet_ds.finetuning.classifier import AveragedLabels, Classifier, Labels, export_classifier, start_identity
from mapet_ds.config.sections import ConfigError
from mapet_ds.data.loader import open_shared_index
from mapet_ds.data.index import DataError
from mapet_ds.data.labelled import EvaluationBatches, TrainLoader, check_classes, report_unreadable, served, train_transform
from mapet_ds.run import Run


class Finetuning(Run):
    """See Run. RUN/timm and RUN/results.json are what it leaves."""

    def _build_parts(self) -> tuple[Labels, Classifier]:
        config, ranks = self.config, self.ranks
        self.val = open_shared_index(config.data.val, self.folder / "index_val", ranks)
        check_classes(self.index, self.val, num_classes=config.data.num_classes)
        classes = len(self.index.classes)
        objective = Classifier(config, classes)
        size = config.model.img_size
        asked = {"input_size": size and (3, size, size), "crop_pct": config.data.crop_pct}
        self.data_config = timm.data.resolve_model_data_config(objective.vit, args=asked)
        try:
            self.transform = train_transform(config.data, self.data_config)
        except (AssertionError, ValueError, KeyError) as error:
            raise ConfigError(f"data.rand_augment = {config.data.rand_augment} is no policy that timm knows: {error}.") from error
        if ranks.rank == 0:
            fresh = sorted({name.rpartition(".")[0] for name in objective.fresh})
            says = "all weights are fresh" if config.model.untrained else f"fresh are {', '.join(fresh) or 'none'}"
            print(f"{config.model.path or config.model.name}: {says}.", flush=True)
        start = start_identity(config.model)
        if config.model.ema is None:
            return Labels(classes, start), objective
        average = Classifier(config, classes).to(ranks.device)
        return AveragedLabels(average, config.model.ema, classes, start), objective

    def _open_loader(self) -> TrainLoader:
        return TrainLoader(self.config, self.index, self.transform, self.ranks, self.step, self.quarantine.known)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Accuracy and loss on data.val, each image once, unreadable ones left out. Every rank must call it.

        Raises:
            DataError: more than data.max_bad_share of them are unreadable.
        """
        config, ranks = self.config, self.ranks
        dataset = EvaluationBatches(config, self.val, timm.data.create_transform(**self.data_config), ranks.rank, ranks.world_size)
        model = self.target.model if config.model.ema else self.engine
        model.eval()
        sums, bad = torch.zeros(4, dtype=torch.float64), []
        for number, batch in enumerate(served(dataset, range(len(dataset)), config.data.workers, ranks)):
            self.watchdog.doing(f"evaluating batch {number} of {len(dataset)}")
            counted = batch.label >= 0
            label = batch.label.clamp(min=0)
            target = F.one_hot(label, len(self.val.classes)).float()
            logits = model(batch.images.to(ranks.device), target.to(ranks.device)).prediction.cpu()[counted]
            label = label[counted]
            hits = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
            loss = F.cross_entropy(logits.double(), label, reduction="sum")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, counted.sum()])
            bad += batch.bad
        self.engine.train()
        dist.all_reduce(sums, group=ranks.control)
        report_unreadable(config, self.val, bad, ranks)
        top1, top5, loss, images = sums.tolist()
        return {
            "val_top1": 100 * top1 / images, "val_top5": 100 * top5 / images, "val_loss": loss / images, "val_images": int(images),
        }  # fmt: skip

    def _hand_over(self) -> str:
        """Write RUN/timm and RUN/results.json from the last checkpoint and the last evaluation.

        Raises:
            DataError: the run's own files are gone.
        """
        config, found = self.config, newest(self.folder)
        lines = (json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines())
        last = [line for line in lines if line["step"] == self.total_steps and "val_top1" in line]
        if found is None or not last:
            raise DataError(f"{self.folder} lacks its last checkpoint or the last line of metrics.jsonl: nothing is written.")
        state = found.load("target" if config.model.ema else "model")
        state = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
        out = self.folder / "timm"
        export_classifier(config, state, self.index.classes, self.data_config, out)
        figures = {key: last[0].get(key) for key in ("val_top1", "val_top5", "val_loss", "val_images", "loss", "epoch", "step")}
        results = figures | {
            "classes": len(self.index.classes), "train_images": len(self.index), "seed": config.seed, "model": config.model.path,
            "untrained": config.model.untrained, "ema": config.model.ema, "start": self.target.identity,
        }  # fmt: skip
        (self.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        return f"Top-1 {figures['val_top1']:.2f} %, top-5 {figures['val_top5']:.2f} % of {figures['val_images']} images; {out}"
