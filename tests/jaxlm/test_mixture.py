"""Which part of a mixture a row comes from: as even as can be after every row, and known without the rows before."""

from fractions import Fraction

import numpy as np
import pytest

from jaxlm.data.mixture import MAX_PERIOD, Mixture

# Many small parts beside a large one break plain rounding methods: they would all come due at once.
WEIGHTS = [
    (1.0,),
    (0.5, 0.5),
    (0.7, 0.3),
    (0.7, 0.25, 0.05),
    (0.4, 0.4, 0.0667, 0.0667, 0.0666),
    (0.9, *[0.1 / 9] * 9),
    (0.499, 0.002, 0.499),
    (1 / 3, 1 / 3, 1 / 3),
    (0.333, 0.333, 0.334),
    (0.00001, 0.99999),
    (0.125,) * 8,
    (0.61803399, 0.38196601),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_holds_each_part_to_within_one_row(weights):
    """Exact fractions; over more than two periods where they are short, and each part's rows count up from 0."""
    mixture = Mixture(weights)
    rows = min(3 * MAX_PERIOD // 2, 5000 if len(weights) > 5 else 100_000)
    part, place = mixture.locate(np.arange(rows))
    assert sum(mixture.shares) == 1
    for i, (share, weight) in enumerate(zip(mixture.shares, weights, strict=True)):
        assert abs(share - Fraction(str(weight))) <= Fraction(1, MAX_PERIOD)
        given = np.cumsum(part == i)
        after = np.arange(1, rows + 1) * share.numerator
        assert np.all(given >= after // share.denominator)  # floor(w i) <= rows given <= ceil(w i)
        assert np.all(given <= -(-after // share.denominator))
        assert np.array_equal(place[part == i], np.arange(given[-1]))


@pytest.mark.parametrize("weights", WEIGHTS[:-1], ids=str)
def test_decimal_weights_are_kept_exactly(weights):
    """Within one row of weight * i also after a thousand million rows, from the counts alone."""
    mixture = Mixture(weights)
    for rows in (0, 1, 12_345, 10**9 + 7):
        counts = mixture.counts(rows)
        assert counts.sum() == rows
        total = sum(Fraction(str(w)) for w in weights)
        for count, weight in zip(counts.tolist(), weights, strict=True):
            assert abs(count - Fraction(str(weight)) / total * rows) <= 1


def test_a_row_is_found_without_the_rows_before():
    """The same part and place for any subset, also at rows that no loop reaches; counts agree."""
    mixture = Mixture((0.7, 0.25, 0.05))
    for start in (0, 10**15 + 3):
        part, place = mixture.locate(start + np.arange(200))
        some = np.array([150, 3, 77, 3])
        assert [x.tolist() for x in mixture.locate(start + some)] == [
            part[some].tolist(),
            place[some].tolist(),
        ]
        for i in range(3):
            own = place[part == i]
            assert own[0] == mixture.counts(start)[i] and np.all(np.diff(own) == 1)


def test_weights_of_many_digits_are_rounded_evenly():
    """To multiples of 1/100,000 that sum to one; no part is lost, however small."""
    mixture = Mixture((0.1234567, 0.8765432, 0.0000001))
    assert [share * MAX_PERIOD for share in mixture.shares] == [12345, 87654, 1]
    thirds = Mixture((0.3333330, 0.3333333, 0.3333337))
    assert [share * MAX_PERIOD for share in thirds.shares] == [33333, 33333, 33334]
    assert Mixture((2.0, 1.0)).shares == (Fraction(2, 3), Fraction(1, 3))


def test_the_schedule_never_changes_between_versions():
    """Runs are resumed under newer libraries."""
    assert Mixture((0.5, 0.3, 0.2)).locate(np.arange(12))[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]


@pytest.mark.parametrize("weights", [(), (0.5, 0.0), (-1.0, 2.0), (float("nan"), 1.0), (float("inf"),)])
def test_weights_that_are_none_are_refused(weights):
    """Zero, negative, not finite, none at all."""
    with pytest.raises(ValueError, match="must be positive numbers"):
        Mixture(weights)
