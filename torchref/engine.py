"""The torch side of the loop: eager steps, safetensors checkpoints (latest, previous and best)."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jaxlm.config import RunConfig
from torchref.checkpoint import CheckpointError, candidates, load_training, save_run, state_bytes
from torchref.layers import Backends
from torchref.optim import scalars
from torchref.train import TrainState, init_state, make_eval_step, make_train_step, place_batch

TRACE = "trace.json"  # of `profile`


class TorchEngine:
    """Implements jaxlm.loop.Engine."""

    def __init__(self, run: RunConfig, directory: Path, backends: Backends = Backends()):
        self.run, self.directory, self.backends = run, Path(directory), backends
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._train, self._evaluate = make_train_step(run), make_eval_step(run)
        self.rows: list[int] | None = None  # it runs in one process
        self.state: TrainState | None = None
        self.evaluated: dict[str, float] = {}

    def initialise(self) -> None:
        """Fresh parameters from the run's seed."""
        self.state = init_state(self.run, self.device, self.backends)

    def restore(self, which: str = "latest") -> dict[str, Any]:
        """Continues from a folder of `candidates`; returns what was saved beside the state."""
        if not (self.directory / which).is_dir():
            raise CheckpointError(f"{self.directory / which}: no checkpoint to restore")
        self.state, extra = load_training(
            init_state(self.run, self.device, self.backends), self.directory / which
        )
        return extra

    def adopt(self, state: TrainState) -> None:
        """Continues from a state that came from elsewhere; it must lie on this run's device already."""
        self.state = state

    @property
    def candidates(self) -> list[tuple[float, str]]:
        """(step, what `restore` calls it) of every checkpoint, newest first, damaged ones included."""
        return candidates(self.directory)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        assert self.state is not None, "initialise() or restore() first"
        return self.state.step

    def train_step(self, batch: dict[str, np.ndarray], stop: bool = False) -> Mapping[str, Any]:
        """One optimizer step. `stop` is for engines of several processes."""
        assert self.state is not None, "initialise() or restore() first"
        values = scalars(self.run.optim, self.step)
        self.state, metrics = self._train(self.state, place_batch(batch, self.device), values)
        return metrics

    def evaluate(self, batches: Iterable[dict[str, np.ndarray]]) -> float:
        """Mean cross-entropy in nats per token, summed in double."""
        assert self.state is not None
        sums = [self._evaluate(self.state.model, place_batch(batch, self.device)) for batch in batches]
        return sum(float(s["loss_sum"]) for s in sums) / sum(float(s["tokens"]) for s in sums)

    def save(self, extra: dict[str, Any], metric: float | None) -> None:
        """Writes latest/ and, where the validation loss is the lowest so far, best/."""
        save_run(self.state, self.directory, extra, metric is not None and metric <= extra["best"])

    def wait(self, timeout: float | None = None) -> None:
        """Nothing is ever under way."""

    @property
    def state_bytes(self) -> int:
        """Bytes of a checkpoint, nearly."""
        return state_bytes(self.state)

    @contextlib.contextmanager
    def profile(self, folder: Path) -> Iterator[str]:
        """Records a trace; yields how it is opened."""
        with torch.profiler.profile() as recorded:
            yield f"open {folder / TRACE} at https://ui.perfetto.dev or chrome://tracing"
        recorded.export_chrome_trace(str(folder / TRACE))
