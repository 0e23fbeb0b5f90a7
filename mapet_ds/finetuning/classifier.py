"""A timm model that learns classes: its weights from a file, its loss, its moving average, and what timm takes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from timm.models import save_for_hf
from torch import Tensor, nn

from mapet_ds.config.finetune import ClassifierConfig, FinetuneConfig
from mapet_ds.data.batch import Draw
from mapet_ds.draws import Purpose, uniforms
from mapet_ds.errors import ConfigError
from mapet_ds.files import checksum, staged
from mapet_ds.finetuning.loader import LabelledBatch
from mapet_ds.objectives.objective import Loss, seed_weights
from mapet_ds.targets.momentum import MovingAverage
from mapet_ds.targets.target import Target
from mapet_ds.weights import mismatches, shapes, timm_weights


class DrawnDropPath(nn.Module):
    """timm's DropPath by factors [B] that it is given before a forward, so that a recomputed one decides alike."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.factor: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.factor is None else x * self.factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Classifier(nn.Module):
    """The objective of fine-tuning: soft cross-entropy on the logits of `vit`."""

    def __init__(self, config: FinetuneConfig, num_classes: int) -> None:
        super().__init__()
        seed_weights(config.seed)
        self.seed, self.loss = config.seed, SoftTargetCrossEntropy()
        self.vit, self.fresh = build_model(config.model, num_classes)
        self.drop_paths: list[DrawnDropPath] = []
        for module in list(self.vit.modules()):
            for name, child in module.named_children():
                if isinstance(child, DropPath):
                    self.drop_paths.append(DrawnDropPath(child.drop_prob))
                    setattr(module, name, self.drop_paths[-1])

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """One uniform an image and residual branch."""
        keep = uniforms(self.seed, Purpose.DEPTH, step, first_slot, slots, len(self.drop_paths))
        return Draw(mask=None, order=None, keep=torch.from_numpy(keep).float())

    def forward(self, images: Tensor, target: Tensor, draw: Draw | None = None) -> Loss:
        """images [B, 3, S, S]; target [B, classes], rows sum to 1; no draw: nothing is dropped, for evaluation. No host wait."""
        for i, drop_path in enumerate(self.drop_paths):
            drop = drop_path.drop_prob
            drop_path.factor = None if draw is None else (draw.keep[:, i] >= drop) / (1 - drop)
        logits = self.vit(images.to(next(self.vit.parameters()).dtype)).float()
        return Loss(self.loss(logits, target), {}, logits.detach())


def _create(model: ClassifierConfig, **arguments: Any) -> nn.Module:
    source = model.name or f"local-dir:{model.folder}"
    try:
        return timm.create_model(source, pretrained=False, **arguments)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
        AttributeError,
        LookupError,
        OSError,
    ) as error:
        # timm checks what it is given here and there: an assertion, an argument that a class doesn't know, a key that isn't there
        raise ConfigError(
            f"timm can't build {source} with {arguments}: {type(error).__name__} {error}. Look at model.name, model.pool, "
            "model.img_size and model.drop_path."
        ) from error


def build_model(model: ClassifierConfig, num_classes: int) -> tuple[nn.Module, list[str]]:
    """The timm model with its weights loaded, and the names of what is fresh: a head for other classes, the norm of the mean.

    Raises:
        ConfigError: timm can't build it, or the weights are of another architecture.
    """
    vit = _create(
        model, num_classes=num_classes, global_pool=model.pool, drop_path_rate=model.drop_path, img_size=model.img_size
    )  # fmt: skip
    if extra := sorted(vit.state_dict().keys() - dict(vit.named_parameters()).keys()):
        raise ConfigError(
            f"{type(vit).__name__} has a state beside its parameters ({extra[0]}, ...), such as running statistics, which would "
            "depend on the number of ranks: take a ViT, or another model with LayerNorm."
        )
    fresh = list(vit.state_dict()) if model.untrained else load_weights(vit, model)
    head = vit.get_classifier()
    if isinstance(head, nn.Linear) and any(vit.get_parameter(name) is head.weight for name in fresh):
        with torch.no_grad():
            head.weight.mul_(model.head_scale)
    return vit, fresh


def load_weights(vit: nn.Module, model: ClassifierConfig) -> list[str]:
    """Load a file of weights strictly, but for a head of other classes and the norm before it; the names of what stays fresh.

    Raises:
        ConfigError: no such file, or another architecture.
    """
    path = model.weights
    state = timm_weights(path, vit, f"model.path = {path}")
    wanted = shapes(vit.state_dict())
    heads = vit.pretrained_cfg.get("classifier") or "head"
    heads = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))
    state = {
        name: tensor for name, tensor in state.items()
        if not name.startswith((*heads, "norm.", "fc_norm.")) or wanted.get(name) == tuple(tensor.shape)
    }  # fmt: skip
    fresh = [name for name in wanted if name not in state and name.startswith((*heads, "fc_norm."))]
    if wrong := mismatches(
        {name: shape for name, shape in wanted.items() if name not in fresh}, shapes(state)
    ):
        raise ConfigError(
            f"{path} is of another architecture than {vit.pretrained_cfg['architecture']} here: {len(wrong)} tensors differ, e.g. "
            f"{'; '.join(wrong[:3])}."
        )
    vit.load_state_dict(state, strict=False)
    return fresh


def start_identity(model: ClassifierConfig) -> dict[str, Any]:
    """What a run begins from: the sha256 of its weights and of the description of the model."""
    files = {
        "weights": None if model.untrained else model.weights,
        "config": model.path and model.folder / "config.json",
    }
    return {name: checksum(path) for name, path in files.items() if path and path.is_file()}


class Labels(Target):
    """The target of fine-tuning: the mixed labels that a batch brings along."""

    teacher_view = None

    def __init__(self, num_classes: int, identity: dict[str, Any]) -> None:
        self.dim, self.identity = num_classes, identity

    def __call__(self, batch: LabelledBatch) -> Tensor:
        return batch.target


class AveragedLabels(MovingAverage, Labels):
    """The same, with a moving average of the classifier, which is evaluated and written instead."""

    def __init__(
        self, model: Classifier, momentum: float, num_classes: int, identity: dict[str, Any]
    ) -> None:
        MovingAverage.__init__(self, model.eval(), momentum)
        Labels.__init__(self, num_classes, identity)


def export_classifier(
    config: FinetuneConfig,
    state: dict[str, Tensor],
    classes: list[str],
    data_config: dict[str, Any],
    out: Path,
) -> None:
    """Write config.json and model.safetensors that timm.create_model("local-dir:OUT", pretrained=True) loads, class names
    included. For rank 0 only.

    state: fp32 weights by timm's names.
    """
    vit = _create(
        config.model, num_classes=len(classes), global_pool=config.model.pool, img_size=config.model.img_size
    )
    vit.load_state_dict(state)
    vit.pretrained_cfg = {
        **vit.pretrained_cfg,
        "num_classes": len(classes),
        "label_names": classes,
        "tag": "finetune",
    }
    with staged(out) as folder:
        save_for_hf(vit, folder, safe_serialization=True, data_config=data_config)
