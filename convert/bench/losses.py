"""The losses of the first steps in both frameworks, from the same weights on the same batch."""

from typing import Any

from convert.bench import train
from convert.bench.cases import Case
from convert.bench.side import Side


def make(case: Case, name: str) -> Side:
    """A side whose trace is its losses; nothing is timed."""
    side: Any = train.make(case, name, case.options["steps"])
    done: list[Any] = []

    def run(n: int) -> None:
        """The first call alone trains."""
        if not done:
            done.append(side.trace()["losses"])

    return Side(run, lambda: done[0], value=0.0)
