"""The suite tested on itself: faults are planted one at a time, and the ordinary report must find each.

    result = self_test(progress=print_line)       # two processes, some minutes
    result.passed, result.lines(), result.to_json()

A fault replaces a function or rule of jaxlm, torchref or convert (convert/parity/faults); the comparison, its inputs
and its report are the ordinary ones and know nothing of it. `located` means that the report's first divergence names
the rung and the operation that stand in the table. Equivalent rewrites must raise no alarm.

A worker is this module as a program: names of faults come in on stdin, outcomes go out on stdout, a line each.
"""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convert.parity import steps
from convert.parity.compare import Finding
from convert.parity.faults import ALL, EQUIVALENT, KINDS, Fault, Rewrite
from convert.parity.faults.plant import SelfTestError, planted
from convert.parity.limits import limit
from convert.parity.precision import ledger, pinned
from convert.parity.results import ORDER, Report, Rung
from convert.parity.suite import Options, compare_decoders
from jaxlm.config import ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig

Progress = Callable[[str, int, int], None]  # what was planted, how many are done, how many there are
INTACT = "nothing changed"  # the rewrite that changes nothing: before and after all others
PATIENCE = 300.0  # seconds for one fault; the slowest takes 40 where nothing is compiled yet
STARTING = 120.0  # seconds until a worker has imported everything
MARK = "outcome: "  # libraries may write to stdout too
AT_LEAST = {"faults": 60, "of each kind": 4, "rewrites": 8, "located": 0.95}
DEVICES = 4  # of the rung `mesh`


@dataclass(frozen=True)
class Outcome:
    """What the suite said about one fault or rewrite."""

    name: str
    kind: str  # "" for rewrites
    caught: bool  # the report did not pass
    caught_by: str  # rung of the first divergence
    located: bool  # rung and operation are the expected ones
    expected: str = ""  # rung and operation, by hand
    found: str = ""  # rung and operation, by the report
    seconds: float = 0.0
    error: str = ""  # why there is no report: a crash or a hang, never counted as caught


@dataclass
class SelfTest:
    """All outcomes, and whether they are what the suite promises."""

    faults: list[Outcome] = field(default_factory=list)
    rewrites: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def false_alarms(self) -> list[str]:
        """Rewrites that made the suite fail, or were never answered."""
        return [outcome.name for outcome in self.rewrites if outcome.caught or outcome.error]

    @property
    def kinds(self) -> dict[str, tuple[int, int, int]]:
        """Planted, caught and located faults of each kind."""
        found = {}
        for kind in KINDS:
            own = [o for o in self.faults if o.kind == kind]
            found[kind] = (len(own), sum(o.caught for o in own), sum(o.located for o in own))
        return found

    @property
    def problems(self) -> list[str]:
        """What keeps the self-test from passing, one line each."""
        found = [f"no answer for {o.name!r}: {o.error}" for o in (*self.faults, *self.rewrites) if o.error]
        found += [f"not caught: {o.name}" for o in self.faults if not (o.caught or o.error)]
        located = sum(o.located for o in self.faults)
        if located < AT_LEAST["located"] * len(self.faults):
            found.append(f"located {located} of {len(self.faults)}, must be {AT_LEAST['located']:.0%}")
        found += [f"false alarm: {name}" for name in self.false_alarms]
        if len(self.faults) < AT_LEAST["faults"]:
            found.append(f"{len(self.faults)} faults, must be {AT_LEAST['faults']}")
        if len(self.rewrites) < AT_LEAST["rewrites"]:
            found.append(f"{len(self.rewrites)} rewrites, must be {AT_LEAST['rewrites']}")
        few = [kind for kind, (planted, _, _) in self.kinds.items() if planted < AT_LEAST["of each kind"]]
        return found + [f"fewer than {AT_LEAST['of each kind']} faults of kind {kind}" for kind in few]

    @property
    def passed(self) -> bool:
        """Every fault caught, nearly all located, no false alarm, and the table as large as promised."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The outcomes for programs."""
        return {
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "faults": [dataclasses.asdict(o) for o in self.faults],
            "rewrites": [dataclasses.asdict(o) for o in self.rewrites],
            "false_alarms": self.false_alarms,
            "problems": self.problems,
        }

    def report(self) -> Report:
        """As a parity report, for the files."""
        with pinned("float64"):
            report = Report("planted faults", "the intact twin", "float64", ledger("float64"))
        count = {
            "not caught": sum(not o.caught for o in self.faults),
            "false alarms": len(self.false_alarms),
            "problems": len(self.problems),
        }
        findings = [Finding(name, float(n), limit("exact")) for name, n in count.items()]
        missed = sum(not o.located for o in self.faults) / max(1, len(self.faults))
        findings.append(Finding("share not located", missed, 1 - AT_LEAST["located"]))
        report.rungs = [Rung("self-test", "", findings, self.seconds)]
        report.seconds, report.extra = self.seconds, self.to_json()
        return report

    def lines(self) -> list[str]:
        """The table for a terminal."""
        wide = max((len(o.name) for o in (*self.faults, *self.rewrites)), default=0)
        rows = []
        for kind in KINDS:
            for o in (o for o in self.faults if o.kind == kind):
                verdict = (o.error and "ERROR") or ("caught" if o.caught else "MISSED")
                place = o.found if o.located else f"{o.error or o.found or '-'}  (expected {o.expected})"
                rows.append(f"  {verdict:<6} {kind:<12} {o.name:<{wide}}  {place}")
        for o in self.rewrites:
            verdict = (o.error and "ERROR") or ("ALARM" if o.caught else "quiet")
            rows.append(f"  {verdict:<6} {'equivalent':<12} {o.name:<{wide}}  {o.error or o.found}".rstrip())
        caught, located = (sum(getattr(o, name) for o in self.faults) for name in ("caught", "located"))
        n = len(self.faults)
        rows.append(
            f"{n} faults: {caught} caught, {located} located ({located / max(1, n):.0%}); {len(self.rewrites)} "
            f"equivalent rewrites: {len(self.false_alarms)} false alarms; {self.seconds:.0f} s"
        )
        return rows + [f"  {problem}" for problem in self.problems]


