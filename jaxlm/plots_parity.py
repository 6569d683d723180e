"""Figures of a parity report, drawn from report.json alone: where errors are, and how far below their limits.

Zeros have a place of their own at the low end of every logarithmic axis, infinities at its high end. Colours: Paul
Tol's "light" set, which stays apart for colour-blind readers; the first that fails is ringed and named besides.
"""

import json
import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.plots import BACKGROUND, GRID, MUTED, SIZE, TEXT, Painter, PlotError, draw_all, needs_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND, FAIL, BOUND = "#1c222b", "#ff4d5e", "#e6e9ee"
JAX, TORCH, ORACLE = "#77aadd", "#ee8866", "#bbcc33"
# Kind of operation -> colour, and the activations and parameters of that kind; the first that matches counts.
KINDS = {
    "norm": ("#ffaabb", r"_norm\b"),
    "q, k, v": ("#77aadd", r"attn\.[qkv]\b|attn\.[qkv]_proj"),
    "scores, heads": ("#99ddff", r"attn\.(scores|heads|bias_table)"),
    "attention out": ("#44bb99", r"attn$|o_proj"),
    "router": ("#eedd88", r"moe\.(router|expert_ids|weights|kept)"),
    "experts": ("#ee8866", r"\bmoe\b"),
    "mlp": ("#bbcc33", r"\bmlp\b"),
    "logits, head": ("#e0a8ff", r"logits|lm_head|head_bias"),
    "embedding, residual": ("#dddddd", ""),
}
MARKERS = ("o", "D", "s", "^")  # by case of weights
NAMED = 44  # tensors up to which each has its name below the axis
WIDEST = 20.0  # inches
CELLS = "cividis"  # even in lightness, made for colour-blind readers


def plot_parity(directory: Path) -> list[Path]:
    """Draws plots/{activations,gradients,rungs,trajectory,faults}.png of a directory with a report.json.

    What the report does not hold is left out; returns the files that were written. Raises PlotError without
    matplotlib, or where report.json is missing or is none.
    """
    needs_matplotlib()
    directory = Path(directory)
    path = directory / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rungs = [rung for rung in report["rungs"] if rung["findings"]]
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise PlotError(f"{path} is not a parity report") from None
    painters: dict[str, Painter] = {}
    for name, title in (
        ("activations", "Error along the forward pass"),
        ("gradients", "Error along the backward pass"),
    ):
        if chosen := [rung for rung in rungs if rung["name"] == name]:
            painters[name] = partial(_along, rungs=chosen, title=f"{title}, {report['dtype']}")
    if rungs:
        painters["rungs"] = partial(_headroom, rungs=rungs)
    if report.get("curves", {}).get("loss_jax") and report["curves"].get("loss_torch"):
        painters["trajectory"] = partial(_trajectory, curves=report["curves"])
    if report.get("faults"):
        painters["faults"] = partial(_faults, faults=report["faults"])
    return draw_all(painters, directory / "plots")


class Span(NamedTuple):
    """A logarithmic axis of whole decades: 0 is drawn at `zero`, infinity and NaN at `infinity`."""

    zero: float
    infinity: float
    shows_zero: bool
    shows_infinity: bool

    def place(self, value: Any) -> float:
        """Where a value is drawn."""
        number = float(value)
        return self.infinity if not math.isfinite(number) else self.zero if number <= 0 else number


def _span(values: list[Any]) -> Span:
    numbers = [float(value) for value in values]
    finite = [x for x in numbers if math.isfinite(x) and x > 0] or [1e-16, 1.0]
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    has_zero, has_infinity = 0 in numbers, not all(map(math.isfinite, numbers))
    return Span(10.0 ** (low - 1), 10.0 ** (high + 1), has_zero, has_infinity)


def _scale(axes: "Axes", span: Span, along: str) -> None:
    """Makes an axis logarithmic over the span, with round ticks, and names the places of 0 and infinity."""
    low, high = (round(math.log10(x)) for x in (span.zero, span.infinity))
    stride = max(1, math.ceil((high - low) / (12 if along == "y" else 9)))
    ticks = {10.0**e: f"$10^{{{e}}}$" for e in range(low + 1, high) if e % stride == 0}
    ticks |= {span.zero: "0"} if span.shows_zero else {}
    ticks |= {span.infinity: "∞"} if span.shows_infinity else {}
    limits = (
        span.zero / 2 if span.shows_zero else span.zero * 3,
        span.infinity * (2 if span.shows_infinity else 0.3),
    )
    axis = axes.yaxis if along == "y" else axes.xaxis
    axes.set(**{f"{along}scale": "log", f"{along}lim": limits})
    axis.set_ticks(list(ticks), list(ticks.values()))
    axis.set_ticks([], minor=True)


