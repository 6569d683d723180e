"""Training from the command line: exact resumption, every preset, one clear line for bad input."""

import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import flip
from entry import SMALL, SMALL_MOE, run, sentences
from tolerances import tolerance

from experiments import export, pretrain, sample
from jaxlm.data.corpus import open_corpus
from jaxlm.data.prepare import prepare
from jaxlm.metrics import read_metrics
from jaxlm.presets import PRESETS
from jaxlm.tokenizer import Tokenizer

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file to train on."""
    path = tmp_path / "text.txt"
    path.write_text(sentences(900), encoding="utf-8")
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Calls an entry point's main with words."""
    return lambda main, *words: run(main, [str(w) for w in words], capsys, monkeypatch)


@pytest.mark.parametrize("framework", ["jax", pytest.param("torch", marks=needs_torch)])
def test_resume_is_bitwise(call, tmp_path: Path, text: Path, framework: str) -> None:
    """6 steps and 6 more give the losses of 12 at once, each step once in the log."""
    common = [*SMALL, *SMALL_MOE, "--data.path", text, "--framework", framework, "--optim.decay-steps", 12]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for steps, where, more in ((6, parts, []), (12, parts, ["--resume"]), (12, whole, [])):
        done = call(pretrain.main, "quickstart", *common, "--train.steps", steps, "--run-dir", where, *more)
        assert done.code == 0, done.err
    logs = [read_metrics(where / "metrics.jsonl") for where in (parts, whole)]
    assert [row["step"] for row in logs[0]] == list(range(1, 13))
    for name in ("loss", "grad_norm", "lr", "tokens", "expert_load"):
        assert [row[name] for row in logs[0]] == [row[name] for row in logs[1]], name


def test_resume_with_nothing_there_starts_fresh_and_says_so(call, tmp_path: Path, text: Path) -> None:
    """--resume on an empty place is a start, said aloud."""
    words = [
        *SMALL,
        *SMALL_MOE,
        "--data.path",
        text,
        "--train.steps",
        1,
        "--run-dir",
        tmp_path / "run",
        "--resume",
    ]
    done = call(pretrain.main, "quickstart", *words)
    assert done.code == 0 and "nothing to resume" in done.err


def _shrunk(name: str) -> list[str]:
    moe = SMALL_MOE if PRESETS[name].config.model.moe.n_experts else []
    return [name, *SMALL, *moe, "--train.steps", "20", "--train.eval-every", "20"]


QUICK = ("minigpt-124m",)  # quickstart goes the same way in test_readme and test_quickstart


@needs_torch
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS]
)
def test_every_preset_trains_samples_and_exports_in_both_frameworks(
    call, tmp_path: Path, text: Path, name: str
) -> None:
    """Shrunk from the command line: 20 steps in JAX and in torch, a sample, the export and its float64 proof."""
    where = {framework: tmp_path / framework for framework in ("jax", "torch")}
    for framework, directory in where.items():
        words = [*_shrunk(name), "--data.path", text, "--framework", framework, "--run-dir", directory]
        done = call(pretrain.main, *words)
        assert done.code == 0, done.err
        losses = [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]
        assert len(losses) == 20 and losses[-1] < losses[0]
    for framework, directory in where.items():
        words = ["--prompt", "The cat", "--max-new-tokens", 8, "--greedy", "--framework", framework]
        done = call(sample.main, directory, *words)
        assert done.code == 0 and done.out.startswith("The cat"), done.err
    done = call(export.main, where["jax"], tmp_path / "exported")
    assert done.code == 0 and "(PyTorch) agree" in done.err, done.err


