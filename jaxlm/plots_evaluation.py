"""The figure of an evaluation, drawn from evaluation.json alone: loss against the length of the context."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.metrics import short
from jaxlm.perplexity import Position, binned
from jaxlm.plots import BASELINES, MUTED, TRAIN, PlotError, draw_all, needs_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_evaluation(directory: Path) -> list[Path]:
    """Draws loss_by_position.png beside a directory's evaluation.json; returns the files that were written.

    Raises PlotError without matplotlib, or where evaluation.json is missing or is none, or holds no finite loss.
    """
    needs_matplotlib()
    directory = Path(directory)
    path = directory / "evaluation.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        by, overall = report["loss_by_position"], report["total"]["loss"]
        rows = zip(by["position"], by["tokens"], by["loss"], strict=True)
        positions = [Position(int(p), int(p), int(n), float(loss)) for p, n, loss in rows if loss is not None]
        told = report["options"]
        window, stride = int(told["window"]), int(told["stride"])
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise PlotError(f"{path} is not a report of an evaluation") from None
    if not positions or overall is None:
        raise PlotError(f"{path} holds no finite loss to draw")
    paint = partial(
        _loss_by_position, positions=positions, overall=float(overall), window=window, stride=stride
    )
    return draw_all({"loss_by_position": paint}, directory)


def _loss_by_position(
    figure: "Figure", positions: list[Position], overall: float, window: int, stride: int
) -> None:
    """The mean loss of each bin above, how many tokens it is the mean of below."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    bins = binned(positions)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = [bins[0].first - 0.5, *(b.last + 0.5 for b in bins)]
    middles = [(b.first * b.last) ** 0.5 for b in bins]
    marker = {"marker": "o", "markersize": 5}
    top.plot(middles, [b.loss for b in bins], color=TRAIN, label="at this length of context", **marker)
    line = {"color": BASELINES[0], "linestyle": (0, (6, 4)), "linewidth": 1.5, "zorder": 1}
    top.axhline(overall, label=f"all tokens  {overall:.4g}", **line)
    top.set_title("Loss by length of context")
    top.set_ylabel("nats per token")
    top.legend(loc="upper right")
    bottom.stairs([b.tokens for b in bins], edges, fill=True, color=MUTED)
    bottom.set_ylabel("tokens")
    bottom.set_yscale("log")
    bottom.set_ylim(bottom=0.5)
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value) if value >= 1 else ""))
    bottom.yaxis.set_minor_formatter(NullFormatter())
    bottom.set_xlabel(f"tokens read before the one predicted (window {window}, stride {stride})")
    bottom.set_xscale("log", base=2)
    bottom.set_xlim(edges[0], edges[-1])
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else ""))
    bottom.xaxis.set_minor_formatter(NullFormatter())
