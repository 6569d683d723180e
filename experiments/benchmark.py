"""jaxlm beside PyTorch on the same weights and batches, in one run: how fast, how much memory, how near to the limit.

    python -m experiments.benchmark --suite cpu                          # what `make bench` runs: twenty minutes
    python -m experiments.benchmark --suite cpu --only 'train/dense/*'   # a part of it
    python -m experiments.benchmark --suite h200 --out runs/h200         # nine minutes on a GPU
    python -m experiments.benchmark --suite sweep                        # on a GPU: settings of the fast paths
    python -m experiments.benchmark --suite h200 --list                  # names of the cases

Before anything is timed, both sides must have computed the same. OUT gets results.json, results.md, results.png,
losses.png and the workers' logs; compiled programs are kept for the next run. Needs jax, flax, numpy, torch, rich and
matplotlib. Exit code 1 when sides computed different things, one of ours failed or a case hung, 2 on bad input.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from convert.bench.cases import SUITES, Case, chosen, suite
from convert.bench.results import failed, write_results
from convert.bench.runner import run_suite
from jaxlm.cli import main_guard, need, say
from jaxlm.config import ConfigError


class _Parser(argparse.ArgumentParser):
    """Bad options are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def main(argv: list[str]) -> int:
    """Entry point."""
    options = _options(argv)
    cases = chosen(suite(options.suite, options.shrink), options.only)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.repeats < 1:
        raise ConfigError(f"--repeats {options.repeats} must be at least 1")
    need("torch")
    gpu = options.suite != "cpu" and has_cuda()
    if options.suite != "cpu" and not gpu and not options.shrink:
        raise ConfigError(
            "jax sees no CUDA device here; --suite cpu needs none, --shrink tries the cases out anywhere"
        )
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file; name a directory")
    options.out.mkdir(parents=True, exist_ok=True)
    _clear(options.out)
    rows, figures = _measure(cases, options, gpu)
    bad = failed(rows)
    for line in bad:
        say(f"failed: {line}")
    say(f"{', '.join(['results.json', 'results.md', *figures])} in {options.out}")
    return 1 if bad else 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m experiments.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=tuple(SUITES), default="cpu", help="which cases")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="GLOB", help="cases whose name fits, or begins with it"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="directory of the results")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of each side, in turns")
    parser.add_argument(
        "--shrink", action="store_true", help="the same cases at sizes that take seconds anywhere"
    )
    parser.add_argument("--list", action="store_true", help="print the cases' names and end")
    return parser.parse_args(argv)


def has_cuda() -> bool:
    """Asked in another process: this one must not take the card's memory."""
    probe = "import jax; raise SystemExit(0 if any(d.platform == 'gpu' for d in jax.devices()) else 1)"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, env=environment).returncode == 0


def _clear(out: Path) -> None:
    """Removes figures and logs of an earlier run, which would pass for this one's."""
    stale = [out / name for name in ("results.png", "losses.png")]
    stale += [path for path in (out / "log").glob("[0-9]*") if path.suffix in (".jsonl", ".txt")]
    for path in stale:
        path.unlink(missing_ok=True)


def _measure(
    cases: list[Case], options: argparse.Namespace, gpu: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and names of the figures. Runs the cases with a line of progress; results are on the disk as they come."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    title = f"Benchmark, suite {options.suite}{', shrunk' if options.shrink else ''}"
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(cases))

        def told(text: str) -> None:
            progress.update(task, description=text)
            if not console.is_terminal:
                say(text)

        def done(rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
            progress.update(task, completed=len(rows))
            write_results(rows, machine, options.out, title)

        rows, machine = run_suite(
            cases, options.suite, options.shrink, options.repeats, options.out, told, done, gpu
        )
    write_results(rows, machine, options.out, title)
    return rows, _draw(options.out)


def _draw(out: Path) -> list[str]:
    from jaxlm.plots import PlotError
    from jaxlm.plots_benchmark import plot_benchmark

    try:
        return [path.name for path in plot_benchmark(out)]
    except PlotError as error:
        say(str(error))
        return []


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker, too
    main_guard(main)