def small_run() -> RunConfig:
    """The model of the self-test: no default, no square matrix, nothing that hides a fault, and small."""
    moe = MoEConfig(
        n_experts=4, n_active=2, d_ff=20, pattern=(True, False), balance_coef=0.02, router_z_coef=1e-3
    )
    model = ModelConfig(
        vocab_size=61,
        d_model=24,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        head_dim=6,
        d_ff=40,
        context=32,
        rope_theta=5e4,
        norm_eps=3e-6,
        qk_norm=True,
        qkv_bias=True,
        windows=(0, 7),
        moe=moe,
    )
    return RunConfig(
        model=model,
        optim=OptimConfig(warmup_steps=3, decay_steps=10, z_loss_coef=1e-3),
        train=TrainConfig(steps=10, batch_size=4, seq_len=32),
    )


def small_options() -> Options:
    """How the small run is compared: every rung, short rows, a trajectory of K steps, up to the first failure."""
    return Options(length=15, step_length=11, steps=steps.K, first_failure=True)


def try_fault(fault: Fault | Rewrite, options: Options | None = None) -> Outcome:
    """Plants one fault (or rewrite) in this process, asks the ordinary suite, and puts everything back."""
    started = time.perf_counter()
    options = small_options() if options is None else options
    if change_rungs := fault.rungs:
        options = dataclasses.replace(options, rungs=change_rungs)
    beside = fault.beside if isinstance(fault, Fault) else None
    with contextlib.ExitStack() as stack:
        for change in (fault, beside):
            if change is not None:
                stack.enter_context(planted(change.target, change.change))
        report = compare_decoders(fault.run(small_run()), options=options)
    first = report.divergence
    rung, operation = ("", "") if first is None else (first.rung, first.operation)
    found, seconds = f"{rung} {operation}".strip(), round(time.perf_counter() - started, 2)
    if isinstance(fault, Rewrite):
        return Outcome(fault.name, "", not report.passed, rung, False, "", found, seconds)
    right = (rung, operation) == (fault.rung, fault.operation)
    expected = f"{fault.rung} {fault.operation}"
    return Outcome(fault.name, fault.kind, not report.passed, rung, right, expected, found, seconds)


def table() -> dict[str, Fault | Rewrite]:
    """Every fault and rewrite by name, the intact model among them."""
    intact = Rewrite(INTACT, "convert.native.RULES", lambda rules: rules)
    return {change.name: change for change in (intact, *ALL, *EQUIVALENT)}


def self_test(
    progress: Progress = lambda name, done, total: None, workers: int = 2, names: Sequence[str] = ()
) -> SelfTest:
    """Plants every fault and rewrite (or those named) in processes of their own, and collects what the suite says.

    Raises SelfTestError when a worker does not start, or when the suite fails although nothing is planted. A worker
    that dies or hangs costs the fault it was at, which is then an error, and is started anew.
    """
    started, known = time.perf_counter(), table()
    for name in names:
        if name not in known:
            raise SelfTestError(f"there is no fault {name!r}; names are those of convert/parity/faults")
    chosen = [name for name in (names or known) if name != INTACT]
    chosen.sort(key=lambda name: _turn(known[name]))
    with tempfile.TemporaryDirectory(prefix="jaxlm-selftest-") as cache:
        outcomes = _Crew(cache, chosen, progress).work(min(workers, len(chosen)))
    order = {name: place for place, name in enumerate(known)}
    outcomes.sort(key=lambda o: order[o.name])
    result = SelfTest(
        [o for o in outcomes if isinstance(known[o.name], Fault)],
        [o for o in outcomes if isinstance(known[o.name], Rewrite)],
        time.perf_counter() - started,
    )
    return result


