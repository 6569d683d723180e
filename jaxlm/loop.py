"""The one training loop, for either framework: an `Engine` steps, validates and saves; the loop does the rest.

Step n is dispatched before step n-1's metrics are read, so the device never waits for the host. Every logged step is
one line of metrics.jsonl; a checkpoint is written with every validation; the first SIGINT or SIGTERM finishes the step,
saves and ends the run in order, the second leaves at once.
"""

import math
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm.config import RunConfig
from jaxlm.metrics import JsonlSink, Progress, Throughput, mfu

HostBatch = dict[str, np.ndarray]


@runtime_checkable
class Engine(Protocol):
    """One framework's side of training. Metrics may be lazy; reading them waits for the step."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    def train_step(self, batch: HostBatch) -> Mapping[str, Any]:
        """One optimizer step."""
        ...

    def evaluate(self, batches: Iterable[HostBatch]) -> float:
        """Mean cross-entropy in nats per token over all batches."""
        ...

    def save(self, extra: dict[str, Any], metric: float | None) -> None:
        """Writes a checkpoint of the current step."""
        ...

    def close(self) -> None:
        """Waits for writes under way."""
        ...


@runtime_checkable
class Loader(Protocol):
    """Batches in a fixed order, with a position that can be stored."""

    def __iter__(self) -> Iterator[HostBatch]: ...

    def __next__(self) -> HostBatch: ...

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        ...


class DivergedError(RuntimeError):
    """The loss is not finite; the message names the step."""


@dataclass
class Interrupts:
    """Counts SIGINT and SIGTERM while the loop runs: one asks to stop after the step, two leave at once."""

    received: int = 0
    name: str = ""
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


def fit(
    run: RunConfig,
    engine: Engine,
    loader: Loader,
    validation: list[HostBatch],
    sink: JsonlSink,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
    best: float = math.inf,
    on_checkpoint: Any = None,
) -> Result:
    """Trains from `engine.step` to `run.train.steps`. Raises DivergedError when the loss is not finite.

    on_checkpoint: called without arguments after every checkpoint (plots); its failure never ends a run.
    """
    train, started = run.train, time.perf_counter()
    meter = Throughput(train.batch_size * train.seq_len)
    report = _Reporter(run, sink, meter, flops_per_token, peak_flops)
    val_loss, pending = math.nan, None
    with Progress(train.steps, engine.step) as bar, Interrupts() as interrupts:
        while engine.step < train.steps:
            metrics = engine.train_step(next(loader))
            if pending is not None:
                bar.update(*report(*pending))
            pending = (engine.step, metrics)
            # Asked once per step: a signal that comes later than this is the next step's, and nothing goes unsaved.
            step, stopping = engine.step, interrupts.received > 0
            evaluating, saving = step % train.eval_interval == 0, step % train.save_interval == 0
            if not (evaluating or saving or stopping or step == train.steps):
                continue
            _plain(metrics["loss"])  # the step ends before the clock stops
            with meter.paused():
                extra = {}
                if (evaluating or step == train.steps) and validation:
                    val_loss = engine.evaluate(validation)
                    best, extra = min(best, val_loss), {"val_loss": val_loss}
                bar.update(*report(*pending, **extra))
                pending = None
                engine.save({"loader": loader.get_state(), "best": best}, extra.get("val_loss"))
                _after(on_checkpoint)
            if stopping:
                break
        engine.close()
    seconds, stopped = time.perf_counter() - started, interrupts.name if engine.step < train.steps else ""
    return Result(engine.step, report.loss, val_loss, best, seconds, stopped)


class _Reporter:
    """Turns a step's metrics into one line of the log. Blocks until the step is done."""

    RATE_STEPS = 10  # steps a tokens/s figure is averaged over

    def __init__(
        self, run: RunConfig, sink: JsonlSink, meter: Throughput, flops: float | None, peak: float | None
    ):
        self.run, self.sink, self.meter, self.flops, self.peak = run, sink, meter, flops, peak
        self.loss, self.rate, self.steps = math.nan, None, 0

    def __call__(self, step: int, metrics: Mapping[str, Any], **extra: float) -> tuple[int, dict[str, Any]]:
        values = {name: _plain(value) for name, value in metrics.items()}
        self.loss = values["loss"]
        if not math.isfinite(self.loss):
            raise DivergedError(
                f"loss is {self.loss} at step {step}; lower --optim.lr or resume an earlier checkpoint"
            )
        tokens = self.run.train.batch_size * self.run.train.seq_len
        self.meter.tick()
        self.steps += 1
        if self.rate is None or self.steps % self.RATE_STEPS == 0:
            self.rate = self.meter.tokens_per_second() or self.rate
        line = {"step": step, "tokens": step * tokens} | values | {"tokens_per_second": self.rate}
        if self.flops and self.peak and self.rate:
            line["mfu"] = mfu(self.rate, self.flops, self.peak)
        line |= extra
        if step % self.run.train.log_every == 0 or extra:
            self.sink.write(line)
        return step, line


def _plain(value: Any) -> Any:
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu().numpy()
    return np.asarray(value).tolist()


def _after(callback: Any) -> None:
    if callback is None:
        return
    try:
        callback()
    except Exception as error:  # a plot must never end a run
        print(f"plots were not drawn: {error}", flush=True)
