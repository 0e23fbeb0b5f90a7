"""Signs of collapse: what they are of features whose directions are known, and against plain loops."""

import itertools
import math

import numpy as np
import pytest

from mapet_ds.results.collapse import effective_rank, mean_cosine


def features(values):
    return np.asarray(values, dtype=np.float32)


def test_the_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(40, 8)))[0]
    assert effective_rank(features(axes)) == pytest.approx(8, rel=1e-5)
    assert effective_rank(features(axes[:, :1] @ np.ones((1, 8)))) == pytest.approx(1, abs=1e-4)
    spectrum = np.array([4.0, 2.0, 1.0, 1.0])
    share = spectrum / 8
    expected = math.exp(-(share * np.log(share)).sum())
    turned = axes[:, :4] * spectrum @ np.linalg.qr(rng.normal(size=(6, 4)))[0].T
    assert effective_rank(features(turned)) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(features(1000 * turned)) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(features(np.zeros((3, 4)))) == 0


def test_the_mean_cosine_is_that_of_all_pairs():
    rows = np.random.default_rng(0).normal(0.5, 1, size=(7, 5))
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [float(a @ b) for a, b in itertools.combinations(directions, 2)]
    assert mean_cosine(features(rows)) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert mean_cosine(features(np.ones((3, 2)))) == pytest.approx(1)
    assert math.isnan(mean_cosine(features(rows[:1])))
