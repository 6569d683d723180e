"""TensorBoard and W&B show what metrics.jsonl holds, read back from their own files; neither can end a run."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import InputError, LogConfig, RunConfig
from jaxlm.metric_names import BY_GROUP, LOAD, NAMES, named
from jaxlm.metrics import VOLATILE, read_metrics
from jaxlm.presets import preset
from jaxlm.run_dir import RunDir
from jaxlm.sinks import check_sinks, open_sinks
from jaxlm.wandb_sink import read_wandb, wandb_id

ROOT = Path(__file__).resolve().parents[2]


def a_run(**log: Any) -> RunConfig:
    """A run that logs to what `log` says."""
    return dataclasses.replace(preset("quickstart"), log=LogConfig(**log))


def a_row(step: int) -> dict[str, Any]:
    """A line with a number of every kind."""
    row: dict[str, Any] = {
        "step": step,
        "tokens": 128 * step,
        "loss": 7 / step,
        "lr": 1e-3 / step,
        "skips": 0,
    }
    row |= {"grad_norm": 0.1 * step, "grad_norm/head": 0.3 * step, "perplexity": math.exp(min(7 / step, 5))}
    row |= {"expert_load": np.full((2, 4), 0.25), "balance": math.nan, "tokens_per_second": None, "new": 0.5}
    return row | ({"val_loss": 8 / step} if step % 5 == 0 else {})


SCRIPT = """
import os, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_sinks import a_row, a_run
from jaxlm.run_dir import RunDir
from jaxlm.sinks import open_sinks
"""


def in_a_process(body: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in `folder`, with no home, no credentials, and a server that nobody listens on."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    known |= {"HOME": str(folder), "WANDB_BASE_URL": "http://127.0.0.1:9"} | environment
    script = SCRIPT.format(root=str(ROOT), tests=str(Path(__file__).parent)) + body
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, timeout=120)


def events(folder: Path) -> Any:
    """A TensorBoard folder as TensorBoard itself reads it."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    return found.Reload()


def test_tensorboard_shows_every_number_once(tmp_path: Path) -> None:
    """Killed after step 12, resumed from 8: TensorBoard's reader has steps 1 to 20 once, with the log's values."""
    pytest.importorskip("tensorboard")
    directory, run = RunDir(tmp_path), a_run(tensorboard=True)
    killed = open_sinks(run, directory, None)
    for step in range(1, 13):
        killed.write(a_row(step) | {"loss": 7 / step + (step > 8)})  # what is purged can be told apart
    with open_sinks(run, directory, 8) as sinks:
        for step in range(9, 21):
            sinks.write(a_row(step))
    shown, rows = events(tmp_path / "tensorboard"), read_metrics(directory.metrics)
    assert [row["step"] for row in rows] == list(range(1, 21))
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in named(row).items():
            expected.setdefault(name, []).append((row["step"], float(np.float32(value))))
    got = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    assert got == expected
    assert {
        "loss/train",
        "loss/val",
        "norms/gradients",
        "norms_gradients/head",
        "experts/fullest_01",
    } <= got.keys()
    loads = shown.Histograms("experts/load_00")
    assert [event.step for event in loads] == [5, 10, 15, 20]
    assert loads[0].histogram_value.bucket == [0.25] * 4
    killed.close()


def test_names_group_what_belongs_together() -> None:
    """A line's numbers under their shown names; what is no number has none, the fullest expert counts in balances."""
    row = a_row(5) | {"expert_load": [[0.5, 0.5, 0.0, 0.0], [0.25] * 4]}
    assert named(row) == {
        "progress/tokens": 640.0,
        "loss/train": 1.4,
        "loss/val": 1.6,
        "optimizer/lr": 2e-4,
        "guard/skips": 0.0,
        "norms/gradients": 0.5,
        "norms_gradients/head": 1.5,
        "perplexity/train": pytest.approx(math.exp(1.4)),
        "experts/fullest_00": 2.0,
        "experts/fullest_01": 1.0,
        "other/new": 0.5,
    }


