"""The JAX side of the loop: state on a mesh, the jitted step, orbax checkpoints."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.checkpoint import Checkpoints
from jaxlm.compile_meter import CompileMeter
from jaxlm.config import RunConfig
from jaxlm.distributed import own_rows, place_rows, place_votes
from jaxlm.finetune.tasks import task_of
from jaxlm.guard import init_guard
from jaxlm.layers import Backends
from jaxlm.model import Params
from jaxlm.optim import as_arrays, scalars
from jaxlm.sharding import make_mesh
from jaxlm.train import (
    Task,
    TrainState,
    frozen_shardings,
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
    run: RunConfig,
    checkpoints: Checkpoints,
    which: int | Literal["latest", "best"],
    mesh: Mesh | None = None,
    task: Task | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """A checkpoint's state on a mesh or, without one, on one device, and what was saved beside it."""
    widen_if_needed(run)
    task = task_of(run) if task is None else task
    shapes = state_shapes(run, task)
    if mesh is None:
        whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: whole, shapes)
    else:
        places = state_shardings(run, mesh, task)
    template = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
    older = {f"guard.{name}": value for name, value in init_guard(run)._asdict().items()}
    return checkpoints.restore(which, template, older)


class JaxEngine:
    """Implements jaxlm.loop.Engine.

    Attributes:
        rows: of every global batch, which this process is to be given; None = all, where it is alone.
        compiled: what was compiled since it was made.
        task: what is trained.
        frozen: what is used and not trained, as `freeze` has placed it.
        evaluated: what the last evaluation gave beside the loss.
    """

    def __init__(self, run: RunConfig, directory: Path, backends: Backends = Backends()):
        widen_if_needed(run)
        self.task = task_of(run, backends)
        self.frozen: Params = {}
        self.evaluated: dict[str, float] = {}
        self.run, self.directory = run, directory
        self.compiled = CompileMeter()
        self.mesh: Mesh | None = make_mesh(run.mesh) if run.mesh.size > 1 else None
        self.rows: list[int] | None = own_rows(self.mesh, run.train.batch_size)
        self._train = make_train_step(run, self.mesh, backends, self.task)
        self._evaluate = make_eval_step(run, backends, self.task)
        self.checkpoints = Checkpoints(directory, keep=run.train.keep)
        self.state: TrainState | None = None
        self._step = 0

    def freeze(self, params: Params) -> None:
        """Takes what the task uses and does not train, placed as the mesh wants it."""
        wanted = {path: (s.shape, s.dtype) for path, s in self.task.frozen_shapes.items()}
        given = {path: (x.shape, x.dtype) for path, x in params.items()}
        assert wanted == given, sorted(wanted.items() ^ given.items(), key=str)[:4]
        self.frozen = (
            params
            if self.mesh is None
            else jax.device_put(params, frozen_shardings(self.mesh, self.task), donate=True)
        )

    def initialise(self, params: Params | None = None) -> None:
        """Step 0: the given parameters, whose memory is taken over, or the task's own from the run's seed."""
        with self._on_mesh():
            self.state, self._step = init_state(self.run, self.mesh, self.task, params), 0

    def restore(self, which: int | Literal["latest", "best"] = "latest") -> dict[str, Any]:
        """Continues from a checkpoint, onto whatever mesh this run has; returns what was saved beside the state."""
        state, extra = restore_state(self.run, self.checkpoints, which, self.mesh, self.task)
        self.adopt(state)
        return extra

    def adopt(self, state: TrainState) -> None:
        """Continues from a state that came from elsewhere; it must lie on this run's mesh already."""
        self.state, self._step = state, int(state.step)

    @property
    def candidates(self) -> list[tuple[int, int]]:
        """(step, what `restore` calls it) of every checkpoint, newest first, damaged ones included."""
        return [(step, step) for step in reversed(self.checkpoints.numbers)]

    @property
    def step(self) -> int:
        """Optimizer steps done, counted on the host so that nothing waits for the device."""
        return self._step

    @property
    def params(self) -> Params:
        """Master weights by dotted path."""
        assert self.state is not None, "initialise() or restore() first"
        return self.state.params

    def train_step(self, batch: dict[str, np.ndarray], stop: bool = False) -> Mapping[str, Any]:
        """One optimizer step; the metrics are futures. Among several processes `batch` holds this one's rows."""
        assert self.state is not None, "initialise() or restore() first"
        values = as_arrays(scalars(self.run.optim, self._step), np.dtype(self.run.train.param_dtype))
        placed = self._place(batch)
        if self.rows is not None and self.mesh is not None:
            placed |= {"stop": place_votes(self.mesh, stop)}
        with self._on_mesh():
            self.state, metrics = self._train(self.state, placed, values, self.frozen)
        self._step += 1
        return metrics

    def evaluate(self, batches: Iterable[dict[str, np.ndarray]]) -> float:
        """Mean loss (cross-entropy in nats per token; of preferences, per pair), summed in double on the host."""
        with self._on_mesh():
            sums = [
                self._evaluate(self.params, self._place(self._own(batch)), self.frozen) for batch in batches
            ]
        count = sum(float(s["tokens"]) for s in sums)
        means = {name: sum(float(s[name]) for s in sums) / count for name in sums[0] if name != "tokens"}
        self.evaluated = {f"val_{name}": value for name, value in means.items() if name != "loss_sum"}
        return means["loss_sum"]

    def save(self, extra: dict[str, Any], metric: float | None) -> None:
        """An orbax checkpoint of this step."""
        self.checkpoints.save(self._step, self.state, extra, metric)

    def wait(self, timeout: float | None = None) -> None:
        """Waits for an asynchronous write, at most so many seconds. Raises CheckpointError where it failed."""
        self.checkpoints.wait(timeout)

    @property
    def state_bytes(self) -> int:
        """Bytes of a checkpoint, nearly."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))

    @contextlib.contextmanager
    def profile(self, folder: Path) -> Iterator[str]:
        """Records a trace; yields how it is opened. It should begin and end with the device at rest."""
        with jax.profiler.trace(str(folder), create_perfetto_trace=True):
            yield (
                f"open the perfetto_trace.json.gz below {folder} at https://ui.perfetto.dev, "
                f"or tensorboard --logdir {folder} (needs the package xprof)"
            )

    def _own(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return batch if self.rows is None else {name: array[self.rows] for name, array in batch.items()}

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        if self.rows is None or self.mesh is None:
            return place_batch(batch, self.mesh)
        return place_rows(batch, self.mesh, self.rows, self.run.train.batch_size)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
