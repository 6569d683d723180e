"""The loop around a real engine: bad batches, full disks, signals at bad moments, and a profiler's trace."""

import dataclasses
import io
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import T, V, tiny
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxlm import loop
from jaxlm.bad_batches import LIMIT, BadBatches
from jaxlm.config import LogConfig, OptimConfig, RunConfig, TrainConfig
from jaxlm.engine import JaxEngine
from jaxlm.loop import DivergedError, Outputs, Result, StoppedError, fit
from jaxlm.metrics import JsonlSink, Progress, Throughput, read_metrics
from jaxlm.reporter import Reporter

NO_BATCH: frozenset[int] = frozenset()


def run_of(**train: Any) -> RunConfig:
    """A run of a tiny decoder that saves when told and never validates before its end."""
    settings = {
        "steps": 8,
        "batch_size": 2,
        "seq_len": T,
        "save_every": 100,
        "eval_every": 100,
        "plots": False,
    }
    optim = OptimConfig(warmup_steps=2, decay_steps=8)
    model = tiny(n_layers=1)
    return RunConfig(
        model, optim=optim, train=TrainConfig(**(settings | train)), log=LogConfig(details=False)
    )


class Batches:
    """Batch k from its number alone; those in `bad` have a loss mask of NaN."""

    def __init__(self, start: int = 0, bad: frozenset[int] = NO_BATCH) -> None:
        self.next, self.bad = start, bad

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        ids = np.random.default_rng(self.next).integers(0, V, (2, T + 1)).astype(np.int32)
        mask = np.full((2, T), np.nan if self.next in self.bad else 1, np.float32)
        self.next += 1
        return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_mask": mask}

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch."""
        return {"next": self.next}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the progress bar says above itself."""
    text = io.StringIO()
    console = Console(file=text, width=10_000)
    monkeypatch.setattr(loop, "Progress", lambda total, start: Progress(total, start, console))
    return text


def train(
    folder: Path, run: RunConfig, bad: frozenset[int] = NO_BATCH, engine: Any = None, **outputs: Any
) -> tuple[Result, JaxEngine]:
    """`fit` in a run directory, continuing what is there."""
    engine = engine or JaxEngine(run, folder / "checkpoints")
    folder.mkdir(exist_ok=True)
    start = 0
    if engine.candidates:
        start = engine.restore("latest")["loader"]["next"]
    else:
        engine.initialise()
    with JsonlSink(folder / "metrics.jsonl", start or None) as sink:
        report = Reporter(run, sink, Throughput(2 * T), None, None)
        places = Outputs(bad_batches=folder / "bad_batches", **outputs)
        result = fit(run, engine, Batches(start, bad), [Batches(99).__next__()], report, outputs=places)
    return result, engine


def weights(engine: JaxEngine) -> dict[str, bytes]:
    """Every byte of the state by path."""
    leaves = jax.tree_util.tree_flatten_with_path(engine.state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def test_what_the_first_step_found_is_said_once(tmp_path: Path, said: io.StringIO) -> None:
    """After the first step of a run of eight, above the bar."""
    asked: list[int] = []
    result, _ = train(tmp_path, run_of(), on_first_step=lambda: f"compiled, {asked.append(1)}")
    assert result.step == 8 and len(asked) == 1 and said.getvalue().count("compiled, None") == 1


def test_a_nan_batch_is_skipped_counted_and_kept(tmp_path: Path, said: io.StringIO) -> None:
    """Weights stay finite, the log counts it, the file holds the batch itself with its step and reason."""
    result, engine = train(tmp_path, run_of(), bad=frozenset({2}))
    assert (result.step, result.stopped_by) == (8, "")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(engine.params))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0] and rows[-1]["skips"] == 1
    file = tmp_path / "bad_batches" / "step_3.safetensors"
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    kept, batch = load_file(file), Batches(2, frozenset({2})).__next__()
    assert {k: v.tobytes() for k, v in kept.items()} == {k: v.tobytes() for k, v in batch.items()}
    with safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"step": "3", "reason": "its loss is nan"}
    line = f"step 3 was skipped: its loss is nan; 1 skipped so far; its batch is in {file}\n"
    assert said.getvalue().count(line) == 1


