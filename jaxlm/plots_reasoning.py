"""The figure of experiments.reasoning, drawn from reasoning.json alone: how often right, and after how much thought."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.json_file import read_object
from jaxlm.plots import DARK, PlotError, draw_all, needs_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 0.38  # of a bar
TITLES = {"base": "base", "sft": "SFT", "dpo": "DPO"}


def plot_reasoning(directory: Path) -> list[Path]:
    """Draws plots/reasoning.png of a directory; returns the files written.

    Raises PlotError without matplotlib, or where reasoning.json is missing, is none, or holds no stage.
    """
    needs_matplotlib()
    path = Path(directory) / "reasoning.json"
    try:
        stages = read_object(path)["stages"]
        shown = [
            (
                TITLES.get(stage["name"], str(stage["name"])),
                (100 * float(stage["accuracy"]), 100 * float(stage["three_digit_accuracy"])),
                (float(stage["mean_think_tokens"]), float(stage["three_digit_mean_think_tokens"])),
            )
            for stage in stages
        ]
        counts = (int(stages[0]["n"]), int(stages[0]["three_digit_n"]))
        own = 100 * float(stages[0].get("own_form_accuracy", math.nan))
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise PlotError(f"{path} is no report of experiments.reasoning") from None
    return draw_all(
        {"reasoning": lambda figure: _draw(figure, shown, counts, own)}, Path(directory) / "plots"
    )


def _draw(figure: "Figure", stages: list[tuple[str, Any, Any]], counts: tuple[int, int], own: float) -> None:
    """own: what the first stage does in the form of text that it knows, in percent; NaN = not known."""
    figure.suptitle("Sums that no stage has seen", x=0.012, ha="left", fontsize=17, fontweight="bold")
    left, right = figure.subplots(1, 2)
    names = [name for name, _, _ in stages]
    labels = (f"two digits, {counts[0]:,} sums", f"three digits, {counts[1]:,} sums")
    _bars(left, names, [shares for _, shares, _ in stages], labels, "{:.1f}")
    _bars(right, names, [tokens for _, _, tokens in stages], labels, "{:.1f}")
    if not math.isnan(own):
        left.plot(
            0, own, "D", markersize=8, color=DARK.muted, label=f"{names[0]}, in the form of what it has read"
        )
    left.set_title("Right answers, %", fontsize=14)
    left.set_ylim(0, 112)
    left.set_yticks(range(0, 101, 20))
    right.set_title("Tokens of thought, on average", fontsize=14)
    right.margins(y=0.12)
    handles, texts = left.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower left", ncols=3)


def _bars(axes: "Axes", names: list[str], values: list[Any], labels: tuple[str, str], form: str) -> None:
    """Two bars for each stage."""
    for side, (label, colour) in enumerate(zip(labels, (DARK.train, DARK.validation))):
        places = [i + (side - 0.5) * WIDTH for i in range(len(names))]
        heights = [pair[side] for pair in values]
        axes.bar(places, heights, WIDTH * 0.92, color=colour, label=label)
        for x, height in zip(places, heights):
            axes.annotate(
                form.format(height), (x, height), (0, 4), textcoords="offset points", ha="center", fontsize=11
            )
    axes.set_xticks(range(len(names)), names)
    axes.grid(False, axis="x")
