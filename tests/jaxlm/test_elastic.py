"""A checkpoint is restored onto any mesh: the same bits, and the next loss to rounding."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import hard_batch, tiny, tiny_run
from tolerances import tolerance

from jaxlm.config import LogConfig, MeshConfig, RunConfig
from jaxlm.engine import JaxEngine
from jaxlm.train import state_shapes, state_shardings

MESHES = {
    "data=2,fsdp=4": MeshConfig(data=2, fsdp=4),
    "fsdp=8": MeshConfig(fsdp=8),
    "expert=4,data=2": MeshConfig(expert=4, data=2),
    "one device": MeshConfig(),
}
# Widths that eight divides, so that parameters and moments are really split.
MODEL = tiny({"d_ff": 24}, n_layers=1, d_model=32, vocab_size=64)
BATCH = hard_batch(8)


def run_on(mesh: MeshConfig) -> RunConfig:
    """A float64 run whose batch every mesh can split."""
    return dataclasses.replace(tiny_run(MODEL, mesh=mesh, batch_size=8), log=LogConfig(details=False))


def bits(state: Any) -> dict[str, bytes]:
    """Every leaf, gathered from wherever it lies."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def next_loss(engine: JaxEngine, train: bool) -> float:
    """Of the next step, or of a validation, which compiles in a fifth of the time; float64 is asked for first."""
    return float(engine.train_step(BATCH)["loss"]) if train else engine.evaluate([BATCH])


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)])
def saved(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, bytes], float, bool]:
    """On fsdp=2,expert=2,tensor=2: the folder, what was saved there, the next loss, and whether that is a step's."""
    folder, rng = tmp_path_factory.mktemp("elastic"), np.random.default_rng(0)
    with jax.enable_x64(True):
        run = run_on(MeshConfig(fsdp=2, expert=2, tensor=2))
        engine = JaxEngine(run, folder)
        shapes, places = state_shapes(run), state_shardings(run, engine.mesh)

        def drawn(shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
            values = rng.random(shape.shape) * 0.1 if shape.dtype.kind == "f" else np.ones(shape.shape)
            return jax.device_put(values.astype(shape.dtype), place)

        engine.adopt(jax.tree.map(drawn, shapes, places))
        engine.save({}, None)
        engine.wait()
        before = bits(engine.state)
        return folder, before, next_loss(engine, request.param), request.param


@pytest.mark.parametrize("name", MESHES)
def test_restored_onto_another_mesh_it_goes_on_as_before(
    saved: tuple[Path, dict[str, bytes], float, bool], name: str
) -> None:
    """Weights, moments and guard are the saved bits, laid out as this mesh wants them; the next loss is the same."""
    folder, before, loss, train = saved
    with jax.enable_x64(True):
        engine = JaxEngine(run_on(MESHES[name]), folder)
        engine.restore("latest")
        assert bits(engine.state) == before
        if engine.mesh is not None:
            wanted = jax.tree.leaves(state_shardings(engine.run, engine.mesh))
            leaves = jax.tree.leaves(engine.state)
            assert [leaf.sharding for leaf in leaves] == wanted
            assert any(not place.is_fully_replicated for place in wanted)
        error = abs(next_loss(engine, train) - loss) / loss
    assert error <= tolerance("f64_mesh"), error
