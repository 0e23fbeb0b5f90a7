"""A tokenizer turns an image into one id per patch; it is looked up here by name, or is the user's own."""

from __future__ import annotations

import pkgutil
from typing import Any, Protocol

import torch
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.targets.kclip import KClip
from mapet_ds.targets.vqkd import VQKD

TOKENIZERS = {
    # name: factory, called with the config and the device
    "kclip": KClip,
    "vqkd": VQKD,
}


class Tokenizer(Protocol):
    """Images to one id per patch of the student, without gradient."""

    view: View
    """The images it wants."""
    vocab_size: int
    identity: dict[str, Any]
    """What a checkpoint must find unchanged at resume."""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> long ids [B, L] in 0 .. vocab_size - 1, patches row by row from the top left."""


def build_tokenizer(config: Config, device: torch.device) -> Tokenizer:
    """The tokenizer that tokenizer.name names, on `device`. Every rank must call it.

    Raises:
        ConfigError: no such name or factory, or another number of ids than tokenizer.vocab_size.
    """
    name = config.tokenizer.name
    if name not in TOKENIZERS and ":" not in name:
        raise ConfigError(
            f"tokenizer.name = {name} is not known; there are: {', '.join(TOKENIZERS)}, or name your own as "
            "package.module:factory."
        )
    try:
        factory = TOKENIZERS.get(name) or pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"tokenizer.name = {name} can't be resolved: {error}. Its module must be installed or on PYTHONPATH."
        ) from error
    if not callable(factory):
        raise ConfigError(
            f"tokenizer.name = {name} is a {type(factory).__name__}, not a factory(config, device)."
        )
    tokenizer = factory(config, device)
    if tokenizer.vocab_size != config.tokenizer.vocab_size:
        raise ConfigError(
            f"The tokenizer {name} has {tokenizer.vocab_size} ids, tokenizer.vocab_size is {config.tokenizer.vocab_size}. "
            f"Set tokenizer.vocab_size={tokenizer.vocab_size}."
        )
    return tokenizer
