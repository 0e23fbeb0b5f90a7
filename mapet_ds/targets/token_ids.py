"""Token ids as targets: computed on the fly by a tokenizer, or looked up where they were stored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch, to_device
from mapet_ds.data.index import open_index
from mapet_ds.data.stored_ids import StoredIds
from mapet_ds.errors import ConfigError, DataError, ShapeError
from mapet_ds.launch import ranks_per_host
from mapet_ds.targets.target import Target
from mapet_ds.targets.tokenizer import build_tokenizer
from mapet_ds.weights import shapes_only


class TokenIds(Target):
    """The tokenizer's ids, long [B, L], of the teacher's view: the same crop as the student's.

    Raises:
        ConfigError: no such tokenizer, or one that does not fit the run.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.dim, self.num_patches = config.tokenizer.vocab_size, config.num_patches
        self.ahead = config.teacher.ahead
        self.counts = torch.zeros(self.dim, device=device)
        self._open(config)

    def _open(self, config: Config) -> None:
        self.tokenizer = build_tokenizer(config, self.counts.device)
        self.teacher_view, self.identity = self.tokenizer.view, self.tokenizer.identity

    def ids(self, batch: Batch) -> Tensor:
        """The ids of a batch, long [B, L]."""
        if batch.teacher_images is None:
            raise ShapeError("The batch has no teacher_images, of which the tokenizer makes ids.")
        return self.tokenizer(batch.teacher_images)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        ids = self.ids(batch)
        if (given := ids.shape[1]) != self.num_patches:
            raise ConfigError(f"The tokenizer gives {given} ids for an image of {self.num_patches} patches.")
        return ids

    def note(self, target: Tensor) -> None:
        flat = target.flatten()
        self.counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=self.counts.dtype))

    def metrics(self) -> dict[str, float]:
        """Perplexity of the ids that all ranks noted since the last call, and the share of codes in use."""
        counts = self.counts.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.counts.zero_()
        share = counts / counts.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        used = (counts > 0).float().mean()
        return {"codebook_perplexity": entropy.exp().item(), "codebook_used": used.item()}


class LookedUpIds(TokenIds):
    """The same ids, looked up where tools/tokenize_images.py stored them.

    Neither tokenizer nor teacher is built, and the loader makes no second view. Nothing waits for the GPU.

    Raises:
        ConfigError: ids of other images, or damaged ones.
    """

    teacher_view = None

    def _open(self, config: Config) -> None:
        self.ahead = False
        if shapes_only():
            return
        self.stored = stored = StoredIds(config.tokenizer.ids)
        self.identity = stored.identity
        index = open_index(config.data.train, Path(config.run_dir) / "index", compare=False)
        stored.check_data(config.data.train, index.fingerprint)

        # The ranks of a host share the reading. It brings the rows, looked up at random, into the page cache.
        parts = len(stored.sha256)
        damaged = stored.damaged(int(os.environ.get("LOCAL_RANK", "0")), ranks_per_host())
        first = torch.tensor(parts if damaged is None else damaged, device=self.counts.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        if first < parts:
            raise ConfigError(
                f"{stored.folder / 'ids.bin'} is damaged: part {int(first)} of {parts} hasn't the checksum "
                "of ids.json. Restore it from a copy, or delete the folder and write it anew with "
                "tools/tokenize_images.py."
            )

    def ids(self, batch: Batch) -> Tensor:
        """The ids of a batch, long [B, L].

        Raises:
            DataError: an image that could not be read when the ids were stored.
        """
        if shapes_only():
            return torch.empty(len(batch.index), self.num_patches, dtype=torch.long)
        rows = self.stored.rows[batch.index.numpy()]
        if rows.max() >= self.dim:
            i = int(batch.index[(rows >= self.dim).any(axis=1).argmax()])
            raise DataError(
                f"{self.stored.folder} has no ids of image {i} of the index, which can be read now and could "
                f"not when they were written ({self.stored.unreadable.get(str(i))}). Write them anew with "
                "tools/tokenize_images.py, or leave tokenizer.ids empty."
            )
        return to_device(torch.from_numpy(rows.astype(np.int64)), self.counts.device)


def token_ids(config: Config, device: torch.device) -> Target:
    """The ids that MaPeT and BEiT predict, looked up where tokenizer.ids names a folder."""
    return (LookedUpIds if config.tokenizer.ids else TokenIds)(config, device)
