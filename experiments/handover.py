"""Where a resumed run goes on: from the newest whole checkpoint, whichever framework wrote it.

A checkpoint of the other framework is converted on the way, weights, AdamW moments, step and seed bit for bit; what was
saved beside it (data position, best validation loss) is the same in both.
"""

import os
from pathlib import Path
from typing import Any

from convert.checkpoints import CHECKPOINTS, candidates
from experiments.cli import say
from jaxlm.checkpoint_files import DamagedError
from jaxlm.config import InputError, RunConfig
from jaxlm.run_dir import RunDir

OTHER = {"jax": "torch", "torch": "jax"}


def resume(run: RunConfig, directory: RunDir, engine: Any, framework: str) -> dict[str, Any] | None:
    """Restores an engine from the run's newest whole checkpoint; of equal steps, from its own framework's.

    Damaged ones that are newer are named in a line each. Returns what was saved beside the state, None where the run
    has no checkpoint. Raises InputError where none is whole, or one is of another model (a line per tensor).
    """
    other = OTHER[framework]
    folder = directory.path / CHECKPOINTS[other]
    own = [(step, True, which) for step, which in engine.candidates]
    foreign = [(step, False, which) for step, which in candidates(directory.path, other)]
    damages: list[str] = []
    for step, is_own, which in sorted(own + foreign, key=lambda found: found[:2], reverse=True):
        try:
            extra = engine.restore(which) if is_own else _FROM[other](run, folder, engine, which)
        except DamagedError as damage:
            damages.append(str(damage))
            continue
        for damage in damages:
            say(f"warning: {damage}; going on from step {step:.0f}")
        if not is_own:
            say(f"continuing from the {other} checkpoint of step {step:.0f}")
        return extra
    if damages:
        found = "; ".join(damage.replace(f"{directory.path}/", "") for damage in damages)
        raise InputError(
            f"{directory.path} has no whole checkpoint: {found}; bring back a copy of one, or start anew in another "
            "--run-dir"
        )
    return None


def _from_torch(run: RunConfig, folder: Path, engine: Any, which: str) -> dict[str, Any]:
    from convert.optstate import train_state_to_jax
    from torchref.checkpoint import load_training
    from torchref.train import init_state

    state, extra = load_training(init_state(run), folder / which)
    engine.adopt(train_state_to_jax(run, state, engine.mesh))
    return extra


def _from_jax(run: RunConfig, folder: Path, engine: Any, which: int) -> dict[str, Any]:
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # jax only reads here; the card's memory is torch's
    from convert.optstate import train_state_to_torch
    from jaxlm.checkpoint import Checkpoints
    from jaxlm.engine import restore_state

    state, extra = restore_state(run, Checkpoints(folder), which)
    engine.adopt(train_state_to_torch(run, state, engine.backends, engine.device))
    return extra


_FROM = {"torch": _from_torch, "jax": _from_jax}
