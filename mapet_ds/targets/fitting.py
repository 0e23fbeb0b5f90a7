"""How a codebook is fitted: a keyed sample of a data set's patch features, clustered by k-means."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from mapet_ds import draws
from mapet_ds.config.sections import Config, TokenizerConfig
from mapet_ds.data.batch import View
from mapet_ds.data.index import Index
from mapet_ds.data.loader import Loader
from mapet_ds.errors import ConfigError
from mapet_ds.launch import Ranks
from mapet_ds.nearest import kmeans
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import Teacher, teacher_mean_std

logger = logging.getLogger(__name__)


def num_points(images: int, config: Config) -> int:
    """Features the codebook of this recipe is fitted on: points_per_centroid for each code, or all that there are.

    Raises:
        ConfigError: fewer than codes.
    """
    available, wanted = (
        images * config.num_patches,
        config.tokenizer.vocab_size * config.tokenizer.points_per_centroid,
    )
    if available < config.tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size = {config.tokenizer.vocab_size}, but {images} images have only {available} patches: use "
            f"more images or set tokenizer.vocab_size to at most {available}."
        )
    return min(available, wanted)


def chosen_patches(
    config: Config, images: int, first: int, slots: int
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """Which patches of `slots` consecutive images, from place `first` of the epoch on, the codebook is fitted on.

    Every image gives equally many, up to rounding; which ones is drawn by its place. Images past the end of the epoch give
    none. Returns the place of the first of these points among all, and for each point the image (0 .. slots - 1) and patch.
    """
    ends = np.minimum(np.arange(first, first + slots + 1), images) * num_points(images, config) // images
    numbers = draws.uniforms(config.seed, draws.Purpose.CODEBOOK, 0, first, slots, config.num_patches)
    image, place = np.nonzero(np.arange(config.num_patches) < np.diff(ends)[:, None])
    return int(ends[0]), image, np.argsort(numbers, axis=1, kind="stable")[image, place]


def sample_features(
    config: Config, index: Index, teacher: Teacher, ranks: Ranks
) -> NDArray[np.float32] | None:
    """[n, C] features of the keyed sample of patches of the whole set, on rank 0; None elsewhere. Every rank must call it.

    The pass is one step whose global batch is the whole set: places, crops and patches don't depend on the ranks.
    """
    micro, images = config.train.micro_batch_size, len(index)
    micro_steps = -(-images // (micro * ranks.world_size))
    train = dataclasses.replace(config.train, global_batch_size=micro_steps * micro * ranks.world_size)
    loader = Loader(
        dataclasses.replace(config, train=train), index, student=False, rank=ranks.rank, world_size=ranks.world_size,
        local_rank=ranks.local_rank, teacher=View(config.teacher.img_size, *teacher_mean_std(config.teacher)),
    )  # fmt: skip
    on_first = ranks.rank == 0
    features = np.empty((num_points(images, config), teacher.embed_dim), np.float32) if on_first else None
    for _ in tqdm(
        range(micro_steps), "features", disable=not (on_first and config.log.progress), unit="batch"
    ):
        batch = next(loader)
        dense = teacher(batch.teacher_images.to(ranks.device))
        for bad, reason in loader.new_bad():
            logger.warning(
                "Unreadable, and replaced by the next of the order: %s (%s)", index.path(bad), reason
            )
        start, image, patch = chosen_patches(config, images, batch.place.first_slot, micro)
        points = dense[torch.from_numpy(image), torch.from_numpy(patch)].float().cpu().numpy()
        pieces = [None] * ranks.world_size if on_first else None
        dist.gather_object((start, points), pieces, group=ranks.control)
        for first, piece in pieces or ():
            features[first : first + len(piece)] = piece
    loader.close()
    return features


def fit(
    features: NDArray[np.float32], config: TokenizerConfig, seed: int, source: dict[str, str] | None = None
) -> Codebook:
    """Euclidean k-means by FAISS on [n, C] features: on all GPUs it sees, else on the CPU. One process calls it.

    The provenance gets `source`, the settings, where it ran, and how the points use the centroids. Same points in the same
    order on a CPU -> same bits.

    Raises:
        ConfigError: fewer points than centroids, or features that are not finite.

    Source: MaPeT (arXiv 2306.07346), k-CLIP.
    """
    points = len(features)
    if points < config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size = {config.vocab_size}, but there are only {points} patch features to cluster: use more "
            f"images or set tokenizer.vocab_size to at most {points}."
        )
    finite = np.isfinite(np.einsum("ij->i", features))  # one number a row: no mask of the whole size
    if not finite.all():
        raise ConfigError(
            f"{points - int(finite.sum())} of {points} patch features are not finite: the teacher's weights are damaged, or "
            "its precision is too low (try teacher.precision=fp32)."
        )
    clusters = kmeans(
        features, config.vocab_size, config.iterations, config.redo, config.points_per_centroid, seed
    )  # fmt: skip
    usage = np.bincount(clusters.ids, minlength=config.vocab_size) / points
    used = usage[usage > 0]
    provenance = (source or {}) | {
        "tokenizer.vocab_size": config.vocab_size,
        "tokenizer.iterations": config.iterations,
        "tokenizer.redo": config.redo,
        "tokenizer.points_per_centroid": config.points_per_centroid,
        "seed": seed,
        "points": points,
        "inertia": clusters.inertia,
        "dead_codes": config.vocab_size - len(used),
        "perplexity": float(np.exp(-(used * np.log(used)).sum())),
        "faiss": clusters.where,
    }
    return Codebook(torch.from_numpy(clusters.centroids), provenance)
