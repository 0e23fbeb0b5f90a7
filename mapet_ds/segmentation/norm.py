"""BatchNorm whose statistics no split of a batch changes, and its running ones as the target's state.

Ranks, micro-batches and a resume so change nothing but the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mapet_ds.finetuning.classifier import Labels

MOMENTUM = 0.1
"""PyTorch's: the part that a step has of the running statistics after it."""


class GroupedBatchNorm(nn.Module):
    """BatchNorm over `group` neighbouring images in training, by its running statistics in evaluation.

    Those move once a step, by the mean over the groups of all ranks. Both are fp32.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float, group: int) -> None:
        super().__init__()
        self.eps, self.group = eps, group
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.forget()

    def forget(self) -> None:
        """Begins a step: no group has been seen."""
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float(), self.bias.float()
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, *scale, eps=self.eps)
        parts = []
        for part in x.split(self.group):
            moments = torch.zeros(2, x.shape[1], device=x.device)  # with a momentum of 1 they are the group's
            mean, var = moments
            normed = F.batch_norm(part, mean, var, *scale, training=True, momentum=1.0, eps=self.eps)
            parts.append(normed)
            self.seen.append(moments)
        return torch.cat(parts)


def group_norms(module: nn.Module, group: int) -> None:
    """Puts a GroupedBatchNorm in the place of each BatchNorm2d in a module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, GroupedBatchNorm(child.num_features, child.eps, group))


class MaskLabels(Labels):
    """The target of segmentation: the masks that a batch brings along. Its state is the norms' statistics."""

    def __init__(self, module: nn.Module, num_classes: int, identity: dict[str, Any]) -> None:
        super().__init__(num_classes, identity)
        self.norms = {n: norm for n, norm in module.named_modules() if isinstance(norm, GroupedBatchNorm)}
        self.step = -1

    def __call__(self, batch: Any) -> Tensor:
        """The classes int16 [B, S, S] of a LabelledBatch, which begins a step where its own is another."""
        if batch.place.step != self.step:  # what a step left that was skipped is of no use
            self.step = batch.place.step
            for norm in self.norms.values():
                norm.forget()
        return super().__call__(batch)

    @torch.no_grad()
    def after_step(self, weights: Iterable[tuple[str, Tensor]], progress: float) -> None:
        """See Target. The host waits for nothing."""
        norms = list(self.norms.values())
        sums = torch.cat([torch.stack(norm.seen).double().mean(dim=0) for norm in norms], dim=1)
        dist.all_reduce(sums)
        widths = [len(norm.running_mean) for norm in norms]
        means = (sums / dist.get_world_size()).float().split(widths, dim=1)
        for norm, (mean, var) in zip(norms, means):
            norm.running_mean.lerp_(mean, MOMENTUM)
            norm.running_var.lerp_(var, MOMENTUM)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: buffer.cpu().clone() for name, buffer in self._buffers()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, buffer in self._buffers():
            buffer.copy_(state[name])

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, norm in self.norms.items():
            yield from norm.named_buffers(prefix=name)
