"""Draws the figures of a run again, or of several runs over each other.

    python -m experiments.plots runs/book                               runs/book/plots/*.png, dark, and light/*.png
    python -m experiments.plots runs/book runs/muon --out comparison    a figure for each metric, a curve for each run
    python -m experiments.plots book muon --keys val_loss,grad_norm/head --x flops

RUN is a run directory or its name in runs/. The paths of the figures go to standard output.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.cli import main_guard, parse
from jaxlm.config import ConfigError, InputError
from jaxlm.curves import X, find_run


@dataclass(frozen=True)
class PlotOptions:
    """What to draw."""

    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(name="run", metavar="RUN [RUN…]", help="run directories, or their names in runs/"),
    ]
    out: str = ""  # folder of the figures; '' = RUN/plots, or overlay/ beside the first of several runs
    keys: str = ""  # metrics of metrics.jsonl with commas between, one figure each; '' = all that are known
    x: X = "step"  # what the x axis shows; time = hours of training, pauses left out


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(PlotOptions, argv, "python -m experiments.plots", __doc__ or "")
    for path in draw(options):
        print(path)
    return 0


def draw(options: PlotOptions) -> list[Path]:
    """The files that were written. Raises InputError on a run or a metric that is not there."""
    from jaxlm.plots_overlay import plot_runs
    from jaxlm.plots_run import plot_run

    if not options.runs:
        raise ConfigError("name a run first: python -m experiments.plots RUN [RUN…]")
    runs = list(dict.fromkeys(find_run(text) for text in options.runs))
    keys = [key.strip() for key in options.keys.split(",") if key.strip()]
    single = len(runs) == 1
    out = Path(options.out) if options.out else runs[0] / "plots" if single else runs[0].parent / "overlay"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out")
    if single and not keys:
        return plot_run(runs[0], out, options.x)
    return plot_runs(runs, out, keys, options.x)


if __name__ == "__main__":
    main_guard(main)
