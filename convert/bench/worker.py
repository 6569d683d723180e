"""A process that measures some cases: python -m convert.bench.worker, with its order on standard input.

Each result is a line of JSON in the file that the order names, written as soon as it is there, so that a worker that is
stopped has not worked in vain. Progress goes to standard output, a line each.
"""

import ctypes
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.host_memory import keep_memory


class Order(NamedTuple):
    """What a worker is to do."""

    suite: str
    shrink: bool
    cases: list[str]
    sides: list[str] | None  # None = all of a case's
    rounds: int
    end: float  # by time.time: cases that cannot be done by then are not begun
    lines: str  # file of the results
    machine: bool  # also describe the machine


def main() -> int:
    """Reads an order, does it."""
    end_with_parent()
    order = Order(**json.loads(sys.stdin.read()))
    keep_memory()  # as training does; it serves both frameworks
    import torch

    torch.set_num_threads(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with open(order.lines, "a", encoding="utf-8") as file:
        for line in work(order):
            file.write(json.dumps(line) + "\n")
            file.flush()
    return 0


def work(order: Order) -> Any:
    """Lines: {"machine": …} once if asked for, then {"case", "sides", "problem", "skipped"} for each case."""
    from convert.bench.cases import suite
    from convert.bench.machine import describe
    from convert.bench.side import measure

    known = {case.name: case for case in suite(order.suite, order.shrink)}
    if order.machine:
        say("peaks of the machine")
        yield {"machine": describe(order.shrink)}
    for name in order.cases:
        case = known[name]
        names = [side for side in case.sides if order.sides is None or side in order.sides]
        left = order.end - time.time()
        if left < case.seconds:
            yield {
                "case": name,
                "skipped": f"no time left: {max(left, 0):.0f} s, it takes about {case.seconds:.0f}",
            }
            continue
        make = importlib.import_module(f"convert.bench.{case.kind}").make
        deadline = time.perf_counter() + min(left, 2 * case.seconds)
        begun = time.perf_counter()
        sides, problem = measure(
            case.facts,
            lambda side, case=case, make=make: make(case, side),
            names,
            order.rounds,
            deadline,
            say,
        )
        told = {side: dataclasses.asdict(value) for side, value in sides.items()}
        yield {"case": name, "sides": told, "problem": problem, "seconds": time.perf_counter() - begun}
        free()


def end_with_parent() -> None:
    """Nobody reads on when the benchmark itself was killed; Linux alone can be told so."""
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return


def free() -> None:
    """What a case leaves behind on a GPU would be missing to the next."""
    import gc

    import torch

    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The results in a worker's file; a last line that was cut short is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


if __name__ == "__main__":
    sys.exit(main())
