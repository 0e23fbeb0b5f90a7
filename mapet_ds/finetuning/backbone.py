"""A timm model that a run on labels begins from: its weights from a file, its stochastic depth by draws."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mapet_ds.config.finetune import BackboneConfig
from mapet_ds.data.batch import Draw
from mapet_ds.draws import Purpose, uniforms
from mapet_ds.errors import ConfigError
from mapet_ds.files import checksum
from mapet_ds.objectives.objective import Loss, Objective
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


class OnTimm(Objective):
    """An objective around any timm model, `vit`, whose stochastic depth is drawn for each slot."""

    vit: Any
    """timm has no type for its models."""

    def __init__(self, seed: int, vit: Any) -> None:
        super().__init__()
        self.seed, self.vit = seed, vit
        # timm joins this buffer of BEiT's attention with two parameters, and DeepSpeed casts only parameters.
        self.joined = [module for module in vit.modules() if getattr(module, "k_bias", None) is not None]
        self.drop_paths: list[DrawnDropPath] = []
        for module in list(vit.modules()):
            for name, child in module.named_children():
                if isinstance(child, DropPath):
                    self.drop_paths.append(DrawnDropPath(child.drop_prob))
                    setattr(module, name, self.drop_paths[-1])

    def __call__(self, images: Tensor, target: Tensor, draw: Draw | None = None) -> Loss:
        """See forward. A target of classes, or of masks, has no patches whose number could be wrong."""
        return nn.Module.__call__(self, images, target, draw)

    def draw(self, step: int, first_slot: int, slots: int) -> Draw:
        """See Objective. It holds one uniform for each image and residual branch."""
        keep = uniforms(self.seed, Purpose.DEPTH, step, first_slot, slots, len(self.drop_paths))
        return Draw(mask=None, order=None, keep=torch.from_numpy(keep).float())

    def prepare(self, images: Tensor, draw: Draw | None) -> Tensor:
        """Sets which branches the next forward drops, none without a draw; gives images of its dtype."""
        for i, drop_path in enumerate(self.drop_paths):
            drop = drop_path.drop_prob
            drop_path.factor = None if draw is None else (draw.keep[:, i] >= drop) / (1 - drop)
        dtype = next(self.vit.parameters()).dtype
        for attention in self.joined:
            attention.k_bias = attention.k_bias.to(dtype)
        return images.to(dtype)


def create(model: BackboneConfig, num_classes: int, pool: str, **arguments: Any) -> Any:
    """A timm model of these sizes without its weights."""
    source = model.name or f"local-dir:{model.folder}"
    sizes = {"num_classes": num_classes, "global_pool": pool, "img_size": model.img_size}
    arguments = sizes | arguments
    try:
        return timm.create_model(source, pretrained=False, **arguments)
    except REFUSALS as error:
        raise ConfigError(
            f"timm can't build {source} with {arguments}: {type(error).__name__} {error}. Look at "
            "model.name, model.pool, model.img_size and model.drop_path."
        ) from error


def refuse_more_state(model: nn.Module) -> None:
    """Refuses a model whose state is more than its parameters, by a ConfigError."""
    if extra := sorted(model.state_dict().keys() - dict(model.named_parameters()).keys()):
        raise ConfigError(
            f"{type(model).__name__} has a state beside its parameters ({extra[0]}, ...), such as running "
            "statistics, which would depend on the number of ranks: take a ViT, or another model with "
            "LayerNorm."
        )


def load_weights(vit: Any, model: BackboneConfig, unread: tuple[str, ...] = ()) -> list[str]:
    """Loads a file of weights strictly, but for a head of other classes and the norm before it.

    Gives the names of the parameters that stay fresh.

    unread: beginnings of names of parameters that nothing reads, which may be missing.

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
    fresh = [name for name in wanted if name not in state and name.startswith((*heads, "fc_norm.", *unread))]
    needed = {name: shape for name, shape in wanted.items() if name not in fresh}
    if wrong := mismatches(needed, shapes(state)):
        architecture, examples = vit.pretrained_cfg["architecture"], "; ".join(wrong[:3])
        raise ConfigError(
            f"{path} is of another architecture than {architecture} here: {len(wrong)} tensors differ, e.g. "
            f"{examples}."
        )
    vit.load_state_dict(state, strict=False)
    return fresh


def start_identity(model: BackboneConfig) -> dict[str, Any]:
    """The sha256 of the weights that a run begins from and of the description of their model."""
    files = {
        "weights": None if model.untrained else model.weights,
        "config": model.path and model.folder / "config.json",
    }
    return {name: checksum(path) for name, path in files.items() if path and path.is_file()}
