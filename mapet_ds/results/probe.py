"""Probes of frozen features: nearest neighbours and linear classifiers; and the timm ViT that is judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mapet_ds.errors import ConfigError, DataError
from mapet_ds.nearest import most_similar
from mapet_ds.results.features import Features, Labels
from mapet_ds.weights import UNREADABLE, timm_weights

K = 20
"""The number of neighbours that vote."""
EPOCHS = 90
"""Passes of the linear probe by SGD over the features."""
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The rates that the linear probe tries."""
LEAST = 20
"""Training images of which a tenth can be held out to choose a rate by."""
BATCH_SIZE = 256
"""Images an update of the linear probe."""


def device_of(name: str | None) -> torch.device:
    """The device of that name; without a name a GPU where there is one.

    Raises:
        ConfigError: this host has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} is no device of this host: {reason}") from error
    return device


def load_timm(
    path: Path, architecture: str | None = None, untrained: bool = False, seed: int = 0,
    classify: bool = False,
) -> Any:  # fmt: skip
    """A timm ViT for evaluation, from a folder of config.json and model.safetensors, or weights and a name.

    classify: with its classifier, if it has one.
    untrained: the same architecture with fresh weights drawn from `seed`; no weights are read.

    Raises:
        ConfigError: there is nothing to load, or the weights don't fit.
    """
    folder = path.parent if path.is_file() and architecture is None else path
    sizes: dict[str, Any] = {} if classify else {"num_classes": 0}
    torch.manual_seed(seed)
    try:
        if (folder / "config.json").is_file():
            if not untrained and not (folder / "model.safetensors").is_file():
                missing = folder / "model.safetensors"
                raise ConfigError(f"--model {path}: there are no weights, {missing} is missing.")
            return timm.create_model(f"local-dir:{folder}", pretrained=not untrained, **sizes).eval()
        if not path.is_file():
            raise ConfigError(
                f"--model {path} is neither a folder with config.json and model.safetensors, as "
                "tools/export_timm.py writes it, nor a file of weights."
            )
        if architecture is None:
            cure = "add --arch, timm's name for it"
            raise ConfigError(f"--model {path}: weights alone don't tell the model; {cure}.")
        jax = None if untrained or path.suffix not in (".npz", ".npy") else path  # timm's reader knows these
        model = timm.create_model(architecture, checkpoint_path=jax, **sizes).eval()
        if not untrained and not jax:
            model.load_state_dict(timm_weights(path, model, f"--model {path}"))
        return model
    except UNREADABLE as error:
        raise ConfigError(f"timm can't load --model {path}: {' '.join(str(error).split())[:500]}") from error


def knn(
    train_features: Features, train_labels: Labels, val_features: Features, val_labels: Labels, k: int = K,
    temperature: float = 0.07, on_gpus: bool = True,
) -> float:  # fmt: skip
    """The accuracy in percent of a weighted vote of neighbours, on features of length 1.

    Each of the k most similar training images gives exp(cosine / temperature) to its class. The search is
    exact, and on all GPUs that there are unless `on_gpus` is False. Memory: for ImageNet (1.28 million x 768
    floats) the features and FAISS's copy of them are 4 GB each, the votes 0.4 GB.

    Raises:
        DataError: there are fewer training images than k.

    Source: Wu et al., arXiv 1805.01978, section 3.4, with the values that DINO (arXiv 2104.14294) uses.
    """
    if (n := len(train_features)) < k:
        raise DataError(f"k = {k} neighbours can't be found among {n} training images; lower --k.")
    cosines, neighbours = most_similar(train_features, val_features, k, on_gpus)
    votes = np.zeros((len(val_features), int(train_labels.max()) + 1))
    rows = np.arange(len(val_features))[:, None]
    np.add.at(votes, (rows, train_labels[neighbours]), np.exp(cosines.astype(np.float64) / temperature))
    return 100 * int((votes.argmax(1) == val_labels).sum()) / len(val_labels)


def linear(
    train_features: Features, train_labels: Labels, val_features: Features, val_labels: Labels,
    penalty: float = 1e-4,
) -> float:  # fmt: skip
    """The accuracy in percent of a multinomial logistic regression, on standardised features.

    It is for small sets: L-BFGS solves it whole, in float64 on the CPU, with `penalty` / 2 times the squared
    weights added to the mean cross-entropy. The figure is the same each time.
    """
    x, y = torch.from_numpy(train_features).double(), torch.from_numpy(train_labels)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        val = (torch.from_numpy(val_features).double() - mean) / std
        predicted = (val @ weight + bias).argmax(1)
    return 100 * int((predicted == torch.from_numpy(val_labels)).sum()) / len(val_labels)


class LinearHeads(nn.Module):
    """Linear classifiers side by side on the same features [B, D], after a BatchNorm without weights or none.

    Its running statistics are plain means over all batches: features don't change, and a moving average would
    begin at 0.
    """

    def __init__(self, heads: int, width: int, classes: int, batch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        self.batches = 0
        self.weight = nn.Parameter(torch.zeros(heads, width, classes))
        self.bias = nn.Parameter(torch.zeros(heads, 1, classes))

    def forward(self, x: Tensor) -> Tensor:
        """The logits [heads, B, classes] of features [B, D]."""
        if self.training and isinstance(self.norm, nn.BatchNorm1d):
            self.batches += 1
            # A momentum of None means the same, but is read from the GPU at every batch.
            self.norm.momentum = 1 / self.batches
        return self.norm(x) @ self.weight + self.bias

    @torch.no_grad()
    def accuracies(self, x: Tensor, y: Tensor) -> list[float]:
        """The accuracy of each head, in percent, on features [n, D] and labels [n]."""
        hits = torch.zeros(len(self.weight), dtype=torch.float64, device=x.device)
        for rows, labels in zip(x.split(4096), y.split(4096), strict=True):
            hits += (self(rows).argmax(2) == labels).sum(1)
        return (100 * hits / len(y)).tolist()


def fit_heads(
    x: Tensor, y: Tensor, rows: Tensor, rates: Sequence[float], epochs: int, batch_norm: bool,
    generator: torch.Generator,
) -> LinearHeads:  # fmt: skip
    """Trains one head a learning rate, side by side, on these rows of features [n, D] and labels [n].

    SGD has momentum, and its rates follow a cosine to 0. The generator orders each epoch, whose last, smaller
    batch is left out.
    """
    heads = LinearHeads(len(rates), x.shape[1], int(y.max()) + 1, batch_norm).to(x.device)
    batch_size = min(BATCH_SIZE, len(rows))
    batches = len(rows) // batch_size
    solver = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, epochs * batches)
    factors = torch.tensor(rates, device=x.device)
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)].to(x.device)
        for batch in order.split(batch_size)[:batches]:
            logits = heads(x[batch])
            labels = y[batch].repeat(len(rates))
            losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(len(rates), -1)
            solver.zero_grad()
            # SGD is linear in gradients, so a rate on the loss is a rate on the update.
            (losses.mean(1) * factors).sum().backward()
            solver.step()
            schedule.step()
    return heads.eval()


class Fitted(NamedTuple):
    """The result of a probe that has tried several learning rates."""

    accuracy: float
    """In percent, on the validation images."""
    learning_rate: float
    """The rate that was chosen."""
    held_out: dict[float, float]
    """The accuracy of each learning rate, in percent, on the training images it was chosen by."""


def linear_sgd(
    train_features: Features, train_labels: Labels, val_features: Features,
    val_labels: Labels, learning_rates: Sequence[float] = LEARNING_RATES, epochs: int = EPOCHS,
    batch_norm: bool = False, seed: int = 0, device: torch.device | str = "cpu",
) -> Fitted:  # fmt: skip
    """Trains and judges a linear classifier of features [n, D] as papers do, in fp32; the same each time.

    All learning rates are tried at once without a tenth of the training images, drawn from the seed. The best
    on that tenth, the lowest of equals, is trained anew on all training images. It alone sees the validation
    images, once.

    Raises:
        DataError: fewer than 20 training images.

    Source: BatchNorm without weights before the head, 90 epochs: MAE, arXiv 2111.06377, A.1, and SAIM. SGD
    with momentum 0.9 without weight decay, cosine: DINO, arXiv 2104.14294. Many rates at once: DINOv2, arXiv
    2304.07193. Departures: features are computed once, of central crops, without augmentation; batches of 256
    and SGD instead of MAE's 16,384 and LARS; no validation image chooses the rate.
    """
    if len(train_labels) < LEAST:
        raise DataError(f"{len(train_labels)} training images are too few to hold out a tenth of them.")

    # The rate, by a tenth of the training images.
    x, y = (torch.from_numpy(each).to(device) for each in (train_features, train_labels))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    tenth, rest = order[: len(y) // 10], order[len(y) // 10 :]
    heads = fit_heads(x, y, rest, learning_rates, epochs, batch_norm, generator)
    held_out = dict(zip(learning_rates, heads.accuracies(x[tenth], y[tenth]), strict=True))
    chosen = max(sorted(held_out), key=held_out.__getitem__)

    # The classifier.
    head = fit_heads(x, y, order, [chosen], epochs, batch_norm, generator)
    x, y = (torch.from_numpy(each).to(device) for each in (val_features, val_labels))
    (accuracy,) = head.accuracies(x, y)
    return Fitted(accuracy, chosen, held_out)
