"""The benchmark: it compares only what is the same work, times in turns, keeps to its budget and says what it found."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from entry import run
from tolerances import tolerance

pytest.importorskip("torch")

from convert.bench import runner
from convert.bench.cases import START, SUITES, Case, chosen, suite, train_case
from convert.bench.machine import PeakMemory
from convert.bench.results import OURS, Facts, Measured, difference, failed, make_row, table, write_results
from convert.bench.runner import _row, jobs
from convert.bench.side import Side, measure
from convert.bench.timing import LEAST_ROUNDS, Spread, interleave, spread
from convert.bench.worker import Order, work
from experiments.benchmark import main
from jaxlm.config import ConfigError
from jaxlm.plots_benchmark import plot_benchmark

pytestmark = pytest.mark.torch
FACTS = Facts("train/dense/x/float32", "tokens/s", work=100.0, flops=1e9, tolerance=1e-3)
MACHINE = {"device": "a machine", "peak_flops": {"float32": 1e11}, "bandwidth": 1e10}


def side(trace: list[float], calls: list[str] | None = None, name: str = "") -> Side:
    """A side that computes `trace`, and writes down when it runs."""
    return Side(lambda n: (calls if calls is not None else []).extend([name] * n), lambda: trace)


def measured(trace: list[float], seconds: float) -> Measured:
    """A side that took so long."""
    return Measured(trace, spread([seconds], 1))


def test_different_work_is_not_timed() -> None:
    """Sides whose traces differ give a problem that says by how much, no times, and a row without a ratio."""
    traces = {OURS: [1.0, 2.0], "torchref:eager": [1.0, 2.1]}
    known, problem = measure(FACTS, lambda name: side(traces[name]), list(traces), 3, 0.0, lambda text: None)
    assert "not the same work: jaxlm's differs from torchref:eager by 0.048" in problem
    assert all(one.times is None for one in known.values())
    row = make_row(FACTS, known, MACHINE, problem)
    assert (row["jaxlm"], row["torchref"], row["ratio"]) == (None, None, None)
    assert failed([row]) == [f"{FACTS.name}: {problem}"]


def test_same_work_is_timed_and_a_failing_baseline_is_named() -> None:
    """What one side of PyTorch raises stands in the notes; if ours raises, the case has failed."""

    def make(name: str) -> Side:
        if name == "torchref:compile":
            raise RuntimeError("no compiler here\nand more")
        return side([1.0])

    names = [OURS, "torchref:compile", "torchref:eager"]
    known, problem = measure(FACTS, make, names, 2, 0.0, lambda text: None)
    assert not problem and known.keys() == {OURS, "torchref:eager"}
    assert known[OURS].notes["failed"] == {"torchref:compile": "RuntimeError: no compiler here"}

    def broken(name: str) -> Side:
        raise ValueError("ours")

    assert measure(FACTS, broken, [OURS], 2, 0.0, lambda text: None)[1] == "jaxlm: ValueError: ours"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([1.0], [1.0, 2.0], float("inf")),
        ([float("nan")], [float("nan")], float("inf")),
        ([], [], 0.0),
        ({"losses": [10.0], "norm": [0.1]}, {"losses": [10.0], "norm": [0.2]}, 0.5),
        ({"losses": [10.0]}, {"norm": [10.0]}, float("inf")),
    ],
)
def test_traces_are_compared_by_their_largest_number(one, other, expected) -> None:
    """Of each part its own; unequal lengths and what is not finite are as different as can be."""
    assert difference(one, other) == pytest.approx(expected)


def test_sides_take_turns() -> None:
    """Every round runs each side once, and every other round in the reverse order."""
    calls: list[str] = []
    runs = {name: side([], calls, name).run for name in "ab"}
    ticks = iter(range(10_000))
    interleave(runs, 4, "cpu", clock=lambda: float(next(ticks)))
    assert calls[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]  # the first two find the length of a round


def test_short_runs_are_repeated_and_the_clock_is_kept() -> None:
    """A round lasts long enough to be measured; past the deadline only the least number of rounds is taken."""
    now = [0.0]

    def work_for(n: int) -> None:
        now[0] += 0.001 * n

    found = interleave({"a": work_for}, 10, "cpu", deadline=-1.0, clock=lambda: now[0])["a"]
    assert found.runs == 50 and found.rounds == LEAST_ROUNDS
    assert found.median == pytest.approx(0.001)


def test_spread_is_median_and_quartiles() -> None:
    """Five times in any order; what is no time is refused."""
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0], 2) == Spread(3.0, 1.0, 2.0, 4.0, 5, 2)
    with pytest.raises(ValueError, match="positive"):
        spread([1.0, float("nan")], 1)


@pytest.mark.parametrize(("unit", "value"), [("tokens/s", 50.0), ("ms", 2000.0)])
def test_ratio_is_above_one_where_jaxlm_is_faster(unit: str, value: float) -> None:
    """Whatever the unit: 2 s against the best of 3 s and 5 s is 1.5."""
    facts = dataclasses.replace(FACTS, unit=unit)
    sides = {
        OURS: measured([1.0], 2.0),
        "torchref:a": measured([1.0], 5.0),
        "torchref:b": measured([1.0], 3.0),
    }
    row = make_row(facts, sides, MACHINE)
    assert row["jaxlm"] == pytest.approx(value) and row["ratio"] == pytest.approx(1.5)
    assert row["torchref_is"] == "torchref:b"
    assert row["mfu"] == pytest.approx(1e9 / 2.0 / 1e11)


def test_floor_is_the_longer_of_flops_and_bytes() -> None:
    """1e9 FLOPs at 1e11 a second are 10 ms; 1e9 bytes at 1e10 are 100 ms."""
    assert make_row(FACTS, {}, MACHINE)["floor"] == pytest.approx(100 / 0.01)
    heavy = dataclasses.replace(FACTS, bytes=1e9, unit="ms")
    assert make_row(heavy, {}, MACHINE)["floor"] == pytest.approx(100.0)


def test_processes_of_one_case_become_one_row() -> None:
    """Sides measured apart are compared when they meet, and a difference fails there too."""
    case = dataclasses.replace(_tiny(), sides=(OURS, "torchref:eager"))
    ours, theirs = (dataclasses.asdict(measured([x], 1.0)) for x in (1.0, 2.0))
    lines = [
        {"case": case.name, "sides": {OURS: ours}},
        {"case": case.name, "sides": {"torchref:eager": theirs}},
    ]
    row = _row(case, json.loads(json.dumps(lines)), MACHINE)
    assert "not the same work" in row["problem"] and row["ratio"] is None


def _tiny() -> Case:
    return suite("cpu", shrink=True)[0]


@pytest.mark.parametrize("name", SUITES)
def test_suites_fit_their_time(name: str) -> None:
    """By estimate, with a process's start: otherwise the last cases would never be measured."""
    cases = suite(name)
    starts = START * len(list(jobs(cases, apart=name != "cpu")))
    assert starts + sum(case.seconds for case in cases) <= SUITES[name]