def _bad_inputs(tmp: Path) -> dict[str, tuple[list[str], list[str]]]:
    files = {
        "empty.txt": b"",
        "short.txt": b"ten words are not enough text to train on",
        "latin.txt": "caf\xe9 ".encode("latin-1") * 400,
        "good.txt": sentences(900).encode(),
    }
    for name, content in files.items():
        (tmp / name).write_bytes(content)
    good = ["quickstart", *SMALL, *SMALL_MOE, "--data.path", str(tmp / "good.txt")]
    tokenizer = Tokenizer.train([sentences(50)], 300)
    (tmp / "tok").mkdir()
    tokenizer.save(tmp / "tok" / "tokenizer.json")
    prepare(open_corpus(str(tmp / "short.txt")), tokenizer, tmp / "few", 0.5, 2)
    own = [*good, "--data.tokenizer", str(tmp / "tok")]

    def data(name: str) -> list[str]:
        return [*good[:-1], str(tmp / name)]

    return {
        "missing file": (data("god.txt"), ["god.txt", "good.txt"]),
        "empty file": (data("empty.txt"), ["empty.txt", "empty"]),
        "short file": (data("short.txt"), ["41"]),
        "not utf-8": (data("latin.txt"), ["latin.txt", "UTF-8"]),
        "unknown preset": (["quickstrt", *good[1:]], ["quickstrt", "'quickstart'"]),
        "no preset": (good[1:], ["preset", "quickstart"]),
        "unknown option": ([*good, "--model.n-layer", "2"], ["--model.n-layer", "--model.n-layers"]),
        "bad value": ([*good, "--optim.lr", "many"], ["--optim.lr", "many"]),
        "heads": ([*good, "--model.n-heads", "3"], ["n_heads=3", "n_kv_heads=2"]),
        "mesh": ([*good, "--mesh", "data=4,fsdp=4", "--train.batch-size", "32"], ["16", "8 "]),
        "mesh axis": ([*good, "--mesh", "dta=2"], ["dta", "data"]),
        "tokenizer": ([*good, "--data.tokenizer", "nowhere.json"], ["nowhere.json"]),
        "prepared too short": (
            [*data("few"), "--model.vocab-size", "300"],
            ["needs 41; lower train.seq_len"],
        ),
        "vocabulary": ([*own, "--model.vocab-size", "270"], ["tok has 300 tokens but model.vocab_size=270"]),
        "somebody's folder": (
            [*own, "--model.vocab-size", "300", "--data.cache", str(tmp / "tok")],
            ["tok holds 'tokenizer.json', which is no tokenised data"],
        ),
    }


BAD = (
    "missing file",
    "empty file",
    "short file",
    "not utf-8",
    "unknown preset",
    "no preset",
    "unknown option",
    "bad value",
    "heads",
    "mesh",
    "mesh axis",
    "tokenizer",
    "prepared too short",
    "vocabulary",
    "somebody's folder",
)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(call, tmp_path: Path, case: str) -> None:
    """Exit code 2, one line that names what is wrong, no run directory."""
    words, expected = _bad_inputs(tmp_path)[case]
    done = call(pretrain.main, *words, "--run-dir", tmp_path / "run", "--train.steps", 2)
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(lines) == 1 and done.err.rstrip().endswith(lines[0]), done.err
    assert "Traceback" not in done.err
    for part in expected:
        assert part in lines[0], lines[0]
    assert not (tmp_path / "run").exists() and (tmp_path / "tok" / "tokenizer.json").is_file()


@pytest.fixture
def started(call, tmp_path: Path, text: Path) -> tuple[Path, list]:
    """A finished run of two steps, and the words that made it."""
    words = ["quickstart", *SMALL, *SMALL_MOE, "--data.path", text, "--run-dir", tmp_path / "run"]
    done = call(pretrain.main, *words, "--train.steps", 2)
    assert done.code == 0, done.err
    return tmp_path / "run", words


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_directory_with_another_run_is_refused_untouched(call, started) -> None:
    """Without --resume, and with --resume but another model: one line with both values, nothing lost."""
    directory, words = started
    before = _contents(directory)
    done = call(pretrain.main, *words, "--train.steps", 4)
    assert done.code == 2 and "--resume" in done.err
    done = call(pretrain.main, *words, "--train.steps", 4, "--resume", "--optim.lr", 0.5)
    assert done.code == 2 and "optim.lr" in done.err and "0.5" in done.err and "0.00" in done.err, done.err
    assert _contents(directory) == before


def test_damaged_shards_are_made_again_from_the_text(call, started) -> None:
    """A flipped bit, and ids out of vocabulary (JAX would clamp them silently): neither is trained on."""
    directory, words = started
    shard = directory / "data" / "train" / "shard_0000.npy"
    whole, tokens = shard.read_bytes(), np.load(shard)
    flip(shard, len(whole) - 9)
    done = call(pretrain.main, *words, "--train.steps", 3, "--resume")
    assert done.code == 0 and shard.read_bytes() == whole, done.err
    tokens[:] = 60_000
    np.save(shard, tokens)
    done = call(pretrain.main, *words, "--train.steps", 4, "--resume", "--data.verify", "full")
    assert done.code == 0 and shard.read_bytes() == whole, done.err


def _limited(words: list, size: int) -> subprocess.CompletedProcess:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-m", "experiments.pretrain", *map(str, words)]
    # The limit would cut the tests' common compilation cache short as well.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, env=environment)


