"""Of a run's checkpoints, by either framework, the newest whole one is opened; skipped updates count for no moments."""

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from damage import flip  # noqa: E402
from helpers import hard_batch, tiny, tiny_run  # noqa: E402

from convert.checkpoints import CHECKPOINTS  # noqa: E402
from convert.targets import open_target  # noqa: E402
from jaxlm import train  # noqa: E402
from jaxlm.checkpoint import Checkpoints  # noqa: E402
from jaxlm.config import InputError, save  # noqa: E402
from torchref.checkpoint import save_run  # noqa: E402
from torchref.optim import scalars  # noqa: E402
from torchref.train import init_state, make_train_step, place_batch  # noqa: E402

pytestmark = pytest.mark.torch
RUN = tiny_run(tiny(n_layers=1), dtype="float32", param_dtype="float32")


def with_jax(run: Path, step: int, skipped: int, metric: float) -> None:
    """Adds a checkpoint of JAX."""
    state = train.init_state(RUN)
    state = state._replace(step=jnp.int32(step), guard=state.guard._replace(skipped=jnp.int32(skipped)))
    checkpoints = Checkpoints(run / CHECKPOINTS["jax"])
    checkpoints.save(step, state, {"best": metric, "loader": None}, metric)
    checkpoints.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with JAX's steps 1 and 3 and torch's 2 and 4 (its best); of torch's updates the second was skipped."""
    run = tmp_path_factory.mktemp("both") / "run"
    run.mkdir()
    save(RUN, run / "config.json")
    state, step = init_state(RUN), make_train_step(RUN)
    for k in range(4):
        batch = hard_batch(seed=k)
        batch["loss_mask"] = batch["loss_mask"] * (float("nan") if k == 1 else 1.0)
        state, _ = step(state, place_batch(batch), scalars(RUN.optim, k))
        if k in (1, 3):
            save_run(state, run / CHECKPOINTS["torch"], {"best": 5.0 - k, "loader": None}, is_best=True)
    with_jax(run, 1, 0, 1.5)
    with_jax(run, 3, 1, 2.5)
    return run


def damage(folder: Path) -> None:
    """One bit of the largest file."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip(path, path.stat().st_size // 2, 3)


def opened(run: Path) -> tuple[str, int]:
    """Whose checkpoint is read, and how many updates its moments have seen."""
    target = open_target(run)
    assert target.contents.moments is not None
    return "jax" if target.torch_weights is None else target.torch_weights.name, target.contents.moments.step


def test_the_newest_whole_checkpoint_of_either_framework_is_opened(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Damaged ones give way one after the other, each named in a line; updates are steps less those skipped."""
    run = tmp_path / "run"
    shutil.copytree(source, run)
    capsys.readouterr()
    assert opened(run) == ("latest", 3) and capsys.readouterr().err == ""
    torch_folder, jax_folder = (run / CHECKPOINTS[name] for name in ("torch", "jax"))
    shutil.rmtree(torch_folder / "best")
    for broken, left, step in (
        (torch_folder / "latest", ("jax", 2), 3),
        (jax_folder / "3", ("previous", 1), 2),
        (torch_folder / "previous", ("jax", 1), 1),
    ):
        damage(broken)
        assert opened(run) == left
        said = capsys.readouterr().err.splitlines()
        assert any(str(broken) in line and line.endswith(f"; taking the one of step {step}") for line in said)
    damage(jax_folder / "1")
    with pytest.raises(InputError, match="has no whole checkpoint: .*latest") as error:
        opened(run)
    assert "\n" not in str(error.value)


def test_the_best_has_the_lower_loss_and_must_be_whole(source: Path, tmp_path: Path) -> None:
    """JAX's 1.5 against torch's 2.0; once torch's is all there is, a bit of it is not passed over."""
    run = tmp_path / "run"
    shutil.copytree(source, run)
    assert open_target(run, "best").torch_weights is None
    shutil.rmtree(run / CHECKPOINTS["jax"])
    found = open_target(run, "best").torch_weights
    assert found is not None and found.name == "best"
    damage(run / CHECKPOINTS["torch"] / "best")
    with pytest.raises(InputError, match="checkpoint best of torch is damaged"):
        _: Any = open_target(run, "best").decoder


def test_jax_alone_is_opened_without_torch_having_trained(tmp_path: Path) -> None:
    """The usual run; restored as `jaxlm.checkpoint` does."""
    run = tmp_path / "run"
    run.mkdir()
    save(RUN, run / "config.json")
    with_jax(run, 2, 1, 1.0)
    assert opened(run) == ("jax", 1)
    assert set(open_target(run).params) == set(jax.eval_shape(lambda: train.init_state(RUN)).params)
