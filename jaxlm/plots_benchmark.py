"""The figures of a benchmark, drawn from results.json alone: ratios, how near to the limit, losses beside PyTorch's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.plots import LIGHT, TEXT, TRAIN, VALIDATION, Painter, PlotError, draw_all, needs_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, PER_ROW = 13.5, 0.34  # inches
LESS_IS_BETTER = ("ms", "rel")  # units


def plot_benchmark(directory: Path) -> list[Path]:
    """Draws results.png, and losses.png where there are some, beside results.json; returns the files written.

    Raises PlotError without matplotlib, or where results.json is missing, is none, or holds nothing that was measured.
    """
    needs_matplotlib()
    path = Path(directory) / "results.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        rows = [r for r in known if r["jaxlm"] and r["unit"] != "rel"]
        curves = {
            str(r["name"]): {side: made["trace"] for side, made in r["sides"].items()}
            for r in known
            if str(r["name"]).startswith("losses/") and r["sides"]
        }
        shown = [(str(r["name"]), r["ratio"], _share(r, "jaxlm"), _share(r, "torchref")) for r in rows]
        machine = str(rows[0]["machine"]) if rows else ""
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise PlotError(f"{path} is not a benchmark's results") from None
    painters: dict[str, Painter] = {}
    if shown:
        painters["results"] = lambda figure: _draw(figure, shown, machine)
    if curves:
        painters["losses"] = lambda figure: _draw_losses(figure, curves)
    if not painters:
        raise PlotError(f"{path} holds nothing that was measured")
    return draw_all(painters, Path(directory))


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
    ratios = [ratio for _, ratio, _, _ in rows if ratio]
    least, most = min([0.8, *ratios]), max([1.3, *ratios])
    for i, (_, ratio, ours, theirs) in enumerate(rows):
        if ratio:
            left.barh(i, ratio - 1, left=1, height=0.62, color=TRAIN if ratio >= 1 else VALIDATION)
            left.text(1.03 * max(1.0, ratio), i, f"{ratio:.2f}", va="center", fontsize=10)
        for share, colour, label in ((theirs, VALIDATION, "PyTorch"), (ours, TRAIN, "jaxlm")):
            if share:
                right.plot(share, i, "o", markersize=7, color=colour, label=label)
    left.axvline(1.0, color=LIGHT.muted, linewidth=1.2)
    left.set_title("Speed of jaxlm over PyTorch's best", fontsize=14)
    left.set_xscale("log", base=2)
    left.set_xlim(least / 1.15, most * (most / least) ** 0.15)
    left.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    left.set_yticks(range(len(rows)), [name for name, *_ in rows])
    left.tick_params(axis="y", length=0, labelcolor=TEXT, labelsize=10)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.grid(False, axis="y")
    right.set_title("Share of what FLOPs and bytes allow, %", fontsize=14)
    right.set_xscale("log")
    right.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    right.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    right.tick_params(axis="y", length=0)
    handles = dict(zip(*reversed(right.get_legend_handles_labels())))
    if handles:
        right.legend(handles.values(), handles.keys(), loc="upper right", bbox_to_anchor=(1, -0.08), ncols=2)


def _draw_losses(figure: "Figure", curves: dict[str, dict[str, list[float]]]) -> None:
    """A panel of each case; PyTorch's line is drawn under jaxlm's, and wider."""
    figure.set_size_inches(WIDTH / 2 * max(len(curves), 1.5), 5.4)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (name, sides) in zip(panels, curves.items()):
        for side, losses in reversed(sides.items()):
            ours = side == "jaxlm"
            panel.plot(
                range(len(losses)),
                losses,
                color=TRAIN if ours else VALIDATION,
                linewidth=1.5 if ours else 4,
                label=side,
            )
        panel.set_title(name, fontsize=13)
        panel.set_xlabel("step")
        panel.set_ylabel("loss")
        panel.legend()
