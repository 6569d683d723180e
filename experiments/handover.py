"""Where a resumed run goes on: from the newest checkpoint, whichever framework wrote it.

A checkpoint of the other framework is converted on the way, weights, AdamW moments, step and seed bit for bit; what was
saved beside it (data position, best validation loss) is the same in both.
"""

import os
from pathlib import Path
from typing import Any

from convert.targets import TORCH_CHECKPOINTS
from experiments.cli import need, say
from jaxlm.config import RunConfig
from jaxlm.run_dir import RunDir

CHECKPOINTS = {"jax": "checkpoints", "torch": TORCH_CHECKPOINTS}  # folders of a run directory
OTHER = {"jax": "torch", "torch": "jax"}


def resume(run: RunConfig, directory: RunDir, engine: Any, framework: str) -> dict[str, Any] | None:
    """Restores an engine from the run's newest checkpoint; of equal steps, from its own framework's.

    Returns what was saved beside the state, None where the run has no checkpoint. Raises InputError, one line or a
    line per tensor, where the checkpoint is damaged or of another model.
    """
    other = OTHER[framework]
    folder, mine = directory.path / CHECKPOINTS[other], engine.latest_step
    theirs = latest_step(folder, other) if folder.is_dir() else None
    if theirs is not None and (mine is None or theirs > mine):
        say(f"continuing from the {other} checkpoint of step {theirs}")
        return {"torch": _from_torch, "jax": _from_jax}[other](run, folder, engine)
    return None if mine is None else engine.restore("latest")


def latest_step(folder: Path, framework: str) -> int | None:
    """Step of the newest checkpoint in a framework's folder, None without one."""
    if framework == "torch":
        need("torch")
        from torchref.checkpoint import latest_step as torch_step

        return torch_step(folder)
    from jaxlm.checkpoint import Checkpoints

    return Checkpoints(folder).latest_step


def _from_torch(run: RunConfig, folder: Path, engine: Any) -> dict[str, Any]:
    from convert.optstate import train_state_to_jax
    from torchref.checkpoint import load_training
    from torchref.train import init_state

    state, extra = load_training(init_state(run), folder / "latest")
    engine.adopt(train_state_to_jax(run, state, engine.mesh))
    return extra


def _from_jax(run: RunConfig, folder: Path, engine: Any) -> dict[str, Any]:
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # jax only reads here; the card's memory is torch's
    from convert.optstate import train_state_to_torch
    from jaxlm.checkpoint import Checkpoints
    from jaxlm.engine import restore_state

    state, extra = restore_state(run, Checkpoints(folder), "latest")
    engine.adopt(train_state_to_torch(run, state, engine.backends, engine.device))
    return extra
