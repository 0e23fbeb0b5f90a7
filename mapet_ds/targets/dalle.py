"""DALL-E's tokenizer, which BEiT learnt from: the dVAE's encoder, convolutions that end in a logit a code.

Modules and parameters have the published names. The decoder, which made images of ids, is not used.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.weights import fingerprint, mismatches, read_tensors, shapes, shapes_only

EPSILON = 0.1
"""Pixels of 0 .. 1 are mapped to EPSILON .. 1 - EPSILON: the decoder's logit-Laplace needs an open range."""
GROUPS, BLOCKS = 4, 2
"""Groups of blocks, with a max-pooling of 2 x 2 between two of them, and blocks of each."""
SHRINKS = 2 ** (GROUPS - 1)
"""Pixels along a side of the cell that an id stands for."""
IMAGES = 16
"""Images of one forward: the first group takes some 65 MB for each at 112 px, and the logits 6 MB."""
FIRST, LAST = "blocks.input.w", "blocks.output.conv.w"
WIDTH = 256
"""Channels of the published encoder's first group."""
CURE = "docs/extending.md has the lines that make it, once, of OpenAI's encoder.pkl."


class Convolution(nn.Module):
    """A convolution that keeps the size of the image: w [out, in, side, side] and b [out]."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(outputs, inputs, side, side))
        self.b = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """A residual block: four convolutions, each after a ReLU, whose sum with the input they scale down."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = outputs // 4
        sizes = (inputs, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, outputs, 1)
        self.id_path = nn.Identity() if inputs == outputs else Convolution(inputs, outputs, 1)
        self.res_path = nn.ModuleDict({f"conv_{i}": Convolution(*size) for i, size in enumerate(sizes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution in self.res_path.values():
            y = convolution(F.relu(y))
        return self.id_path(x) + y / (GROUPS * BLOCKS) ** 2


def encoder(width: int, codes: int) -> nn.Sequential:
    """The encoder's layers: [B, 3, T, T] -> logits [B, codes, T / 8, T / 8]. Weights have no values yet."""
    layers: dict[str, nn.Module] = {"input": Convolution(3, width, 7)}
    inputs = width
    for number in range(1, GROUPS + 1):
        group = dict[str, nn.Module]()
        for block in range(1, BLOCKS + 1):
            outputs = width * 2 ** (number - 1)
            group[f"block_{block}"] = Block(inputs, outputs)
            inputs = outputs
        if number < GROUPS:
            group["pool"] = nn.MaxPool2d(2)
        layers[f"group_{number}"] = nn.Sequential(OrderedDict(group))
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Convolution(inputs, codes, 1)))
    return nn.Sequential(OrderedDict(layers))


class DallE(nn.Module):
    """A `Tokenizer` that is frozen: the code of the largest logit in each cell of 8 x 8 pixels of its view.

    The view is the student's own crop with 8 pixels a patch, 112 for 14 x 14 of them, resized as every view
    is; BEiT's is resampled by Lanczos. A CPU computes in fp32. A GPU multiplies in TF32, whose fractions have
    the 10 bits of the fp16 that OpenAI's own code takes there, and adds and keeps all in fp32.

    Raises:
        ConfigError: no file, or tensors that are not the encoder's.

    Source: DALL-E (arXiv 2102.12092), appendix A, as released; BEiT (arXiv 2106.08254), its second view.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__()
        self.identity: dict[str, Any] = {"name": "dalle"}
        self.view = View(SHRINKS * config.grid, *self.mean_std())
        if shapes_only():
            self.vocab_size = config.tokenizer.vocab_size
            with torch.device(device):
                self.blocks = encoder(WIDTH, self.vocab_size)
        else:
            weights = _read_weights(config.tokenizer.path)
            self.vocab_size = len(weights[LAST])
            with torch.device("meta"):
                self.blocks = encoder(len(weights[FIRST]), self.vocab_size)
            _refuse(mismatches(shapes(self.state_dict()), shapes(weights)), config.tokenizer.path)
            self.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
            self.identity["sha256"] = fingerprint(weights)
        self.to(device).to(memory_format=torch.channels_last).requires_grad_(False).eval()

    @staticmethod
    def mean_std() -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and deviation of a view by which its x becomes (1 - 2 EPSILON) x + EPSILON."""
        mean, std = -EPSILON / (1 - 2 * EPSILON), 1 / (1 - 2 * EPSILON)
        return (mean, mean, mean), (std, std, std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> long ids [B, L] in raster order. Does not make the host wait."""
        cudnn, images = torch.backends.cudnn, images.float()
        tf32 = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "allow_tf32": True}
        with torch.autocast(images.device.type, enabled=False), cudnn.flags(enabled=True, **tf32):
            parts = images.contiguous(memory_format=torch.channels_last).split(IMAGES)
            return torch.cat([self.blocks(part).argmax(dim=1).flatten(1) for part in parts])


def _refuse(wrong: list[str], path: str) -> None:
    if wrong:
        raise ConfigError(
            f"tokenizer.path = {path} is not the encoder of DALL-E's dVAE: {len(wrong)} tensors differ, e.g. "
            f"{'; '.join(sorted(wrong)[:3])}. {CURE}"
        )


def _read_weights(path: str) -> dict[str, Tensor]:
    """The file's tensors, of which two give the sizes."""
    try:
        weights = read_tensors(Path(path), f"tokenizer.path = {path or '(empty)'}")
    except ConfigError as error:
        raise ConfigError(f"{error} {CURE}") from error
    sizes = shapes(weights)
    _refuse([f"{name} is missing" for name in (FIRST, LAST) if name not in weights], path)
    _refuse([f"{n} is {sizes[n]}, not 4-d" for n in (FIRST, LAST) if len(sizes[n]) != 4], path)
    if len(weights[FIRST]) % 4:
        _refuse([f"{FIRST} has {len(weights[FIRST])} channels, no multiple of 4"], path)
    return weights
