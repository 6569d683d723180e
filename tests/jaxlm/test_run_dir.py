"""A run directory is started once, resumed under the same configuration, and says what it was made with."""

import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config as configs
from jaxlm.config import ConfigError, MeshConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from jaxlm.run_dir import RunDir, RunDirError, diff_configs, move_aside, open_run

MODEL = ModelConfig(
    vocab_size=11, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=16, context=512,
    rope_theta=7e4, norm_eps=3e-6,
)  # fmt: skip


def run_config(
    optim: dict[str, Any] | None = None, mesh: MeshConfig | None = None, **train: Any
) -> RunConfig:
    """A run that differs from the defaults where told."""
    optim_config = OptimConfig(**({"warmup_steps": 5} | (optim or {})))
    return RunConfig(MODEL, optim=optim_config, train=TrainConfig(**train), mesh=mesh or MeshConfig())


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a directory with its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_fresh_start_stores_the_resolved_schedule(tmp_path: Path) -> None:
    """decay_steps=0 becomes the steps of the first start, in config.json and in what is returned."""
    directory, config, resumed = open_run(tmp_path / "r", run_config(steps=40), resume=False)
    assert (config.optim.decay_steps, resumed) == (40, False)
    assert configs.load(RunConfig, directory.config) == config
    assert dataclasses.replace(config, optim=run_config().optim) == run_config(steps=40)


def test_explicit_decay_is_kept(tmp_path: Path) -> None:
    """A given decay is not resolved again."""
    assert open_run(tmp_path / "r", run_config({"decay_steps": 30}), False)[1].optim.decay_steps == 30


def test_a_run_is_not_started_over(tmp_path: Path) -> None:
    """Without --resume a directory with a run is refused and left byte for byte as it is."""
    open_run(tmp_path / "r", run_config(), False)
    before = contents(tmp_path)
    with pytest.raises(
        RunDirError, match=r"/r holds a run; continue it with --resume or choose another --run-dir$"
    ):
        open_run(tmp_path / "r", run_config(steps=7), False)
    assert contents(tmp_path) == before


def test_other_files_do_not_make_a_run(tmp_path: Path) -> None:
    """A directory that only holds a user's own files may be used; a file in its place may not."""
    (tmp_path / "notes.txt").write_text("mine")
    assert open_run(tmp_path, run_config(), False)[2] is False
    with pytest.raises(RunDirError, match=r"notes\.txt is a file; choose another --run-dir"):
        open_run(tmp_path / "notes.txt", run_config(), False)


def test_resume_of_nothing_starts_fresh(tmp_path: Path) -> None:
    """--resume without a run creates one and says that nothing was resumed."""
    directory, config, resumed = open_run(tmp_path / "r", run_config(steps=40), resume=True)
    assert not resumed and directory.config.is_file() and config.optim.decay_steps == 40


def test_resume_may_change_what_does_not_change_the_model(tmp_path: Path) -> None:
    """More steps, other intervals and another mesh are taken over and stored; the schedule stays the first one."""
    open_run(tmp_path / "r", run_config(steps=40), False)
    changes = dict(steps=90, log_every=2, eval_every=3, save_every=4, eval_batches=5, keep=6, plots=False)
    changes |= {"disk_full": "stop", "max_skips": 9}
    directory, config, resumed = open_run(
        tmp_path / "r", run_config(mesh=MeshConfig(data=2, fsdp=2), **changes), resume=True
    )
    assert resumed
    assert config.optim.decay_steps == 40
    assert {name: getattr(config.train, name) for name in changes} == changes
    assert config.mesh == MeshConfig(data=2, fsdp=2)
    assert configs.load(RunConfig, directory.config) == config


