"""The figures of one run, dark and light, drawn from metrics.jsonl and baselines.json; only axes are computed."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.curves import XLABELS, Curve, RunLog, X
from jaxlm.metrics import perplexity
from jaxlm.plots import (
    DARK,
    HEAT,
    LIGHT,
    SIZE,
    STEP_TICKS,
    Painter,
    PlotError,
    Theme,
    draw_all,
    needs_matplotlib,
)
from jaxlm.plots_axes import amount, beside, from_zero, log_if_wide, log_ticks, number_ticks, x_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = 200  # points from which a curve is drawn thin
THEMES = {"": DARK, "light": LIGHT}  # folder inside plots/ -> theme
GROUPED = {
    "grad_norm": ("gradients", "norm"),
    "param_norm": ("parameters", "norm"),
    "update_norm": ("updates", "norm"),
    "update_ratio": ("Update-to-parameter ratio", "norm of update / norm of parameters"),
}
BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def plot_run(run_dir: Path, out: Path | None = None, x: X = "step") -> list[Path]:
    """Draws <name>.png and light/<name>.png of everything that a run directory's metrics hold.

    Args:
        run_dir: has metrics.jsonl, and baselines.json where there is something to compare with.
        out: folder of the figures; None = plots/ in the run directory.
        x: what the x axes show.

    Returns the files that were written. Raises PlotError without matplotlib or without a line to draw, and
    jaxlm.metrics.MetricsError without metrics.
    """
    needs_matplotlib()
    run_dir = Path(run_dir)
    log, baselines = RunLog.read(run_dir, x), _baselines(run_dir / "baselines.json")
    folder = run_dir / "plots" if out is None else Path(out)
    if not log.keys:
        raise PlotError(f"{run_dir}: nothing that can be drawn was logged yet")
    files: list[Path] = []
    for name, theme in THEMES.items():
        files += draw_all(Figures(log, theme, baselines).painters(), folder / name, theme)
    return files


def _baselines(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(nats) for name, nats in values.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError, ValueError):
        raise PlotError(f'{path} is not a JSON object of losses in nats, like {{"bigram": 5.1}}') from None


class Figures:
    """What can be drawn of a run in one theme."""

    def __init__(self, log: RunLog, theme: Theme, baselines: dict[str, float]) -> None:
        self.log, self.theme, self.baselines = log, theme, baselines
        self.skipped = [x for x, y in zip(*log.series("skipped")) if y]

    def painters(self) -> dict[str, Painter]:
        """Name of the file -> what draws it, of everything the log has."""
        has = self.log.has
        found: dict[str, Painter] = {}
        if has("loss") or has("val_loss"):
            found |= {"loss": self.loss, "perplexity": self.perplexity}
        if has("bits_per_byte") or has("val_bits_per_byte"):
            found["bits_per_byte"] = self.bits_per_byte
        for name, key, title, unit in (
            ("learning_rate", "lr", "Learning rate", ""),
            ("tokens_seen", "tokens", "Tokens seen", "tokens"),
        ):
            if has(key):
                found[name] = partial(self.single, key=key, title=title, unit=unit)
        if has("tokens_per_second"):
            found["throughput"] = self.throughput
        if has("peak_memory_bytes"):
            found["memory"] = self.memory
        if has("grad_norm"):
            found["norms"] = self.norms
        if any(self.log.groups(key) for key in GROUPED):
            found["norms_by_group"] = self.norms_by_group
        if has("update_ratio"):
            found["update_ratio"] = self.update_ratio
        if has("logit_entropy") or has("router_entropy"):
            found["entropy"] = self.entropy
        if any(y for key in ("balance", "router_z", "z") for y in self.log.series(key)[1]):
            found["other_losses"] = self.other_losses
        if has("expert_load"):
            found["expert_load"] = self.expert_load
        if has("loss") and has("tokens") and has("flops"):
            found["scaling"] = self.scaling
        return found

    def loss(self, figure: "Figure") -> None:
        """Training and validation loss over the baselines; steps that were skipped are marked."""
        self._losses(self._axes(figure, "Loss", "nats per token"), "loss", lambda loss: loss)

    def perplexity(self, figure: "Figure") -> None:
        """exp(loss) on a logarithmic axis."""
        axes = self._axes(figure, "Perplexity", "exp(loss), log scale")
        axes.set_yscale("log")
        self._losses(axes, "loss", perplexity)
        log_ticks(axes)

    def bits_per_byte(self, figure: "Figure") -> None:
        """Losses in bits per byte of text."""
        self._losses(self._axes(figure, "Bits per byte", "bits per byte of text"), "bits_per_byte", None)

    def single(self, figure: "Figure", key: str, title: str, unit: str) -> None:
        """One number from zero."""
        axes = self._axes(figure, title, unit)
        self._draw(axes, self.log.curve(key), self.theme.train)
        from_zero(axes)
        if unit:
            number_ticks(axes)
        else:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)

    def throughput(self, figure: "Figure") -> None:
        """Tokens per second and, on the right, the model FLOP utilisation that they amount to."""
        self.single(figure, "tokens_per_second", "Throughput", "tokens per second")
        axes = figure.axes[0]
        pairs = [
            (r["tokens_per_second"], r["mfu"])
            for r in self.log.rows
            if r.get("mfu") and r.get("tokens_per_second")
        ]
        if not pairs:
            return
        percent = 100 * pairs[-1][1] / pairs[-1][0]  # of one token per second
        right = axes.secondary_yaxis("right", functions=(lambda y: y * percent, lambda y: y / percent))
        right.set_ylabel("MFU, %")

    def memory(self, figure: "Figure") -> None:
        """Peak memory so far."""
        axes = self._axes(figure, "Peak memory", "of the fullest device")
        curve = self.log.curve("peak_memory_bytes")
        unit, name = next(((u, n) for u, n in BYTES if curve.last >= u), (1, "bytes"))
        self._draw(axes, curve.mapped(lambda size: size / unit), 0)
        axes.set_ylabel(f"{name}, of the fullest device")
        from_zero(axes)

    def norms(self, figure: "Figure") -> None:
        """Norms of gradients, parameters and updates, each with its own axis."""
        known = [key for key in ("grad_norm", "param_norm", "update_norm") if self.log.has(key)]
        for axes, key in zip(self._panels(figure, "Norms", len(known)), known):
            self._draw(axes, self.log.curve(key), 0)
            axes.set_ylabel(GROUPED[key][0])
            log_if_wide(axes)
            if key == "grad_norm":
                self._mark_skips(axes)

    def norms_by_group(self, figure: "Figure") -> None:
        """The same by group of parameters."""
        known = [key for key in ("grad_norm", "param_norm", "update_norm") if self.log.groups(key)]
        panels = self._panels(figure, "Norms by group", len(known))
        for axes, key in zip(panels, known):
            self._groups(axes, key)
            log_if_wide(axes)
            axes.set_ylabel(GROUPED[key][0])
        beside(panels[0])

    def update_ratio(self, figure: "Figure") -> None:
        """How far a step moves the parameters, whole and by group."""
        axes = self._axes(figure, *GROUPED["update_ratio"])
        self._groups(axes, "update_ratio")
        self._draw(axes, self.log.curve("update_ratio"), self.theme.text, "all")
        log_if_wide(axes)
        beside(axes)

    def entropy(self, figure: "Figure") -> None:
        """Entropies of the predicted tokens and of the routers' choices."""
        known = [key for key in ("logit_entropy", "router_entropy") if self.log.has(key)]
        for axes, key in zip(self._panels(figure, "Entropy", len(known)), known):
            self._draw(axes, self.log.curve(key), 0)
            axes.set_ylabel(f"{key.removesuffix('_entropy')}s, nats")

    def other_losses(self, figure: "Figure") -> None:
        """What is added to the cross-entropy, before its coefficient counts."""
        known = {"balance": "balance loss", "router_z": "router z-loss", "z": "z-loss"}
        keys = [key for key in known if any(self.log.series(key)[1])]
        for axes, key in zip(self._panels(figure, "Other losses", len(keys)), keys):
            self._draw(axes, self.log.curve(key), 0)
            axes.set_ylabel(known[key])

    def scaling(self, figure: "Figure") -> None:
        """Loss against tokens and against FLOPs, all axes logarithmic."""
        figure.suptitle("Scaling", x=0.012, ha="left", fontsize=17, fontweight="bold")
        for axes, x in zip(figure.subplots(1, 2, sharey=True), ("tokens", "flops")):
            log = RunLog(self.log.name, self.log.rows, x)
            for key, colour, marker in (
                ("loss", self.theme.train, ""),
                ("val_loss", self.theme.validation, "o"),
            ):
                if log.has(key):
                    self._draw(axes, log.curve(key), colour, {"loss": "train"}.get(key, "validation"), marker)
            axes.set(xscale="log", yscale="log", xlabel=XLABELS[x])
            log_ticks(axes, "x")
            log_ticks(axes)
        figure.axes[0].set_ylabel("nats per token")
        figure.axes[1].legend(loc="upper right")

    def expert_load(self, figure: "Figure") -> None:
        """One heat map per MoE layer: time to the right, experts down, colour = share of the tokens' choices."""
        _expert_load(figure, self.log, self.theme)

    def _losses(self, axes: "Axes", key: str, of: Callable[[float], float] | None) -> None:
        """Train and validation, baselines as dashed lines; the legend tells the last values."""
        of = of or (lambda value: value)
        for name, colour, marker in (
            (key, self.theme.train, ""),
            (f"val_{key}", self.theme.validation, "o"),
        ):
            if self.log.has(name):
                curve = self.log.curve(name).mapped(of)
                label = f"{'validation' if marker else 'train'}  {amount(curve.last)}"
                self._draw(axes, curve, colour, label, marker)
        lines = sorted(self.baselines.items(), key=lambda item: -item[1]) if key == "loss" else []
        for i, (name, nats) in enumerate(lines):
            value, colour = of(nats), self.theme.baselines[i % len(self.theme.baselines)]
            dashed = {"linestyle": (0, (6, 4)), "linewidth": 1.5}
            axes.axhline(value, color=colour, label=f"{name}  {amount(value)}", **dashed)
        self._mark_skips(axes)
        if lines:  # they cross the whole plot, so the legend goes beside it
            beside(axes)
        else:
            axes.legend(loc="upper right")

    def _mark_skips(self, axes: "Axes") -> None:
        if not self.skipped:
            return
        count = len(self.skipped)
        label = f"{count} update{'s' * (count > 1)} skipped"
        ends = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
        axes.plot(
            self.skipped,
            [0.0] * count,
            linestyle="",
            marker="^",
            markersize=7,
            color=self.theme.alarm,
            label=label,
            **ends,
        )

    def _groups(self, axes: "Axes", key: str) -> None:
        for i, group in enumerate(self.log.groups(key)):
            self._draw(axes, self.log.curve(f"{key}/{group}"), i, group)

    def _draw(
        self, axes: "Axes", curve: Curve, colour: str | int, label: str | None = None, marker: str = ""
    ) -> None:
        """A line; where its points stand for several lines of the log, with the band they lie in."""
        colour = colour if isinstance(colour, str) else self.theme.lines[colour % len(self.theme.lines)]
        marker = marker or ("o" if len(curve.x) == 1 else "")
        width = 1.1 if len(curve.x) > DENSE else 2.0
        size = 5 if len(curve.x) <= 50 else 3
        axes.plot(
            curve.x, curve.y, color=colour, marker=marker, markersize=size, linewidth=width, label=label
        )
        if curve.thinned:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.25, linewidth=0)

    def _axes(self, figure: "Figure", title: str, ylabel: str) -> "Axes":
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_ylabel(ylabel)
        x_axis(axes, self.log.x)
        return axes

    def _panels(self, figure: "Figure", title: str, count: int) -> "list[Axes]":
        figure.set_size_inches(SIZE[0], max(SIZE[1], 0.9 + 2.1 * count))
        figure.suptitle(title, x=0.012, ha="left", fontsize=17, fontweight="bold")
        panels = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
        x_axis(panels[-1], self.log.x)
        return panels


