"""What is to be predicted for each patch."""

from __future__ import annotations

import math
import os
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mapet_ds.config import Config, ConfigError
from mapet_ds.data import Batch, View
from mapet_ds.ids import StoredIds
from mapet_ds.index import DataError, open_index
from mapet_ds.launch import ranks_per_host, shapes_only
from mapet_ds.objectives import OBJECTIVES, build_objective
from mapet_ds.teacher import build_teacher, teacher_mean_std
from mapet_ds.tokenizer import build_tokenizer
from mapet_ds.vit import compile_blocks


class Target(Protocol):
    """A function of a batch, without gradient."""

    teacher_view: View | None
    """The second view the loader must make; None for no second view."""
    dim: int
    """What there is for each patch: number of token ids, or width of a vector."""
    identity: dict[str, Any]
    """What a checkpoint must find unchanged at resume."""
    ahead: bool
    """Whether a batch's is asked for before the student has learnt from the batch before."""

    def __call__(self, batch: Batch) -> Tensor: ...

    def note(self, target: Tensor) -> None:
        """Called with each target that is learnt from, when its turn comes."""

    def after_step(self, weights: Iterable[tuple[str, Tensor]], progress: float) -> None:
        """Called after each update with the student's weights, of which all or none must be taken; progress: share of the
        run that is done."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, copied: it is written while training goes on."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave. Every rank must call it."""

    def metrics(self) -> dict[str, float]:
        """Figures since the last call; every rank must call it; the host waits for the GPU."""


def build_target(config: Config, device: torch.device) -> Target:
    """The target of the configured objective. Every rank must call it."""
    return pkgutil.resolve_name(OBJECTIVES[config.objective][1])(config, device)


def begin(target: Target, batch: Batch, stream: torch.cuda.Stream | None) -> Callable[[], Tensor]:
    """Start computing the target of a batch, on a stream of its own if one is given; what it gives is called for the target,
    which is then ordered with the current stream. Nothing makes the host wait."""
    if stream is None:
        made = target(batch)
        return lambda: made
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = target(batch)
    batch.teacher_images.record_stream(stream)  # their memory is the other stream's, which must not use it again too early
    done = stream.record_event()

    def take() -> Tensor:
        torch.cuda.current_stream().wait_event(done)
        made.record_stream(torch.cuda.current_stream())
        return made

    return take


class Constant:
    """What a target has that nothing moves."""

    ahead = False

    def note(self, target: Tensor) -> None:
        pass

    def after_step(self, weights: Iterable[tuple[str, Tensor]], progress: float) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state

    def metrics(self) -> dict[str, float]:
        return {}


class TokenIds(Constant):
    """The tokenizer's ids, long [B, L], of the teacher's view: the same crop as the student's.

    Raises:
        ConfigError: no such tokenizer, or one that does not fit the run.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.dim, self.num_patches, self.ahead = config.tokenizer.vocab_size, config.num_patches, config.teacher.ahead
        self.counts = torch.zeros(self.dim, device=device)
        self._open(config)

    def _open(self, config: Config) -> None:
        self.tokenizer = build_tokenizer(config, self.counts.device)
        self.teacher_view, self.identity = self.tokenizer.view, self.tokenizer.identity

    def ids(self, batch: Batch) -> Tensor:
        """long [B, L]."""
        return self.tokenizer(batch.teacher_images)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        ids = self.ids(batch)
        if ids.shape[1] != self.num_patches:
            raise ConfigError(f"The tokenizer gives {ids.shape[1]} ids for an image of {self.num_patches} patches.")
        return ids

    def note(self, target: Tensor) -> None:
        flat = target.flatten()
        self.counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=self.counts.dtype))

    def metrics(self) -> dict[str, float]:
        """Perplexity of the ids noted by all ranks since the last call, and the share of codes among them."""
        counts = self.counts.clone()
        torch.distributed.all_reduce(counts)
        self.counts.zero_()
        share = counts / counts.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        used = (counts > 0).float().mean()
        return {"codebook_perplexity": entropy.exp().item(), "codebook_used": used.item()}


class LookedUpIds(TokenIds):
    """The same ids, looked up where tools/tokenize_images.py has written them: neither tokenizer nor teacher is built, and the
    loader makes no second view. Nothing waits for the GPU.

    Raises:
        ConfigError: ids of other images, or damaged ones.
    """

    teacher_view = None

    def _open(self, config: Config) -> None:
        self.ahead = False
        if shapes_only():
            return
        self.stored = StoredIds(config.tokenizer.ids)
        self.identity = self.stored.identity
        self.stored.check_data(config.data.train, open_index(config.data.train, Path(config.run_dir) / "index").fingerprint)
        # The ranks of each host share the reading, and the rows are then in its page cache: they are looked up at random.
        whole = len(self.stored.sha256)
        found = self.stored.damaged(int(os.environ.get("LOCAL_RANK", "0")), ranks_per_host())
        first = torch.tensor(whole if found is None else found, device=self.counts.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        if first < whole:
            raise ConfigError(
                f"{self.stored.folder / 'ids.bin'} is damaged: part {int(first)} of {whole} hasn't the checksum of ids.json. "
                "Restore it from a copy, or delete the folder and write it anew with tools/tokenize_images.py."
            )

    def ids(self, batch: Batch) -> Tensor:
        """long [B, L].

        Raises:
            DataError: an image that could not be read when the ids were written.
        """
        if shapes_only():
            return torch.empty(len(batch.index), self.num_patches, dtype=torch.long)
        rows = self.stored.rows[batch.index.numpy()]
        if rows.max() >= self.dim:
            i = int(batch.index[(rows >= self.dim).any(axis=1).argmax()])
            raise DataError(
                f"{self.stored.folder} has no ids of image {i} of the index, which can be read now and could not when they were "
                f"written ({self.stored.unreadable.get(str(i))}). Write them anew with tools/tokenize_images.py, or leave "
                "tokenizer.ids empty."
            )
        ids = torch.from_numpy(rows.astype(np.int64))
        return (ids.pin_memory() if self.counts.is_cuda else ids).to(self.counts.device, non_blocking=True)


def token_ids(config: Config, device: torch.device) -> Target:
    """The ids of MaPeT and BEiT, as tokenizer.ids says."""
    return (LookedUpIds if config.tokenizer.ids else TokenIds)(config, device)


class TeacherFeatures(Constant):
    """The frozen CLIP's own patch features [B, L, C], in its precision, of the same crop as the student's view."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.teacher = build_teacher(config.teacher, device, config.train.compile)
        self.teacher.check_grid(config.grid)
        self.dim, self.ahead = self.teacher.embed_dim, config.teacher.ahead
        self.teacher_view = View(config.teacher.img_size, *teacher_mean_std(config.teacher))
        self.identity = {"teacher": self.teacher.identity, "dtype": str(self.teacher.dtype)}

    def __call__(self, batch: Batch) -> Tensor:
        return self.teacher(batch.teacher_images)


