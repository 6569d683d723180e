"""Runs an entry point in this process, as `python -m experiments.X ARGS` would."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from experiments.cli import main_guard

# A decoder that trains in milliseconds; every option can stand on a command line.
SMALL = [
    "--model.n-layers",
    "2",
    "--model.d-model",
    "48",
    "--model.n-heads",
    "4",
    "--model.n-kv-heads",
    "2",
    "--model.head-dim",
    "16",
    "--model.d-ff",
    "64",
    "--model.vocab-size",
    "320",
    "--model.context",
    "64",
    "--train.seq-len",
    "40",
    "--train.batch-size",
    "4",
    "--train.accumulation",
    "2",
    "--train.eval-batches",
    "2",
    "--optim.warmup-steps",
    "5",
    "--data.tokenizer",
    "train",
    "--train.plots",
    "False",
]
SMALL_MOE = ["--model.moe.n-experts", "4", "--model.moe.d-ff", "32"]


class Outcome(NamedTuple):
    """What a user sees."""

    code: int
    out: str
    err: str


def run(
    main: Callable, argv: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Outcome:
    """Exit code, standard output and standard error of an entry point."""
    monkeypatch.setattr(sys, "argv", ["prog", *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main_guard(main)
    captured = capsys.readouterr()
    return Outcome(int(stop.value.code or 0), captured.out, captured.err)


def sentences(n: int) -> str:
    """Text with structure, the same every time."""
    animals, verbs = ("cat", "dog", "owl", "fox", "hen"), ("sees", "likes", "finds", "hears")
    words = [f"The {animals[i % 5]} {verbs[i * 7 % 4]} the {animals[i * i % 5]} {i % 13}." for i in range(n)]
    return "\n".join(words)