def _kind(name: str) -> str:
    return next(kind for kind, (_, pattern) in KINDS.items() if re.search(pattern, name))


def _layer(name: str) -> str:
    match = re.match(r"blocks\.(\d+)", name)
    return match[1] if match else ""


class Point(NamedTuple):
    """One compared tensor in one case of weights."""

    x: float
    name: str
    error: Any  # of JAX: against PyTorch in float64, against float64 otherwise
    other: Any | None  # PyTorch's error against float64
    bound: float  # 0: none to draw
    passed: bool
    marker: str


def _points(rungs: list[dict[str, Any]]) -> list[Point]:
    names = list(dict.fromkeys(finding["name"] for rung in rungs for finding in rung["findings"]))
    place = {name: x for x, name in enumerate(names)}
    points = []
    for case, (rung, marker) in enumerate(zip(rungs, MARKERS * len(rungs))):
        aside = 0.36 * (case - (len(rungs) - 1) / 2)  # cases stand side by side, each above its own limit
        for finding in rung["findings"]:
            detail, value, bound = finding.get("detail", {}), float(finding["value"]), finding["limit"]
            error, other = finding["value"], None
            if "error_jax" in detail:  # value is the ratio of two errors: the bound is on the error of JAX
                error, other = detail["error_jax"], detail["error_torch"]
                bound = bound * float(error) / value if math.isfinite(value) and value > 0 else 0.0
            x = place[finding["name"]] + aside
            points.append(Point(x, finding["name"], error, other, bound, finding["passed"], marker))
    return points


def _along(figure: "Figure", rungs: list[dict[str, Any]], title: str) -> None:
    """Errors of tensors in the order in which they came to be, by kind of operation, layers as bands."""
    points = _points(rungs)
    names = list(dict.fromkeys(point.name for point in points))
    three = any(point.other is not None for point in points)
    named = len(names) <= NAMED
    figure.set_size_inches(
        min(WIDEST, max(SIZE[0] + 2.4, 4 + 0.07 * len(names))), SIZE[1] + (2.0 if named else 0.9)
    )
    axes = figure.subplots()
    every = [v for p in points for v in (p.error, p.other, p.bound or None) if v is not None]
    span = _span(every)
    _bands(axes, names, named)
    for point in points:
        _mark(axes, span, point)
    _scale(axes, span, "y")
    axes.set_title(title, pad=30)
    axes.set_ylabel("error against float64, relative" if three else "error, relative")
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.7, len(names) - 0.3)
    first = min((p for p in points if not p.passed), key=lambda p: p.x, default=None)
    if first is not None:
        axes.axvline(first.x, color=FAIL, linewidth=1.2, linestyle=(0, (3, 4)), zorder=1)
        ring = {"color": FAIL, "markerfacecolor": "none", "markeredgewidth": 2.2, "markersize": 17}
        axes.plot(first.x, span.place(first.error), "o", **ring, zorder=6)
        words = f"first over its limit: {first.name}"
        axes.set_xlabel(words, color=FAIL, loc="left", parse_math=False)
    _legend(axes, rungs, points, three)


def _bands(axes: "Axes", names: list[str], named: bool) -> None:
    """Every second layer on a lighter ground, its number above; tensor names below where they have room."""
    layers = [_layer(name) for name in names]
    known = sorted({int(layer) for layer in layers if layer})
    every = max(1, math.ceil(len(known) / 24))
    for layer in known:
        inside = [x for x, of in enumerate(layers) if of == str(layer)]
        if layer % 2 == 0:
            axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=BAND, linewidth=0, zorder=0)
        if layer % every == 0:
            label = f"layer {layer}" if len(known) <= 8 else str(layer)
            middle = (inside[0] + inside[-1]) / 2
            at = axes.get_xaxis_transform()
            axes.text(middle, 1.01, label, transform=at, ha="center", va="bottom", color=MUTED, fontsize=11)
    if not named:
        axes.set_xticks([])
        axes.set_xlabel("tensors in the order of execution; numbers above: layers")
        return
    short = [re.sub(r"^blocks\.\d+$", "block", re.sub(r"^blocks\.\d+\.", "", name)) for name in names]
    short = [name.removesuffix(".weight") for name in short]
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=9.5, parse_math=False)
    axes.tick_params(axis="x", length=0)


