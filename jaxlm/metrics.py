"""What a run reports: metrics.jsonl, the progress bar, and the meters behind both. No jax here.

`metrics.jsonl` has one JSON object per logged step, every step once, however often the run was stopped and
resumed.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from jaxlm.cli import say
from jaxlm.config import InputError
from jaxlm.disk import is_full, replace_text

PLAIN_INTERVAL = 30.0  # seconds between lines where there is no terminal

# Keys that say how fast and on what a step ran; all others are the same, bit by bit, however often a run was stopped.
VOLATILE = ("tokens_per_second", "mfu", "peak_memory_bytes")

# Dense bfloat16 FLOP/s of one device by a part of its name in JAX; the makers' data sheets, without sparsity.
PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "TPU v6 lite": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v4": 275e12,
}


class MetricsError(InputError):
    """A metrics file that cannot be used; the message is one line that says which and why."""


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token; infinity beyond what float64 holds."""
    return math.exp(loss) if loss < 709 else math.inf if not math.isnan(loss) else math.nan


def bits_per_byte(loss: float, bytes_per_token: float | int) -> float:
    """A loss in nats per token, divided by ln 2 and by the bytes of text a token stands for on average."""
    return loss / math.log(2) / bytes_per_token


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device in `dtype` by `jax.Device.device_kind`; None where it is not known.

    In float16 the GPUs of the table are as fast as in bfloat16; TPUs have no float16.
    """
    if dtype != "bfloat16" and (dtype != "float16" or "TPU" in device_kind):
        return None
    return next((peak for name, peak in PEAK_BF16.items() if name in device_kind), None)


def mfu(tokens_per_second: float, flops_per_token: float | int, peak: float | None) -> float | None:
    """Model FLOP utilisation in [0, 1]: FLOPs the model needs over `peak`, FLOP/s of all devices together.

    Definition of Chowdhery et al. 2022, appendix B (PaLM): recomputation does not count. None where the peak
    is unknown.
    """
    return None if peak is None else tokens_per_second * flops_per_token / peak


class Throughput:
    """Tokens per second of training alone: neither the first step (it compiles) nor anything `paused` counts.

    Steps run asynchronously: wait for a result of the last one before asking for the rate and before
    `paused`, else its time counts for the next window, or for none.
    """

    def __init__(self, tokens_per_step: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.tokens_per_step = tokens_per_step
        self._clock = clock
        self._since: float | None = None  # start of the window, moved on by every pause
        self._paused_at: float | None = None
        self._steps = 0

    def tick(self) -> None:
        """Counts a step. The first call starts the clock instead."""
        if self._since is None:
            self._since = self._now()
        else:
            self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (validation, checkpoint, plots) does not count; asking for the rate inside is fine."""
        self._paused_at = start = self._clock()
        try:
            yield
        finally:
            self._paused_at = None
            if self._since is not None:
                self._since += self._clock() - start

    def tokens_per_second(self) -> float | None:
        """The rate since it was last asked for, and a new window; None before a step beyond the first."""
        if self._since is None:
            return None
        now = self._now()
        elapsed, steps = now - self._since, self._steps
        self._since, self._steps = now, 0
        return steps * self.tokens_per_step / elapsed if steps and elapsed > 0 else None

    def _now(self) -> float:
        return self._clock() if self._paused_at is None else self._paused_at


