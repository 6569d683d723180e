"""Preferences from the command line: it learns them, keeps its reference, resumes bitwise, refuses what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from entry import Outcome, run
from safetensors.numpy import load_file, save_file
from tuning_files import exported, turn, write_base, write_preferences, write_rows

from experiments import dpo
from jaxlm.metrics import read_metrics
from jaxlm.tune_config import TuneRun, load_run

QUICK = [
    *("--train.plots", "False", "--train.batch-size", "8", "--optim.lr", "1e-2", "--train.remat", "none"),
    *("--samples", "0", "--train.eval-every", "4", "--log.details", "False", "--optim.warmup-steps", "1"),
]
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")
Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base")
    return exported(write_base(folder / "ours"), folder / "tiny")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences."""
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture
def call(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls experiments.dpo with words."""
    return lambda *words: run(dpo.main, [str(word) for word in words], capsys, monkeypatch)


def test_stored_reference_learns_resumes_bitwise_and_is_computed_once(
    call: Call, base: Path, pairs: Path, tmp_path: Path
) -> None:
    """Of all weights: the margin grows from zero; 4 steps and 4 more are 8; reference.npz is not computed again."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    common = [base, "--data", pairs, *QUICK, "--optim.decay-steps", 8]
    written = 0
    for steps, where, more in ((8, whole, []), (4, parts, []), (8, parts, ["--resume"])):
        done = call(*common, "--train.steps", steps, "--run-dir", where, *more)
        assert done.code == 0, done.err
        assert ("reference: log-probabilities" in done.err) == (not more)
        written = written or (parts / "reference.npz").stat().st_mtime_ns if where == parts else 0
    assert (parts / "reference.npz").stat().st_mtime_ns == written
    logs = [read_metrics(where / "metrics.jsonl") for where in (parts, whole)]
    for name in ("loss", "grad_norm", "val_loss", "val_rewards/accuracy", *REWARDS):
        assert [row.get(name) for row in logs[0]] == [row.get(name) for row in logs[1]], name
    first, last = logs[0][0], logs[0][-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and last["val_loss"] < 0.9 * first["loss"]
    assert last["rewards/margin"] > 0.1 and last["val_rewards/accuracy"] == 1.0
    stored = load_run(parts / "config.json")
    assert isinstance(stored, TuneRun) and stored.tune.reference == "stored"
    spoil(parts / "reference.npz")
    done = call(*common, "--train.steps", 9, "--run-dir", parts, "--resume")
    assert done.code == 2 and "reference.npz is damaged" in done.err, done.err
    # The reference is that of the base: of another one with the same shapes nothing may go on.
    moved = shutil.copytree(base, tmp_path / "moved")
    stored = {name: x * 1.5 for name, x in load_file(moved / "model.safetensors").items()}
    save_file(stored, moved / "model.safetensors", {"format": "pt"})
    shutil.move(base, tmp_path / "kept")
    shutil.move(moved, base)
    try:
        done = call(*common, "--train.steps", 9, "--run-dir", parts, "--resume")
    finally:
        shutil.rmtree(base)
        shutil.move(tmp_path / "kept", base)
    assert done.code == 2 and "that is another model now" in done.err.splitlines()[-1], done.err


def spoil(path: Path) -> None:
    """Cuts a file short."""
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.slow
def test_references_agree(call: Call, base: Path, pairs: Path, tmp_path: Path) -> None:
    """An adapter's reference switched off, or computed before and stored: the same losses and rewards."""
    logs = {}
    for reference in ("adapter_off", "stored"):
        words = ["--data", pairs, *QUICK, "--lora.rank", 2, "--dpo.reference", reference, "--train.steps", 3]
        done = call(base, *words, "--run-dir", tmp_path / reference)
        assert done.code == 0, done.err
        assert (tmp_path / reference / "reference.npz").is_file() == (reference == "stored")
        logs[reference] = read_metrics(tmp_path / reference / "metrics.jsonl")
    for name in ("loss", *REWARDS):
        values = np.array([[row[name] for row in log] for log in logs.values()])
        assert np.abs(values[0] - values[1]).max() < 1e-5, name


SAME = {"prompt": turn("cat")[:1], "chosen": turn("cat")[1:], "rejected": turn("cat")[1:]}
BAD_ROWS = {
    "chosen equals rejected": (SAME, ["chosen", "rejected"]),
    "empty answer": (SAME | {"rejected": turn("cat", "")[1:]}, ["empty"]),
    "unknown role": (SAME | {"chosen": [{"role": "robot", "content": "x"}]}, ["robot"]),
    "no rejected": ({"prompt": "a", "chosen": "b"}, ["rejected"]),
    "a conversation": ({"messages": turn("cat")}, []),
    "too long": (SAME | {"chosen": turn("cat", "dog " * 40)[1:]}, ["tokens"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_pair_is_one_line_with_its_place(call: Call, base: Path, tmp_path: Path, name: str) -> None:
    """Exit code 2, one line, the file and the line of the row; nothing is left behind."""
    row, said = BAD_ROWS[name]
    good = SAME | {"rejected": turn("cat", "dog")[1:]}
    data = write_rows(tmp_path / "pairs.jsonl", [good, row, good])
    done = call(base, "--data", data, *QUICK, "--chat.too-long", "refuse", "--run-dir", tmp_path / "run")
    assert done.code == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err, done.err
    assert "pairs.jsonl" in done.err and "line 2" in done.err, done.err
    assert all(word in done.err for word in said), done.err
    assert not (tmp_path / "run").exists()


BAD_WORDS = {
    "adapter_off": (["--dpo.reference", "adapter_off"], ["--lora.rank"]),
    "beta": (["--dpo.beta", "0"], ["beta"]),
    "smoothing of ipo": (["--dpo.loss", "ipo", "--dpo.label-smoothing", "0.1"], ["label_smoothing"]),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_options_are_one_line(call: Call, base: Path, pairs: Path, tmp_path: Path, name: str) -> None:
    """Exit code 2 and a line that names what is wrong."""
    words, said = BAD_WORDS[name]
    done = call(base, "--data", pairs, *QUICK, *words, "--run-dir", tmp_path / "run")
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in said) and not (tmp_path / "run").exists(), done.err
