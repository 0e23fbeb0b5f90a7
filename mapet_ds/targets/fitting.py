"""Fitting of a codebook: a keyed sample of a data set's patch features, clustered by k-means."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mapet_ds import draws
from mapet_ds.config.sections import Config, TokenizerConfig
from mapet_ds.data.index import Index
from mapet_ds.data.loader import Loader
from mapet_ds.errors import ConfigError
from mapet_ds.launch import Ranks
from mapet_ds.nearest import kmeans
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import Teacher
from mapet_ds.targets.towers import teacher_view

logger = logging.getLogger(__name__)
IN_MEMORY = 2**33
"""Bytes of features that the first rank keeps in memory: 8 GiB. More of them lie in a file."""


def num_points(images: int, config: Config) -> int:
    """The number of features to fit this recipe's codebook on: points_per_centroid a code, at most all.

    Raises:
        ConfigError: fewer features than codes.
    """
    codes, available = config.tokenizer.vocab_size, images * config.num_patches
    if available < codes:
        raise ConfigError(
            f"tokenizer.vocab_size = {codes}, but {images} images have only {available} patches: use more "
            f"images or set tokenizer.vocab_size to at most {available}."
        )
    return min(available, codes * config.tokenizer.points_per_centroid)


def chosen_patches(
    config: Config, images: int, first: int, slots: int
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """The points of the sample that come from `slots` consecutive images, from place `first` of the epoch on.

    Gives the place of the first of these points among all, and for each point its image (0 .. slots - 1) and
    its patch. Every image gives equally many points, up to rounding; its place decides which. Images past the
    end of the epoch give none.
    """
    ends = np.minimum(np.arange(first, first + slots + 1), images) * num_points(images, config) // images
    numbers = draws.uniforms(config.seed, draws.Purpose.CODEBOOK, 0, first, slots, config.num_patches)
    image, place = np.nonzero(np.arange(config.num_patches) < np.diff(ends)[:, None])
    return int(ends[0]), image, np.argsort(numbers, axis=1, kind="stable")[image, place]


def _rows(points: int, dim: int, folder: Path) -> NDArray[np.float32]:
    """Room for features [n, C]: in memory, or where they are large in a file in `folder` that has no name.

    The file is mapped. The kernel keeps as much of it in memory as is free, writes the rest to the disk, and
    gives its room back when this process ends, however it ends.

    Raises:
        ConfigError: the disk has too little room.
    """
    size = points * dim * np.dtype(np.float32).itemsize
    if size <= IN_MEMORY:
        return np.empty((points, dim), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a crash later
        except OSError as error:
            raise ConfigError(
                f"{points} features of {dim} numbers need {size / 2**30:.1f} GiB in {folder}, the folder of "
                f"tokenizer.path, while the codebook is fitted: {error.strerror}. Name another folder, or "
                "set tokenizer.points_per_centroid lower."
            ) from error
        return np.memmap(file, np.float32, "r+", shape=(points, dim))


def sample_features(
    config: Config, index: Index, teacher: Teacher, ranks: Ranks
) -> NDArray[np.float32] | None:
    """Features [n, C] of the sample, on rank 0; None elsewhere. Every rank must call it.

    Beyond IN_MEMORY they lie in a file beside tokenizer.path, which is gone when they are.
    The pass is one step whose global batch is the whole set: places and crops don't depend on the ranks.
    """
    micro, images = config.train.micro_batch_size, len(index)
    micro_steps = -(-images // (micro * ranks.world_size))
    train = dataclasses.replace(config.train, global_batch_size=micro_steps * micro * ranks.world_size)
    loader = Loader(
        dataclasses.replace(config, train=train), index, student=False, teacher=teacher_view(config.teacher),
        rank=ranks.rank, world_size=ranks.world_size, local_rank=ranks.local_rank,
    )  # fmt: skip
    on_first = ranks.rank == 0
    folder, rows = Path(config.tokenizer.path).absolute().parent, list[NDArray[np.float32]]()
    ranks.from_first(lambda: rows.append(_rows(num_points(images, config), teacher.embed_dim, folder)))
    quiet = not (on_first and config.log.progress)
    for _ in tqdm(range(micro_steps), "features", disable=quiet, unit="batch"):
        batch = next(loader)
        assert batch.teacher_images is not None
        dense = teacher(batch.teacher_images.to(ranks.device))
        for bad, reason in loader.new_bad():
            path = index.path(bad)
            logger.warning("Unreadable, and replaced by the next of the order: %s (%s)", path, reason)
        start, image, patch = chosen_patches(config, images, batch.place.first_slot, micro)

        # Rank 0 puts the points of every rank where they belong.
        points = dense[torch.from_numpy(image), torch.from_numpy(patch)].float().cpu().numpy()
        for first, piece in ranks.gather_on_first((start, points)):
            rows[0][first : first + len(piece)] = piece
    loader.close()
    return rows[0] if rows else None


def fit(
    features: NDArray[np.float32], config: TokenizerConfig, seed: int, source: dict[str, str] | None = None
) -> Codebook:
    """The codebook of a Euclidean k-means on [n, C] features, on all GPUs that FAISS sees, else on the CPU.

    Its provenance holds `source`, the settings, the device, and how the points use the centroids. The same
    points in the same order give the same bits on a CPU. One process calls it.

    Raises:
        ConfigError: fewer points than centroids, or features that are not finite.

    Source: MaPeT (arXiv 2306.07346), k-CLIP.
    """
    points, codes = len(features), config.vocab_size
    if points < codes:
        raise ConfigError(
            f"tokenizer.vocab_size = {codes}, but there are only {points} patch features to cluster: use "
            f"more images or set tokenizer.vocab_size to at most {points}."
        )
    finite = np.isfinite(np.einsum("ij->i", features))  # one number a row: no mask of the whole size
    if not finite.all():
        raise ConfigError(
            f"{points - int(finite.sum())} of {points} patch features are not finite: the teacher's weights "
            "are damaged, or its precision is too low (try teacher.precision=fp32)."
        )
    clusters = kmeans(features, codes, config.iterations, config.redo, config.points_per_centroid, seed)
    usage = np.bincount(clusters.ids, minlength=codes) / points
    used = usage[usage > 0]
    provenance = (source or {}) | {
        "tokenizer.vocab_size": codes,
        "tokenizer.iterations": config.iterations,
        "tokenizer.redo": config.redo,
        "tokenizer.points_per_centroid": config.points_per_centroid,
        "seed": seed,
        "points": points,
        "inertia": clusters.inertia,
        "dead_codes": codes - len(used),
        "perplexity": float(np.exp(-(used * np.log(used)).sum())),
        "faiss": clusters.where,
    }
    return Codebook(torch.from_numpy(clusters.centroids), provenance)
