"""A run started in one framework goes on in the other from the command line: float64 losses show no seam."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
from entry import SMALL, SMALL_MOE, run, sentences  # noqa: E402
from helpers import assert_close, relative_error  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert.targets import open_target  # noqa: E402
from experiments import pretrain  # noqa: E402
from jaxlm.checkpoint import Checkpoints  # noqa: E402
from jaxlm.metrics import read_metrics  # noqa: E402
from jaxlm.run_dir import RunDir  # noqa: E402

pytestmark = pytest.mark.torch

OTHER = {"jax": "torch", "torch": "jax"}
FLOAT64 = ["--train.dtype", "float64", "--train.param-dtype", "float64"]
COMPARED = ("loss", "lr", "grad_norm", "clip_scale", "expert_load", "z", "balance", "router_z", "val_loss")


@pytest.fixture
def call(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`pretrain` of a small float64 model on a text, with these words beside."""
    text = tmp_path / "text.txt"
    text.write_text(sentences(900), encoding="utf-8")
    common = ["quickstart", *SMALL, *SMALL_MOE, *FLOAT64, "--data.path", text, "--train.eval-every", 3]

    def pretrained(*words):
        return run(pretrain.main, [str(w) for w in (*common, *words)], capsys, monkeypatch)

    return pretrained


@pytest.fixture
def wide() -> Iterator[None]:
    """A float64 run widens jax for its process, which here has other tests to run."""
    yield
    jax.config.update("jax_enable_x64", False)


def facts(directory: Path, framework: str) -> dict:
    """What the newest checkpoint of a framework holds beside the state."""
    if framework == "torch":
        return json.loads((directory / "checkpoints-torch" / "latest" / "training.json").read_text())
    checkpoints = Checkpoints(RunDir(directory).checkpoints)
    assert checkpoints.latest_step is not None
    return checkpoints.verify(checkpoints.latest_step)["extra"]


def assert_no_seam(parts: Path, whole: Path, keys: tuple[str, ...] = COMPARED) -> float:
    """Every step once, every number within the gate of the uninterrupted run's; returns the largest error."""
    here, there = (read_metrics(directory / "metrics.jsonl") for directory in (parts, whole))
    assert [row["step"] for row in here] == [row["step"] for row in there] == list(range(1, len(there) + 1))
    errors = {}
    for a, b in zip(here, there, strict=True):
        kept = [
            {k for k in row if not k.startswith("val_")} for row in (a, b)
        ]  # the end of a part is validated too
        assert kept[0] == kept[1]
        assert a["tokens"] == b["tokens"]
        errors |= {
            f"{key} of step {b['step']}": relative_error(a[key], b[key])
            for key in keys
            if key in a and key in b
        }
    assert_close(errors, tolerance("f64"), "numbers")
    return max(errors.values())


def test_a_run_goes_back_and_forth_without_a_seam(call, tmp_path: Path, wide: None) -> None:
    """JAX, torch, JAX in one directory equal six steps in JAX: losses, norms, data and best value."""
    steps, parts, whole = ["--optim.decay-steps", 6, "--train.steps"], tmp_path / "parts", tmp_path / "whole"
    done = call(*steps, 6, "--run-dir", whole)
    assert done.code == 0, done.err
    before = None
    for last, framework in ((1, "jax"), (3, "torch"), (6, "jax")):
        words = [*steps, last, "--run-dir", parts, "--resume", "--framework", framework]
        done = call(*words)
        assert done.code == 0, done.err
        if before is not None:
            assert f"continuing from the {OTHER[framework]} checkpoint of step {before}\n" in done.err
            assert f"resumed at step {before} of {last}" in done.err
        before = last
        assert (open_target(parts).torch_weights is None) == (framework == "jax"), "not the newest weights"
    assert_no_seam(parts, whole)
    ended, wanted = facts(parts, "jax"), facts(whole, "jax")
    assert ended["loader"] == wanted["loader"]
    assert relative_error(ended["best"], wanted["best"]) <= tolerance("f64")
    done = call(*words)
    assert done.code == 0 and "continuing from" not in done.err, "the older checkpoint of the other was taken"
    assert "resumed at step 6" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("first", ["jax", "torch"])
def test_twenty_five_steps_and_twenty_five_more_are_fifty(
    call, tmp_path: Path, wide: None, first: str
) -> None:
    """quickstart's width and experts, two layers: fifty steps of one framework, the second half in the other."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    size = ["--model.d-model", 192, "--model.moe.n-experts", 8, "--model.moe.d-ff", 256]
    stable = ["--optim.lr", 5e-4]  # at a higher rate the trajectory itself magnifies rounding
    words = [*size, *stable, "--optim.decay-steps", 50, "--train.eval-every", 25, "--train.steps"]
    done = [
        call(*words, 50, "--run-dir", whole, "--framework", first),
        call(*words, 25, "--run-dir", parts, "--framework", first),
        call(*words, 50, "--run-dir", parts, "--framework", OTHER[first], "--resume"),
    ]
    assert [outcome.code for outcome in done] == [0, 0, 0], done
    print(f"largest error of a number: {assert_no_seam(parts, whole):.1e}")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param("training.json", b"{", id="facts"),
        pytest.param("optimizer.safetensors", b"", id="empty moments"),
        pytest.param("optimizer.safetensors", b"\x02\0\0\0\0\0\0\0{}", id="no moments"),
        pytest.param("model.safetensors", b"", id="weights"),
    ],
)
def test_a_damaged_checkpoint_of_the_other_framework_is_one_line(
    call, tmp_path: Path, wide: None, file: str, content: bytes
) -> None:
    """Passed over with a warning while an older one is whole; exit code 2 where none is, never fresh moments."""
    folder = tmp_path / "run" / "checkpoints-torch"
    words = ["--run-dir", tmp_path / "run", "--train.save-every", 1, "--train.eval-batches", 1]
    done = call("--train.steps", 2, *words, "--framework", "torch")
    assert done.code == 0, done.err
    shutil.rmtree(folder / "best")
    (folder / "latest" / file).write_bytes(content)
    for name, code in (("latest", 0), ("previous", 2)):
        (folder / name / file).write_bytes(content)
        done = call("--train.steps", 1, *words, "--resume")
        lines = [line for line in done.err.splitlines() if line.startswith(("error: ", "warning: "))]
        assert done.code == code and len(lines) == 1 and file in lines[0], done.err
        assert f"checkpoint {name} of torch is damaged: " in lines[0]
        assert code or "continuing from the torch checkpoint of step 1\n" in done.err
        assert not code or done.err.rstrip().endswith(lines[0])
