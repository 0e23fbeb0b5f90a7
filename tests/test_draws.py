"""Randomness: bijections, uniformity, and rows that don't depend on how a batch is split."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapet_ds import draws
from mapet_ds.draws import CHUNK, Purpose, SampleOrder


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4096, 4097, 65_537])
def test_each_sample_comes_once_an_epoch(n):
    order = SampleOrder(n, seed=3)
    for epoch in (0, 1, 1000):
        assert np.array_equal(np.sort(order.epoch_places(epoch, np.arange(n))), np.arange(n))


def test_the_call_is_the_epochs_order():
    order = SampleOrder(37, seed=1)
    epochs = [order.epoch_places(epoch, np.arange(37)).tolist() for epoch in range(3)]
    assert [order(n) for n in range(111)] == list(itertools.chain(*epochs))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != SampleOrder(37, seed=2).epoch_places(0, np.arange(37)).tolist()


def test_orders_of_a_small_set_are_equally_likely():
    counts = Counter(
        tuple(order.epoch_places(epoch, np.arange(4)).tolist())
        for order in (SampleOrder(4, seed) for seed in range(5))
        for epoch in range(960)
    )
    assert len(counts) == 24
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 60, "23 degrees of freedom: 60 has a probability of 4e-5"


def test_neighbours_in_an_order_are_unrelated():
    places = SampleOrder(50_000, seed=0).epoch_places(0, np.arange(50_000))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(places, np.arange(50_000))[0, 1]) < 0.02
    assert np.count_nonzero(np.diff(places) == 1) < 10


def test_substitutes_go_round_the_same_epoch():
    order = SampleOrder(11, seed=5)
    for n in (0, 21, 23):
        epoch = n // 11
        assert {order(n), *(order.after(n, tries) for tries in range(1, 11))} == set(range(11))
        assert order.after(n, 1) == (order(n + 1) if (n + 1) // 11 == epoch else order(11 * epoch))


def test_the_order_reaches_far():
    order = SampleOrder(20_000_000_000, seed=2**62)
    n = 10**15
    assert 0 <= order(n) < 20_000_000_000
    assert order(n) == SampleOrder(20_000_000_000, seed=2**62)(n)


def test_the_order_without_a_window_is_what_it_always_was():
    order = SampleOrder(20_000_000, seed=7, window=0)
    assert order.epoch_places(3, np.array([0, 1, 12_345, 19_999_999])).tolist() == [
        17342306,
        4575712,
        10817436,
        2875385,
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5000), st.integers(1, 6000), st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.randoms()
)
def test_a_windowed_epoch_is_a_permutation_of_few_stretches_a_window(n, window, seed, epoch, random):
    order, window = SampleOrder(n, seed, window), -(-window // CHUNK) * CHUNK
    places = np.arange(n)
    indices = order.epoch_places(epoch, places)
    assert np.array_equal(np.sort(indices), places)
    some = np.array(random.choices(range(n), k=9))
    assert np.array_equal(SampleOrder(n, seed, window).epoch_places(epoch, some), indices[some]), (
        "no place needs another"
    )
    for start in range(0, n, window):
        stretches = 1 + np.count_nonzero(np.diff(np.sort(indices[start : start + window])) > 1)
        assert stretches <= window // CHUNK + 1


def test_windows_reach_far_and_go_round_epochs():
    order = SampleOrder(20_000_000_000, seed=2**62, window=65_536)
    n = 10**15
    assert [order(k) for k in range(n, n + 3)] == [
        SampleOrder(20_000_000_000, 2**62, 65_536)(k) for k in range(n, n + 3)
    ]
    order = SampleOrder(1000, seed=3, window=256)
    for epoch in (0, 1, 7):
        substitutes = [order.after(1000 * epoch + 999, tries) for tries in range(1, 1000)]
        assert sorted([order(1000 * epoch + 999), *substitutes]) == list(range(1000))


@pytest.mark.parametrize(("n", "place"), [(300, 0), (300, 299), (20, 3)])
def test_every_sample_is_as_likely_at_any_place_of_a_windowed_order(n, place):
    order = SampleOrder(n, seed=1, window=256)
    counts = np.bincount([order(n * epoch + place) for epoch in range(5 * n)], minlength=n)
    assert ((counts - 5) ** 2 / 5).sum() < n + 5 * (2 * n) ** 0.5, "five standard deviations"


def test_within_a_window_neighbours_are_unrelated_and_epochs_differ():
    order = SampleOrder(50_000, seed=0, window=10_000)
    epochs = [order.epoch_places(epoch, np.arange(50_000)).reshape(5, -1)[:4] for epoch in range(2)]
    assert (epochs[0] == epochs[1]).mean() < 0.001
    for window in epochs[0]:  # places among its own samples, so that only the order inside of it counts
        ranks = np.argsort(np.argsort(window))
        assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) < 0.05
        assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.05
    chunks = [{tuple(sorted(set((window // CHUNK).tolist()))) for window in epoch} for epoch in epochs]
    assert not chunks[0] & chunks[1], "other chunks share a window in the next epoch"
    shares = [SampleOrder(50_000, seed, 10_000).epoch_places(0, np.arange(9)).tolist() for seed in (0, 1)]
    assert shares[0] != shares[1]


def test_keys_of_a_windowed_order_are_all_different():
    """Windows that shared a key would be shuffled alike."""
    order = SampleOrder(4096, seed=0, window=256)
    windows = [
        np.argsort(np.argsort(order.epoch_places(e, np.arange(4096)).reshape(16, 256), axis=1))
        for e in range(3)
    ]
    assert len({tuple(row) for epoch in windows for row in epoch.tolist()}) == 48


@pytest.mark.parametrize("width", [1, 3, 4, 5, 41, 196])
def test_a_row_depends_on_its_slot_alone(width):
    whole = draws.uniforms(9, Purpose.CROP, 7, 0, 12, width)
    assert whole.shape == (12, width)
    for first, slots in ((0, 1), (5, 3), (11, 1)):
        assert np.array_equal(
            draws.uniforms(9, Purpose.CROP, 7, first, slots, width), whole[first : first + slots]
        )


def test_streams_differ_by_seed_purpose_step_and_slot():
    rows = [
        draws.uniforms(seed, purpose, step, 0, 4, 8)
        for seed, purpose, step in itertools.product((0, 1), (Purpose.CROP, Purpose.JITTER), (0, 1))
    ]
    assert len(np.unique(np.concatenate(rows))) == 8 * 4 * 8


def test_numbers_are_uniform():
    numbers = draws.uniforms(0, Purpose.CROP, 0, 0, 5000, 8)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 50, "19 degrees of freedom: 50 has a probability of 1e-4"
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.06


def test_permutations_are_uniform_and_split_freely():
    order = draws.permutations(4, 2, 0, 6000, 6)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(6), (6000, 1)))
    table = np.stack([np.bincount(order[:, patch], minlength=6) for patch in range(6)])
    assert np.abs(table - 1000).max() < 150, "five standard deviations"
    assert np.array_equal(draws.permutations(4, 2, 100, 7, 6), order[100:107])


def test_permutations_give_ranks():
    numbers = draws.uniforms(4, Purpose.PERMUTATION, 2, 0, 3, 9)
    for row, order in zip(numbers, draws.permutations(4, 2, 0, 3, 9), strict=True):
        assert [sum(other < number for other in row) for number in row] == order.tolist()


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 2), (4, 3), (3, 8)])
def test_slots_share_out_the_global_batch(world_size, micro_batch_size):
    accumulation = 24 // (world_size * micro_batch_size)
    firsts = [
        draws.first_slot(micro, rank, world_size, micro_batch_size)
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    assert firsts == list(range(0, 24, micro_batch_size))
