"""The order that is computed where it is read: a permutation, as random as one should be, and the same for ever."""

import itertools
import math

import numpy as np
import pytest
from tolerances import tolerance

from jaxlm.data.order import SCHEME, shuffled

SIZES = [*range(1, 70), *(2**k + d for k in range(7, 13) for d in (-1, 0, 1)), 1000, 40_000]
ORDER_OF_10 = [5, 1, 3, 4, 0, 6, 9, 8, 7, 2, 8, 1, 3, 5, 6, 2, 4, 0, 9, 7]
ORDER_OF_STREAM_1 = [3, 5, 1, 4, 0, 8, 7, 6, 2, 9]
ORDER_OF_TEN_MILLION = [8450280, 7449722, 2476529, 1341531, 4119121]
DEVIATIONS = tolerance("sigmas")  # of a chi-square: sqrt(2 f), f degrees of freedom


def _orders(n, epochs, seed=0, stream=0):
    return shuffled(np.arange(epochs * n), n, seed, stream).reshape(epochs, n)


def _excess(counts):
    """Chi-square of equally likely cells, in standard deviations above what is expected; normal for many cells."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", [0, 5, 2**63 + 1, -3])
def test_every_epoch_visits_everything_once(seed):
    """n = 1, 2, all small ones, powers of two and their neighbours, several epochs."""
    for n in SIZES:
        epochs = 3 if n < 5000 else 1
        assert np.array_equal(
            np.sort(_orders(n, epochs, seed), axis=1), np.tile(np.arange(n), (epochs, 1))
        ), n


@pytest.mark.parametrize("n", [2**31 - 1, 2**32 + 1, 10**10, 2**53 + 1, 2**62])
def test_large_orders_neither_leave_their_range_nor_repeat(n):
    """Sampled: 200,000 places of an epoch far away give as many different values, below n, in all of its parts."""
    rng = np.random.default_rng(0)
    epoch = min(7, (2**63 - 1) // n - 1)
    places = np.unique(
        np.concatenate([rng.integers(0, n, 100_000), np.arange(50_000), n - 1 - np.arange(50_000)])
    )
    found = shuffled(epoch * n + places, n, 1)
    assert found.min() >= 0 and found.max() < n and np.unique(found).size == places.size
    assert abs(_excess(np.bincount((found // (n / 64)).astype(int), minlength=64))) < DEVIATIONS


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7])
def test_all_orders_of_a_few_things_are_equally_likely(n):
    """Over epochs, and over seeds: all n! orders occur, evenly; odd permutations like even ones."""
    by_epoch = _orders(n, (20 if n == 7 else 100) * math.factorial(n), seed=3)
    by_seed = np.stack([shuffled(np.arange(n), n, seed) for seed in range(1200)])
    for orders in (by_epoch, by_seed) if n < 5 else (by_epoch,):
        codes = (orders * n ** np.arange(n)).sum(axis=1)
        counts = np.unique(codes, return_counts=True)[1]
        assert counts.size == math.factorial(n) and _excess(counts) < DEVIATIONS


@pytest.mark.parametrize("n", [100, 1023, 5000, 70_001])
def test_every_value_is_equally_likely_at_every_place(n):
    """Place against value, the step from one value to the next, and one epoch against the next, in 24 x 24 cells."""
    epochs = 2_000_000 // n
    orders = _orders(n, epochs, seed=9)
    cells = (np.arange(n) * 24 // n)[None] * 24 + orders * 24 // n
    steps = (np.diff(orders, axis=1) % n - 1) * 24 // (n - 1)
    neighbours = orders[:-1] * 24 // n * 24 + orders[1:] * 24 // n
    # Cells hold slightly different numbers of places where 24 does not divide n: compared with exactly those.
    wide = np.bincount(np.arange(n) * 24 // n, minlength=24) / n
    even = np.outer(wide, wide).ravel()
    for counts in (np.bincount(cells.ravel(), minlength=576), np.bincount(neighbours.ravel(), minlength=576)):
        expected = counts.sum() * even
        chi = ((counts - expected) ** 2 / expected).sum()
        assert chi < 575 + DEVIATIONS * math.sqrt(2 * 575)
    widths = np.bincount(np.arange(n - 1) * 24 // (n - 1), minlength=24) / (n - 1)
    counts = np.bincount(steps.ravel(), minlength=24)
    expected = counts.sum() * widths
    assert ((counts - expected) ** 2 / expected).sum() < 23 + DEVIATIONS * math.sqrt(2 * 23)


def test_epochs_seeds_and_streams_have_nothing_in_common():
    """Rank correlations of neighbouring keys stay within noise, and equal places are as rare as in random orders."""
    n = 20_000
    keys = [*itertools.product((0, 1, 2), (0, 1), (0, 1, 2))]
    orders = [_orders(n, epoch + 1, seed, stream)[epoch] for seed, stream, epoch in keys]
    for a, b in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < DEVIATIONS / math.sqrt(n)
        assert (a == b).sum() < 12  # one on average, Poisson
    identity = np.arange(n)
    assert all(abs(np.corrcoef(a, identity)[0, 1]) < DEVIATIONS / math.sqrt(n) for a in orders)


def test_a_place_is_found_without_its_neighbours():
    """Any subset of places, in any order, at once or one by one."""
    n = 1000
    whole = shuffled(np.arange(5 * n), n, 4)
    places = np.random.default_rng(0).permutation(5 * n)[:300]
    assert np.array_equal(shuffled(places, n, 4), whole[places])
    assert [int(shuffled(np.array([i]), n, 4)[0]) for i in places[:20]] == whole[places[:20]].tolist()
    assert shuffled(np.empty(0, np.int64), n, 4).shape == (0,)


def test_the_order_never_changes_between_versions():
    """Runs are resumed under newer libraries; these numbers are the contract, and SCHEME is its name."""
    assert SCHEME == "feistel-1"
    assert shuffled(np.arange(20), 10, 5).tolist() == ORDER_OF_10
    assert shuffled(np.arange(10), 10, 5, stream=1).tolist() == ORDER_OF_STREAM_1
    assert shuffled(np.arange(5) + 3 * 10**7, 10**7, 2**64 - 1).tolist() == ORDER_OF_TEN_MILLION


def _mixed(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _written_out(place, n, seed, stream):
    """One place in Python's integers."""
    golden = 0x9E3779B97F4A7C15
    a = math.ceil(math.sqrt(n))
    b = next(b for b in itertools.count(2, 2) if a * b >= n)
    key = seed % 2**64
    for word in (stream, place // n):
        key = _mixed(_mixed((key + golden) % 2**64) ^ word)
    found, k = place % n, key
    while True:
        left, right = found % a, found // a
        for step in range(8 if a * b >= 4096 else 24):
            k = (key + (step + 1) * golden) % 2**64
            if step % 2 == 0:
                left = (left + _mixed(right ^ k)) % a
            else:
                right = (right + _mixed(left ^ k)) % b
        found = right * a + left
        if found < n:
            return found


def test_the_order_is_the_one_written_out():
    """Places here and there against Python's integers: nothing rounds or overflows otherwise than meant."""
    rng = np.random.default_rng(1)
    for n in (1, 2, 10, 4000, 4097, 10**7, 2**40 + 3):
        for seed, stream in ((0, 0), (-1, 3), (2**63 + 5, 1)):
            places = rng.integers(0, 3 * n, 10)
            wanted = [_written_out(int(place), n, seed, stream) for place in places]
            assert shuffled(places, n, seed, stream).tolist() == wanted


def test_places_and_sizes_that_do_not_exist_are_refused():
    """Instead of wrapping around."""
    for n in (0, -1, 2**62 + 1):
        with pytest.raises(ValueError, match="n must be 1 to 2\\^62"):
            shuffled(np.arange(3), n, 0)
    with pytest.raises(ValueError, match="place -1 is negative"):
        shuffled(np.array([-1]), 5, 0)
