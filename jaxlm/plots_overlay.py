"""Figures that compare several runs: one for each metric, one curve for each run, dark and light."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.config import InputError, nearest
from jaxlm.curves import RunLog, X, short_names
from jaxlm.plots import Painter, Theme, draw_all, needs_matplotlib
from jaxlm.plots_axes import amount, beside, log_if_wide, log_ticks, number_ticks, x_axis
from jaxlm.plots_run import THEMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 250  # of a curve: fewer than of a single run's, so that noise does not hide the others
WIDE = 20  # times the shortest run's length, from which the x axis is logarithmic
# Metric -> title and unit, in the order of the figures that are drawn where no keys are given.
TITLES = {
    "loss": ("Training loss", "nats per token"),
    "val_loss": ("Validation loss", "nats per token"),
    "bits_per_byte": ("Bits per byte, training", "bits per byte of text"),
    "val_bits_per_byte": ("Bits per byte, validation", "bits per byte of text"),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "param_norm": ("Parameter norm", ""),
    "update_norm": ("Update norm", ""),
    "update_ratio": ("Update-to-parameter ratio", ""),
    "logit_entropy": ("Entropy of the logits", "nats"),
    "router_entropy": ("Entropy of the routers", "nats"),
    "balance": ("Balance loss", ""),
    "dropped": ("Tokens dropped by experts", "share"),
    "skips": ("Updates skipped", ""),
    "tokens_per_second": ("Throughput", "tokens per second"),
    "mfu": ("Model FLOP utilisation", "share of the peak"),
    "peak_memory_bytes": ("Peak memory", "bytes, of the fullest device"),
}
# Drawn from their least value up; all others from zero, or on a logarithmic axis.
LOSSES = ("loss", "val_loss", "bits_per_byte", "val_bits_per_byte")


def plot_runs(run_dirs: Sequence[Path], out: Path, keys: Sequence[str] = (), x: X = "step") -> list[Path]:
    """Draws out/<key>.png and out/light/<key>.png, each with a curve of every run that has the metric.

    Args:
        run_dirs: have metrics.jsonl each; one is enough.
        out: folder, made where it is missing.
        keys: metrics; none = all of TITLES that a run has.
        x: what the x axes show.

    Returns the files that were written. Raises PlotError without matplotlib, MetricsError without metrics and
    InputError on a key that no run has.
    """
    needs_matplotlib()
    names = short_names(run_dirs)
    logs = [RunLog(name, RunLog.read(path).rows, x) for name, path in zip(names, run_dirs)]
    known = list(dict.fromkeys(key for log in logs for key in log.keys))
    for key in keys:
        if key not in known:
            raise InputError(
                f"no run has the metric {key!r}{nearest(key, known)}; there are {', '.join(known)}"
            )
    chosen = list(keys) or [key for key in TITLES if key in known]
    if not chosen:
        raise InputError(f"{run_dirs[0]}: nothing that can be drawn was logged yet")
    files: list[Path] = []
    for folder, theme in THEMES.items():
        painters: dict[str, Painter] = {
            key.replace("/", "_"): partial(_overlay, logs=logs, key=key, theme=theme) for key in chosen
        }
        files += draw_all(painters, Path(out) / folder, theme)
    return files


def _overlay(figure: "Figure", logs: Sequence[RunLog], key: str, theme: Theme) -> None:
    axes = figure.subplots()
    title, unit = TITLES.get(key, (key, ""))
    axes.set_title(title)
    axes.set_ylabel(unit)
    thinned, ends = False, []
    for i, log in enumerate(logs):
        curve = log.curve(key, POINTS)
        if not curve.x:
            continue
        ends.append(curve.x[-1])
        colour = theme.lines[i % len(theme.lines)]
        dash = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))[i // len(theme.lines) % 3]
        marker = "o" if len(curve.x) <= 50 else ""
        label = f"{log.name}  {amount(curve.last)}"
        axes.plot(
            curve.x, curve.y, color=colour, linestyle=dash, marker=marker, markersize=4, label=label, lw=1.6
        )
        if curve.thinned:
            thinned = True
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0)
    x_axis(axes, logs[0].x)
    if len(ends) > 1 and max(ends) > WIDE * min(ends) > 0:  # else the shorter run would be a line upwards
        axes.set_xscale("log")
        log_ticks(axes, "x")
    if key not in LOSSES:
        log_if_wide(axes)
        if axes.get_ylim()[1] >= 1000:
            number_ticks(axes)
    if thinned:
        axes.set_xlabel(f"{axes.get_xlabel()}\nlines are means of neighbouring steps, bands their range")
    beside(axes)
