"""`python -m experiments.plan`: what it says by arithmetic, what the compiler adds, and bad input in one line."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from experiments import plan
from jaxlm.config import ConfigError

# Small enough to compile in seconds; eight devices, so that every kind of collective has a reason.
SMALL = ["--model.n-layers", "1", "--model.vocab-size", "4096", "--train.accumulation", "1"]


def has_plugin() -> bool:
    """Whether jax's CUDA compiler of jax's own version is installed here."""
    try:
        names = ("jax", "jax-cuda13-plugin", "jax-cuda13-pjrt")
        return len({importlib.metadata.version(name) for name in names}) == 1
    except importlib.metadata.PackageNotFoundError:
        return False


def test_it_says_memory_time_tokens_disk_and_collectives(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole answer of one plan, figures checked by hand."""
    words = ["gptoss", "--mesh", "fsdp=2,expert=4", "--batch", "64", "--seq=2048", "--mfu", "0.5"]
    assert plan.main([*words, "--tokens", "1e9", "--compile", "no"]) == 0
    out = capsys.readouterr().out
    assert "gptoss on 8 x h200 (mesh fsdp=2,expert=4), 131,072 tokens per step in 8 micro-batches" in out
    assert "2,857,434,112, 592,509,952 active" in out
    assert "2.477 GFLOP per token: forward 0.826, backward 1.651" in out
    assert re.search(r"weights +1.43 GB\n +moments +2.86 GB", out)  # 4 and 8 bytes on each of eight devices
    assert "1,597,749 tokens/s at 50% MFU, 0.2 hours for 1,000,000,000 tokens" in out
    assert "11.9 G tokens: 20 per active parameter" in out
    assert "102.87 GB: 2 newest checkpoints and the best, 34.29 GB each" in out
    assert all(f"    {kind}" in out for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"))
    assert "compiled" not in out


def test_what_does_not_fit_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict is the exit code, as scripts want it."""
    assert plan.main(["llama3-8b", "--device", "rtx4090", "--compile", "no"]) == 1
    assert "does NOT fit (95% is usable)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "name a preset first"),
        (["gptos"], "did you mean 'gptoss'"),
        (["gptoss", "--device", "h1000"], "unknown device 'h1000'"),
        (["gptoss", "--mfu", "40"], "mfu=40.0 must be above 0 and at most 1"),
        (["gptoss", "--tokens", "-1"], "tokens=-1 must be positive"),
        (["gptoss", "--tokens", "nan"], "tokens=nan must be a finite number"),
        (["gptoss", "--mesh", "fsdp"], "is not of the form axis=count"),
        (["astragpt-7b", "--mesh", "fsdp=8"], "must be a multiple of the mesh's"),
        (["gptoss", "--batches", "3"], "unknown option --batches"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    """Every mistake names what was wrong."""
    with pytest.raises(ConfigError) as caught:
        plan.main(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(has_plugin(), reason="the compiler is installed")
def test_asking_for_the_compiler_where_it_is_missing_says_what_to_install() -> None:
    """--compile yes without the plugin: one line with the command."""
    done = _run("quickstart", "--compile", "yes")
    assert done.returncode == 2
    assert re.search(
        r"error: jax-cuda13-plugin is missing; pip install --no-deps jax-cuda13-plugin==", done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not has_plugin(), reason="needs jax's CUDA compiler plugin")
@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, mesh", [("astragpt-1b", "fsdp=8"), ("gptoss", "fsdp=2,expert=4"), ("gptoss", "data=2,expert=2")]
)
def test_the_compiler_agrees(preset: str, mesh: str) -> None:
    """For an H200 that is not there: the estimate within 15 %, the state divided, no collective unforeseen."""
    done = _run(preset, "--mesh", mesh, "--compile", "yes", *SMALL)
    assert done.returncode == 0, done.stderr
    off = re.search(r"the estimate is off by ([+-][\d.]+)%", done.stdout)
    assert off is not None and abs(float(off[1])) <= 15, done.stdout
    state = re.search(r"state +([\d.]+) GB if divided evenly, ([\d.]+) GB with the batch", done.stdout)
    ways = 2 if mesh.startswith("data=2") else 1  # `data` keeps copies
    assert state is not None and float(state[2]) <= 1.1 * ways * float(state[1]) + 0.01, done.stdout
    assert "not expected" not in done.stdout, done.stdout


def _run(*words: str) -> "subprocess.CompletedProcess[str]":
    """The entry point in a process of its own, since platforms are chosen before jax is imported."""
    command = [sys.executable, "-m", "experiments.plan", *words]
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
