"""The figure of a benchmark, drawn from results.json alone: ratios, and how near both frameworks are to the limit."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.plots import LIGHT, TEXT, TRAIN, VALIDATION, PlotError, draw_all, needs_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, PER_ROW = 13.5, 0.34  # inches
LESS_IS_BETTER = ("ms",)


def plot_benchmark(directory: Path) -> list[Path]:
    """Draws results.png beside a directory's results.json; returns the files that were written.

    Raises PlotError without matplotlib, or where results.json is missing, is none, or holds nothing that was measured.
    """
    needs_matplotlib()
    path = Path(directory) / "results.json"
    try:
        rows = [r for r in json.loads(path.read_text(encoding="utf-8")) if r["jaxlm"] and r["unit"] != "rel"]
        shown = [(str(r["name"]), r["ratio"], _share(r, "jaxlm"), _share(r, "torchref")) for r in rows]
        machine = str(rows[0]["machine"]) if rows else ""
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise PlotError(f"{path} is not a benchmark's results") from None
    if not shown:
        raise PlotError(f"{path} holds nothing that was measured")
    return draw_all({"results": lambda figure: _draw(figure, shown, machine)}, Path(directory))


def _share(row: dict[str, Any], side: str) -> float | None:
    """How much of what the floor allows is reached, in percent."""
    value, floor = row[side], row["floor"]
    if not value or not floor:
        return None
    return 100 * (floor / value if row["unit"] in LESS_IS_BETTER else value / floor)


def _draw(figure: "Figure", rows: list[tuple[str, Any, Any, Any]], machine: str) -> None:
    figure.set_size_inches(WIDTH, 1.9 + PER_ROW * len(rows))
    figure.suptitle(f"jaxlm beside PyTorch: {machine}", x=0.012, ha="left", fontsize=17, fontweight="bold")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.15, 1])
    most = max([1.3, *(ratio for _, ratio, _, _ in rows if ratio)])
    for i, (_, ratio, ours, theirs) in enumerate(rows):
        if ratio:
            left.barh(i, ratio, height=0.62, color=TRAIN if ratio >= 1 else VALIDATION)
            left.text(ratio + 0.01 * most, i, f"{ratio:.2f}", va="center", fontsize=10)
        for share, colour, label in ((theirs, VALIDATION, "PyTorch"), (ours, TRAIN, "jaxlm")):
            if share:
                right.plot(share, i, "o", markersize=7, color=colour, label=label)
    left.axvline(1.0, color=LIGHT.muted, linewidth=1.2)
    left.set_title("Speed of jaxlm over PyTorch's best", fontsize=14)
    left.set_xlim(0, 1.15 * most)
    left.set_yticks(range(len(rows)), [name for name, *_ in rows])
    left.tick_params(axis="y", length=0, labelcolor=TEXT, labelsize=10)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.grid(False, axis="y")
    right.set_title("Share of what FLOPs and bytes allow, %", fontsize=14)
    right.set_xlim(left=0)
    right.tick_params(axis="y", length=0)
    handles = dict(zip(*reversed(right.get_legend_handles_labels())))
    if handles:
        right.legend(handles.values(), handles.keys(), loc="lower right")
