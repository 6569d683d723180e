"""torchref's checkpoints are whole, or known to be damaged; a kill at any moment leaves one to go on from."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from damage import flip  # noqa: E402
from helpers import hard_batch, tiny, tiny_run  # noqa: E402

from torchref import checkpoint  # noqa: E402
from torchref.checkpoint import (  # noqa: E402
    MANIFEST,
    CheckpointError,
    DamagedCheckpointError,
    candidates,
    load_training,
    save_run,
    save_training,
)
from torchref.engine import TorchEngine  # noqa: E402
from torchref.optim import scalars  # noqa: E402
from torchref.train import init_state, make_train_step, place_batch  # noqa: E402

pytestmark = pytest.mark.torch
RUN = tiny_run(tiny(n_layers=1), spike_z=4.0, spike_window=3)


@pytest.fixture(scope="module")
def states() -> list[Any]:
    """States of steps 0 to 3, with moments and a guard that has seen something; each has its own tensors."""
    step, found = make_train_step(RUN), []
    for done in range(4):
        state = init_state(RUN)
        for k in range(done):
            state, _ = step(state, place_batch(hard_batch(seed=k)), scalars(RUN.optim, k))
        found.append(state)
    return found


def bits(state: Any) -> dict[str, Any]:
    """Weights, optimizer and guard, every byte."""
    named = list(state.model.named_parameters())
    found = {path: p.detach().numpy().tobytes() for path, p in named}
    for path, p in named:
        for name, value in state.optimizer.state.get(p, {}).items():
            found[f"{path}/{name}"] = value.numpy().tobytes()
    guard = {
        k: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for k, v in state.guard._asdict().items()
    }
    return found | guard | {"step": state.step}


def test_a_state_comes_back_bit_for_bit(tmp_path: Path, states: list[Any]) -> None:
    """Weights, moments, guard and JSON, at step 0 and later."""
    for state in (states[0], states[3]):
        save_training(state, tmp_path / str(state.step), {"best": 0.1 + 0.2, "loader": {"next_batch": 3}})
        back, extra = load_training(init_state(RUN), tmp_path / str(state.step))
        assert bits(back) == bits(state)
        assert (extra["best"], extra["loader"]) == (0.1 + 0.2, {"next_batch": 3})
    assert back.guard.seen == 3


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flip_and_truncation_is_found(tmp_path: Path, states: list[Any], count: int) -> None:
    """Single bits and cuts anywhere in any file: none is loaded in silence."""
    save_training(states[1], tmp_path / "latest", {})
    every, rng = sorted((tmp_path / "latest").iterdir()), np.random.default_rng(0)
    assert len(every) == 6
    for trial in range(count):
        path = every[trial % len(every)]
        whole = path.read_bytes()
        place = int(rng.integers(len(whole)))
        if rng.random() < 0.25:
            os.truncate(path, place)
        else:
            flip(path, place, int(rng.integers(8)))
        with pytest.raises(
            DamagedCheckpointError, match="checkpoint latest of torch is damaged: .*" + path.name
        ):
            checkpoint.verify(tmp_path / "latest")
        path.write_bytes(whole)
    for path in every:
        path.rename(tmp_path / "aside")
        with pytest.raises(DamagedCheckpointError, match=path.name):
            checkpoint.verify(tmp_path / "latest")
        (tmp_path / "aside").rename(path)
    (tmp_path / "latest" / "stray").write_text("")
    with pytest.raises(DamagedCheckpointError, match="stray is no part of it"):
        checkpoint.verify(tmp_path / "latest")


class Killed(BaseException):
    """Stands in for a kill: nothing catches it."""


def test_a_kill_at_any_rename_leaves_a_whole_checkpoint(
    tmp_path: Path, states: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each rename of a save: the newest whole one is at most one save old, and the next save succeeds."""
    rename, count = Path.rename, 0

    def until(last: int) -> Any:
        def counted(path: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count > last:
                raise Killed
            return rename(path, target)

        return counted

    for last in range(20):
        shutil.rmtree(tmp_path, ignore_errors=True)
        for step in (1, 2):
            save_run(states[step], tmp_path, {"best": 1.0}, is_best=step == 1)
        count = 0
        monkeypatch.setattr(Path, "rename", until(last))
        try:
            save_run(states[3], tmp_path, {"best": 0.5}, is_best=True)
            through = True
        except Killed:
            through = False
        monkeypatch.setattr(Path, "rename", rename)
        step, name = candidates(tmp_path)[0]
        back, _ = load_training(init_state(RUN), tmp_path / name)
        assert bits(back) == bits(states[int(step)]) and step >= 2
        if (tmp_path / "latest").is_dir() and checkpoint.verify(tmp_path / "latest")["best"] == 0.5:
            assert checkpoint.verify(tmp_path / "best")["step"] == 3, "the best value without its weights"
        save_run(states[3], tmp_path, {"best": 0.5}, is_best=True)
        assert candidates(tmp_path)[0] == (3, "latest")
        assert {p.name for p in tmp_path.iterdir()} == {"latest", "previous", "best"}
        if through:
            break
    assert through and last >= 4, "the renames were not seen"


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path, states: list[Any]) -> None:
    """Without guard and checksums; the guard starts anew. A later one that lost its checksums is damaged."""
    save_training(states[2], tmp_path, {})
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpointError, match=MANIFEST):
        load_training(init_state(RUN), tmp_path)
    (tmp_path / "guard.safetensors").unlink()
    (tmp_path / "training.json").write_text('{"step": 2}')
    back, extra = load_training(init_state(RUN), tmp_path)
    assert (back.step, back.guard.seen, extra["step"]) == (2, 0, 2)
    found = bits(back)
    assert all(found[k] == v for k, v in bits(states[2]).items() if k not in states[2].guard._fields)


def test_a_full_disk_leaves_the_checkpoints_before(
    tmp_path: Path, states: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file size limit: one line, nothing of the failed save stays, what was there is whole."""
    import resource

    save_run(states[1], tmp_path, {"best": 1.0}, is_best=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(checkpoint.NoSpaceError, match="step 2 was not written to .*latest") as error:
            save_run(states[2], tmp_path, {"best": 1.0}, is_best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and isinstance(error.value, CheckpointError)
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
    checkpoint.verify(tmp_path / "latest")


def test_a_checkpoint_without_its_facts_is_damaged_not_absent(tmp_path: Path, states: list[Any]) -> None:
    """So that a run passes it over; a folder that is not there is said to be none."""
    engine = TorchEngine(RUN, tmp_path)
    save_run(states[1], tmp_path, {"best": 1.0}, is_best=False)
    (tmp_path / "latest" / "training.json").unlink()
    assert engine.candidates == [(float("inf"), "latest")]
    with pytest.raises(DamagedCheckpointError, match=r"training\.json cannot be read"):
        engine.restore("latest")
    with pytest.raises(CheckpointError, match="previous: no checkpoint to restore"):
        engine.restore("previous")
