"""The figure of an ablation, drawn from ablation.json alone: loss curves, validation losses, and errors by layer."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.plots import GRID, HEAT, MUTED, STEP_TICKS, TEXT, PlotError, draw_all, needs_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Row = dict[str, Any]
WIDTH = 13.5  # inches
COLORS = ("#5aa9ff", "#ffb454", "#6bd6a8", "#f2789f", "#b78cf7", "#d7c66b", "#5ad1e0", "#ff8a5c")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
NAMED_CELLS = 20  # columns up to which a cell says its value
NAMED_TICKS = 40  # columns up to which each has its name


def plot_ablation(directory: Path) -> list[Path]:
    """Draws ablation.png beside a directory's ablation.json; returns the files that were written.

    Raises PlotError without matplotlib, or where ablation.json is missing or is none.
    """
    needs_matplotlib()
    directory = Path(directory)
    path = directory / "ablation.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        varying = [name for name, values in report["axes"].items() if len(values) > 1]
        rows, base = report["variants"], Path(str(report["base"])).name
        labels = [_label(row["settings"], varying) for row in rows]
        paint = partial(_ablation, base=base, labels=labels, rows=rows)
        return draw_all({"ablation": paint}, directory)
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise PlotError(f"{path} is not a report of an ablation") from None


def _label(settings: dict[str, Any], varying: Sequence[str]) -> str:
    """`xla · bfloat16 · lr 0.001`: words speak for themselves, numbers need their name."""

    def one(name: str) -> str:
        value = settings[name]
        text = str(value).lower() if isinstance(value, bool) else str(value)
        plain = isinstance(value, str) and value != "none"
        return text if plain else f"{name.rpartition('.')[2]} {text}"

    return " · ".join(map(one, varying))


def _ablation(figure: "Figure", base: str, labels: list[str], rows: list[Row]) -> None:
    """Curves and bars above, then a heat map of numerics and, where something was trained, one of weights."""
    others, own = range(1, len(rows)), [i for i, row in enumerate(rows) if i and row["trained_as"] == i]
    heats = [("activations", list(others))]
    if own and any(rows[i]["distances"] for i in own):
        heats.append(("distances", own))
    heights = [max(4.2, 1.6 + 0.3 * len(rows)), *(1.35 + 0.38 * len(chosen) for _, chosen in heats)]
    figure.set_size_inches(WIDTH, 0.7 + sum(heights))
    figure.suptitle(f"Ablation of {base}", x=0.012, ha="left", fontsize=17, fontweight="bold")
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    _above(parts[0], labels, rows, any("losses" in row for row in rows))
    for part, (kind, chosen) in zip(parts[1:], heats, strict=True):
        _heat(part, kind, [labels[i] for i in chosen], [rows[i][kind] or {} for i in chosen])


def _above(part: "SubFigure", labels: list[str], rows: list[Row], trained: bool) -> None:
    if not trained:
        _bars(part.subplots(), labels, rows)
        return
    left, right = part.subplots(1, 2, width_ratios=[1.25, 1])
    _curves(left, labels, rows)
    _bars(right, labels, rows)


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def _curves(axes: "Axes", labels: list[str], rows: list[Row]) -> None:
    """Training losses; the first drawn widest, so that curves that lie on each other are all seen."""
    from matplotlib.ticker import MaxNLocator

    shared = {row["trained_as"] for row in rows}
    for place, i in enumerate(sorted(shared)):
        losses = [math.nan if loss is None else loss for loss in rows[i]["losses"]]
        width = 1.4 + 4.0 * (1 - place / max(1, len(shared) - 1)) if len(shared) > 1 else 2.0
        marker = "o" if len(losses) == 1 else ""
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, linewidth=width, marker=marker, solid_capstyle="butt", **_style(i))
    alike = "" if len(shared) == len(rows) else "; variants that train alike share a curve"
    axes.set_title(f"Training loss{alike}", fontsize=14)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=STEP_TICKS))
    axes.margins(x=0.01)


def _bars(axes: "Axes", labels: list[str], rows: list[Row]) -> None:
    """Validation losses from zero, so that bars do not exaggerate; the number says what the eye cannot."""
    known = [row["val_loss"] for row in rows]
    longest = max((loss for loss in known if loss is not None), default=1.0)
    for i, (row, loss) in enumerate(zip(rows, known, strict=True)):
        axes.barh(i, loss or 0, height=0.62, color=_style(i)["color"])
        change = "" if i == 0 or row["change"] is None else f"  {row['change']:+.2g}"
        text = "diverged" if loss is None else f"{loss:.4f}{change}"
        axes.text((loss or 0) + 0.015 * longest, i, text, va="center", fontsize=11)
    axes.set_title("Validation loss, and its change", fontsize=14)
    axes.set_xlabel("nats per token")
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", length=0, labelcolor=TEXT)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.36 * longest)
    axes.grid(False, axis="y")


def _heat(part: "SubFigure", kind: str, labels: list[str], values: list[dict[str, float]]) -> None:
    """Rows are variants, columns the layers; an exact zero stays empty and says so."""
    from matplotlib.colors import LogNorm

    axes = part.subplots()
    names = list(dict.fromkeys(name for value in values for name in value))
    cells = [[value.get(name) for name in names] for value in values]
    positive = [cell for row in cells for cell in row if cell]
    low, high = (min(positive), max(positive)) if positive else (1e-8, 1.0)
    norm = LogNorm(low / 1.2, max(high * 1.2, low * 1.5))
    shown = [[cell if cell else math.nan for cell in row] for row in cells]
    image = axes.pcolormesh(shown, cmap=HEAT, norm=norm, edgecolors=GRID, linewidth=0.6)
    if len(names) <= NAMED_CELLS:
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                text = "–" if cell is None else "0" if cell == 0 else _power(cell)
                light = cell and norm(cell) > 0.6
                color = "#14171c" if light else TEXT if cell else MUTED
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9.5, color=color)
    title, unit = {
        "activations": ("Numerics: the first variant's weights, computed each way", "relative error"),
        "distances": (
            "Training: distance of the trained weights from the first variant's",
            "relative distance",
        ),
    }[kind]
    axes.set_title(title, fontsize=14)
    every = 1 if len(names) <= NAMED_TICKS else math.ceil(len(names) / NAMED_TICKS)
    ticks = range(0, len(names), every)
    axes.set_xticks(
        [i + 0.5 for i in ticks],
        [_short(names[i]) for i in ticks],
        rotation=30,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks([i + 0.5 for i in range(len(cells))], labels)
    axes.tick_params(length=0, labelsize=11, labelcolor=TEXT)
    axes.set_ylim(len(cells), 0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = part.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label(unit, fontsize=11)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=10)


def _short(name: str) -> str:
    """blocks.3.attn -> 3.attn, blocks.3 -> 3 out (what the block gives)."""
    if not name.startswith("blocks."):
        return name
    rest = name.removeprefix("blocks.")
    return rest if "." in rest else f"{rest} out"


def _power(value: float) -> str:
    """1.2e-7 in as few characters as can be read."""
    return f"{value:.2g}" if 0.01 <= value < 1000 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
