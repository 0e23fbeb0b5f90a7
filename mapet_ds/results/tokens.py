"""A recipe's targets as the probes know a ViT, the use that tokenizers make of their ids, and their table."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mapet_ds.config.sections import Config, TeacherConfig
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.results.features import Features
from mapet_ds.targets.teacher import build_teacher
from mapet_ds.targets.tokenizer import Tokenizer, build_tokenizer
from mapet_ds.targets.towers import teacher_mean_std


class Histograms(nn.Module):
    """A tokenizer as the probes know a ViT: its one token is the share of each id among an image's patches.

    It sees an image's largest central square, as timm resizes and crops for evaluation.
    """

    num_prefix_tokens = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        view: View = tokenizer.view
        data = {"input_size": (3, view.size, view.size), "mean": view.mean, "std": view.std}
        self.pretrained_cfg = data | {"interpolation": "bicubic", "crop_pct": 1.0}

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> float [B, 1, ids]. The host waits for the GPU.

        Raises:
            ConfigError: an id that the tokenizer does not have.
        """
        ids, number = self.tokenizer(images), self.tokenizer.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < number:
            raise ConfigError(f"The tokenizer gives ids of {low} .. {high}; it has 0 .. {number - 1}.")
        shares = torch.zeros(len(ids), number, device=ids.device)
        each = torch.full(ids.shape, 1 / ids.shape[1], device=ids.device)
        return shares.scatter_add_(1, ids, each)[:, None]


def tokenizer_as_vit(config: Config, device: torch.device) -> Histograms:
    """A recipe's tokenizer on this device, as the probes know a ViT.

    Its teacher is whole on every rank, and not compiled: a pass this short would not repay it.
    """
    teacher = dataclasses.replace(config.teacher, shard="none")
    train = dataclasses.replace(config.train, compile=False)
    return Histograms(build_tokenizer(dataclasses.replace(config, teacher=teacher, train=train), device))


def teacher_as_vit(config: TeacherConfig) -> Any:
    """A recipe's teacher with what a timm ViT has, so that the targets themselves are judged.

    Its patch tokens are the features of the teacher's layer.
    """
    teacher: Any = build_teacher(config, torch.device("cpu"))
    mean, std = teacher_mean_std(config)
    size = (3, config.img_size, config.img_size)
    data = {"input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}
    teacher.num_prefix_tokens, teacher.pretrained_cfg, teacher.forward_features = 0, data, teacher.forward
    return teacher


def usage(*histograms: Features) -> dict[str, Any]:
    """The use of the ids in all images of these sets together, from the histogram of each [n, ids].

    entropy_bits: of the distribution of ids; perplexity: 2 to that power, the number of equally likely ids of
    the same entropy. A dead id occurs in no image.
    """
    share = np.concatenate(histograms).mean(axis=0, dtype=np.float64)
    used = share[share > 0] / share.sum()
    entropy = float(-(used * np.log2(used)).sum())
    counts = {"ids": len(share), "used": len(used), "dead": len(share) - len(used)}
    return counts | {"perplexity": 2**entropy, "entropy_bits": entropy}


def described(config: Config) -> str:
    """A tokenizer in a few words: its name, and the teacher whose features it names."""
    teacher, name = config.teacher, config.tokenizer.name
    if name != "kclip":
        return name
    weights = "" if teacher.name.startswith("local-dir:") else f" {teacher.weights.rpartition('/')[2]}"
    layer = "" if teacher.layer == -1 else f" layer {teacher.layer}"
    return f"{name} of {teacher.name.rstrip('/').rpartition('/')[2]}{weights}{layer}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, and the images that they rest on."""
    formats = {
        "ids": "d", "used": "d", "dead": "d", "perplexity": ".1f", "entropy_bits": ".2f",
        "knn_accuracy_percent": ".2f", "linear_accuracy_percent": ".2f",
    }  # fmt: skip
    titles = ["tokenizer", *formats]
    titles[-3:] = ["entropy, bits", "k-NN, %", "linear, %"]
    lines = [titles, *([row["tokenizer"], *(f"{row[n]:{f}}" for n, f in formats.items())] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[f"{line[0]:<{widths[0]}}", *map(str.rjust, line[1:], widths[1:])] for line in lines]
    text, basis = [*map("  ".join, cells)], rows[0]
    unreadable = basis["train_unreadable"] + basis["val_unreadable"]
    text.append(
        f"of {basis['train_images']} training and {basis['val_images']} validation images, "
        f"{basis['classes']} classes; {unreadable} unreadable ones are left out. k-NN (k = {basis['k']}) and "
        f"the linear classifier ({basis['solver']}) see each image's histogram of ids alone."
    )
    return "\n".join(text)
