"""Nearest neighbours and k-means, the only import of FAISS.

Both are exact. They run on all GPUs that FAISS sees, else on the CPU. FAISS is imported where it is used, so
that training from a codebook that exists does without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Clusters(NamedTuple):
    """The result of k-means."""

    centroids: NDArray[np.float32]
    """[K, C]."""
    ids: NDArray[np.int64]
    """[n], the cluster of each point."""
    inertia: float
    """Sum of the squared distances of all points from their centroids."""
    where: str
    """FAISS's version and the device it ran on."""


def kmeans(
    points: NDArray[np.float32],
    clusters: int,
    iterations: int,
    redo: int,
    points_per_centroid: int,
    seed: int,
) -> Clusters:
    """Clusters [n, C] points by Euclidean k-means. On a CPU equal points in equal order give equal bits."""
    import faiss

    gpus = faiss.get_num_gpus()
    solver: Any = faiss.Kmeans(
        points.shape[1], clusters, niter=iterations, nredo=redo, seed=seed, gpu=gpus,
        max_points_per_centroid=points_per_centroid, min_points_per_centroid=1,
    )  # fmt: skip
    solver.train(points)
    distances, ids = solver.assign(points)
    where = f"{faiss.__version__} on {f'{gpus} GPU' if gpus else 'CPU'}"
    return Clusters(solver.centroids.copy(), ids, float(distances.sum(dtype=np.float64)), where)


def most_similar(
    rows: NDArray[np.float32], queries: NDArray[np.float32], k: int, on_gpus: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Finds the k rows with the largest inner product for each query, [m, C].

    Returns [m, k] products, largest first, and [m, k] numbers of the rows.
    """
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    if on_gpus and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(rows)
    return index.search(queries, k)