def read_metrics(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; of a long one about `most`, evenly chosen, and all with a validation or a skip.

    A last line cut short by a kill is left out; MetricsError on any other damage.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise MetricsError(f"{path}: {error.strerror}") from None
    lines.pop()  # what follows the last newline was not written to its end
    stride = 1 if most is None else math.ceil(max(1, len(lines) / most))
    rows = []
    for number, line in enumerate(lines, start=1):
        if (len(lines) - number) % stride and b'"val_loss"' not in line and b'"skipped": 1' not in line:
            continue
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"])} | {key: _decoded(value) for key, value in row.items()})
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise MetricsError(
                f"{path}: line {number} is not a JSON object with a step; mend or delete it"
            ) from None
    return rows


class JsonlSink:
    """Appends to metrics.jsonl; usable as a context manager.

    Where the disk is full, lines wait in memory until there is room, so that a run can outlast it.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """`resume_step` is the step the state was restored from: later lines are cut, they will be written
        again.

        None starts a new file, and raises MetricsError if there is one already.
        """
        self.path = Path(path)
        self._last = -1
        if resume_step is None and self.path.exists() and self.path.stat().st_size:
            raise MetricsError(f"{self.path} exists already; resume its run or write to another directory")
        if resume_step is not None and self.path.exists():
            self._cut(resume_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._size = self.path.stat().st_size
        self._waiting, self._full = b"", False

    def _cut(self, step: int) -> None:
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        self._last = max((row["step"] for row in rows), default=-1)
        replace_text(self.path, "".join(_line(row) for row in rows))

    def write(self, row: Mapping[str, Any]) -> None:
        """One line of `step` and whatever else is known of it (numbers, strings, arrays, lists, None).

        Floats keep every bit. What JSON has no number for is written as the strings NaN, Infinity and
        -Infinity, which `read_metrics` turns back. Raises MetricsError if the step is not beyond the last
        one.
        """
        step = int(row["step"])
        if step <= self._last:
            raise MetricsError(
                f"{self.path}: step {step} is not beyond step {self._last}, the last one written"
            )
        self._waiting += _line(row).encode()
        self._last = step
        self._drain()

    def close(self) -> None:
        """Closes the file."""
        self._drain()
        if self._waiting:
            lines = self._waiting.count(b"\n")
            say(f"warning: {self.path} lacks its last {lines} lines: there was no room for them")
        self._file.close()

    def _drain(self) -> None:
        """Writes all lines that wait, or none of them."""
        data, done = memoryview(self._waiting), 0
        try:
            while done < len(data):
                done += self._file.write(data[done:]) or 0
        except OSError as error:
            if not is_full(error):
                raise
            self._file.truncate(self._size)
            if not self._full:
                say(f"warning: {self.path}: {error.strerror}; its lines wait in memory until there is room")
            self._full = True
            return
        self._size, self._waiting, self._full = self._size + done, b"", False

    def __enter__(self) -> "JsonlSink":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _encoded(value) for key, value in row.items()}, allow_nan=False) + "\n"


def _encoded(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and jax, without importing either; numbers widen exactly
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_encoded(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(v) for v in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def short(number: float | int) -> str:
    """A count in four characters or so: 950, 12.3k, 4.56M, 1.20B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


class Progress:
    """A bar with losses, speed and time left on standard error; without a terminal a plain line now and then."""

    def __init__(self, total_steps: int, start: int = 0, console: Console | None = None) -> None:
        """`start` is the number of steps done before this process, `console` a rich one in place of standard
        error.
        """
        self.total, self.start = total_steps, start
        self._console = console or Console(stderr=True)
        self._began = self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._shown: dict[str, Any] = {}
        self._bar: RichProgress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = bar = RichProgress(
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self._console,
                expand=True,
            )
            self._task = bar.add_task("compiling", total=total_steps, completed=start)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Shows that `step` steps are done; values of `metrics` stay until newer ones come."""
        fresh = dict(metrics or {})
        self._shown |= fresh
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._summary(step, now))
            return
        due = now - self._printed >= PLAIN_INTERVAL or step == self.total or "val_loss" in fresh
        if due or (self._printed == self._began and fresh):
            self._printed = now
            self.message(f"step {step}/{self.total}  {self._summary(step, now)}")

    def message(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        (self._bar.console if self._bar is not None else self._console).print(
            text, markup=False, highlight=False, soft_wrap=True
        )

    def _summary(self, step: int, now: float) -> str:
        parts = []
        if (loss := self._shown.get("loss")) is not None:
            parts.append(f"loss {float(loss):.3f}")
        if (loss := self._shown.get("val_loss")) is not None:
            parts.append(f"val {float(loss):.3f}")
        if (rate := self._shown.get("tokens_per_second")) is not None:
            parts.append(f"{short(float(rate))} tok/s")
        if (share := self._shown.get("mfu")) is not None:
            parts.append(f"mfu {100 * float(share):.0f} %")
        if skips := self._shown.get("skips"):
            parts.append(f"{int(skips)} skipped")
        if step >= self.total:
            parts.append(f"{_clock(now - self._began)} in all")
        elif self._first is None or step <= self._first[0]:
            self._first = (step, now)  # the step before it compiled: its time says nothing of those to come
        else:
            pace = (now - self._first[1]) / (step - self._first[0])
            parts.append(f"{_clock(pace * (self.total - step))} left")
        return "  ".join(parts) or "compiling"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