def test_every_key_is_documented() -> None:
    """What has a name in TensorBoard stands in docs/metrics.md as it does in metrics.jsonl."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [key for key in (*NAMES, LOAD, *BY_GROUP, *VOLATILE) if f"`{key}`" not in text] == []


def test_wandb_offline_run_holds_the_log(tmp_path: Path) -> None:
    """Killed after step 60, resumed from 50, without a network: one run id, every step once, the log's values.

    A killed process takes with it what W&B had not written yet; the resumed one sends it again.
    """
    pytest.importorskip("wandb")
    body = """
resume, first, last, kill = map(int, sys.argv[1:]) if len(sys.argv) > 1 else ARGUMENTS
directory = RunDir(Path("run"))
directory.path.mkdir(exist_ok=True)
sinks = open_sinks(a_run(wandb="offline"), directory, resume if resume else None)
for step in range(first, last + 1):
    sinks.write(a_row(step))
if kill:
    import signal
    os.kill(os.getpid(), signal.SIGKILL)
sinks.close()
"""
    for arguments in ((0, 1, 60, 1), (50, 51, 70, 0)):
        done = in_a_process(body.replace("ARGUMENTS", repr(arguments)), tmp_path)
        assert done.returncode == (-9 if arguments[-1] else 0), done.stderr
        assert "warning" not in done.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    identity = json.loads((tmp_path / "run" / "wandb_id.json").read_text())["id"]
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for file in files for record in read_wandb(file)]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert {(r.run_id, r.project, r.display_name) for r in runs} == {(identity, "jaxlm", "run")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["optim"]["lr"] == a_run().optim.lr
    history = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            history.append({key: json.loads(value) for key, value in items.items()})
    own = [{key: value for key, value in entry.items() if key[0] != "_"} for entry in history]
    assert [entry["_step"] for entry in history] == [row["step"] for row in rows] == list(range(1, 71))
    assert own == [named(row) for row in rows]


def test_mirrors_that_fail_never_end_a_run(tmp_path: Path) -> None:
    """W&B without a key and TensorBoard on a file's name: one warning each, and the log is complete."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    body = """
directory = RunDir(Path("run"))
directory.path.mkdir()
(directory.path / "tensorboard").write_text("in the way")
with open_sinks(a_run(wandb="online", tensorboard=True), directory, None) as sinks:
    for step in range(1, 5):
        sinks.write(a_row(step))
"""
    done = in_a_process(body, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert (
        len(lines) == 2 and "TensorBoard cannot start" in lines[0] and "W&B cannot start (No API" in lines[1]
    )
    assert "Traceback" not in done.stderr
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4


def test_a_full_disk_costs_no_line_of_the_log(tmp_path: Path) -> None:
    """No file may grow beyond 3,000 bytes for a while: TensorBoard stops with a warning, the log catches up."""
    pytest.importorskip("tensorboard")
    body = """
import resource
directory = RunDir(Path("run"))
directory.path.mkdir()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with open_sinks(a_run(tensorboard=True), directory, None) as sinks:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    for step in range(1, 41):
        sinks.write(a_row(step))
    assert directory.metrics.stat().st_size <= 3000 and directory.metrics.read_bytes().endswith(b"\\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    sinks.write(a_row(41))
"""
    done = in_a_process(body, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 42))
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2, done.stderr
    assert "wait in memory until there is room" in done.stderr and "TensorBoard stopped (" in done.stderr


@pytest.mark.parametrize(
    ("package", "log"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "offline"})]
)
def test_missing_package_names_the_extra(
    package: str, log: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be imported: one line with the extra's name, and no file; nothing where it is off."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}.*pip install 'jaxlm\[{package}\]'"):
        open_sinks(a_run(**log), RunDir(tmp_path), None)
    assert not list(tmp_path.iterdir())
    check_sinks(LogConfig())


def test_run_id_stays_and_a_damaged_one_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The id is made once; a file that holds none gives a warning and a new one."""
    path = tmp_path / "wandb_id.json"
    identity, known = wandb_id(path)
    assert not known and wandb_id(path) == (identity, True)
    assert capsys.readouterr().err == ""
    for damage in ('{"id": "../x"}', '{"id', "[]"):
        path.write_text(damage)
        other, known = wandb_id(path)
        assert not known and other != identity
        assert "a new" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["wandb_id.json"]