def _fewer_layers(stepper) -> None:
    stepper.model.blocks = stepper.model.blocks[:1]


def _no_step(stepper) -> None:
    stepper.optimizer.step = lambda: None


@pytest.mark.parametrize("fault", [None, _fewer_layers, _no_step])
def test_another_model_and_a_missing_step_are_other_work(fault, monkeypatch) -> None:
    """Four layers against one, and weights that nobody updates, in bfloat16, whose losses alone hardly tell."""
    from convert.bench import train
    from convert.bench.cases import _Sizes

    sizes = _Sizes(True)
    case = train_case(sizes, "minigpt-124m", "bfloat16", ("eager",))
    run = dataclasses.replace(case.run, model=dataclasses.replace(case.run.model, n_layers=4))
    case = dataclasses.replace(case, run=run)
    real = train._Stepper.__init__

    def init(self, *arguments) -> None:
        real(self, *arguments)
        if fault:
            fault(self)

    monkeypatch.setattr(train._Stepper, "__init__", init)
    known, problem = measure(
        case.facts, lambda name: train.make(case, name), list(case.sides), 1, 0.0, lambda text: None
    )
    assert known.keys() == set(case.sides)
    assert problem.startswith("not the same work") == (fault is not None), problem


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux")
def test_like_sides_hold_alike() -> None:
    """A side that comes after another in the same process is not told to need less."""
    import numpy as np

    def held() -> int:
        meter = PeakMemory("jax")
        for _ in range(2):
            parts = [
                np.ones(1 << 12) for _ in range(1_500)
            ]  # 49 MB in small pieces, which the heap would keep
            del parts
            meter.restart()
        parts = [np.ones(1 << 12) for _ in range(1_500)]
        found = meter.bytes()
        del parts
        return found or 0

    sides = [held() for _ in range(4)]
    assert min(sides) > 0.9 * max(sides) > 40e6, sides


