"""Axes of curves: ticks, limits and numbers that people can read."""

import math
from typing import TYPE_CHECKING

import numpy as np

from jaxlm.curves import XLABELS, X
from jaxlm.metrics import short
from jaxlm.plots import STEP_TICKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def x_axis(axes: "Axes", x: X) -> None:
    """Label, ticks and limits of the x axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(XLABELS[x])
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=x == "step", steps=STEP_TICKS, min_n_ticks=1))
    if x == "step":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    elif x != "time":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))


def number_ticks(axes: "Axes") -> None:
    """1.2k in place of 1200 on the y axis."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def log_ticks(axes: "Axes", along: str = "y") -> None:
    """Round numbers along a logarithmic axis, as many as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim() if along == "y" else axes.get_xlim()
    decades = math.log10(high / low) * (1 if along == "y" else 1.5)  # numbers are wider than they are high
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else range(1, 10)
    axis = axes.yaxis if along == "y" else axes.xaxis
    axis.set_major_locator(LogLocator(subs=tuple(map(float, subs)), numticks=20 if along == "y" else 6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axis.set_minor_formatter(NullFormatter())


def from_zero(axes: "Axes") -> None:
    """The y axis from zero to a little above the highest point."""
    drawn = _drawn(axes)
    axes.set_ylim(0, 1.08 * max(drawn, default=0.0) or 1.0)


def log_if_wide(axes: "Axes") -> None:
    """A logarithmic y axis where the curves span more than a factor of 20, one from zero otherwise."""
    drawn = sorted(y for y in _drawn(axes) if y > 0)
    if drawn and drawn[-1] > 20 * drawn[0]:
        axes.set_yscale("log")
        axes.set_ylim(
            drawn[len(drawn) // 50] / 1.5, drawn[-1] * 1.5
        )  # the first steps of a warmup may fall below
        log_ticks(axes)
    else:
        from_zero(axes)


def _drawn(axes: "Axes") -> list[float]:
    values = [float(y) for line in axes.lines for y in np.asarray(line.get_ydata(), float)]
    return [y for y in values if math.isfinite(y)]


def beside(axes: "Axes") -> None:
    """The legend to the right of the axes."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def amount(number: float | int) -> str:
    """A number in four digits or so, of any size: 3.5e-7, 0.0012, 12.34, 45.6k, 1.2e18."""
    size = abs(number)
    if size == 0 or not math.isfinite(number):
        return f"{number:.0f}"
    if 1e-3 <= size < 1000:
        return f"{number:.4g}"
    if 1000 <= size < 1e12:
        return short(number)
    digits, exponent = f"{number:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
