"""The style of all figures, dark and light, and how they are written. Only plots*.py import matplotlib."""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (9.6, 5.4)  # inches; 1536 x 864 pixels
DPI = 160
HEAT = "viridis"
STEP_TICKS = [1, 2, 2.5, 5, 10]  # leading digits of round steps

Painter = Callable[["Figure"], None]  # draws into an empty figure of SIZE, which it may resize


@dataclass(frozen=True)
class Theme:
    """The colours of a set of figures."""

    background: str
    grid: str
    text: str
    muted: str  # labels, ticks
    train: str
    validation: str
    alarm: str  # what went wrong
    baselines: tuple[str, ...]
    lines: tuple[str, ...]  # of curves that are alike in kind: groups of parameters, layers, runs


DARK = Theme(
    background="#14171c",
    grid="#2b313a",
    text="#e6e9ee",
    muted="#9aa4b2",
    train="#5aa9ff",
    validation="#ffb454",
    alarm="#ff4d5e",
    baselines=("#8f9bab", "#b78cf7", "#6bd6a8", "#f2789f", "#d7c66b"),
    lines=("#5aa9ff", "#ffb454", "#6bd6a8", "#f2789f", "#b78cf7", "#d7c66b", "#5ad1e0", "#ff8a5c"),
)
LIGHT = Theme(
    background="#ffffff",
    grid="#e3e7ec",
    text="#1b2028",
    muted="#56606d",
    train="#1f6fd1",
    validation="#cf6a00",
    alarm="#cc1f35",
    baselines=("#7b8694", "#7a4fd0", "#178a5b", "#c2356b", "#8f7a0c"),
    lines=("#1f6fd1", "#cf6a00", "#178a5b", "#c2356b", "#7a4fd0", "#8f7a0c", "#0f8a9c", "#b5492a"),
)
# Figures that come in the dark theme alone name its colours.
BACKGROUND, GRID, TEXT, MUTED = DARK.background, DARK.grid, DARK.text, DARK.muted
TRAIN, VALIDATION, BASELINES = DARK.train, DARK.validation, DARK.baselines


class PlotError(InputError):
    """Nothing could be drawn; the message is one line that says why."""


def style(theme: Theme) -> dict[Any, Any]:
    """matplotlib's settings for a theme."""
    return {
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 17,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 14,
        "axes.labelsize": 13,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "text.color": theme.text,
        "font.size": 12,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 12,
        "figure.constrained_layout.w_pad": 0.16,
        "figure.constrained_layout.h_pad": 0.16,
    }


def needs_matplotlib() -> None:
    """Raises PlotError, which names the extra to install, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise PlotError("plots need matplotlib; install it with pip install 'jaxlm[plots]'") from None


def draw_all(painters: Mapping[str, Painter], folder: Path, theme: Theme = DARK) -> list[Path]:
    """Draws <name>.png of each painter into a folder in the house style; returns the files."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style(theme)):
        return [_draw(paint, folder / f"{name}.png") for name, paint in painters.items()]


def _draw(paint: Painter, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    paint(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")  # a process that draws the same does not disturb it
    unfinished.write_bytes(image.getvalue())
    os.replace(unfinished, path)  # an image viewer never sees half a file
    return path