def _mark(axes: "Axes", span: Span, point: Point) -> None:
    """A filled mark for JAX, a hollow one for PyTorch, a dash for the limit, a red rim where it fails."""
    y = span.place(point.error)
    color = KINDS[_kind(point.name)][0]
    if point.bound > 0:
        half = 0.5 if point.other is None else 0.17
        axes.plot([point.x - half, point.x + half], [point.bound] * 2, color=BOUND, linewidth=1.3, zorder=2)
    if point.other is not None:
        other = span.place(point.other)
        axes.plot(point.x, other, point.marker, color=MUTED, markersize=6, markerfacecolor="none", zorder=3)
    over = {} if point.passed else {"markeredgecolor": FAIL, "markeredgewidth": 1.6, "zorder": 5}
    plain = {"color": color, "markersize": 6.5, "markeredgewidth": 0, "zorder": 4}
    axes.plot(point.x, y, point.marker, **(plain | over))


def _legend(axes: "Axes", rungs: list[dict[str, Any]], points: list[Point], three: bool) -> None:
    from matplotlib.lines import Line2D

    def mark(label: str, color: str, marker: str, **more: Any) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=color, label=label, markersize=7, **more)

    used = {_kind(point.name) for point in points}
    entries = [mark(kind, color, "s") for kind, (color, _) in KINDS.items() if kind in used]
    if len(rungs) > 1:
        entries += [mark(f"{r['case']} weights", MUTED, m) for r, m in zip(rungs, MARKERS * len(rungs))]
    if three:
        entries += [mark("JAX", TEXT, "o"), mark("PyTorch", MUTED, "o", markerfacecolor="none")]
    entries.append(Line2D([], [], color=BOUND, linewidth=1.3, label="limit of JAX" if three else "limit"))
    if not all(point.passed for point in points):
        entries.append(mark("over the limit", FAIL, "o", markerfacecolor="none", markeredgewidth=1.6))
    axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _headroom(figure: "Figure", rungs: list[dict[str, Any]]) -> None:
    """One bar per rung from its worst value to its limit: the longer, the more room; red where it is over."""
    figure.set_size_inches(SIZE[0] + 1.4, 1.9 + 0.34 * len(rungs))
    axes = figure.subplots()
    span = _span([x for rung in rungs for x in (rung["value"], rung["limit"])])
    for y, rung in enumerate(rungs):
        value, limit = span.place(rung["value"]), span.place(rung["limit"])
        color = JAX if rung["passed"] else FAIL
        if value != limit:
            axes.plot(
                [value, limit], [y, y], color=color, linewidth=7, alpha=0.55, solid_capstyle="butt", zorder=2
            )
        axes.plot(limit, y, "|", color=BOUND, markersize=15, markeredgewidth=2, zorder=3)
        axes.plot(value, y, "o" if rung["passed"] else "X", color=color, markersize=8, zorder=4)
        text = _orders(rung)
        axes.annotate(
            text,
            (max(value, limit), y),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            color=MUTED if rung["passed"] else FAIL,
        )
    labels = [rung["name"] + (f" [{rung['case']}]" if rung["case"] else "") for rung in rungs]
    axes.set_yticks(range(len(rungs)), labels, parse_math=False)
    axes.tick_params(axis="y", length=0)
    _scale(axes, span, "x")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.2)  # room for the words behind the bars
    axes.set_ylim(len(rungs) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_title("Headroom: from worst value (dot) to limit (tick)")
    axes.set_xlabel("error, or what the rung measures; log scale")


def _orders(rung: dict[str, Any]) -> str:
    value, limit = float(rung["value"]), float(rung["limit"])
    if value == 0:
        return "exact"
    if not math.isfinite(value) or limit == 0:
        return "over the limit"
    ratio = limit / value
    far = (
        f"{abs(math.log10(ratio)):.1f} orders"
        if not 0.1 < ratio < 10
        else f"{max(ratio, 1 / ratio):.2g} times"
    )
    return f"{far} {'below' if rung['passed'] else 'over'}"


def _trajectory(figure: "Figure", curves: dict[str, list[Any]]) -> None:
    """Losses of both frameworks above, and what is between them below, on a log axis."""
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches(SIZE[0] + 0.8, SIZE[1] + 1.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    losses = {name: [float(x) for x in values] for name, values in curves.items() if values}
    looks: dict[str, tuple[str, dict[str, Any]]] = {
        "loss_float64": ("PyTorch float64", {"color": ORACLE, "linewidth": 5, "alpha": 0.45}),
        "loss_jax": ("JAX", {"color": JAX, "linewidth": 3}),
        "loss_torch": ("PyTorch", {"color": TORCH, "linestyle": (0, (4, 3))}),
        "loss_jax_raw": ("JAX, routing not replayed", {"color": JAX, "linewidth": 1, "marker": "D"}),
        "loss_torch_raw": ("PyTorch, routing not replayed", {"color": TORCH, "linewidth": 1, "marker": "x"}),
    }
    for name, (label, look) in looks.items():
        if name in losses:
            every = max(1, len(losses[name]) // 25)
            steps = range(1, len(losses[name]) + 1)
            above.plot(steps, losses[name], label=label, markersize=4, markevery=every, **look)
    gaps = {
        "JAX and PyTorch": ("loss_jax", "loss_torch", TEXT, "o"),
        "JAX and float64": ("loss_jax", "loss_float64", JAX, "D"),
        "PyTorch and float64": ("loss_torch", "loss_float64", TORCH, "s"),
    }
    drawn = {
        label: ([_gap(a, b) for a, b in zip(losses[one], losses[two])], color, marker)
        for label, (one, two, color, marker) in gaps.items()
        if one in losses and two in losses
    }
    span = _span([gap for values, _, _ in drawn.values() for gap in values])
    for label, (values, color, marker) in drawn.items():
        places = [span.place(value) for value in values]
        below.plot(
            range(1, len(places) + 1),
            places,
            color=color,
            marker=marker,
            markersize=3.5,
            linewidth=1,
            label=label,
        )
    _scale(below, span, "y")
    above.set_title("Training: loss in both frameworks")
    above.set_ylabel("nats per token")
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    for axes in (above, below):
        axes.margins(x=0.02)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _gap(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a / b - 1) if b and math.isfinite(a) and math.isfinite(b) else math.inf


def _faults(figure: "Figure", faults: list[dict[str, Any]]) -> None:
    """How many planted faults of each kind each rung caught; those not located or not caught are told."""
    missed = "not caught"
    kinds = list(dict.fromkeys(str(fault["kind"]) for fault in faults))
    by = [str(fault["caught_by"]) if fault["caught"] else missed for fault in faults]
    columns = [name for name in dict.fromkeys(by) if name != missed] + ([missed] if missed in by else [])
    counts = Counter((str(fault["kind"]), rung) for fault, rung in zip(faults, by))
    lost = Counter(
        (str(f["kind"]), rung) for f, rung in zip(faults, by) if f["caught"] and not f.get("located", True)
    )
    figure.set_size_inches(max(SIZE[0], 3.4 + 0.75 * len(columns)), 2.7 + 0.5 * len(kinds))
    axes = figure.subplots()
    shares = [[counts[kind, rung] or math.nan for rung in columns] for kind in kinds]
    borders = [[i - 0.5 for i in range(len(names) + 1)] for names in (columns, kinds)]
    top = max(counts.values())
    axes.pcolormesh(*borders, shares, cmap=CELLS, vmin=0, vmax=top, edgecolors=BACKGROUND, linewidth=3)
    for (kind, rung), count in counts.items():
        x, y = columns.index(rung), kinds.index(kind)
        bad = rung == missed or lost[kind, rung] > 0
        if bad:
            box = {"boxstyle": "round,pad=0.3", "facecolor": BACKGROUND, "edgecolor": FAIL, "linewidth": 2}
        else:
            box = None
        words = f"{count}" if not lost[kind, rung] else f"{count}, {lost[kind, rung]} not located"
        dark = count > 0.55 * top and not bad
        size = 12 if len(words) < 4 else 8.5
        words = words.replace(", ", "\n")
        axes.text(
            x, y, words, ha="center", va="center", fontsize=size, color=BACKGROUND if dark else TEXT, bbox=box
        )
    axes.set_xticks(
        range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(range(len(kinds)), kinds, parse_math=False)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_color(GRID)
    found = sum(bool(fault["caught"]) for fault in faults)
    axes.set_title(f"Planted faults: {found} of {len(faults)} caught")
    axes.set_xlabel("caught by rung")
    axes.set_ylabel("kind of fault")