def test_too_many_skips_in_a_row_stop_with_the_last_good_state(tmp_path: Path, said: io.StringIO) -> None:
    """The run ends with one line, its checkpoint has the weights of before, and --resume goes on from it."""
    run = run_of(steps=20, max_skips=6)
    bad = frozenset(range(3, 11))
    with pytest.raises(DivergedError) as error:
        train(tmp_path, run, bad)
    assert str(error.value).startswith("6 steps in a row were skipped, the last of them 9: its loss is nan; ")
    assert "\n" not in str(error.value) and "the checkpoint of step 9:" in str(error.value)
    assert len(list((tmp_path / "bad_batches").glob("*.safetensors"))) == LIMIT
    stopped, good = JaxEngine(run, tmp_path / "checkpoints"), tmp_path / "good"
    stopped.restore("latest")
    _, before = train(good, dataclasses.replace(run, train=dataclasses.replace(run.train, steps=3)))
    assert {k: v.tobytes() for k, v in jax.tree.map(np.asarray, stopped.params).items()} == {
        k: v.tobytes() for k, v in jax.tree.map(np.asarray, before.params).items()
    }
    more = dataclasses.replace(run, train=dataclasses.replace(run.train, max_skips=9))
    result, _ = train(tmp_path, more, bad)
    assert result.step == 20
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 21))


def test_a_resumed_run_stops_at_the_skip_at_which_it_would_have(tmp_path: Path, said: io.StringIO) -> None:
    """Two of three skips before a stop, the third after it: no further step is taken."""
    run, bad = run_of(steps=5, max_skips=3), frozenset(range(3, 9))
    train(tmp_path, run, bad)
    more = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=20))
    with pytest.raises(
        DivergedError, match="^3 steps in a row .*, the last of them 6: .* checkpoint of step 6:"
    ):
        train(tmp_path, more, bad)


def test_a_process_keeps_its_rows_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """Whose parent is not there yet."""
    lines: list[str] = []
    folder = tmp_path / "bad_batches" / "rows_0_to_1"
    skips = BadBatches(TrainConfig(), folder, lines.append)
    line = {"step": 7, "loss": float("nan"), "grad_norm": 1.0, "skipped": 1, "skips": 1, "skips_in_a_row": 1}
    skips.look(line, {"inputs": np.arange(4).reshape(2, 2)})
    assert load_file(folder / "step_7.safetensors")["inputs"].tolist() == [[0, 1], [2, 3]]
    assert len(lines) == 1 and not skips.reason


