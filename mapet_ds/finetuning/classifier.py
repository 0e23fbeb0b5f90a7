"""A timm model that learns classes: its weights from a file, its loss, its moving average, and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from mapet_ds.config.finetune import ClassifierConfig, FinetuneConfig
from mapet_ds.data.batch import Draw, View
from mapet_ds.files import staged
from mapet_ds.finetuning.backbone import OnTimm, create, load_weights, refuse_more_state
from mapet_ds.objectives.objective import Loss, seed_weights
from mapet_ds.results.export import write_timm
from mapet_ds.targets.momentum import MovingAverage
from mapet_ds.targets.target import Target


class Classifier(OnTimm):
    """The objective of fine-tuning: soft cross-entropy on the logits of `vit`."""

    def __init__(self, config: FinetuneConfig, num_classes: int) -> None:
        seed_weights(config.seed)
        vit, fresh = build_model(config.model, num_classes)
        super().__init__(config.seed, vit)
        self.fresh, self.loss = fresh, SoftTargetCrossEntropy()

    def forward(self, images: Tensor, target: Tensor, draw: Draw | None = None) -> Loss:
        """The loss of images [B, 3, S, S] and a target [B, classes] whose rows sum to 1.

        Without a draw nothing is dropped, which is for evaluation. The host waits for nothing.
        """
        logits = self.vit(self.prepare(images, draw)).float()
        return Loss(self.loss(logits, target), {}, logits.detach())


def build_model(model: ClassifierConfig, num_classes: int) -> tuple[Any, list[str]]:
    """The timm model with its weights loaded, and the names of the parameters that are fresh.

    Those are a head for other classes, and the norm of the mean where the weights have none.

    Raises:
        ConfigError: timm can't build it, or the weights are of another architecture.
    """
    vit = create(model, num_classes, model.pool, drop_path_rate=model.drop_path)
    refuse_more_state(vit)
    fresh = list(vit.state_dict()) if model.untrained else load_weights(vit, model)
    head = vit.get_classifier()
    if isinstance(head, nn.Linear) and any(vit.get_parameter(name) is head.weight for name in fresh):
        with torch.no_grad():  # timm's BEiT has scaled its own already
            head.weight.mul_(model.head_scale / getattr(vit, "head_init_scale", 1.0))
    return vit, fresh


class Labels(Target):
    """The target of fine-tuning: the mixed labels that a batch brings along."""

    teacher_view: View | None = None

    def __init__(self, num_classes: int, identity: dict[str, Any]) -> None:
        self.dim, self.identity = num_classes, identity

    def __call__(self, batch: Any) -> Tensor:
        """The target [B, classes] of a LabelledBatch."""
        return batch.target


class AveragedLabels(MovingAverage, Labels):
    """Labels, with a moving average of the classifier, which is evaluated and exported in its place."""

    def __init__(self, model: Classifier, momentum: float, classes: int, identity: dict[str, Any]) -> None:
        MovingAverage.__init__(self, model.eval(), momentum)
        Labels.__init__(self, classes, identity)


def export_classifier(
    config: FinetuneConfig, state: dict[str, Tensor], classes: list[str], data_config: dict[str, Any],
    out: Path,
) -> None:  # fmt: skip
    """Writes config.json and model.safetensors with the class names. For rank 0 only.

    timm.create_model("local-dir:OUT", pretrained=True) loads them.
    state: fp32 weights by timm's names.
    data_config: timm's, of the images that the model takes.
    """
    vit = create(config.model, len(classes), config.model.pool)
    vit.load_state_dict(state)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "num_classes": len(classes), "tag": "finetune"}
    with staged(out) as folder:
        write_timm(vit, folder, data_config, classes)
