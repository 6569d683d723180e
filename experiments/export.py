"""Exports a run to a torchref checkpoint and proves in float64 that both are the same model.

    python -m experiments.export runs/quickstart exported/

Writes DIR/config.json, DIR/model.safetensors and DIR/tokenizer.json. Exit code 1 when the two disagree.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from experiments.cli import main_guard, need, parse, say
from experiments.targets import open_target
from jaxlm.config import ModelConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from convert.parity.agreement import Agreement


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
    agreement = export_and_prove(target.config, target.params, out, options.seed)
    tokenizer = Path(options.target) / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, out / "tokenizer.json")
    for line in agreement.lines():
        say(line)
    say(f"written to {out}")
    return 0 if agreement.passed else 1


def export_and_prove(config: ModelConfig, params: dict[str, Any], out: Path, seed: int = 0) -> "Agreement":
    """Writes the checkpoint, reads it back, and compares what was read with what was trained."""
    from convert.native import export_torch
    from convert.parity.agreement import float64_agreement
    from convert.tree import from_jax
    from torchref.checkpoint import load_model

    export_torch(config, params, out)
    run = RunConfig(model=config, train=TrainConfig(batch_size=3, seq_len=min(96, config.context)))
    batch = comparison_batch(config, run.train.seq_len, seed)
    return float64_agreement(run, from_jax(params), load_model(out), batch)


def comparison_batch(config: ModelConfig, length: int, seed: int) -> dict[str, np.ndarray]:
    """Random tokens, hard on purpose: left and right padding, two documents in one row, a ragged loss mask."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (3, length + 1), dtype=np.int32)
    segments = np.ones((3, length), np.int32)
    segments[0, : length // 5] = 0
    segments[1, length // 2 :] = 2
    segments[2, length - length // 7 :] = 0
    positions = np.maximum(np.arange(length) - length // 5 * (np.arange(3) == 0)[:, None], 0).astype(np.int32)
    positions[1, length // 2 :] -= length // 2
    mask = ((rng.random((3, length)) < 0.8) & (segments > 0)).astype(np.float32)
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_mask": mask,
        "segments": segments,
        "positions": positions,
    }


if __name__ == "__main__":
    main_guard(main)
