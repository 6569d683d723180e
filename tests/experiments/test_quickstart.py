"""The whole way in one command, on a small scale: train, compare, sample, export, prove."""

import importlib.util
import json
from pathlib import Path

import pytest
from entry import SMALL, SMALL_MOE, run, sentences

from experiments import quickstart

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")


def test_quickstart_goes_the_whole_way_and_moves_an_old_run_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses beside baselines, samples, figures, an export that agrees in float64; the second time keeps the first."""
    monkeypatch.setattr(quickstart, "PROMPTS", ("The cat", "The owl"))
    text, directory = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(sentences(900), encoding="utf-8")
    words = [*SMALL, *SMALL_MOE, "--data.path", str(text), "--train.steps", "60", "--run-dir", str(directory)]
    words += ["--optim.lr", "5e-3", "--train.plots", "True"]
    first = run(quickstart.main, words, capsys, monkeypatch)
    assert "validation loss" in first.out and "bigram" in first.out and "gzip" in first.out
    assert "float64: what was trained (JAX) and" in first.out and "(PyTorch) agree" in first.out, (
        first.out + first.err
    )
    lost = "DOES NOT BEAT" in first.out
    assert first.code == (1 if lost else 0), first.err
    assert {p.name for p in (directory / "plots").iterdir()} >= {
        "loss.png",
        "perplexity.png",
        "expert_load.png",
    }
    assert (directory / "samples.txt").read_text(encoding="utf-8").count("--- ") == 2
    assert (directory / "torchref" / "model.safetensors").is_file()
    report = json.loads((directory / "parity" / "report.json").read_text())
    proved = ["config", "tree", "activations", "loss", "gradients"]
    assert report["passed"] and [rung["name"] for rung in report["rungs"]] == proved
    assert all(rung["value"] <= rung["limit"] for rung in report["rungs"])
    assert (directory / "parity" / "report.html").is_file()
    assert json.loads((directory / "baselines.json").read_text())["bigram"] > 0
    second = run(quickstart.main, [*words, "--train.steps", "1"], capsys, monkeypatch)
    assert (
        "is kept as" in second.err and len([p for p in tmp_path.iterdir() if p.name.startswith("run")]) == 2
    )
    assert second.code == 1, "one step cannot beat a bigram table, and the command must say so"
