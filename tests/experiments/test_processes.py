"""Several processes train as one: two with two CPU devices each over loopback, in real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tolerances import tolerance

ROOT = Path(__file__).resolve().parents[2]
TINY = """
    quickstart --data.path README.md --model.vocab-size 512 --model.n-layers 2 --model.d-model 32 --model.n-heads 4
    --model.n-kv-heads 2 --model.head-dim 8 --model.d-ff 48 --model.moe.d-ff 48 --model.moe.n-experts 4
    --model.context 32 --train.seq-len 32 --train.batch-size 8 --train.accumulation 1 --train.dtype float64
    --train.param-dtype float64 --train.plots False --optim.decay-steps 10 --optim.warmup-steps 3 --train.save-every 2
    --train.eval-every 5 --train.eval-batches 3 --train.spike-z 6
""".split()  # noqa: SIM905 (a command line reads better as one)


def start(folder: Path, *words: str, devices: int = 0) -> "subprocess.Popen[str]":
    """A training command in the background; `devices` fake CPU devices for a single process."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled")
    if devices:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "experiments.pretrain", *TINY, "--run-dir", str(folder), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and what was said on standard error."""
    _, said = process.communicate(timeout=240)
    return process.returncode, said


TWO = ("--mesh", "data=2,fsdp=2", "--launch.processes", "2", "--launch.cpu-devices", "2")


def rows(folder: Path) -> dict[int, dict]:
    """The log by step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def losses(folder: Path) -> list[float]:
    """Training and validation losses in order."""
    return [value for row in rows(folder).values() for value in (row["loss"], row.get("val_loss", 0.0))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in one process on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    code, said = finish(start(folder, "--train.steps", "10", devices=1))
    assert code == 0, said
    return folder


def test_two_processes_train_as_one_and_go_on_as_one(alone: Path, tmp_path: Path) -> None:
    """2 processes x 2 devices follow 1 x 1 on the same global batches; killed, they go on as 1 process x 4 devices."""
    folder, limit = tmp_path / "run", tolerance("f64_mesh")
    process = start(folder, "--train.steps", "10", *TWO)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (folder / "checkpoints" / "6" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()  # the parent; its children end by themselves
    process.communicate()
    reached = rows(folder)
    assert len(reached) >= 6
    wanted = rows(alone)
    assert max(abs(row["loss"] - wanted[step]["loss"]) for step, row in reached.items()) <= limit
    code, said = finish(
        start(folder, "--train.steps", "10", "--mesh", "data=2,fsdp=2", "--resume", devices=4)
    )
    assert code == 0 and "resumed at step" in said, said
    assert len(rows(folder)) == 10
    assert max(abs(a - b) for a, b in zip(losses(folder), losses(alone), strict=True)) <= limit


@pytest.mark.slow
def test_a_signal_to_one_of_them_ends_all_at_the_same_step(alone: Path, tmp_path: Path) -> None:
    """SIGTERM to the second process alone: both finish the same step, save and end with 0; nothing is lost.

    Along `tensor` both hold the same rows, and only one of them was asked.
    """
    folder, mesh = tmp_path / "run", ("--model.n-kv-heads", "4", "--mesh", "tensor=4")
    process = start(folder, "--train.steps", "100000", "--train.log-every", "1", *mesh, *TWO[2:])
    second = wait_for_process(folder, process, 1)
    os.kill(second, signal.SIGTERM)
    code, said = finish(process)
    assert code == 0 and "a signal to another process: saved at step" in said, said
    last = max(rows(folder))
    assert (folder / "checkpoints" / str(last) / "manifest.json").exists()


@pytest.mark.slow
def test_a_process_that_dies_is_named_within_a_minute(tmp_path: Path) -> None:
    """SIGKILL on the second of two in training: one line with number and host, exit 1, native traces in the run."""
    folder = tmp_path / "run"
    process = start(folder, "--train.steps", "100000", *TWO)
    second = wait_for_process(folder, process, 1)
    began = time.monotonic()
    os.kill(second, signal.SIGKILL)
    code, said = finish(process)
    assert code == 1 and time.monotonic() - began < 60, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"process 1 of 2 on {socket.gethostname()} died of SIGKILL"), said
    assert "Traceback" not in said
    assert "hread 0x" in (folder / "logs" / "process_000.log").read_text()  # stacks of its threads


def wait_for_process(folder: Path, process: "subprocess.Popen[str]", index: int) -> int:
    """Number of a child that trains already: the log has two steps."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()[1]
        log = folder / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) > 2:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                settings = Path(f"/proc/{child}/environ").read_text()
                if f'"index": {index},' in settings:
                    return int(child)
        time.sleep(0.05)
    raise AssertionError("nothing was trained in two minutes")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--mesh", "fsdp=2", *TWO[2:]), "--mesh"),
        (("--mesh", "fsdp=4", "--framework", "torch", *TWO[2:]), "torch"),
        (("--launch.machines", "2"), "launch.coordinator"),
    ],
)
def test_a_launch_that_cannot_work_is_one_line(tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    """Exit 2, said once."""
    code, said = finish(start(tmp_path / "run", "--train.steps", "3", *words))
    assert code == 2 and reason in said and len(said.strip().splitlines()) == 1, said