def _suite_of(case: Case, out: Path, code: str, monkeypatch) -> list[dict]:
    """Rows of a suite whose worker is a piece of Python."""
    popen = runner.subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", code], **rest)
    )
    return runner.run_suite([case], "cpu", True, 1, out, lambda t: None, lambda r, m: None, gpu=False)[0]


def test_a_worker_that_hangs_is_a_failure(tmp_path: Path, monkeypatch) -> None:
    """Stopped by the patience with its cases it has failed; stopped by the suite's clock it is skipped."""
    hang = "import sys, time; sys.stdin.read(); time.sleep(60)"
    monkeypatch.setattr(runner, "START", 0.2)
    case = dataclasses.replace(_tiny(), seconds=0.1)
    rows = _suite_of(case, tmp_path, hang, monkeypatch)
    assert "far beyond what it takes" in rows[0]["problem"] and len(failed(rows)) == 1
    monkeypatch.setattr(runner, "SUITES", {"cpu": 0.5})
    monkeypatch.setattr(runner, "GRACE", 0.0)
    rows = _suite_of(dataclasses.replace(case, seconds=60.0), tmp_path, hang, monkeypatch)
    assert rows[0]["skipped"] and failed(rows) == []


def test_curves_are_compared_by_a_number(tmp_path: Path) -> None:
    """The row of losses tells their largest relative difference, and there is a figure of them."""
    facts = Facts("losses/dense/x/float32", "rel", 1.0, tolerance=0.1)
    sides = {OURS: Measured([4.0, 2.0], None, 0.0), "torchref:a": Measured([4.0, 2.2], None, 0.0)}
    row = make_row(facts, sides, MACHINE)
    assert row["jaxlm"] == pytest.approx(0.05) and row["torchref"] is None
    write_results([row], MACHINE, tmp_path, "title")
    assert [path.name for path in plot_benchmark(tmp_path)] == ["losses.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent")
def test_a_killed_benchmark_leaves_no_worker() -> None:
    """The worker ends with the process that began it, however that ended."""
    code = (
        "import time; from convert.bench.worker import end_with_parent as e; e(); print(1, flush=True);"
        "time.sleep(60)"
    )
    parent = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=-1);"
        "p.stdout.readline(); print(p.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, code], stdin=-1, stdout=-1, cwd=Path(__file__).parents[2]
    ) as process:
        child = int(process.stdout.readline())
        process.terminate()
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} lives on")


@pytest.mark.parametrize("name", SUITES)
def test_names_keep_the_contract(name: str) -> None:
    """KIND/…/DTYPE, each once, the same whatever the sizes; every kind has a module that makes sides."""
    cases = suite(name)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) and names == [case.name for case in suite(name, shrink=True)]
    assert name == "sweep" or not {case.name for case in suite("sweep")} & set(names)
    kinds = "prefill|decode|head|moe_layer|attention|loader|convert|gemm|copy|scatter|grouped|numerics|losses"
    dtypes = "float32|bfloat16|uint16"
    pattern = re.compile(rf"(train/(dense|moe)|tune/lora)/[\w.+-]+/({dtypes})|({kinds})/[\w./+-]+/({dtypes})")
    assert [n for n in names if not pattern.fullmatch(n)] == []
    assert all(hasattr(importlib.import_module(f"convert.bench.{case.kind}"), "make") for case in cases)
    assert all(case.facts.flops or case.facts.bytes or case.facts.unit == "rel" for case in cases)


def test_suites_hold_what_is_promised() -> None:
    """MoE and dense steps in both precisions on a CPU; on an H200 three models, the eager loop and decoding."""
    on_cpu = {case.name: case for case in suite("cpu")}
    for name in ("dense/quickstart-dense", "dense/decoder-30m", "moe/quickstart"):
        assert {f"train/{name}/{dtype}" for dtype in ("float32", "bfloat16")} <= on_cpu.keys()
    on_gpu = {case.name: case for case in suite("h200")}
    assert on_gpu["train/moe/gptoss/bfloat16"].facts.work == 65_536
    assert on_gpu["train/moe/gptoss+rows8/bfloat16"].sides == (OURS, "torchref:eager-loop")
    assert {"decode/dense/llama-1.1b/bfloat16", "decode/moe/gptoss/bfloat16"} <= on_gpu.keys()