def _turn(change: Fault | Rewrite) -> int:
    """What needs few programs goes first, while the intact model fills the cache; what climbs every rung is next, so
    that no worker ends alone with it."""
    if isinstance(change, Rewrite):
        return 1
    return 0 if ORDER.index(change.rung) <= ORDER.index("activations") else 2


class _Crew:
    """Worker processes, a thread each that feeds it, and what came back."""

    def __init__(self, cache: str, names: Sequence[str], progress: Progress):
        self.cache, self.progress = cache, progress
        self.waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            self.waiting.put(name)
        self.total = len(names)
        self.workers: list[_Worker] = []
        self.outcomes: list[Outcome] = []
        self.failed: list[Exception] = []
        self.lock = threading.Lock()

    def work(self, workers: int) -> list[Outcome]:
        """Every outcome, in the order of their ending."""
        threads = [threading.Thread(target=self._feed, args=(i == 0,), daemon=True) for i in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # an interrupt too leaves no process behind
            for worker in self.workers:
                worker.process.kill()
                worker.close()
        if self.failed:
            raise self.failed[0]
        return self.outcomes

    def _feed(self, first: bool) -> None:
        try:
            worker = self._start()
            if first:
                self._intact(worker)
            while not self.failed:
                try:
                    name = self.waiting.get_nowait()
                except queue.Empty:
                    self._intact(worker)
                    break
                outcome = worker.ask(name)
                if outcome.error and not worker.alive:
                    worker.close()
                    worker = self._start()
                with self.lock:
                    self.outcomes.append(outcome)
                    self.progress(name, len(self.outcomes), self.total)
            worker.close()
        except Exception as error:  # told by the main thread
            self.failed.append(error)

    def _start(self) -> "_Worker":
        worker = _Worker(self.cache)
        self.workers.append(worker)
        return worker

    def _intact(self, worker: "_Worker") -> None:
        """The suite must pass where nothing is planted: at first, or every fault would seem caught; and at last, or a
        fault has stayed behind."""
        outcome = worker.ask(INTACT)
        if outcome.caught or outcome.error:
            raise SelfTestError(
                f"the suite fails although nothing is planted: {outcome.error or outcome.found}"
            )


class _Worker:
    """One process that plants faults."""

    def __init__(self, cache: str):
        root = str(Path(__file__).resolve().parents[2])
        flags = os.environ.get("XLA_FLAGS", "")
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip(),
            "JAX_COMPILATION_CACHE_DIR": cache,  # what no fault touches is compiled once for all workers
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
        }
        handle, name = tempfile.mkstemp(".log", dir=cache)
        self.log = Path(name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "convert.parity.selftest"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=handle,
            text=True,
            env=env,
        )
        os.close(handle)
        if (line := self._line(STARTING)) is None:
            raise SelfTestError(f"a worker of the self-test does not start: {self._last_words()}")
        assert line == "ready", line

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def ask(self, name: str) -> Outcome:
        """The outcome of one fault; an error where the process dies or takes longer than PATIENCE."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        started = time.perf_counter()
        line = self._line(PATIENCE)
        if line is not None:
            return Outcome(**json.loads(line))
        seconds = time.perf_counter() - started
        self.process.wait()
        late = f"no answer within {PATIENCE:.0f} s" if seconds >= PATIENCE else "the worker died"
        kind = getattr(table()[name], "kind", "")
        return Outcome(
            name, kind, False, "", False, seconds=round(seconds, 2), error=f"{late}: {self._last_words()}"
        )

    def _line(self, seconds: float) -> str | None:
        """The next marked line; None when the process ends, or is ended for being late."""
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith(MARK):
                    return line.removeprefix(MARK).strip()
            return None
        finally:
            timer.cancel()

    def _last_words(self) -> str:
        said = self.log.read_text(errors="replace").strip().splitlines()
        return said[-1] if said else f"exit status {self.process.poll()}"

    def close(self) -> None:
        """Ends the process: with its input if it listens, by force if it does not."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def _serve() -> int:
    """The worker's side: a name in, an outcome out."""
    torch.set_num_threads(1)
    known = table()
    print(f"{MARK}ready", flush=True)
    for line in sys.stdin:
        fault = known[line.strip()]
        try:
            outcome = try_fault(fault)
        except Exception as error:  # outside the rungs, which turn errors into findings
            kind = getattr(fault, "kind", "")
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome = Outcome(fault.name, kind, False, "", False, error=text)
        print(MARK + json.dumps(dataclasses.asdict(outcome)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_serve())
