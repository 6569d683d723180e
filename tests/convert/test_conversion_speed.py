"""Import and export of a model of 1 GB against what the machine can do at all, in one run."""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import stream
from convert.__main__ import main
from jaxlm import tensor_file
from jaxlm.config import ModelConfig, MoEConfig, save
from jaxlm.model import abstract_model
from jaxlm.model_dir import write_manifest, write_shards
from jaxlm.tensor_file import Planned, boxes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = ModelConfig(
    vocab_size=32_000,
    d_model=1024,
    n_layers=6,
    n_heads=16,
    n_kv_heads=4,
    head_dim=64,
    d_ff=1024,
    context=256,
    rope_theta=5e4,
    norm_eps=3e-6,
    moe=MoEConfig(n_experts=8, n_active=2, d_ff=2816),
)
LIMIT, ROUNDS = 2.0, 5  # seconds over those of the slower anchor; medians of so many


def write_model(directory: Path) -> int:
    """Noise in our layout; bytes."""
    noise = np.random.default_rng(0).normal(size=tensor_file._PIECE // 2).astype(BFLOAT16)

    def planned(shape: tuple[int, ...]) -> Planned:
        sizes = [[s.stop - s.start for s in box] for box in boxes(shape, BFLOAT16)]
        return Planned(shape, BFLOAT16, lambda: (noise[: np.prod(size)].reshape(size) for size in sizes))

    directory.mkdir()
    plans = {path: planned(tuple(x.shape)) for path, x in abstract_model(CONFIG).shapes.items()}
    stored = write_shards(directory, plans, "jaxlm")
    save(CONFIG, directory / "config.json")
    write_manifest(directory, "jaxlm", stored)
    return sum(plan.nbytes for plan in plans.values())


def copy(source: Path, out: Path) -> None:
    """A file copied and brought to the disk."""
    shutil.copyfile(source, out)
    with open(out, "rb") as file:
        os.fsync(file.fileno())


def transpose(values: np.ndarray, out: np.ndarray) -> None:
    """[n, 1024, 1024] in memory, in square blocks, as one writes it without measuring further."""
    for one, other in zip(out, values, strict=True):
        for row in range(0, 1024, 64):
            for column in range(0, 1024, 64):
                one[row : row + 64, column : column + 64] = other[column : column + 64, row : row + 64].T


def tuned(values: np.ndarray, out: np.ndarray) -> None:
    """The same as conversion does it."""
    stream.copy_blocked(out, np.swapaxes(values, 1, 2))


@pytest.mark.bench
@pytest.mark.torch
def test_conversion_takes_at_most_twice_a_copy(tmp_path: Path) -> None:
    """At most 2 times the slower of a file copy (flushed) and a blocked transpose of the same bytes, each direction."""
    total = write_model(tmp_path / "ours")
    assert (
        main(["export", str(tmp_path / "ours"), "--to", "hf", str(tmp_path / "theirs"), "--no-tokenizer"])
        == 0
    )
    numbers = np.random.default_rng(0).integers(0, 2**14, (total // (2 << 20), 1024, 1024), np.uint16)
    values = numbers.view(BFLOAT16)
    out = np.zeros_like(values)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    jobs: dict[str, Callable[[], object]] = {
        "copy of a file": lambda: copy(ours / "model.safetensors", tmp_path / "result"),
        "blocked transpose": lambda: transpose(values, out),
        "our transpose": lambda: tuned(values, out),
        "import": lambda: main(["import", str(theirs), str(tmp_path / "result")]),
        "export": lambda: main(
            ["export", str(ours), "--to", "hf", str(tmp_path / "result"), "--no-tokenizer"]
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
            result = tmp_path / "result"
            shutil.rmtree(result) if result.is_dir() else result.unlink(missing_ok=True)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    anchor = max(median["copy of a file"], median["blocked transpose"])
    print(f"\n{total / 1e9:.2f} GB of bfloat16, {CONFIG.moe.n_experts} experts, medians of {ROUNDS}")
    for name, value in median.items():
        print(
            f"{name:20} {total / 1e9 / value:6.2f} GB/s   {value / anchor:5.2f} times the slower anchor, "
            f"{value / median['copy of a file']:5.2f} times the copy"
        )
    slow = {name: median[name] / anchor for name in ("import", "export") if median[name] > LIMIT * anchor}
    assert not slow, f"over {LIMIT} times the slower anchor: {slow}"
