"""The JAX side of the loop: state on a mesh, the jitted step, orbax checkpoints."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.checkpoint import Checkpoints
from jaxlm.config import RunConfig
from jaxlm.layers import Backends
from jaxlm.model import Params, abstract_model
from jaxlm.optim import as_arrays, scalars
from jaxlm.sharding import make_mesh
from jaxlm.train import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    place_batch,
    state_shapes,
    state_shardings,
)


def widen_if_needed(run: RunConfig) -> None:
    """Lets jax compute in float64 where the run does; process-wide, and before anything is traced."""
    if "float64" in (run.train.dtype, run.train.param_dtype):
        jax.config.update("jax_enable_x64", True)


def restore_state(
    run: RunConfig, checkpoints: Checkpoints, which: int | Literal["latest", "best"], mesh: Mesh | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """A checkpoint's state on a mesh or, without one, on one device, and what was saved beside it."""
    widen_if_needed(run)
    shapes = state_shapes(run)
    if mesh is None:
        whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: whole, shapes)
    else:
        places = state_shardings(run, mesh, abstract_model(run.model))
    template = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
    return checkpoints.restore(which, template)


class JaxEngine:
    """Implements jaxlm.loop.Engine."""

    def __init__(self, run: RunConfig, directory: Path, backends: Backends = Backends()):
        widen_if_needed(run)
        self.run, self.directory = run, directory
        self.mesh: Mesh | None = make_mesh(run.mesh) if run.mesh.size > 1 else None
        self._train, self._evaluate = make_train_step(run, self.mesh, backends), make_eval_step(run, backends)
        self.checkpoints = Checkpoints(directory, keep=run.train.keep)
        self.state: TrainState | None = None
        self._step = 0

    def initialise(self) -> None:
        """Fresh parameters from the run's seed."""
        with self._on_mesh():
            self.state, self._step = init_state(self.run, self.mesh), 0

    def restore(self, which: int | Literal["latest", "best"] = "latest") -> dict[str, Any]:
        """Continues from a checkpoint, onto whatever mesh this run has; returns what was saved beside the state."""
        state, extra = restore_state(self.run, self.checkpoints, which, self.mesh)
        self.adopt(state)
        return extra

    def adopt(self, state: TrainState) -> None:
        """Continues from a state that came from elsewhere; it must lie on this run's mesh already."""
        self.state, self._step = state, int(state.step)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None without one."""
        return self.checkpoints.latest_step

    @property
    def step(self) -> int:
        """Optimizer steps done, counted on the host so that nothing waits for the device."""
        return self._step

    @property
    def params(self) -> Params:
        """Master weights by dotted path."""
        assert self.state is not None, "initialise() or restore() first"
        return self.state.params

    def train_step(self, batch: dict[str, np.ndarray]) -> Mapping[str, Any]:
        """One optimizer step; the metrics are futures."""
        assert self.state is not None, "initialise() or restore() first"
        values = as_arrays(scalars(self.run.optim, self._step), np.dtype(self.run.train.param_dtype))
        with self._on_mesh():
            self.state, metrics = self._train(self.state, place_batch(batch, self.mesh), values)
        self._step += 1
        return metrics

    def evaluate(self, batches: Iterable[dict[str, np.ndarray]]) -> float:
        """Mean cross-entropy in nats per token, summed in double on the host."""
        with self._on_mesh():
            sums = [self._evaluate(self.params, place_batch(batch, self.mesh)) for batch in batches]
        return sum(float(s["loss_sum"]) for s in sums) / sum(float(s["tokens"]) for s in sums)

    def save(self, extra: dict[str, Any], metric: float | None) -> None:
        """An orbax checkpoint of this step."""
        self.checkpoints.save(self._step, self.state, extra, metric)

    def close(self) -> None:
        """Waits for asynchronous writes."""
        self.checkpoints.wait()

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
