"""The benchmark's clock and processes: cases into workers, workers within the budget, lines into rows. No framework.

A process per group of cases keeps memory apart, and its crash costs no other group; what does not fit into memory
beside the other framework gets a process of its own.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert.bench.cases import SUITES, Case
from convert.bench.results import OURS, Measured, make_row
from convert.bench.worker import Order, lines_of
from jaxlm import compilation

START = 25.0  # seconds that a worker may take for its imports
GRACE = 10.0  # seconds past its end that a worker may finish what it began
PATIENCE = 4.0  # times a case's seconds that its worker may take; who takes longer hangs


class Job(NamedTuple):
    """What one process does."""

    cases: list[Case]
    sides: list[str] | None  # None = all


def jobs(cases: Sequence[Case], apart: bool) -> Iterator[Job]:
    """Neighbours of one group together; `apart`: cases that need the memory for themselves once per framework."""
    groups: list[list[Case]] = []
    for case in cases:
        if groups and (groups[-1][-1].group, groups[-1][-1].alone) == (case.group, case.alone):
            groups[-1].append(case)
        else:
            groups.append([case])
    for group in groups:
        if not (apart and group[0].alone):
            yield Job(group, None)
            continue
        sides = list(dict.fromkeys(side for case in group for side in case.sides))
        for side in sides:
            yield Job([case for case in group if side in case.sides], [side])


def run_suite(
    cases: Sequence[Case],
    suite: str,
    shrink: bool,
    rounds: int,
    out: Path,
    told: Callable[[str], None],
    done: Callable[[list[dict[str, Any]], dict[str, Any]], None],
    gpu: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows in the order of the cases, and the machine. `done` gets both after every process, for results so far."""
    end = time.time() + SUITES[suite]
    lines: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    machine: dict[str, Any] = {}
    folder = out / "log"
    folder.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(jobs(cases, apart=gpu)):
        path = folder / f"{number:02d}.jsonl"
        path.unlink(missing_ok=True)
        names = [case.name for case in job.cases]
        order = Order(suite, shrink, names, job.sides, rounds, end, str(path), machine=not machine)
        left = end + GRACE - time.time()
        patience = START + PATIENCE * sum(case.seconds for case in job.cases)
        allowed = min(left, patience)
        broken, stopped = False, "no time left"

        def heard(text: str, path: Path = path, known: dict[str, Any] = machine) -> None:
            """Results are on the disk as they come: whoever stops the benchmark keeps what it has."""
            told(text)
            fresh = lines_of(path)
            merged = {name: lines[name] + [x for x in fresh if x.get("case") == name] for name in lines}
            about = next((line["machine"] for line in fresh if "machine" in line), known)
            done([_row(case, merged[case.name], about) for case in cases if merged[case.name]], about)

        if allowed > START:
            code, late = _worker(order, allowed, environment(gpu, job), path.with_suffix(".txt"), heard)
            broken = bool(code) or (late and patience < left)  # only the suite's clock is nobody's fault
            stopped = (
                f"stopped after {allowed:.0f} s{', far beyond what it takes' if broken else ''}"
                if late
                else f"its process ended with {code}, see {path.stem}.txt"
            )
        found = lines_of(path)
        machine = next((line["machine"] for line in found if "machine" in line), machine)
        for name in names:
            own = [line for line in found if line.get("case") == name]
            lines[name] += own or [{"case": name, "problem" if broken else "skipped": stopped}]
        done([_row(case, lines[case.name], machine) for case in cases if lines[case.name]], machine)
    return [_row(case, lines[case.name], machine) for case in cases], machine


def environment(gpu: bool, job: Job) -> dict[str, str]:
    """Of a worker: the settings of jaxlm.compilation, and how jax shares a GPU's memory with PyTorch.

    What the user has set stands.
    """
    made = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if not gpu:
        made["JAX_PLATFORMS"] = "cpu"
    elif job.sides != [OURS]:
        made["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if job.sides is not None:  # jax only draws the weights, and must give the memory back
            made["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
    made |= {k: v for k, v in os.environ.items() if not (gpu and k == "JAX_PLATFORMS")}
    compilation.set_up(made)
    return made


def _worker(
    order: Order, seconds: float, env: Mapping[str, str], log: Path, told: Callable[[str], None]
) -> tuple[int, bool]:
    """Runs a worker for at most so long: its exit code, and whether it had to be stopped."""
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "convert.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(env),
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        output = process.stdout

        def read() -> None:
            for line in output:
                told(line.strip())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            process.stdin.write(json.dumps(order._asdict()))
            process.stdin.close()
            code, late = process.wait(timeout=seconds), False
        except subprocess.TimeoutExpired:
            process.kill()
            code, late = process.wait(), True
        except BrokenPipeError:  # it died before it read its order
            code, late = process.wait(), False
        except BaseException:
            process.kill()
            process.wait()
            raise
        reader.join(timeout=5)
        if not reader.is_alive():
            output.close()
    return (0 if late else code), late


def _row(case: Case, lines: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> dict[str, Any]:
    """All lines of a case, of one process or of several, as one row."""
    sides: dict[str, Measured] = {}
    for line in lines:
        sides |= {name: Measured.read(made) for name, made in line.get("sides", {}).items()}
    ordered = {name: sides[name] for name in case.sides if name in sides}
    problem = "; ".join(line["problem"] for line in lines if line.get("problem"))
    skipped = "; ".join(line["skipped"] for line in lines if line.get("skipped"))
    measured = any(side.times or side.value is not None for side in ordered.values())
    row = make_row(
        case.facts, ordered, machine, problem or ("" if measured else skipped or "nothing was measured")
    )
    missing = [name for name in case.sides if name not in ordered]
    row["missing"] = {name: problem or skipped or "failed, see the notes of the others" for name in missing}
    row["skipped"] = bool(skipped) and not problem
    row["seconds"] = math.fsum(line.get("seconds", 0.0) for line in lines)
    return row
