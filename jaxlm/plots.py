"""Figures of a run, and the style of all figures; only this file and plots_parity.py import matplotlib.

Reads metrics.jsonl and baselines.json, draws, computes nothing but axes.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import InputError
from jaxlm.metrics import perplexity, read_metrics, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (9.6, 5.4)  # inches; 1536 x 864 pixels
DPI = 160
BACKGROUND, GRID, TEXT, MUTED = "#14171c", "#2b313a", "#e6e9ee", "#9aa4b2"
TRAIN, VALIDATION = "#5aa9ff", "#ffb454"
BASELINES = ("#8f9bab", "#b78cf7", "#6bd6a8", "#f2789f", "#d7c66b")
HEAT = "viridis"
STYLE: dict[Any, Any] = {
    "figure.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 17,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.labelsize": 13,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "text.color": TEXT,
    "font.size": 12,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 12,
    "figure.constrained_layout.w_pad": 0.16,
    "figure.constrained_layout.h_pad": 0.16,
}

STEP_TICKS = [1, 2, 2.5, 5, 10]  # leading digits of round steps
DENSE = 200  # points from which a curve is drawn thin

Row = dict[str, Any]
Painter = Callable[["Figure"], None]  # draws into an empty figure of SIZE, which it may resize


class PlotError(InputError):
    """Nothing could be drawn; the message is one line that says why."""


def plot_run(run_dir: Path) -> list[Path]:
    """Draws plots/{loss,perplexity,learning_rate,throughput,tokens_seen,expert_load}.png of a run directory.

    What the metrics do not hold is left out; returns the files that were written. Raises PlotError without
    matplotlib and jaxlm.metrics.MetricsError without metrics.
    """
    needs_matplotlib()
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    baselines = _baselines(run_dir / "baselines.json")
    painters: dict[str, Painter] = {}
    if _has(rows, "loss") or _has(rows, "val_loss"):
        painters["loss"] = partial(_loss, rows=rows, baselines=baselines)
        painters["perplexity"] = partial(_perplexity, rows=rows, baselines=baselines)
    for name, key, title, unit in (
        ("learning_rate", "lr", "Learning rate", ""),
        ("throughput", "tokens_per_second", "Throughput", "tokens per second"),
        ("tokens_seen", "tokens", "Tokens seen", "tokens"),
    ):
        if _has(rows, key):
            painters[name] = partial(_single, rows=rows, key=key, title=title, unit=unit)
    if _has(rows, "expert_load"):
        painters["expert_load"] = partial(_expert_load, rows=rows)
    return draw_all(painters, run_dir / "plots")


def needs_matplotlib() -> None:
    """Raises PlotError, which names the extra to install, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise PlotError("plots need matplotlib; install it with pip install 'jaxlm[plots]'") from None


def draw_all(painters: dict[str, Painter], folder: Path) -> list[Path]:
    """Draws <name>.png of each painter into a folder in the house style; returns the files."""
    import matplotlib

    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        return [_draw(paint, folder / f"{name}.png") for name, paint in painters.items()]


def _draw(paint: Painter, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    paint(figure)
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, format="png", dpi=DPI)
    os.replace(unfinished, path)  # an image viewer never sees half a file
    return path


def _baselines(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(nats) for name, nats in values.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError, ValueError):
        raise PlotError(f'{path} is not a JSON object of losses in nats, like {{"bigram": 5.1}}') from None


def _has(rows: list[Row], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _series(rows: list[Row], key: str) -> tuple[list[int], list[Any]]:
    known = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in known], [row[key] for row in known]


def _axes(figure: "Figure", title: str, ylabel: str) -> "Axes":
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=STEP_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.margins(x=0.01)
    return axes