class Pixels(Constant):
    """The student's own view, blurred, in patches of mean 0 and variance 1: float32 [B, L, 3 * patch_size ** 2].

    The blur is a 9 x 9 Gaussian with a sigma of one pixel on the normalised image, which is zero beyond its border. Values
    of a patch run over rows, columns, channels.

    Source: SAIM, arXiv 2212.01610, released settings.
    """

    teacher_view = None

    def __init__(self, config: Config, device: torch.device) -> None:
        self.patch = config.model.patch_size
        self.dim = 3 * self.patch**2
        self.identity: dict[str, Any] = {}
        line = torch.exp(-torch.arange(-4.0, 5.0, device=device).square() / 2)
        kernel = torch.outer(line, line)
        self.kernel = (kernel / kernel.sum()).expand(3, 1, 9, 9)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        image = F.conv2d(batch.images, self.kernel, padding=4, groups=3)
        patches = F.pixel_unshuffle(image, self.patch).unflatten(1, (3, -1)).flatten(3)  # [B, 3, rows and columns, L]
        patches = patches.permute(0, 3, 2, 1).flatten(2)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) * (variance + 1e-6).rsqrt()


def pixels_or_features(config: Config, device: torch.device) -> Target:
    """SAIM's target, as saim.target says."""
    return (Pixels if config.saim.target == "pixels" else TeacherFeatures)(config, device)


class MovingAverage:
    """A whole fp32 copy of the student on every rank, of which each update moves it closer: theta <- m theta + (1 - m) student."""

    ahead = False  # the next target is another one after the update

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.model, self.momentum = model.requires_grad_(False), momentum

    def note(self, target: Tensor) -> None:
        pass

    def momentum_at(self, progress: float) -> float:
        """m, when this share of the run is done."""
        return self.momentum

    @torch.no_grad()
    def after_step(self, weights: Iterable[tuple[str, Tensor]], progress: float) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            own[name].lerp_(weight.float(), 1 - self.momentum_at(progress))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.cpu().clone() for name, parameter in self.model.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)

    def metrics(self) -> dict[str, float]:
        return {}


class MomentumTeacher(MovingAverage):
    """A moving average of the student, shown the whole image in a strong view: keys [B, L, 256] of length 1, fp32.

    teacher.precision is that of its forward; m rises along a cosine from conmim.momentum to 1 at the run's end.

    Source: ConMIM, arXiv 2205.09616, released settings.
    """

    dim = 256

    def __init__(self, config: Config, device: torch.device) -> None:
        # of the same seed: the student's first weights
        super().__init__(build_objective(config, self.dim).to(device), config.conmim.momentum)
        if config.train.compile:
            compile_blocks(self.model)
        bf16 = config.teacher.precision == "bf16" or (config.teacher.precision == "auto" and device.type == "cuda")
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.teacher_view = View(config.model.img_size, config.data.mean, config.data.std, strong=True)
        self.identity = {"dtype": str(self.dtype)}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        images = batch.teacher_images
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.model.project(images).float()

    def momentum_at(self, progress: float) -> float:
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
