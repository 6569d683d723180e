"""The parity entry point: targets of every kind, exit codes, one line for bad input, and damaged exports named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from entry import run as run_entry  # noqa: E402
from helpers import random_params, tiny  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from convert.native import export_torch  # noqa: E402
from experiments import parity  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = tiny({"pattern": (True, False)}, init="fan_in", windows=(0, 7))
QUICK = ["--rungs", "config,tree,activations"]
SHALLOW = ["--rungs", "config,tree"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchref checkpoint with random float32 weights."""
    path = tmp_path_factory.mktemp("targets") / "exported"
    export_torch(MODEL, random_params(MODEL, dtype=np.float32), path)
    return path


@pytest.fixture
def climb(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the entry point; returns what the user sees and the report."""

    def call(*args: object) -> tuple[Any, dict[str, Any]]:
        out = tmp_path / "report"
        argv = [str(a) for a in args] + ["--out", str(out)]
        seen = run_entry(parity.main, argv, capsys, monkeypatch)
        path = out / "report.json"
        return seen, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    return call


def changed(checkpoint: Path, into: Path, name: str, change: Any) -> Path:
    """A copy of the checkpoint with one tensor changed."""
    into.mkdir()
    weights = load_file(checkpoint / "model.safetensors")
    weights[name] = np.ascontiguousarray(change(weights[name]))
    save_file(weights, into / "model.safetensors")
    (into / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    return into


def test_a_checkpoint_agrees_with_its_twin(checkpoint: Path, climb: Any) -> None:
    """Exit code 0, the verdict on standard output, three files of report, the keys of the contract."""
    seen, report = climb(checkpoint, *QUICK)
    assert seen.code == 0, seen.err
    assert "agree" in seen.out and "Traceback" not in seen.err
    assert report["schema"] == 1 and report["passed"] and report["dtype"] == "float64"
    assert [rung["name"] for rung in report["rungs"]] == ["config", "tree", "activations"]
    assert {"name", "passed", "value", "limit", "worst"} <= set(report["rungs"][0])
    assert report["ledger"]["jax"]["x64"] and report["ledger"]["torch"]["version"] == torch.__version__


@pytest.mark.parametrize(
    ("name", "change", "operation", "cause"),
    [
        (
            "blocks.1.attn.q_proj.weight",
            lambda w: w.reshape(6, 2, 3, -1).swapaxes(1, 2).reshape(w.shape),
            "attn.q_proj.weight",
            "interleaved",
        ),
        (
            "blocks.0.moe.experts.down",
            lambda w: w[[0, 3, 2, 1]],
            "moe.experts.down",
            "experts 1 and 3 exchanged",
        ),
        (
            "blocks.1.mlp.up_proj.weight",
            lambda w: torch.from_numpy(w).bfloat16().float().numpy(),
            "mlp.up_proj.weight",
            "rounded to bfloat16",
        ),
    ],
    ids=["rows of q", "experts", "rounded"],
)
def test_a_damaged_export_fails_with_its_diagnosis(
    checkpoint: Path, tmp_path: Path, climb: Any, name: str, change: Any, operation: str, cause: str
) -> None:
    """Exit code 1; tensor, layer and what happened to it stand in the report and on the terminal."""
    other = changed(checkpoint, tmp_path / "other", name, change)
    seen, report = climb(checkpoint, "--against", other, *SHALLOW)
    first = report["first_divergence"]
    assert seen.code == 1 and not report["passed"]
    assert (first["rung"], first["name"], first["operation"]) == ("tree", name, operation)
    assert cause in first["causes"][0] and cause in seen.out and operation in seen.out


def test_an_undamaged_export_passes_against(checkpoint: Path, tmp_path: Path, climb: Any) -> None:
    """The same check without the damage."""
    other = changed(checkpoint, tmp_path / "other", "lm_head.weight", lambda w: w)
    seen, report = climb(checkpoint, "--against", other, *SHALLOW)
    assert seen.code == 0 and report["against"] == str(other)


def test_a_preset_is_drawn_at_both_initialisations(climb: Any) -> None:
    """Shrunk presets compare without weights of their own."""
    seen, report = climb("minigpt-124m", "--shrink", *SHALLOW)
    assert seen.code == 0, seen.err
    assert [(r["name"], r["case"]) for r in report["rungs"]] == [
        ("config", ""),
        ("tree", "normal"),
        ("tree", "fan_in"),
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name a target"),
        (["quikstart"], "did you mean 'quickstart'"),
        (["runs/none"], "does not exist"),
        (["llama3-8b"], "--shrink"),
        (["quickstart", "--rungs", "forward"], "unknown rung 'forward'"),
        (["quickstart", "--steps", "0"], "steps=0"),
        (["quickstart", "--dtype", "float16"], "float16"),
        (["quickstart", "--self-test"], "leave TARGET"),
        (["quickstart", "--against", "runs/none", "--rungs", "config"], "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(climb: Any, argv: list[str], words: str) -> None:
    """Exit code 2, one line that says what was wrong, no report."""
    seen, report = climb(*argv)
    assert seen.code == 2 and words in seen.err, seen.err
    assert seen.err.startswith("error: ") and seen.err.count("\n") == 1 and not report


def test_a_file_in_the_place_of_the_report_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is computed."""
    (tmp_path / "file").write_text("kept")
    argv = ["quickstart", "--out", str(tmp_path / "file")]
    seen = run_entry(parity.main, argv, capsys, monkeypatch)
    assert seen.code == 2 and (tmp_path / "file").read_text() == "kept"