def test_no_space_for_the_data_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A disk that is full while the tokens are written."""
    text = tmp_path / "long.txt"
    text.write_text(sentences(20_000), encoding="utf-8")
    words = [
        "quickstart",
        *SMALL,
        *SMALL_MOE,
        "--data.path",
        text,
        "--run-dir",
        tmp_path / "run",
        "--train.steps",
        2,
    ]
    done = _limited(words, 60_000)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "no space" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["continue", pytest.param("stop", marks=pytest.mark.slow)])
def test_no_space_for_a_checkpoint_keeps_the_previous_one(call, started, policy: str) -> None:
    """A disk that is full at a later save: exit code 1, one line, and the run still resumes from where it was."""
    directory, words = started
    done = _limited([*words, "--train.steps", 4, "--resume", "--train.disk-full", policy], 30_000)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith("error: checkpoint of step 4 was not written to "), (
        done.stderr
    )
    assert done.stderr.count("warning: ") == (policy == "continue"), done.stderr
    done = call(pretrain.main, *words, "--train.steps", 4, "--resume")
    assert done.code == 0 and "resumed at step 2" in done.err, done.err


def test_a_disk_without_room_for_one_checkpoint_is_refused(call, started, monkeypatch) -> None:
    """Exit code 2 with both sizes before a step is taken; room for fewer than may be kept is one warning."""
    import shutil
    from types import SimpleNamespace

    directory, words = started
    size = sum(p.stat().st_size for p in (directory / "checkpoints" / "2").rglob("*") if p.is_file())
    for free, code, expected in (
        (size // 4, 2, "error: no room for a checkpoint in"),
        (2 * size, 0, "warning: "),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        done = call(pretrain.main, *words, "--train.steps", 3, "--resume")
        assert done.code == code and expected in done.err and "GB are free" in done.err, done.err


def test_a_damaged_checkpoint_is_passed_over_with_one_line(call, started) -> None:
    """The run goes on from the one before, and says which file of which step is damaged."""
    directory, words = started
    done = call(pretrain.main, *words, "--train.steps", 4, "--resume")
    assert done.code == 0, done.err
    victim = max((directory / "checkpoints" / "4").rglob("d/*"), key=lambda p: p.stat().st_size)
    flip(victim, 40)
    done = call(pretrain.main, *words, "--train.steps", 5, "--resume")
    lines = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert lines == [
        f"warning: checkpoint of step 4 is damaged: {victim} has changed since it was written (SHA-256 differs); "
        "going on from step 2"
    ]
    assert done.code == 0 and "resumed at step 2 of 5" in done.err, done.err
    assert [row["step"] for row in read_metrics(directory / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    for step in (5, 4, 2):
        if (directory / "checkpoints" / str(step)).is_dir():
            (directory / "checkpoints" / str(step) / "manifest.json").write_bytes(b"")
    done = call(pretrain.main, *words, "--train.steps", 6, "--resume")
    assert done.code == 2 and f"error: {directory} has no whole checkpoint: " in done.err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_first_interrupt_saves_and_ends_in_order(tmp_path: Path, text: Path, name: str) -> None:
    """A signal during training: the step is finished, saved, exit code 0, and the run resumes there."""
    import signal
    import time

    directory = tmp_path / "run"
    words = [
        "quickstart",
        *SMALL,
        *SMALL_MOE,
        "--data.path",
        text,
        "--run-dir",
        directory,
        "--train.steps",
        "100000",
    ]
    command = [sys.executable, "-m", "experiments.pretrain", *map(str, words)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    log, deadline = directory / "metrics.jsonl", time.monotonic() + 120
    while (not log.exists() or log.stat().st_size < 2000) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f"{name}: saved at step" in err, err
    last = read_metrics(log)[-1]["step"]
    assert (directory / "checkpoints" / str(last)).is_dir()


@pytest.mark.slow
def test_a_run_moves_between_meshes_without_a_seam(tmp_path: Path, text: Path) -> None:
    """Float64: four steps on fsdp x tensor x expert, four more on data, equal eight on one device."""
    words = ["quickstart", *SMALL, *SMALL_MOE, "--train.batch-size", "8", "--data.path", str(text)]
    words += ["--train.dtype", "float64", "--train.param-dtype", "float64", "--optim.decay-steps", "8"]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for steps, mesh, where, more in (
        (4, "fsdp=2,tensor=2,expert=2", parts, []),
        (8, "data=4", parts, ["--resume"]),
        (8, "data=1", whole, []),
    ):
        command = [sys.executable, "-m", "experiments.pretrain", *words, "--train.steps", str(steps)]
        command += ["--mesh", mesh, "--run-dir", str(where), *more]
        done = subprocess.run(command, capture_output=True, text=True)  # a process of its own: x64 is global
        assert done.returncode == 0, done.stderr[-2000:]
    logs = [read_metrics(where / "metrics.jsonl") for where in (parts, whole)]
    errors = [abs(a["loss"] - b["loss"]) for a, b in zip(*logs, strict=True)]
    assert len(errors) == 8 and max(errors) <= tolerance("f64_mesh"), errors
