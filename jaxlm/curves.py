"""Curves out of metrics.jsonl: what stands on either axis, and long logs in few points. No matplotlib, no jax."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.config import InputError, nearest
from jaxlm.metrics import read_metrics

Row = dict[str, Any]
X = Literal["step", "tokens", "flops", "time"]
XLABELS: dict[str, str] = {
    "step": "step",
    "tokens": "tokens seen",
    "flops": "training FLOPs",
    "time": "hours of training",
}
POINTS = 1200  # of a curve; more do not show
LINES = 10_000  # of a log that are read for its curves


class Curve(NamedTuple):
    """A metric along a run. Of a long log, each point is the mean of the lines that fall on it."""

    x: list[float]
    y: list[float]
    low: list[float]  # least of the lines of a point
    high: list[float]
    last: float  # the metric's last value

    @property
    def thinned(self) -> bool:
        """Whether points stand for more than one line."""
        return self.low != self.high

    def mapped(self, of: Callable[[float], float]) -> "Curve":
        """The same curve in another unit, which `of` turns each value into."""
        return Curve(self.x, [*map(of, self.y)], [*map(of, self.low)], [*map(of, self.high)], of(self.last))


@dataclass(frozen=True)
class RunLog:
    """The lines of one run and what its curves are drawn over."""

    name: str
    rows: list[Row]
    x: X = "step"

    @classmethod
    def read(cls, run_dir: Path, x: X = "step") -> "RunLog":
        """The log of a run directory, about LINES lines of a longer one, so that drawing it stays quick.

        Raises MetricsError where metrics.jsonl is missing or damaged.
        """
        run_dir = Path(run_dir)
        return cls(run_dir.resolve().name, read_metrics(run_dir / "metrics.jsonl", LINES), x)

    def has(self, key: str) -> bool:
        """Whether any line has a value of `key`."""
        return any(row.get(key) is not None for row in self.rows)

    @cached_property
    def keys(self) -> list[str]:
        """Metrics that are numbers, in the order in which they first appear."""
        found: dict[str, None] = {}
        for row in self.rows:
            if not row.keys() <= found.keys():
                found |= {k: None for k, v in row.items() if isinstance(v, (int, float))}
        return [key for key in found if key != "step"]

    def groups(self, key: str) -> list[str]:
        """Groups of parameters that `key` is known of: of grad_norm/head, `head`."""
        start = key + "/"
        return [name.removeprefix(start) for name in self.keys if name.startswith(start)]

    @cached_property
    def positions(self) -> list[float]:
        """Where each line stands on the x axis; NaN where it does not say.

        Hours of training are tokens by tokens per second, so pauses (validation, checkpoints, nights) do not count.
        """
        if self.x != "time":
            return [math.nan if row.get(self.x) is None else float(row[self.x]) for row in self.rows]
        rates = [row.get("tokens_per_second") for row in self.rows]
        known = next((rate for rate in rates if rate), None)
        hours, tokens, found = 0.0, 0, []
        for row, rate in zip(self.rows, rates):
            known = rate or known
            seen = row.get("tokens")
            if known is None or seen is None:
                found.append(math.nan)
                continue
            hours += (seen - tokens) / known / 3600
            tokens = seen
            found.append(hours)
        return found

    def series(self, key: str) -> tuple[list[float], list[Any]]:
        """Positions and values of the lines that have `key`."""
        pairs = [
            (x, row[key])
            for x, row in zip(self.positions, self.rows)
            if row.get(key) is not None and not math.isnan(x)
        ]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def curve(self, key: str, points: int = POINTS) -> Curve:
        """The metric `key` in at most so many points. Lines that are not finite break the curve."""
        xs, ys = self.series(key)
        return thin(xs, [float(y) for y in ys], points)


def thin(xs: Sequence[float], ys: Sequence[float], points: int) -> Curve:
    """A curve in at most so many points, each the mean of equally many neighbours; the last point is the last line.

    Values that are not finite are left out of the mean, and where all of a point's are, the curve is broken.
    """
    if not xs:
        return Curve([], [], [], [], math.nan)
    each = math.ceil(len(xs) / points)
    parts = [range(i, min(i + each, len(xs))) for i in range(0, len(xs), each)]
    finite = [[ys[i] for i in part if math.isfinite(ys[i])] for part in parts]
    return Curve(
        x=[xs[part[-1]] for part in parts],
        y=[sum(part) / len(part) if part else math.nan for part in finite],
        low=[min(part, default=math.nan) for part in finite],
        high=[max(part, default=math.nan) for part in finite],
        last=ys[-1],
    )


def find_run(text: str) -> Path:
    """The run directory that `text` names: a path, or a name in runs/.

    Raises InputError, which names the nearest run, where there is none.
    """
    path = Path(text)
    for found in (path, Path("runs") / text):
        if (found / "metrics.jsonl").is_file():
            return found
    if path.is_dir():
        raise InputError(f"{path} is not the directory of a run: it has no metrics.jsonl")
    folders = [path.parent, *([Path("runs")] if path.parent == Path() else [])]
    known = [str(log.parent) for folder in folders for log in sorted(folder.glob("*/metrics.jsonl"))]
    named = {Path(run).name: run for run in known}
    close = nearest(path.name, named)
    for name, run in named.items():
        close = close.replace(repr(name), repr(run))
    raise InputError(f"there is no run {text!r}{close}")


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as it takes to tell all apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
