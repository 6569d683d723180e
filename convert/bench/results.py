"""What the benchmark found: sides become rows, rows a table. Neither framework is loaded here."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convert.bench.timing import Spread
from jaxlm.disk import replace_text
from jaxlm.plots_benchmark import LESS_IS_BETTER

OURS = "jaxlm"
THEIRS = "torchref"  # sides of PyTorch are called torchref:HOW
Trace = Sequence[float] | Mapping[str, Sequence[float]]  # what was computed, in one part or in parts by name
UNITS = ("tokens/s", "GB/s", "TFLOP/s", "ms", "rel")


@dataclass(frozen=True)
class Measured:
    """One side of a case."""

    trace: Trace  # what it computed, in a few numbers, to be compared with the other sides
    times: Spread | None  # None where the case measures something else: its value is `value`
    value: float | None = None
    compile_seconds: float | None = None  # until the end of the first run
    cached: bool | None = None  # some of that was read from the compile cache
    peak_bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, made: Mapping[str, Any]) -> "Measured":
        """The inverse of `dataclasses.asdict` after a trip through JSON."""
        times = made["times"]
        return cls(**{**made, "times": None if times is None else Spread(*times)})


@dataclass(frozen=True)
class Facts:
    """What is known of a case before it is run."""

    name: str
    unit: str
    work: float  # units of one run: tokens, bytes, FLOPs; 1 for ms
    flops: float = 0.0  # of one run
    bytes: float = 0.0  # that one run moves at least
    peak: str = "float32"  # dtype whose peak the FLOPs are set against
    tolerance: float = 1e-4  # of the trace, relative
    about: str = ""

    def value(self, seconds: float) -> float:
        """Seconds of one run in the case's unit."""
        if self.unit == "ms":
            return 1e3 * seconds
        return self.work / seconds / {"GB/s": 1e9, "TFLOP/s": 1e12}.get(self.unit, 1.0)


def difference(one: Trace, other: Trace) -> float:
    """The largest difference of two traces, relative to the largest number of its part; infinite where they cannot be
    compared.
    """
    a, b = _parts(one), _parts(other)
    if a.keys() != b.keys():
        return math.inf
    return max((_apart(a[part], b[part]) for part in a), default=0.0)


def furthest(one: Trace, other: Trace) -> str:
    """The part that differs most, where there are several."""
    a, b = _parts(one), _parts(other)
    return max(a, key=lambda part: _apart(a[part], b.get(part, ())), default="")


def _parts(trace: Trace) -> Mapping[str, Sequence[float]]:
    return trace if isinstance(trace, Mapping) else {"": trace}


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    if len(one) != len(other) or not all(map(math.isfinite, (*one, *other))):
        return math.inf
    scale = max((abs(x) for x in (*one, *other)), default=0.0) or 1.0
    return max((abs(a - b) / scale for a, b in zip(one, other)), default=0.0)


def mismatch(facts: Facts, sides: Mapping[str, Measured]) -> str:
    """'' where all sides computed what ours did, else who did not and by how much."""
    if OURS not in sides:
        return ""
    found = {name: difference(sides[OURS].trace, side.trace) for name, side in sides.items()}
    wrong = [
        f"{name} by {d:.2g}"
        + (f" in {part}" if (part := furthest(sides[OURS].trace, sides[name].trace)) else "")
        for name, d in found.items()
        if not d <= facts.tolerance
    ]
    limit = f"(limit {facts.tolerance:.2g})"
    return f"not the same work: jaxlm's differs from {', '.join(wrong)} {limit}" if wrong else ""


def floor_seconds(facts: Facts, machine: Mapping[str, Any]) -> float:
    """The longer of FLOPs over peak and bytes over bandwidth; 0 where neither is known."""
    rate = machine.get("peak_flops", {}).get(facts.peak) or math.inf
    return max(facts.flops / rate, facts.bytes / (machine.get("bandwidth") or math.inf))


def make_row(
    facts: Facts,
    sides: Mapping[str, Measured],
    machine: Mapping[str, Any],
    problem: str = "",
) -> dict[str, Any]:
    """One object of results.json. Without a problem, sides that computed different things make one.

    `torchref` is the best of PyTorch's sides; `ratio` is above 1 where jaxlm is better, whatever the unit.
    """
    theirs = {name: side for name, side in sides.items() if name != OURS}
    ours = sides.get(OURS)
    differences = {
        name: difference(ours.trace, side.trace)
        for name, side in theirs.items()
        if ours is not None and (ours.trace or side.trace)
    }
    problem = problem or mismatch(facts, sides)
    values = {name: _value(facts, side) for name, side in sides.items()}
    known = {name: value for name, value in values.items() if value is not None and name != OURS}
    better = min if facts.unit in LESS_IS_BETTER else max
    best = better(known, key=lambda name: known[name]) if known else None
    mine, hers = values.get(OURS), known[best] if best else None
    if facts.unit == "rel" and differences:  # of curves: how far they are apart, whoever is right
        mine, hers, best = max(differences.values()), None, None
    if problem:
        mine = hers = best = None
    seconds = floor_seconds(facts, machine)
    row: dict[str, Any] = {
        "name": facts.name,
        "unit": facts.unit,
        "jaxlm": mine,
        "torchref": hers,
        "ratio": _ratio(facts.unit, mine, hers),
        "floor": facts.value(seconds) if seconds else None,
        "machine": machine.get("device", ""),
        "torchref_is": best,
        "problem": problem,
        "about": facts.about,
        "tolerance": facts.tolerance,
        "differences": {name: d if math.isfinite(d) else None for name, d in differences.items()},
    }
    if facts.flops and facts.unit != "rel":
        row["mfu"] = _mfu(facts, mine, machine)
    row["sides"] = {name: _told(facts, side) for name, side in sides.items()}
    return row


