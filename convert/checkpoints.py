"""The checkpoints of a run, whichever framework wrote them, and which of them `latest` and `best` mean."""

import math
from pathlib import Path
from typing import Any

from jaxlm.checkpoint_files import DamagedError
from jaxlm.cli import need, say
from jaxlm.config import InputError

CHECKPOINTS = {"jax": "checkpoints", "torch": "checkpoints-torch"}  # folders of a run directory


def candidates(run: Path, framework: str) -> list[tuple[float, Any]]:
    """(step, what its reader calls it) of every checkpoint of a framework, damaged ones included."""
    folder = run / CHECKPOINTS[framework]
    if not folder.is_dir():
        return []
    if framework == "torch":
        need("torch")
        from torchref.checkpoint import candidates as of_torch

        return of_torch(folder)
    from jaxlm.checkpoint import Checkpoints

    return [(step, step) for step in Checkpoints(folder).numbers]


def chosen(run: Path, checkpoint: str) -> tuple[str, Any]:
    """(framework, what its reader calls it) of the newest whole checkpoint of a run, or of its best.

    Of equals JAX's. Damaged ones that are newer are named in a line each; the best must be whole itself. A run
    without any is JAX's to refuse. Raises InputError where none is whole.
    """
    if not (run / CHECKPOINTS["torch"]).is_dir():
        return "jax", checkpoint
    return _best(run) if checkpoint == "best" else _newest(run)


def _newest(run: Path) -> tuple[str, Any]:
    found = [
        (step, framework == "jax", framework, which)
        for framework in CHECKPOINTS
        for step, which in candidates(run, framework)
    ]
    damages: list[str] = []
    for step, _, framework, which in sorted(found, key=lambda one: one[:2], reverse=True):
        try:
            _verify(run, framework, which)
        except DamagedError as damage:
            damages.append(str(damage))
            continue
        for damage in damages:
            say(f"warning: {damage}; taking the one of step {step:.0f}")
        return framework, which
    if damages:
        found = "; ".join(damage.replace(f"{run}/", "") for damage in damages)
        raise InputError(f"{run} has no whole checkpoint: {found}; bring back a copy of one")
    return "jax", "latest"


def _best(run: Path) -> tuple[str, Any]:
    """The lower validation loss."""
    from jaxlm.checkpoint import Checkpoints

    if not (run / CHECKPOINTS["torch"] / "best").is_dir():
        return "jax", "best"
    theirs, ours = _verify(run, "torch", "best"), Checkpoints(run / CHECKPOINTS["jax"]).best_metric
    return ("jax" if ours is not None and ours <= theirs.get("best", math.inf) else "torch"), "best"


def _verify(run: Path, framework: str, which: Any) -> dict[str, Any]:
    """What stands beside the state. Raises DamagedError where a file is not as it was written."""
    if framework == "torch":
        from torchref.checkpoint import verify

        return verify(run / CHECKPOINTS["torch"] / which)
    from jaxlm.checkpoint import Checkpoints

    return Checkpoints(run / CHECKPOINTS["jax"]).verify(which)["extra"]