def test_signals_that_come_together_are_one_and_a_second_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler and a parent that passes it on; later it means: at once, with the signal's exit code."""
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with loop.Interrupts() as interrupts:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (interrupts.received, interrupts.name, left) == (1, "SIGTERM", [])
        time.sleep(loop.TOGETHER)
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [128 + signal.SIGINT]


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """Sets the largest size of a file, which stands in for a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or limits[1], limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_the_run_alive(tmp_path: Path, said: io.StringIO, full_disk: Any) -> None:
    """`continue`: the save of step 4 is missed with a line, that of step 2 stays, that of step 6 succeeds."""
    found: list[list[int]] = []

    def fill() -> None:
        if engine.step == 2:
            engine.wait()
            full_disk(3000)
        if engine.step == 4:
            assert (
                engine.checkpoints._pending.exception() is not None
            )  # it has failed, and the loop will be told
            found.append(engine.checkpoints.steps)
            full_disk(None)

    run = run_of(save_every=2)
    engine = JaxEngine(run, tmp_path / "checkpoints")
    result, _ = train(tmp_path, run, engine=engine, on_checkpoint=fill)
    assert result.step == 8 and found == [[2]]
    assert engine.checkpoints.steps == [6, 8]
    engine.checkpoints.verify(8)
    warnings = [line for line in said.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: checkpoint of step 4 was not written to ")


@pytest.mark.parametrize(("policy", "last"), [("continue", 8), ("stop", 4)])
def test_a_disk_that_stays_full_ends_with_one_line(
    tmp_path: Path, said: io.StringIO, full_disk: Any, policy: str, last: int
) -> None:
    """`continue` trains to the end and says that it is not saved; `stop` ends at the save that failed."""
    run = run_of(save_every=2, disk_full=policy)
    engine = JaxEngine(run, tmp_path / "checkpoints")

    def fill() -> None:
        if engine.step == 2:
            engine.wait()
            full_disk(3000)

    with pytest.raises(
        StoppedError, match="was not written .*disk full.* step 2 is intact; free some"
    ) as error:
        train(tmp_path, run, engine=engine, on_checkpoint=fill)
    assert "\n" not in str(error.value) and f"of step {last} was" in str(error.value)
    assert engine.checkpoints.steps == [2]
    engine.checkpoints.verify(2)
    warnings = [line for line in said.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == (3 if policy == "continue" else 0)


class Signalled(JaxEngine):
    """An engine that is told to stop in the middle of a validation or of a save."""

    moment = ""

    def _signal(self, moment: str) -> None:
        if moment == self.moment and self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(self, batches: Any) -> float:
        """Validates, with a signal before it."""
        self._signal("validation")
        return super().evaluate(batches)

    def save(self, extra: dict[str, Any], metric: float | None) -> None:
        """Saves, with a signal before it."""
        self._signal("save")
        super().save(extra, metric)


@pytest.mark.parametrize("moment", ["validation", "save"])
def test_a_signal_during_validation_or_save_loses_nothing(
    tmp_path: Path, said: io.StringIO, moment: str
) -> None:
    """The run ends in order after it, and goes on to the same bits as one that nobody stopped."""
    run = run_of(save_every=4, eval_every=4)
    engine = Signalled(run, tmp_path / "parts" / "checkpoints")
    engine.moment = moment
    result, _ = train(tmp_path / "parts", run, engine=engine)
    assert result.stopped_by == "SIGTERM" and result.step in (4, 5)
    assert engine.checkpoints.latest_step == result.step
    _, parts = train(tmp_path / "parts", run)
    _, whole = train(tmp_path / "whole", run)
    assert weights(parts) == weights(whole)


class AmongSeveral(JaxEngine):
    """One of several processes, of which some are asked to stop in step `agreed` at the latest."""

    agreed, signalled = 0, 0

    def train_step(self, batch: dict[str, np.ndarray], stop: bool = False) -> Any:
        """A step whose metrics say what all have said."""
        self.said = [*getattr(self, "said", []), stop]
        metrics = super().train_step(batch)
        if self.step == self.signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return {**metrics, "stop": np.int32(self.step == self.agreed)}


@pytest.mark.parametrize(("signalled", "name"), [(2, "SIGTERM"), (0, "a signal to another process")])
def test_one_of_several_stops_when_all_know_it(
    tmp_path: Path, said: io.StringIO, signalled: int, name: str
) -> None:
    """A signal of its own is passed on with the next step, and acted on in the step in which all read of it."""
    run = run_of()
    engine = AmongSeveral(run, tmp_path / "checkpoints")
    engine.rows, engine.agreed, engine.signalled = [0, 1], 4, signalled
    result, _ = train(tmp_path, run, engine=engine)
    assert (result.step, result.stopped_by) == (5, name)
    assert engine.said == [False, False, *[bool(signalled)] * 3]
    assert engine.checkpoints.latest_step == 5
    assert all("stop" not in row for row in read_metrics(tmp_path / "metrics.jsonl"))


def test_a_profile_of_some_steps_is_written(tmp_path: Path, said: io.StringIO) -> None:
    """Steps 2 to 5 of a short run, and a line that says where the trace is and how it is opened."""
    train(tmp_path, run_of(steps=6), profile=tmp_path / "profile")
    traces = list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))
    assert len(traces) == 1 and traces[0].stat().st_size > 100
    assert (
        f"profile of steps 2 to 5: open the perfetto_trace.json.gz below {tmp_path / 'profile'}"
        in said.getvalue()
    )


def test_the_log_has_every_step_once_after_a_stop(tmp_path: Path, said: io.StringIO) -> None:
    """What a stopped run logged beyond its checkpoint gives way; torn last lines too."""
    run = run_of(save_every=4)
    train(tmp_path, dataclasses.replace(run, train=dataclasses.replace(run.train, steps=4)))
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 5, "loss": 1.0}) + '\n{"step": 6, "lo')
    train(tmp_path, run)
    assert [row["step"] for row in read_metrics(log)] == list(range(1, 9))