def test_resume_with_another_model_names_every_field(tmp_path: Path) -> None:
    """One line has all fields that forbid it with both values; nothing is written."""
    open_run(tmp_path / "r", run_config(), False)
    before = contents(tmp_path)
    other = run_config({"lr": 1e-3, "decay_steps": 500}, steps=2000, seed=3)
    other = dataclasses.replace(other, model=dataclasses.replace(MODEL, rope_theta=1e6, windows=(4, 0)))
    with pytest.raises(ConfigError) as error:
        open_run(tmp_path / "r", other, resume=True)
    message = str(error.value)
    for part in (
        "model.rope_theta was 70000.0, is 1000000.0; ",
        "model.windows was [0], is [4, 0]; ",
        "optim.lr was 0.0003, is 0.001; ",
        "optim.decay_steps was 1000, is 500; ",
        "train.seed was 0, is 3; only ",
    ):
        assert part in message
    assert "train.steps was" not in message and "\n" not in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(TrainConfig) if f.name not in (
        "steps", "log_every", "eval_every", "eval_batches", "save_every", "keep", "plots", "disk_full", "max_skips"
    )],
)  # fmt: skip
def test_no_other_field_of_the_loop_may_change(tmp_path: Path, field: str) -> None:
    """Batch, length, precision, seed and the rest change what is trained."""
    others = {"dtype": "bfloat16", "param_dtype": "float64", "remat": "block", "seed": 1}
    others |= {"batch_size": 16, "seq_len": 128, "accumulation": 2}
    others |= {"spike_z": 3.0, "spike_window": 7, "loss_scale": 8.0, "loss_scale_steps": 5}
    open_run(tmp_path / "r", run_config(), False)
    with pytest.raises(ConfigError, match=rf"train\.{field} was "):
        open_run(tmp_path / "r", run_config(**{field: others[field]}), resume=True)


def test_damaged_config_is_one_line(tmp_path: Path) -> None:
    """A run without its config, or with half of it, is named and not touched."""
    directory, _, _ = open_run(tmp_path / "r", run_config(), False)
    text = directory.config.read_text()
    directory.config.write_text(text[:40])
    with pytest.raises(ConfigError, match=r"config\.json: "):
        open_run(tmp_path / "r", run_config(), resume=True)
    directory.config.unlink()
    directory.checkpoints.mkdir()
    with pytest.raises(RunDirError, match=r"cannot be resumed: config\.json is missing"):
        open_run(tmp_path / "r", run_config(), resume=True)


def test_diff_lists_every_difference_once() -> None:
    """Nested fields by their dotted path with both values; equal configs differ in nothing."""
    assert diff_configs(run_config(), run_config()) == []
    different = run_config({"lr": 1e-3}, mesh=MeshConfig(data=2), steps=5)
    assert diff_configs(run_config(), different) == [
        ("optim.lr", 3e-4, 1e-3),
        ("train.steps", 1000, 5),
        ("mesh.data", 1, 2),
    ]


def test_env_holds_versions_devices_and_the_past(tmp_path: Path) -> None:
    """Versions are those of the installed packages; a resume adds to the record instead of replacing it."""
    directory = RunDir(tmp_path)
    directory.write_env(["TFRT_CPU_0"], seed=4)
    first = json.loads(directory.env.read_text())
    assert first["versions"]["python"] == platform.python_version()
    assert first["versions"]["orbax-checkpoint"] == importlib.metadata.version("orbax-checkpoint")
    assert (first["devices"], first["seed"], first["previous"]) == (["TFRT_CPU_0"], 4, [])
    assert first["command"].startswith("python") and first["date"].endswith("+00:00")
    directory.write_env(["cuda:0"], seed=4)
    second = json.loads(directory.env.read_text())
    assert second["devices"] == ["cuda:0"]
    assert second["previous"] == [{k: v for k, v in first.items() if k != "previous"}]


def test_move_aside_takes_the_first_free_name(tmp_path: Path) -> None:
    """runs/r becomes runs/r-1, then runs/r-2."""
    for number in (1, 2):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "file").write_text(str(number))
        assert move_aside(tmp_path / "r") == tmp_path / f"r-{number}"
    assert (tmp_path / "r-1" / "file").read_text() == "1"
    assert not (tmp_path / "r").exists()
