"""The attentive probe: attention pools the patch tokens of a frozen ViT, and a linear layer classifies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from mapet_ds.data.index import Images, Ordered
from mapet_ds.data.labelled import Bad, EvaluationBatches, report_unreadable, served
from mapet_ds.data.samples import check_bad
from mapet_ds.errors import DataError
from mapet_ds.launch import Ranks
from mapet_ds.results.features import patch_tokens
from mapet_ds.results.probe import Fitted

EPOCHS = 20
"""Passes over the images."""
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""The rates that are tried, side by side."""
WEIGHT_DECAY = 0.05


def token_shape(model: Any, layer: int | None = None) -> torch.Size:
    """[L, D], the patch tokens of one image."""
    size = model.pretrained_cfg["input_size"]
    device = next(model.parameters()).device
    return patch_tokens(model, torch.zeros(1, *size, device=device), layer).shape[1:]


class Tokens:
    """The patch tokens of images, computed by a frozen model whenever they are asked for, or kept in memory.

    config: as for `labelled_features`. The batches of `batches` are those of config.train.micro_batch_size.
    """

    def __init__(
        self, config: Any, model: Any, images: Images, transform: Callable[[Image.Image], Tensor],
        ranks: Ranks, layer: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.model, self.images, self.transform = config, model, images, transform
        self.ranks, self.layer, self.bad = ranks, layer, dict(Bad())
        self._kept: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def keep(self) -> None:
        """Computes all tokens once, into the host's memory."""
        tokens, labels = [], []
        for batch, label in self._computed(range(len(self.images))):
            tokens.append(batch.cpu())
            labels.append(label.cpu())
        self._kept = torch.cat(tokens), torch.cat(labels)

    def batches(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields tokens [B, L, D] and labels [B] of these images in order, without unreadable ones.

        Raises:
            DataError: more than data.max_bad_share of the images are unreadable.
        """
        for tokens, labels in self._computed(rows) if self._kept is None else self._taken(*self._kept, rows):
            good = labels >= 0
            yield tokens[good], labels[good]

    def report(self) -> None:
        """Says how many images are unreadable.

        Raises:
            DataError: they are more than data.max_bad_share.
        """
        report_unreadable(self.config, self.images, list(self.bad.items()), self.ranks, "--")

    def _taken(self, tokens: Tensor, labels: Tensor, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for places in torch.as_tensor(rows).split(self.config.train.micro_batch_size):
            yield tokens[places].to(self.ranks.device), labels[places].to(self.ranks.device)

    def _computed(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same with unreadable images, whose label is -1."""
        images, device = Ordered(self.images, rows), self.ranks.device
        made = EvaluationBatches(self.config, images, self.transform, 0, 1)
        for batch in served(made, range(len(made)), self.config.data.workers, self.ranks, "fork"):
            self.bad |= {rows[place]: reason for place, reason in batch.bad}
            yield patch_tokens(self.model, batch.images.to(device), self.layer), batch.label.to(device)
        check_bad(self.config, self.images, sorted(self.bad), "--")


def build_head(width: int, classes: int, seed: int) -> nn.Module:
    """A block that pools patch tokens of this width by attention of one learnt query, and a linear layer.

    A head of attention is 64 wide, or as much wider as divides the width. Weights are drawn from the seed.
    """
    heads = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        return nn.Sequential(pool, nn.LayerNorm(width), nn.Linear(width, classes))


def fit_heads(
    tokens: Tokens, rows: Tensor, heads: Sequence[nn.Module], rates: Sequence[float], epochs: int,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Trains one head a learning rate, on the same batches of these images.

    AdamW's rates follow a cosine to 0. The generator orders each epoch.
    """
    solvers = [
        torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        for head, rate in zip(heads, rates, strict=True)
    ]
    steps = epochs * -(-len(rows) // tokens.config.train.micro_batch_size)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps) for solver in solvers]
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)].tolist()
        for batch, labels in tokens.batches(order):
            for head, solver, schedule in zip(heads, solvers, schedules, strict=True):
                if len(labels):  # all of them may be unreadable
                    solver.zero_grad()
                    F.cross_entropy(head(batch), labels).backward()
                    solver.step()
                schedule.step()


@torch.no_grad()
def accuracies(tokens: Tokens, rows: Sequence[int], heads: Sequence[nn.Module]) -> list[float]:
    """The accuracy of each head in percent on these images; NaN where all are unreadable."""
    hits, number = [0] * len(heads), 0
    for batch, labels in tokens.batches(rows):
        number += len(labels)
        hits = [n + int((head(batch).argmax(1) == labels).sum()) for n, head in zip(hits, heads, strict=True)]
    return [100 * n / number if number else float("nan") for n in hits]


def attentive(
    train: Tokens, val: Tokens, width: int, learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS, seed: int = 0,
) -> Fitted:  # fmt: skip
    """Trains and judges an attentive probe, in fp32, on one device; the same each time.

    All learning rates are tried at once without a tenth of the training images, drawn from the seed. The best
    on that tenth, the lowest of equals, is trained anew on all of them, and alone sees the validation images.

    width: of the tokens.

    Raises:
        DataError: fewer than 20 training images, or too many unreadable ones.

    Source: one learnt query over a frozen encoder's patches: I-JEPA's and V-JEPA's evaluation, Bardes et al.,
    arXiv 2404.08471. Departures: timm's pooling, central crops without augmentation, the rate by held-out
    training images.
    """
    if len(train) < 20:
        raise DataError(f"{len(train)} training images are too few to hold out a tenth of them.")
    classes, device = len(train.images.classes), train.ranks.device

    # The rate, by a tenth of the training images.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    tenth, rest = order[: len(order) // 10], order[len(order) // 10 :]
    heads = [build_head(width, classes, seed).to(device) for _ in learning_rates]
    fit_heads(train, rest, heads, learning_rates, epochs, generator)
    held_out = dict(zip(learning_rates, accuracies(train, tenth.tolist(), heads), strict=True))
    chosen = max(sorted(held_out), key=held_out.__getitem__)

    # The classifier.
    head = build_head(width, classes, seed).to(device)
    fit_heads(train, order, [head], [chosen], epochs, generator)
    (accuracy,) = accuracies(val, range(len(val)), [head])
    return Fitted(accuracy, chosen, held_out)