def _value(facts: Facts, side: Measured) -> float | None:
    return facts.value(side.times.median) if side.times else side.value


def _ratio(unit: str, mine: float | None, hers: float | None) -> float | None:
    if not mine or not hers:
        return None
    return hers / mine if unit in LESS_IS_BETTER else mine / hers


def _mfu(facts: Facts, mine: float | None, machine: Mapping[str, Any]) -> float | None:
    """Share of the peak that the work's FLOPs amount to; the work of a case in ms is 1."""
    rate = machine.get("peak_flops", {}).get(facts.peak)
    if not rate or not mine:
        return None
    seconds = mine / 1e3 if facts.unit == "ms" else facts.value(1.0) / mine
    return facts.flops / seconds / rate


def _told(facts: Facts, side: Measured) -> dict[str, Any]:
    told = asdict(side)
    times = told.pop("times")
    finite = {k: [x if math.isfinite(x) else None for x in v] for k, v in _parts(side.trace).items()}
    told["trace"] = finite if isinstance(side.trace, Mapping) else finite[""]
    told["value"] = _value(facts, side)
    told["seconds"] = None if times is None else times._asdict()
    return told


def failed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row that compared different work or ended with an error; skipped rows are none."""
    return [f"{row['name']}: {row['problem']}" for row in rows if row["problem"] and not row.get("skipped")]


def write_results(
    rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], out: Path, title: str
) -> None:
    """Writes results.json and results.md."""
    replace_text(out / "results.json", json.dumps(list(rows), indent=1, allow_nan=False) + "\n")
    replace_text(out / "results.md", "\n".join(table(rows, machine, title)) + "\n")


def table(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], title: str) -> list[str]:
    """The lines of results.md."""
    peaks = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in machine.get("peak_flops", {}).items() if v)
    bandwidth = machine.get("bandwidth")
    lines = [
        f"# {title}",
        "",
        f"{machine.get('device', '')}; {machine.get('versions', '')}; {machine.get('date', '')}.",
        f"Peaks ({machine.get('peak_source', 'unknown')}): {peaks or 'unknown'}"
        + (f"; memory {bandwidth / 1e9:.4g} GB/s." if bandwidth else "."),
        "",
        "Medians of interleaved rounds, in brackets the quartiles over the median and the rounds. Ratio: above 1 jaxlm "
        "is the better one. Floor: the longer of FLOPs over the peak and bytes over the bandwidth, in the case's unit. "
        "MFU: the work's FLOPs, attention causal, over the peak. torchref is the best of its sides, which is named. "
        "Memory and compilation: jaxlm / torchref; compilation is the first run, (kept) if ours is cached.",
        "",
        "| case | unit | jaxlm | torchref | ratio | floor | MFU | peak memory, GB | compile, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return [*lines, *(_line(row) for row in rows if not row["problem"]), *_left(rows), *_sides(rows)]


def _line(row: Mapping[str, Any]) -> str:
    ours, theirs = row["sides"].get(OURS), row["sides"].get(row["torchref_is"] or "")
    how = (row["torchref_is"] or "").partition(":")[2]
    cells = [
        row["name"],
        row["unit"],
        _with_spread(row["jaxlm"], ours),
        _with_spread(row["torchref"], theirs) + (f" {how}" if how else ""),
        _number(row["ratio"], ".2f"),
        _number(row["floor"]),
        _number(row.get("mfu"), ".1%"),
        _pair(ours, theirs, "peak_bytes", 1e-9),
        _pair(ours, theirs, "compile_seconds", 1.0) + (" (kept)" if ours and ours["cached"] else ""),
    ]
    return f"| {' | '.join(cells)} |"


def _left(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    left = [row for row in rows if row["problem"]]
    return ["", "Not measured:", "", *(f"- {row['name']}: {row['problem']}" for row in left)] if left else []


def _sides(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All ways of those cases that have more than two."""
    lines = []
    for row in rows:
        if len(row["sides"]) > 2 and not row["problem"]:
            told = (f"{name} {_with_spread(side['value'], side)}" for name, side in row["sides"].items())
            lines.append(f"- {row['name']}, {row['unit']}: {'; '.join(told)}")
    return ["", "All sides of the cases that have more than two:", "", *lines] if lines else []


def _with_spread(value: float | None, side: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    times = side and side["seconds"]
    if not times:
        return _number(value)
    spread = f"-{1 - times['low'] / times['median']:.0%} +{times['high'] / times['median'] - 1:.0%}"
    return f"{_number(value)} [{spread}, {times['rounds']}]"


def _pair(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None, key: str, scale: float) -> str:
    known = (side[key] if side else None for side in (ours, theirs))
    both = [_number(None if value is None else value * scale, ".3g") for value in known]
    return " / ".join(text or "?" for text in both) if any(both) else ""


def _number(value: float | None, form: str = "") -> str:
    if value is None:
        return ""
    return format(value, form or (",.0f" if abs(value) >= 1000 else ".4g"))
