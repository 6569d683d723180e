"""A side of a case: something that runs, and what it computed. Making one is set-up; its first run compiles."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from convert.bench.machine import PeakMemory
from convert.bench.results import OURS, Facts, Measured, Trace, mismatch
from convert.bench.timing import Run, interleave
from jaxlm.compile_meter import CompileMeter


class Side(NamedTuple):
    """What a maker hands over."""

    run: Run
    trace: Callable[[], Trace]  # numbers that say what was computed; called after the first run
    value: float | None = None  # of a case that is not timed
    notes: dict[str, Any] = {}  # noqa: RUF012 (never changed)


Make = Callable[[str], Side]  # of a side's name: jaxlm, torchref:HOW


def measure(
    facts: Facts,
    make: Make,
    names: list[str],
    rounds: int,
    deadline: float,
    say: Callable[[str], None],
) -> tuple[dict[str, Measured], str]:
    """The sides `names` of a case, and what was wrong with it.

    First each is made, run once and asked for its trace. Where traces differ nothing is timed: a comparison of
    different work must fail. A side of PyTorch that raises is left out and named in the notes; if ours does, the case
    has failed.

    deadline: by time.perf_counter; past it no round is begun but for the first few.
    """
    sides: dict[str, Side] = {}
    known: dict[str, Measured] = {}
    failures: dict[str, str] = {}
    compiled = CompileMeter()
    for name in names:
        say(f"{facts.name}: {name}")
        try:
            sides[name], known[name] = _prepared(make, name, compiled)
        except Exception as error:  # one library's failure must not cost the other cases
            failures[name] = f"{type(error).__name__}: {first_line(error)}"
    if OURS in failures or not sides:
        return known, "; ".join(f"{name}: {told}" for name, told in failures.items())
    if problem := mismatch(facts, known):
        return known, problem
    timed = {name: side.run for name, side in sides.items() if side.value is None}
    platform = "gpu" if jax.devices()[0].platform == "gpu" else "cpu"
    say(f"{facts.name}: timing {len(timed)} sides")
    times = interleave(timed, rounds, platform, deadline) if timed else {}
    notes = {"failed": failures} if failures else {}
    return {
        name: dataclasses.replace(side, times=times.get(name), notes=side.notes | notes)
        for name, side in known.items()
    }, ""


def _prepared(make: Make, name: str, compiled: CompileMeter) -> tuple[Side, Measured]:
    meter = PeakMemory("jax" if name == OURS else "torch")
    side, kept = make(name), compiled.kept
    begun = time.perf_counter()
    side.run(1)
    seconds = time.perf_counter() - begun
    trace = side.trace()
    meter.restart()
    side.run(1)
    cached = compiled.kept > kept if name == OURS else None
    return side, Measured(trace, None, side.value, seconds, cached, meter.bytes(), side.notes)


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "")[:300]