def _curves(
    axes: "Axes", rows: list[Row], baselines: dict[str, float], of_loss: Callable[[float], float]
) -> None:
    """Train and validation over steps, baselines as dashed lines; the legend tells the last values."""
    train_steps, train = _series(rows, "loss")
    val_steps, val = _series(rows, "val_loss")
    for steps, losses, name, color, marker in (
        (train_steps, train, "train", TRAIN, ""),
        (val_steps, val, "validation", VALIDATION, "o"),
    ):
        if losses:
            values = [of_loss(loss) for loss in losses]
            marker = marker or ("o" if len(values) == 1 else "")
            width = 1.1 if len(values) > DENSE else 2.0
            label = f"{name}  {_value(values[-1])}"
            axes.plot(steps, values, color=color, marker=marker, markersize=5, linewidth=width, label=label)
    for i, (name, nats) in enumerate(sorted(baselines.items(), key=lambda item: -item[1])):
        value, color = of_loss(nats), BASELINES[i % len(BASELINES)]
        label = f"{name}  {_value(value)}"
        axes.axhline(value, color=color, linestyle=(0, (6, 4)), linewidth=1.5, label=label)
    if baselines:  # their lines cross the whole plot, so the legend goes beside it
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    else:
        axes.legend(loc="upper right")


def _value(number: float) -> str:
    return f"{number:.4g}" if number < 1000 else short(number)


def _loss(figure: "Figure", rows: list[Row], baselines: dict[str, float]) -> None:
    _curves(_axes(figure, "Loss", "nats per token"), rows, baselines, lambda loss: loss)


def _perplexity(figure: "Figure", rows: list[Row], baselines: dict[str, float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = _axes(figure, "Perplexity", "exp(loss), log scale")
    axes.set_yscale("log")
    _curves(axes, rows, baselines, perplexity)
    low, high = axes.get_ylim()
    subs = (
        (1.0,)
        if math.log10(high / low) > 3
        else (1.0, 2.0, 5.0)
        if math.log10(high / low) > 0.7
        else range(1, 10)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=tuple(map(float, subs)), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _single(figure: "Figure", rows: list[Row], key: str, title: str, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axes = _axes(figure, title, unit)
    steps, values = _series(rows, key)
    width = 1.1 if len(values) > DENSE and key == "tokens_per_second" else 2.0
    axes.plot(steps, values, color=TRAIN, marker="o" if len(values) == 1 else "", linewidth=width)
    axes.set_ylim(bottom=0)
    if unit:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def _expert_load(figure: "Figure", rows: list[Row]) -> None:
    """One heat map per MoE layer: steps to the right, experts down, colour = share of the tokens' choices."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps, loads = _series(rows, "expert_load")
    layers, experts = len(loads[-1]), len(loads[-1][0])
    columns = min(layers, 1 if layers == 1 else 2 if layers <= 6 else 4)
    height = max(SIZE[1], 1.0 + 1.9 * math.ceil(layers / columns))
    figure.set_size_inches(SIZE[0], height)
    grid = figure.subplots(math.ceil(layers / columns), columns, sharex=True, sharey=True, squeeze=False)
    top = max(max(map(max, load)) for load in loads)
    first = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else steps[0] - 1
    edges = [first, *steps]  # a cell ends at its step: it stands for the steps since the line before
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_visible(False)
            continue
        shares = [[load[layer][expert] for load in loads] for expert in range(experts)]
        borders = [expert - 0.5 for expert in range(experts + 1)]
        image = axes.pcolormesh(edges, borders, shares, cmap=HEAT, vmin=0.0, vmax=top)
        axes.grid(False)
        axes.set_title(f"MoE layer {layer}", fontsize=13, pad=6)
        axes.set_ylim(experts - 0.5, -0.5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=STEP_TICKS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    figure.suptitle("Expert load", x=0.01, ha="left", fontsize=17, fontweight="bold")
    figure.supxlabel("step", fontsize=13, color=MUTED)
    figure.supylabel("expert", fontsize=13, color=MUTED)
    bar = figure.colorbar(image, ax=grid, shrink=0.9, pad=0.02)
    bar.set_label(f"share of routed tokens (balanced: {1 / experts:.3g})", fontsize=12)
    bar.outline.set_visible(False)
