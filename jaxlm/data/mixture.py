"""Which part of a mixture row i comes from: fixed beforehand, even, and known for any i at once.

The rows of a period of P are handed out as by a fair scheduler: row by row to the part whose next turn has the earliest
deadline, of those whose turn has come. Turn c (from 0) of a part with weight w comes at row floor(c / w) and is due
before row ceil((c + 1) / w); these are the windows of Pfair scheduling (Baruah, Cohen, Plaxton & Varvel 1996), and on
one machine earliest deadline first meets every deadline that can be met. So after any number of rows i each part
has had floor(w i) or ceil(w i) of them. The period is the weights' common denominator, so that it ends even and
the next one begins like the first.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

SCHEME = "pfair-1"  # in saved positions: what a row is must not change under this name
MAX_PERIOD = 100_000  # rows; the table of a period is made when a loader starts


class Mixture:
    """The schedule of a mixture.

    Args:
        weights: of the parts, positive; only their ratios count. They are taken as the decimal numbers that they
            print as, or as simple fractions where these print alike; with more than five decimals they are rounded to
            multiples of 1/MAX_PERIOD, and to no less than one.

    Attributes:
        shares: the weights that the schedule realises exactly; they sum to 1.

    Raises:
        ValueError: there are no weights, or one is not positive and finite.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"mixture weights {tuple(weights)} must be positive numbers")
        self._per_period = np.array(_turns(weights), np.int64)
        period = int(self._per_period.sum())
        self.shares = tuple(Fraction(int(turns), period) for turns in self._per_period)
        self._part = _schedule(self._per_period.tolist())
        self._turn = np.empty(period, np.int64)  # how many rows of the period the part had before
        for part, turns in enumerate(self._per_period):
            self._turn[self._part == part] = np.arange(turns)

    def __len__(self) -> int:
        """Parts."""
        return len(self.shares)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(part, how many rows that part has given before) of each row, both int64 [len(rows)]."""
        periods, at = np.divmod(np.asarray(rows, np.int64), len(self._part))
        part = self._part[at]
        return part, periods * self._per_period[part] + self._turn[at]

    def counts(self, rows: int) -> np.ndarray:
        """Rows of each part among the first `rows`, int64 [parts]."""
        periods, rest = divmod(rows, len(self._part))
        return periods * self._per_period + np.bincount(self._part[:rest], minlength=len(self))


def _turns(weights: Sequence[float]) -> list[int]:
    """Rows of each part in one period: the weights over their common denominator, in lowest terms."""
    exact = [Fraction(str(float(weight))) for weight in weights]
    total = sum(exact)
    shares = [share / total for share in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    simple = [
        Fraction(share).limit_denominator(1000) for share in shares
    ]  # thirds, printed in full, are thirds
    period = math.lcm(*(share.denominator for share in simple))
    if period <= MAX_PERIOD and sum(simple) == 1 and _close(simple, shares):
        return [int(share * period) for share in simple]
    turns = [max(1, math.floor(share * MAX_PERIOD)) for share in shares]
    by_remainder = sorted(range(len(turns)), key=lambda part: turns[part] - shares[part] * MAX_PERIOD)
    for part in by_remainder[: max(0, MAX_PERIOD - sum(turns))]:
        turns[part] += 1
    divisor = math.gcd(*turns)
    return [turn // divisor for turn in turns]


def _close(simple: Sequence[Fraction], shares: Sequence[Fraction]) -> bool:
    return all(abs(a - b) < Fraction(1, 10**12) for a, b in zip(simple, shares, strict=True))


def _schedule(turns: list[int]) -> np.ndarray:
    """The part of each row of a period, int64 [sum(turns)]; ties go to the first part."""
    period, parts = sum(turns), range(len(turns))
    done = [0] * len(turns)
    deadline = [-(-period // turn) for turn in turns]
    order = np.empty(period, np.int64)
    for row in range(period):
        part = min((deadline[p], p) for p in parts if done[p] * period <= row * turns[p])[1]
        order[row] = part
        done[part] += 1
        # A part that has had all its turns waits for the next period: its release lies past this one's end.
        deadline[part] = -(-(done[part] + 1) * period // turns[part])
    return order
