"""Signs of collapse: features that lie in few directions, or all in one. They need no labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mapet_ds.results.features import Features


def effective_rank(features: Features) -> float:
    """The number of directions that features [n, D] take up: 1 of parallel ones, min(n, D) at most.

    It is the exponential of the entropy of the singular values divided by their sum, in float64.

    Source: RankMe, Garrido et al., arXiv 2210.02885. Departure: where all singular values are 0 it is 0, and
    no small number is added to them.
    """
    values = torch.linalg.svdvals(torch.from_numpy(features).double())
    share = values[values > 0] / values.sum()
    return torch.special.entr(share).sum().exp().item() if len(share) else 0.0


def mean_cosine(features: Features) -> float:
    """The mean cosine of two different rows of features [n, D]: 1 where all are parallel; NaN of one row."""
    directions = F.normalize(torch.from_numpy(features).double(), dim=1)
    n = len(directions)
    pairs = directions.sum(0).square().sum() - directions.square().sum()
    return (pairs / (n * (n - 1))).item() if n > 1 else float("nan")


def collapse_figures(features: Features) -> dict[str, float]:
    """Both, as metrics name them."""
    return {"effective_rank": effective_rank(features), "feature_cosine": mean_cosine(features)}
