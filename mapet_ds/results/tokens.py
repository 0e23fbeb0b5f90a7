"""The use that a tokenizer makes of its ids, and the histogram of an image's ids as a feature."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.results.probe import Features
from mapet_ds.targets.tokenizer import Tokenizer


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


def usage(histograms: Features) -> dict[str, Any]:
    """The use of the ids in all images together, from the histogram of each [n, ids].

    entropy_bits: of the distribution of ids; perplexity: 2 to that power, the number of equally likely ids of
    the same entropy. A dead id occurs in no image.
    """
    share = histograms.mean(axis=0, dtype=np.float64)
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
