"""The one training loop, for either framework: an `Engine` steps, validates and saves; the loop does the rest.

Step n is dispatched before step n-1's metrics are read, so the device never waits for the host. Every logged step is
one line of metrics.jsonl; a checkpoint is written with every validation; the first SIGINT or SIGTERM finishes the step,
saves and ends the run in order, the second leaves at once. Updates that the engine's guard skips are counted and their
batches kept; too many in a row save what there is and end the run.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm.bad_batches import BadBatches
from jaxlm.checkpoint_files import DiskFullError
from jaxlm.config import RunConfig
from jaxlm.metrics import Progress
from jaxlm.reporter import Reporter, host_values
from jaxlm.trace import Trace

HostBatch = dict[str, np.ndarray]
TOGETHER = 0.5  # seconds within which signals are one


@runtime_checkable
class Engine(Protocol):
    """One framework's side of training. Metrics may be lazy; reading them waits for the step."""

    @property
    def rows(self) -> list[int] | None:
        """Rows of every global batch that it is given, one of several processes; None = all, it is alone."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    def train_step(self, batch: HostBatch, stop: bool = False) -> Mapping[str, Any]:
        """One optimizer step. stop: whether this process was asked to; of several, all learn of it by a metric."""
        ...

    @property
    def evaluated(self) -> Mapping[str, float]:
        """What the last evaluation gave beside the loss, by name of the metric."""
        ...

    def evaluate(self, batches: Iterable[HostBatch]) -> float:
        """Mean loss over all batches: cross-entropy in nats per token, or of a pair of answers."""
        ...

    def save(self, extra: dict[str, Any], metric: float | None) -> None:
        """Writes a checkpoint of the current step, perhaps in the background; DiskFullError without room for it."""
        ...

    def wait(self, timeout: float | None = None) -> None:
        """Waits for a write under way, at most so many seconds; DiskFullError where there was no room for it."""
        ...

    def profile(self, folder: Path) -> AbstractContextManager[str]:
        """Records what runs in the context into a folder; yields how the record is opened."""
        ...


@runtime_checkable
class Loader(Protocol):
    """Batches in a fixed order, with a position that can be stored."""

    def __iter__(self) -> Iterator[HostBatch]: ...

    def __next__(self) -> HostBatch: ...

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        ...


class StoppedError(RuntimeError):
    """A run that had to end early; the message is one line that says why, and what there is to continue from."""


class DivergedError(StoppedError):
    """The loss or the gradients were not finite, or spikes, too often in a row."""


@dataclass
class Interrupts:
    """Counts SIGINT and SIGTERM while the loop runs: one asks to stop after the step, two leave at once.

    Those that come within half a second are one: a scheduler signals a process and its parent, which passes it on.
    """

    received: int = 0
    name: str = ""
    _last: float = -math.inf  # when, by the monotonic clock
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: signals stay with whoever owns it
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._last = time.monotonic() - self._last < TOGETHER, time.monotonic()
        if again:
            return
        self.received += 1
        self.name = signal.Signals(number).name
        if self.received > 1:
            os._exit(128 + number)


@dataclass
class Result:
    """How a run ended."""

    step: int
    loss: float
    val_loss: float
    best_val_loss: float
    seconds: float
    stopped_by: str  # '' = all steps done


@dataclass(frozen=True)
class Outputs:
    """Where a run puts what is neither a checkpoint nor a line of the log; None = nowhere."""

    bad_batches: Path | None = None  # folder for the batches of skipped updates
    profile: Path | None = None  # folder for a profiler's trace of a few steps
    on_checkpoint: Callable[[], None] | None = None  # called after every checkpoint (plots); may fail
    on_first_step: Callable[[], str] | None = None  # called when the first step runs; what it says is shown


def fit(
    run: RunConfig,
    engine: Engine,
    loader: Loader,
    validation: list[HostBatch],
    report: Reporter,
    best: float = math.inf,
    outputs: Outputs = Outputs(),
) -> Result:
    """Trains from `engine.step` to `run.train.steps`.

    Args:
        run: the loop's settings.
        engine: initialised or restored.
        loader: at the batch of the engine's next step.
        validation: batches of every validation.
        report: writes the log; its meter is paused for everything that is not training.
        best: lowest validation loss so far.
        outputs: where else something is written.

    Raises:
        DivergedError: `train.max_skips` updates in a row were skipped. The state is saved.
        StoppedError: a checkpoint found no room on the disk, and it was the last one or `train.disk_full` is stop.
    """
    started = time.perf_counter()
    with Progress(run.train.steps, engine.step) as bar, Interrupts() as interrupts:
        loop = _Loop(run, engine, loader, validation, report, best, outputs, bar)
        loop.run(interrupts)
    if loop.skips.reason:
        raise DivergedError(
            f"{loop.skips.reason}; the last good state is the checkpoint of step {engine.step}: look at the batches, "
            "then go on with --resume (--train.max-skips allows more); sound batches mean that the weights went bad "
            "before: start anew with a lower --optim.lr"
        )
    seconds, by = time.perf_counter() - started, interrupts.name or "a signal to another process"
    stopped = by if engine.step < run.train.steps else ""
    return Result(engine.step, report.loss, loop.val_loss, loop.best, seconds, stopped)


class _Loop:
    """What `fit` does between its first step and its last."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        loader: Loader,
        validation: list[HostBatch],
        report: Reporter,
        best: float,
        outputs: Outputs,
        bar: Progress,
    ) -> None:
        self.train, self.engine, self.loader, self.validation = run.train, engine, loader, validation
        self.report, self.outputs, self.bar = report, outputs, bar
        self.best, self.val_loss = best, math.nan
        self.saver = _Saver(engine, run.train.disk_full, bar.message)
        self.skips = BadBatches(run.train, outputs.bad_batches, bar.message)
        self.trace = Trace(engine.profile, outputs.profile, engine.step, run.train.steps, bar.message)
        self._pending: tuple[int, Mapping[str, Any], HostBatch] | None = (
            None  # dispatched and not yet reported
        )
        self._on_first_step = outputs.on_first_step
        # Whether any of several processes was asked to stop; None where there is only this one.
        self._shared_stop: bool | None = None if engine.rows is None else False

    def run(self, interrupts: Interrupts) -> None:
        """Steps until the last one, a signal, or too many skips; what is under way is on the disk then."""
        try:
            while self.engine.step < self.train.steps:
                self._step(interrupts.received > 0)
                self._say_once()
                step = self.engine.step
                evaluating = step % self.train.eval_interval == 0 or step == self.train.steps
                if self.skips.on_edge and not evaluating:
                    self._settle()
                    self._flush()
                # Asked once per step: a signal that comes later than this is the next step's, and nothing goes unsaved.
                asked = interrupts.received > 0 if self._shared_stop is None else self._shared_stop
                stopping = asked or bool(self.skips.reason)
                last = stopping or step == self.train.steps
                self.saver.check()
                if self.trace.ends(step) or last:
                    self._settle()
                    self.trace.stop(step)
                if evaluating or last or step % self.train.save_interval == 0:
                    self._checkpoint(evaluating)
                if stopping or self.skips.reason:
                    break
            self.saver.finish()
        finally:
            with suppress(Exception):  # whatever ended the run matters more than what a save met on the way
                self.engine.wait()

    def _step(self, asked: bool) -> None:
        batch = next(self.loader)
        if self.trace.starts(self.engine.step + 1):
            self._settle()
            self.trace.start()
        metrics = self.engine.train_step(batch, asked)
        self._flush()  # of the step before, while the device works on this one
        self._pending = (self.engine.step, metrics, batch)

    def _say_once(self) -> None:
        if self._on_first_step is not None:
            self.bar.message(self._on_first_step())
            self._on_first_step = None

    def _checkpoint(self, evaluating: bool) -> None:
        self._settle()
        with self.report.meter.paused():
            extra: dict[str, float] = {}
            if evaluating and self.validation:
                self.val_loss = self.engine.evaluate(self.validation)
                self.best = min(self.best, self.val_loss)
                extra = {"val_loss": self.val_loss, **self.engine.evaluated}
            self._flush(**extra)
            self.saver.save({"loader": self.loader.get_state(), "best": self.best}, extra.get("val_loss"))
            _after(self.outputs.on_checkpoint)

    def _settle(self) -> None:
        """Waits until the device has done what was dispatched."""
        if self._pending is not None:
            host_values({"loss": self._pending[1]["loss"]})

    def _flush(self, **extra: float) -> None:
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        if "stop" in metrics:
            self._shared_stop = bool(self._shared_stop) or int(metrics["stop"]) > 0
            metrics = {name: value for name, value in metrics.items() if name != "stop"}
        _, line = self.report(step, metrics, **extra)
        self.bar.update(step, line)
        self.skips.look(line, batch)