def test_flops_of_a_step_are_causal() -> None:
    """Half of what counting all T^2 gives for attention, and 6 a matmul parameter."""
    from convert.bench.cases import _Sizes
    from jaxlm.count import flops_per_token

    facts = train_case(_Sizes(False), "quickstart-dense", "float32", ()).facts
    model = suite("cpu")[0].run.model
    assert facts.flops == facts.work * flops_per_token(model, 256, causal=True)
    assert facts.flops < facts.work * flops_per_token(model, 256, causal=False)


def test_a_part_can_be_chosen() -> None:
    """Globs and beginnings; one that fits nothing is refused with what there is."""
    cases = suite("cpu")
    assert {case.kind for case in chosen(cases, ["train"])} == {"train"}
    assert [c.name for c in chosen(cases, ["loader/win*"])] == ["loader/windows/uint16"]
    with pytest.raises(ConfigError, match="fits no case"):
        chosen(cases, ["train/dense/nothing*"])


def test_frameworks_that_do_not_fit_get_processes_of_their_own() -> None:
    """On a GPU a case that is alone runs once per side; neighbours of a group share a process."""
    case = dataclasses.replace(_tiny(), sides=(OURS, "torchref:a"), group="one")
    other = dataclasses.replace(case, group="two", alone=True)
    found = [(len(job.cases), job.sides) for job in jobs([case, case, other], apart=True)]
    assert found == [(2, None), (1, [OURS]), (1, ["torchref:a"])]
    assert [len(job.cases) for job in jobs([case, case, other], apart=False)] == [2, 1]


def test_a_case_without_time_is_skipped_and_said(tmp_path: Path) -> None:
    """Past the end of the budget nothing is begun; the row says why and is no failure."""
    case = _tiny()
    order = Order("cpu", True, [case.name], None, 1, time.time() - 1, str(tmp_path / "lines"), False)
    lines = list(work(order))
    row = _row(case, lines, MACHINE)
    assert row["problem"].startswith("no time left") and row["skipped"] and failed([row]) == []
    assert any("no time left" in line for line in table([row], MACHINE, "title"))


def test_an_end_to_end_run_writes_everything(tmp_path: Path, capsys, monkeypatch) -> None:
    """Two small cases: exit 0, results in three forms, every key of the contract."""
    out = tmp_path / "out"
    (out / "log").mkdir(parents=True)
    (out / "log" / "99.txt").write_text("of an earlier run")
    argv = [
        "--suite",
        "cpu",
        "--shrink",
        "--repeats",
        "3",
        "--out",
        str(out),
        "--only",
        "loader/windows",
        "attention/b8*",
    ]
    result = run(main, argv, capsys, monkeypatch)
    assert result.code == 0, result.err
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["name"].partition("/")[0] for row in rows] == ["attention", "loader"]
    for row in rows:
        assert {"name", "unit", "jaxlm", "torchref", "ratio", "floor", "machine"} <= row.keys()
        assert row["jaxlm"] > 0 and not row["problem"]
        assert row["sides"][OURS]["seconds"]["rounds"] == 3
    assert rows[0]["ratio"] == pytest.approx(rows[0]["torchref"] / rows[0]["jaxlm"])
    assert rows[0]["differences"]["torchref:sdpa"] < tolerance("f32_reordered")
    assert not (out / "log" / "99.txt").exists() and "results.png" in result.err + result.out
    assert (out / "results.png").stat().st_size > 10_000
    assert "| loader/windows/uint16 |" in (out / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "trian/*"], "error: --only 'trian/*' fits no case"),
        (["--suite", "tpu"], "error: argument --suite: invalid choice: 'tpu'"),
        (["--repeats", "0"], "error: --repeats 0 must be at least 1"),
        (["--out", "README.md"], "error: --out README.md is a file"),
        (["--suite", "h200"], "error: jax sees no CUDA device here"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str, capsys, monkeypatch) -> None:
    """Exit code 2 and what to do, no traceback."""
    monkeypatch.chdir(Path(__file__).parents[2])
    result = run(main, argv, capsys, monkeypatch)
    assert result.code == 2 and result.err.startswith(message), result.err
    assert result.err.count("\n") == 1
