"""Times of several ways to do the same, taken in turns so that what disturbs the machine disturbs all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

ROUND_SECONDS = {"cpu": 0.05, "gpu": 0.3}  # least length of a round: runs that are shorter are repeated in it
LEAST_RUNS = {"cpu": 1, "gpu": 10}  # of a round; on a GPU only the last one is waited for
LEAST_ROUNDS = 3  # even where the clock runs out
PAUSE = 0.01  # seconds between sides: threads of the one that ended may still spin for work

Run = Callable[[int], object]  # does the work so many times and waits for the end of the last


class Spread(NamedTuple):
    """Seconds of one run over several rounds."""

    median: float
    least: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int
    runs: int  # of a round


def spread(seconds: Sequence[float], runs: int) -> Spread:
    """What is told of a list of times. Raises ValueError without any, or where one is not a positive number."""
    if not seconds or not all(math.isfinite(s) and s > 0 for s in seconds):
        raise ValueError(f"times must be positive numbers, got {list(seconds)[:5]}")
    low, middle, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
    )
    return Spread(middle, min(seconds), low, high, len(seconds), runs)


def interleave(
    runs: Mapping[str, Run],
    rounds: int,
    platform: str,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Times each side `rounds` times, in turns whose order is reversed every round; the sides are warm already.

    deadline: by `clock`; past it no round is begun, but for the first LEAST_ROUNDS.
    """
    counts = {name: _runs(run, platform, clock) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        if i >= LEAST_ROUNDS and clock() > deadline:
            break
        for name in list(runs)[:: 1 if i % 2 == 0 else -1]:
            time.sleep(PAUSE)
            begun = clock()
            runs[name](counts[name])
            seconds[name].append((clock() - begun) / counts[name])
    return {name: spread(times, counts[name]) for name, times in seconds.items()}


def _runs(run: Run, platform: str, clock: Callable[[], float]) -> int:
    """How many runs make a round, found by trying one."""
    begun = clock()
    run(1)
    once = max(clock() - begun, 1e-7)
    most = math.ceil(
        4 * ROUND_SECONDS[platform] / once
    )  # what takes seconds is not repeated for the sake of it
    return max(1, min(most, max(LEAST_RUNS[platform], math.ceil(ROUND_SECONDS[platform] / once))))
