"""Exports a run to a torchref checkpoint and proves in float64 that both are the same model.

    python -m experiments.export runs/quickstart exported/

Short for `python -m convert export TARGET --to torch OUT --parity --overwrite --no-optimizer`, but what disagrees
stays there to be looked at. Exit code 1 when the two disagree.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from convert.targets import open_target
from experiments.cli import main_guard, need, parse, say


@dataclass(frozen=True)
class ExportOptions:
    """Options of the export."""

    target: Annotated[str, tyro.conf.Positional]  # run, model directory or file
    out: Annotated[str, tyro.conf.Positional]  # directory of the new torchref checkpoint
    checkpoint: str = "latest"  # latest or best
    seed: int = 0  # of the batch that is compared


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(ExportOptions, argv, "python -m experiments.export", __doc__ or "")
    need("torch")
    from convert.prove import export_and_prove

    report = export_and_prove(
        open_target(options.target, options.checkpoint), Path(options.out), options.seed
    )
    for line in report.lines():
        say(line)
    say(f"written to {options.out}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    main_guard(main)
