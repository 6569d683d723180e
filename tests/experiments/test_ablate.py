"""Ablations from the command line: files that say everything, a table that fits, errors before anything runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from command_line import ours  # noqa: E402
from entry import Outcome, run, sentences  # noqa: E402
from helpers import random_params, tiny  # noqa: E402

from experiments import ablate, ablation_report  # noqa: E402
from jaxlm.config import DataConfig, OptimConfig, RunConfig, TrainConfig, save, to_dict  # noqa: E402
from jaxlm.run_dir import RunDir  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = tiny(n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=280, context=24, init="fan_in")
TEXT = sentences(150)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a run that was never trained and a model directory, both with their tokenizer."""
    path = tmp_path_factory.mktemp("ablate")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    (path / "run").mkdir()
    directory = RunDir(path / "run")
    config = RunConfig(
        MODEL,
        DataConfig(str(path / "text.txt")),
        OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1, decay_steps=9),
        TrainConfig(steps=9, batch_size=2, seq_len=16, eval_batches=2),
    )
    save(config, directory.config)
    tokenizer = Tokenizer.train([TEXT], 270)
    tokenizer.save(directory.tokenizer)
    tokenizer.save(ours(path / "model", MODEL, random_params(MODEL, dtype=np.float32)) / "tokenizer.json")
    return path


@pytest.fixture
def call(place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """`python -m experiments.ablate ARGS` in this process."""

    def start(*args: object) -> Outcome:
        return run(ablate.main, list(map(str, args)), capsys, monkeypatch)

    return start


def test_a_run_is_varied_and_everything_is_written(place: Path, call, tmp_path: Path) -> None:
    """From the run's configuration and tokenizer on its text; the schedule is as long as --steps."""
    vary = "attention=xla,auto,optim.b1=0.9"
    result = call(place / "run", "--vary", vary, "--steps", 2, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out/ablation.json").read_text(encoding="utf-8"))
    assert report["axes"] == {"attention": ["xla", "auto"], "optim.b1": [0.9]}
    assert report["options"]["vary"] == [vary] and report["environment"]["versions"]["jax"]
    first, second = report["variants"]
    assert [first["label"], second["label"]] == ["attention=xla", "attention=auto"]
    told = first["config"]
    assert told["model"] == to_dict(MODEL)
    assert told["train"]["steps"] == told["optim"]["decay_steps"] == 2 == len(first["losses"])
    assert first["batches_sha256"] == second["batches_sha256"]
    assert first["change"] == 0 and set(first["activations"].values()) == {0.0}
    assert second["losses"] == first["losses"], "on a CPU, auto is xla"
    assert all(row["tokens_per_second"] > 0 and row["compile_seconds"] > 0 for row in report["variants"])
    assert (tmp_path / "out/ablation.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "out/ablation.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith(("| xla", "| auto"))]
    assert (
        len(rows) == 2
        and f"{second['val_loss']:.4f}" in rows[1]
        and f"{second['val_loss']:.4f}" in result.out
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ablation.json",
        "ablation.md",
        "ablation.png",
    ]
    again = call(place / "run", "--vary", vary, "--steps", 2, "--out", tmp_path / "out")
    assert again.code == 2 and "holds an ablation" in again.err


def test_stored_weights_are_looked_at_untrained(place: Path, call, tmp_path: Path) -> None:
    """Those of a model directory, whose quantisation is told weight by weight."""
    args = (place / "model", "--vary", "quant=none,int8", "--steps", 0, "--data.path", place / "text.txt")
    result = call(*args, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out/ablation.json").read_text(encoding="utf-8"))
    plain, rounded = report["variants"]
    assert "losses" not in plain and plain["distances"] is None and "tok/s" not in result.out
    assert plain["weight_errors"] == {} and set(rounded["weight_errors"]) == {
        f"blocks.0.{name}_proj.weight"
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }


def test_a_narrow_terminal_gets_blocks(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is longer than the terminal, no number is cut."""
    row = {"settings": {"dtype": "float32"}, "val_loss": 1.23456, "perplexity": 3.4, "change": 0.0}
    row |= {"weight_bytes": 1000, "activations": {"logits": 1e-7}, "distances": None}
    report = {"variants": [row, row], "axes": {"dtype": ["float32", "bfloat16"]}}
    for columns in (34, 200):
        for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", str(columns)), ("TERM", "xterm")):
            monkeypatch.setenv(name, value)
        ablation_report.show(report)
        shown = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
        assert max(map(len, shown.splitlines())) <= columns
        assert shown.count("1.2346") == 2 and shown.count("1.0e-07") == 2
        assert shown.count("val loss") == (2 if columns == 34 else 1)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nobody", "--vary", "dtype=float32,bfloat16"], "'nobody' is neither a preset nor a path"),
        (["quickstart-dens", "--vary", "x=1"], "did you mean 'quickstart-dense'?"),
        (["quickstart"], "nothing varies"),
        (["quickstart", "--vary", "atention=xla"], "did you mean 'attention'?"),
        (["quickstart", "--vary", "attention=xla,cudnn,dtype=bfloat16"], "needs a CUDA device"),
        (["quickstart", "--vary", "dtype=float32,bfloat16", "--steps", "0"], "has no weights to look at"),
        (
            ["quickstart", "--vary", "dtype=float32,bfloat16", "--steps", "-1"],
            "--steps -1 must not be negative",
        ),
        (["quickstart", "--vary", "dtype=float32,bfloat16", "--max-variants", "1"], "makes 2 variants"),
        (["quickstart", "--vary", "train.batch_size=8,x"], "must be a whole number"),
        (["RUN", "--vary", "train.seq_len=16,32"], "train.seq_len=32 must not exceed model.context=24"),
        (["RUN", "--vary", "optim.lr=1,2", "--steps", "0"], "optim.lr: needs training"),
        (["MODEL", "--vary", "optim.lr=1,2"], "give it --steps 0, or a run"),
        (["MODEL", "--vary", "quant=none,int8", "--steps", "0", "--data.path", "missing"], "missing"),
        (["RUN", "--vary", "quant=none,int8", "--data.path", "SHORT"], "tokens"),
        (["RUN", "--vary", "quant=none,int8", "--out", "SHORT"], "is a file"),
    ],
)
def test_bad_input_is_one_line(place: Path, call, tmp_path: Path, args: list[str], said: str) -> None:
    """Exit code 2 and nothing written."""
    (tmp_path / "short.txt").write_text("ab", encoding="utf-8")
    places = {"RUN": place / "run", "MODEL": place / "model", "SHORT": tmp_path / "short.txt"}
    told = [str(places.get(word, word)) for word in args]
    result = call(*told, *(() if "--out" in args else ("--out", tmp_path / "out")))
    assert result.code == 2 and said in result.err, result.err
    assert not (tmp_path / "out").exists() and result.out == "" and "Traceback" not in result.err
    assert [line for line in result.err.splitlines() if line.startswith("error")] == result.err.splitlines()[
        -1:
    ]
