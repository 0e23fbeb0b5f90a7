"""Token ids as targets: computed on the fly by a tokenizer, or looked up where they were stored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch
from mapet_ds.data.index import open_index
from mapet_ds.data.stored_ids import StoredIds
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.launch import ranks_per_host
from mapet_ds.targets.target import Constant, Target
from mapet_ds.targets.tokenizer import build_tokenizer


class TokenIds(Constant):
    """The tokenizer's ids, long [B, L], of the teacher's view: the same crop as the student's.

    Raises:
        ConfigError: no such tokenizer, or one that does not fit the run.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.dim, self.num_patches, self.ahead = (
            config.tokenizer.vocab_size,
            config.num_patches,
            config.teacher.ahead,
        )
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
            raise ConfigError(
                f"The tokenizer gives {ids.shape[1]} ids for an image of {self.num_patches} patches."
            )
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
        self.stored = StoredIds(config.tokenizer.ids)
        self.identity = self.stored.identity
        self.stored.check_data(
            config.data.train, open_index(config.data.train, Path(config.run_dir) / "index").fingerprint
        )
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