class _Saver:
    """Saves by the policy for full disks: `continue` says so and leaves it to the next save, `stop` ends the run."""

    def __init__(self, engine: Engine, disk_full: str, say: Callable[[str], None]) -> None:
        self._engine, self._stops, self._say = engine, disk_full == "stop", say
        self._missed = ""  # why there is no checkpoint of the newest save

    def save(self, extra: dict[str, Any], metric: float | None) -> None:
        """Starts a checkpoint, after the one under way."""
        self._try(self._engine.wait)
        self._missed = ""
        self._try(lambda: self._engine.save(extra, metric))

    def check(self) -> None:
        """Takes notice of a failure in the background, without waiting for anything."""
        self._try(lambda: self._engine.wait(0.0))

    def finish(self) -> None:
        """Waits. Raises StoppedError where the end of the run is not on the disk."""
        self._try(self._engine.wait)
        if self._missed:
            raise StoppedError(f"{self._missed}; free some space and go on with --resume")

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except DiskFullError as error:
            if self._stops:
                raise StoppedError(f"{error}; free some space and go on with --resume") from None
            self._missed = str(error)
            self._say(f"warning: {error}; training goes on, the next save tries again")


def _after(callback: Callable[[], None] | None) -> None:
    if callback is None:
        return
    try:
        callback()
    except Exception as error:  # a plot must never end a run
        print(f"after the checkpoint, plots or answers failed: {error}", flush=True)
