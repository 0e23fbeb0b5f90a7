"""Tokenizers, which turn an image into one id per patch: those known by name, or one of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mapet_ds.config.own import resolve
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.targets.dalle import DallE
from mapet_ds.targets.kclip import KClip
from mapet_ds.targets.vqkd import VQKD


class Tokenizer(Protocol):
    """A function from images to one id for each patch of the student, without gradient."""

    view: View
    """The images that it takes."""
    vocab_size: int
    identity: dict[str, Any]
    """What must be the same when a run resumes from a checkpoint."""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> long ids [B, L] in 0 .. vocab_size - 1, in raster order."""
        ...


TOKENIZERS: dict[str, Callable[[Config, torch.device], Tokenizer]] = {
    "kclip": KClip, "vqkd": VQKD, "dalle": DallE,
}  # fmt: skip


def build_tokenizer(config: Config, device: torch.device) -> Tokenizer:
    """The tokenizer that tokenizer.name names, on `device`. Every rank must call it.

    Raises:
        ConfigError: no such name or factory, or another number of ids than tokenizer.vocab_size.
    """
    name, vocab_size = config.tokenizer.name, config.tokenizer.vocab_size
    if name not in TOKENIZERS and ":" not in name:
        raise ConfigError(
            f"tokenizer.name = {name} is not known; there are: {', '.join(TOKENIZERS)}, or name your own as "
            "package.module:factory."
        )
    factory = TOKENIZERS.get(name) or resolve("tokenizer.name", name)
    if not callable(factory):
        kind = type(factory).__name__
        raise ConfigError(f"tokenizer.name = {name} is a {kind}, not a factory(config, device).")
    tokenizer = cast(Tokenizer, factory(config, device))
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"The tokenizer {name} has {tokenizer.vocab_size} ids, tokenizer.vocab_size is {vocab_size}. "
            f"Set tokenizer.vocab_size={tokenizer.vocab_size}."
        )
    return tokenizer
