"""Exports a run to a torchref checkpoint and proves in float64 that both are the same model.

    python -m experiments.export runs/quickstart exported/

Writes DIR/config.json, DIR/model.safetensors and DIR/tokenizer.json. Exit code 1 when the two disagree.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from convert.targets import open_target
from experiments.cli import main_guard, need, parse, say
from jaxlm.config import ModelConfig

if TYPE_CHECKING:
    from convert.parity.results import Report


PROVED = (
    "config",
    "tree",
    "activations",
    "loss",
    "gradients",
)  # rungs; experiments.parity climbs all of them
LENGTH = 131  # positions of the compared batch


@dataclass(frozen=True)
class ExportOptions:
    """Options of the export."""

    target: Annotated[str, tyro.conf.Positional]  # run directory or torchref checkpoint
    out: Annotated[str, tyro.conf.Positional]  # directory of the new torchref checkpoint
    checkpoint: str = "latest"  # latest or best
    seed: int = 0  # of the batch that is compared


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(ExportOptions, argv, "python -m experiments.export", __doc__ or "")
    need("torch")
    target = open_target(options.target, checkpoint=options.checkpoint)
    out = Path(options.out)
    report = export_and_prove(target.config, target.params, out, options.seed)
    tokenizer = Path(options.target) / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, out / "tokenizer.json")
    for line in report.lines():
        say(line)
    say(f"written to {out}")
    return 0 if report.passed else 1


def export_and_prove(config: ModelConfig, params: dict[str, Any], out: Path, seed: int = 0) -> "Report":
    """Writes the checkpoint, reads it back, and compares what was read with what was trained."""
    from convert.native import export_torch
    from convert.parity.suite import Options, compare_decoders, decoder_run
    from convert.tree import from_jax
    from torchref.checkpoint import load_model

    export_torch(config, params, out)
    options = Options(rungs=PROVED, seed=seed, length=LENGTH)
    return compare_decoders(
        decoder_run(config), from_jax(params), load_model(out), options, "what was trained", str(out)
    )


if __name__ == "__main__":
    main_guard(main)
