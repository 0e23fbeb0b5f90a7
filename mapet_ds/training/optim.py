"""Parameter groups and the learning rate as a function of the step."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from mapet_ds.config.running import OptimConfig

NO_DECAY = ("pos_embed", "cls_token", "reg_token")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: one whose weights decay, one of those that don't.

    Biases, norms, LayerScale, positions and prefix tokens don't decay; a mask token does. Call it before
    DeepSpeed takes the module, because ZeRO-3 leaves no shapes to go by.

    Source: MaPeT, released settings (arXiv 2306.07346).
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith(NO_DECAY)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def layerwise_groups(vit: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """timm's groups of one of its models, two a layer, with `lr_scale` = layer_decay ** (layers above it).

    The head and the norm of the mean have an lr_scale of 1.

    Source: BEiT, arXiv 2106.08254, as in timm, but that BEiT's tables of relative positions decay, as in its
    release.
    """
    exempt = vit.no_weight_decay() if hasattr(vit, "no_weight_decay") else ()
    no_decay = [name for name in exempt if "relative_position_bias_table" not in name]
    return param_groups_layer_decay(vit, weight_decay, no_decay, layer_decay=layer_decay)


def learning_rate(step: int, config: OptimConfig, steps_per_epoch: float, total_steps: int) -> float:
    """The absolute rate of update `step` (0 first): linear from warmup_lr to lr, then falling to min_lr.

    Source of the cosine: Loshchilov and Hutter, SGDR, arXiv 1608.03983, equation 5, without restarts.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * config.falling(min(1.0, done))
