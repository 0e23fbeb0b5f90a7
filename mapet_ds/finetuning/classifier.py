"""A timm model that learns classes: its weights from a file, its loss, its moving average, and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from mapet_ds.config.finetune import ClassifierConfig, FinetuneConfig
from mapet_ds.data.batch import Draw, View
from mapet_ds.draws import Purpose, uniforms
from mapet_ds.errors import ConfigError
from mapet_ds.files import checksum, staged
from mapet_ds.objectives.objective import Loss, Objective, seed_weights
from mapet_ds.results.export import write_timm
from mapet_ds.targets.momentum import MovingAverage
from mapet_ds.targets.target import Target
from mapet_ds.weights import mismatches, shapes, timm_weights

REFUSALS = RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError, OSError
"""What timm raises at arguments that don't fit: an assertion, an argument no class knows, a missing key."""


class DrawnDropPath(nn.Module):
    """timm's DropPath by a `factor` [B], set before a forward so that a recomputed one drops alike."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.factor: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.factor is None else x * self.factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Classifier(Objective):
    """The objective of fine-tuning: soft cross-entropy on the logits of `vit`."""

    vit: Any
    """Any model of timm's: timm has no type for them."""

    def __init__(self, config: FinetuneConfig, num_classes: int) -> None:
        super().__init__()
        seed_weights(config.seed)
        self.seed, self.loss = config.seed, SoftTargetCrossEntropy()
        self.vit, self.fresh = build_model(config.model, num_classes)
        # timm joins this buffer of BEiT's attention with two parameters, and DeepSpeed casts only parameters.
        self.joined = [module for module in self.vit.modules() if getattr(module, "k_bias", None) is not None]
        self.drop_paths: list[DrawnDropPath] = []
        for module in list(self.vit.modules()):
            for name, child in module.named_children():
                if isinstance(child, DropPath):
                    self.drop_paths.append(DrawnDropPath(child.drop_prob))
                    setattr(module, name, self.drop_paths[-1])

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """See Objective. It holds one uniform for each image and residual branch."""
        keep = uniforms(self.seed, Purpose.DEPTH, step, first_slot, slots, len(self.drop_paths))
        return Draw(mask=None, order=None, keep=torch.from_numpy(keep).float())

    def __call__(self, images: Tensor, target: Tensor, draw: Draw | None = None) -> Loss:
        """See forward."""
        return nn.Module.__call__(self, images, target, draw)

    def forward(self, images: Tensor, target: Tensor, draw: Draw | None = None) -> Loss:
        """The loss of images [B, 3, S, S] and a target [B, classes] whose rows sum to 1.

        Without a draw nothing is dropped, which is for evaluation. The host waits for nothing.
        """
        for i, drop_path in enumerate(self.drop_paths):
            drop = drop_path.drop_prob
            drop_path.factor = None if draw is None else (draw.keep[:, i] >= drop) / (1 - drop)
        dtype = next(self.vit.parameters()).dtype
        for attention in self.joined:
            attention.k_bias = attention.k_bias.to(dtype)
        logits = self.vit(images.to(dtype)).float()
        return Loss(self.loss(logits, target), {}, logits.detach())


def _create(model: ClassifierConfig, num_classes: int, **arguments: Any) -> Any:
    """A timm model of these sizes without its weights."""
    source = model.name or f"local-dir:{model.folder}"
    sizes = {"num_classes": num_classes, "global_pool": model.pool, "img_size": model.img_size}
    arguments = sizes | arguments
    try:
        return timm.create_model(source, pretrained=False, **arguments)
    except REFUSALS as error:
        raise ConfigError(
            f"timm can't build {source} with {arguments}: {type(error).__name__} {error}. Look at "
            "model.name, model.pool, model.img_size and model.drop_path."
        ) from error


def build_model(model: ClassifierConfig, num_classes: int) -> tuple[Any, list[str]]:
    """The timm model with its weights loaded, and the names of the parameters that are fresh.

    Those are a head for other classes, and the norm of the mean where the weights have none.

    Raises:
        ConfigError: timm can't build it, or the weights are of another architecture.
    """
    vit = _create(model, num_classes, drop_path_rate=model.drop_path)
    if extra := sorted(vit.state_dict().keys() - dict(vit.named_parameters()).keys()):
        raise ConfigError(
            f"{type(vit).__name__} has a state beside its parameters ({extra[0]}, ...), such as running "
            "statistics, which would depend on the number of ranks: take a ViT, or another model with "
            "LayerNorm."
        )
    fresh = list(vit.state_dict()) if model.untrained else load_weights(vit, model)
    head = vit.get_classifier()
    if isinstance(head, nn.Linear) and any(vit.get_parameter(name) is head.weight for name in fresh):
        with torch.no_grad():  # timm's BEiT has scaled its own already
            head.weight.mul_(model.head_scale / getattr(vit, "head_init_scale", 1.0))
    return vit, fresh


def load_weights(vit: Any, model: ClassifierConfig) -> list[str]:
    """Loads a file of weights strictly, but for a head of other classes and the norm before it.

    Gives the names of the parameters that stay fresh.

    Raises:
        ConfigError: there is no such file, or it is of another architecture.
    """
    path, wanted = model.weights, shapes(vit.state_dict())
    heads = vit.pretrained_cfg.get("classifier") or "head"
    heads = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))

    # A head and a norm of other shapes are left out; a head and a norm of the mean may be missing.
    optional = (*heads, "norm.", "fc_norm.")
    state = {
        name: tensor for name, tensor in timm_weights(path, vit, f"model.path = {path}").items()
        if not name.startswith(optional) or wanted.get(name) == tuple(tensor.shape)
    }  # fmt: skip
    fresh = [name for name in wanted if name not in state and name.startswith((*heads, "fc_norm."))]
    needed = {name: shape for name, shape in wanted.items() if name not in fresh}
    if wrong := mismatches(needed, shapes(state)):
        architecture, examples = vit.pretrained_cfg["architecture"], "; ".join(wrong[:3])
        raise ConfigError(
            f"{path} is of another architecture than {architecture} here: {len(wrong)} tensors differ, e.g. "
            f"{examples}."
        )
    vit.load_state_dict(state, strict=False)
    return fresh


def start_identity(model: ClassifierConfig) -> dict[str, Any]:
    """The sha256 of the weights that a run begins from and of the description of their model."""
    files = {
        "weights": None if model.untrained else model.weights,
        "config": model.path and model.folder / "config.json",
    }
    return {name: checksum(path) for name, path in files.items() if path and path.is_file()}


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
    vit = _create(config.model, len(classes))
    vit.load_state_dict(state)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "num_classes": len(classes), "tag": "finetune"}
    with staged(out) as folder:
        write_timm(vit, folder, data_config, classes)