def _expert_load(figure: "Figure", log: RunLog, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    xs, loads = _columns(*log.series("expert_load"))
    layers, experts = len(loads[-1]), len(loads[-1][0])
    columns = min(layers, 1 if layers == 1 else 2 if layers <= 6 else 4)
    height = max(SIZE[1], 1.0 + 1.9 * math.ceil(layers / columns))
    figure.set_size_inches(SIZE[0], height)
    grid = figure.subplots(math.ceil(layers / columns), columns, sharex=True, sharey=True, squeeze=False)
    top = max(max(map(max, load)) for load in loads)
    first = max(0, 2 * xs[0] - xs[1]) if len(xs) > 1 else xs[0] - 1
    edges = [first, *xs]  # a cell ends at its line: it stands for the steps since the line before
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
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=log.x == "step", steps=STEP_TICKS))
        if log.x != "time":
            axes.xaxis.set_major_formatter(
                FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 1e5 else amount(float(x)))
            )
    figure.suptitle("Expert load", x=0.01, ha="left", fontsize=17, fontweight="bold")
    figure.supxlabel(XLABELS[log.x], fontsize=13, color=theme.muted)
    figure.supylabel("expert", fontsize=13, color=theme.muted)
    bar = figure.colorbar(image, ax=grid, shrink=0.9, pad=0.02)
    bar.set_label(f"share of routed tokens (balanced: {1 / experts:.3g})", fontsize=12)
    bar.outline.set_visible(False)


def _columns(xs: list[float], loads: list[Any], most: int = 400) -> tuple[list[float], list[Any]]:
    """Every so manieth line, the last one included: more columns than pixels do not show."""
    stride = math.ceil(len(xs) / most)
    return xs[::-1][::stride][::-1], loads[::-1][::stride][::-1]
