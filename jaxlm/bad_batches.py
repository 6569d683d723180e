"""Steps whose update was skipped: said in a line, their batches kept, and the run stopped when they do not end.

`RUN/bad_batches/step_N.safetensors` holds the batch of step N as the engine got it, with step and reason in the file's
metadata; the first few of a run are kept. No framework here.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxlm.config import TrainConfig

LIMIT = 5  # files kept of a run


class BadBatches:
    """Watches the lines of a run's log for skipped updates.

    Attributes:
        reason: why the run must stop, one line; '' while it need not.
    """

    def __init__(self, train: TrainConfig, folder: Path | None, say: Callable[[str], None]) -> None:
        """`folder` is RUN/bad_batches, made when it is needed; None keeps no batches. `say` takes one line a skip."""
        self._train, self._folder, self._say = train, folder, say
        self._in_a_row = (
            train.max_skips - 1
        )  # a resumed run may have been left with as many; its next step tells
        self.reason = ""

    @property
    def on_edge(self) -> bool:
        """Whether one more skip would stop the run, so that the next step should be looked at before another."""
        return self._in_a_row + 1 >= self._train.max_skips

    def look(self, line: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> None:
        """Takes a step's values (`jaxlm.reporter`) and its batch."""
        self._in_a_row = line["skips_in_a_row"] if line.get("skipped") else 0
        if not line.get("skipped"):
            return
        step, why = line["step"], _why(line)
        overflow = _overflowed(line)
        kept = None if overflow else self._keep(step, batch, why)
        where = f"; its batch is in {kept}" if kept else ""
        self._say(f"step {step} was skipped: {why}; {line['skips']} skipped so far{where}")
        if not overflow and self._in_a_row >= self._train.max_skips:
            where = f"; batches are in {self._folder}" if self._folder else ""
            self.reason = (
                f"{self._in_a_row} steps in a row were skipped, the last of them {step}: {why}{where}"
            )

    def _keep(self, step: int, batch: Mapping[str, np.ndarray], why: str) -> Path | None:
        if self._folder is None:
            return None
        path = self._folder / f"step_{step}.safetensors"
        others = {p for p in self._folder.glob("step_*.safetensors") if p != path}
        if len(others) >= LIMIT:
            return None
        unfinished = path.with_suffix(".tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            arrays = {name: np.ascontiguousarray(value) for name, value in batch.items()}
            save_file(arrays, unfinished, metadata={"step": str(step), "reason": why})
            unfinished.replace(path)
        except Exception as error:  # evidence that cannot be kept must not end a run
            self._say(f"warning: {path} was not written: {' '.join(str(error).split())[:200]}")
            return None
        return path


def _why(line: Mapping[str, Any]) -> str:
    if not math.isfinite(line["loss"]):
        return f"its loss is {line['loss']}"
    if math.isfinite(total := line.get("total_loss", 0.0)):
        if _overflowed(line):
            return f"its gradients overflow float16; the loss scale is now {line['loss_scale']:g}"
        if not math.isfinite(line["grad_norm"]):
            return f"its gradient norm is {line['grad_norm']}"
        return f"a spike, loss {line['loss']:.4g} and gradient norm {line['grad_norm']:.4g}"
    return f"its total loss is {total}"


def _overflowed(line: Mapping[str, Any]) -> bool:
    """Whether float16 gradients overflowed under a scale that could still be lowered (`jaxlm.guard.next_guard`)."""
    finite = math.isfinite(line["loss"]) and math.isfinite(line.get("total_loss", 0.0))
    return finite and not math.isfinite(line["grad_norm"]) and line.get("loss_scale", 0.0) > 0.5
