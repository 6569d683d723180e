"""A TARGET of a command line, opened: a run directory, or a torchref checkpoint (config.json, model.safetensors).

Weights are read when they are first asked for, and converted when the framework that trained them is not the one
that wants them. jax and torch are imported no earlier than that.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.config import InputError, ModelConfig, RunConfig, load
from jaxlm.run_dir import RunDir
from jaxlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxlm.model import Params
    from torchref.model import Decoder

TORCH_CHECKPOINTS = "checkpoints-torch"  # of a run that torchref trained: latest/ and best/
WEIGHTS = "model.safetensors"


class TargetError(InputError):
    """A path that is no target, or lacks what was asked of it; the message is one line."""


@dataclass(frozen=True)
class Target:
    """An opened target: what it is, and on demand its tokenizer and its weights for either framework."""

    path: Path
    config: ModelConfig
    run: RunConfig | None  # None for a bare checkpoint
    checkpoint: str  # latest or best, of a run

    @property
    def torch_weights(self) -> Path | None:
        """Directory of the torchref checkpoint, None where only orbax has weights."""
        if self.run is None:
            return self.path
        directory = self.path / TORCH_CHECKPOINTS / self.checkpoint
        return directory if (directory / WEIGHTS).is_file() and not self._orbax_is_meant else None

    @functools.cached_property
    def _orbax_is_meant(self) -> bool:
        """Of a run that both frameworks trained, the later step is the latest and the lower loss the best."""
        if not _has_orbax(self.path):
            return False
        facts = self.path / TORCH_CHECKPOINTS / self.checkpoint / "training.json"
        if not facts.is_file():
            return True
        from jaxlm.checkpoint import Checkpoints

        ours = Checkpoints(RunDir(self.path).checkpoints)
        try:
            theirs = json.loads(facts.read_text(encoding="utf-8"))
            step, best = int(theirs["step"]), float(theirs["best"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise TargetError(f"{facts} cannot be read: {error}") from None
        if self.checkpoint == "latest":
            return (ours.latest_step or 0) >= step
        return ours.best_metric is not None and ours.best_metric <= best

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights. Raises TargetError where there is none."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise TargetError(
                f"{self.path} has no tokenizer.json; copy there the one that the model was trained with"
            )
        return Tokenizer.load(path)

    @functools.cached_property
    def params(self) -> "Params":
        """jaxlm's parameters, in the dtype they were saved in. Raises InputError where there are none."""
        if self.run is not None and self.torch_weights is None:
            return _restore(self.run, RunDir(self.path).checkpoints, self.checkpoint)
        from convert.native import import_torch

        assert self.torch_weights is not None
        return import_torch(self.torch_weights)[1]

    @functools.cached_property
    def decoder(self) -> "Decoder":
        """The torch twin, on CUDA where there is one. Raises InputError where there are no weights."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.torch_weights is not None:
            from torchref.checkpoint import load_model

            return load_model(self.torch_weights, device=device)
        from convert.native import build_torch

        return build_torch(self.config, self.params).to(device)


def open_target(path: str | Path, checkpoint: str = "latest") -> Target:
    """Reads a target's configuration. Raises InputError, one line, where the path is no target."""
    path = Path(path)
    if checkpoint not in ("latest", "best"):
        raise TargetError(f"checkpoint={checkpoint!r} must be latest or best")
    if not path.is_dir():
        raise TargetError(
            f"{path} {'is not a directory' if path.exists() else 'does not exist'}; {_EXPECTED}"
        )
    config = path / "config.json"
    if not config.is_file():
        raise TargetError(f"{path} has no config.json; {_EXPECTED}")
    try:
        is_run = "model" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise TargetError(f"{config} cannot be read: {error}") from None
    if is_run:
        run = load(RunConfig, config)
        return Target(path, run.model, run, checkpoint)
    if not (path / WEIGHTS).is_file():
        raise TargetError(f"{path} has a config.json but neither checkpoints nor {WEIGHTS}; {_EXPECTED}")
    return Target(path, load(ModelConfig, config), None, checkpoint)


_EXPECTED = f"a target is a run directory, or a torchref checkpoint with config.json and {WEIGHTS}"


def _has_orbax(path: Path) -> bool:
    from jaxlm.checkpoint import Checkpoints

    return bool(Checkpoints(RunDir(path).checkpoints).steps)


def _restore(run: RunConfig, directory: Path, which: str) -> "Params":
    """Parameters of an orbax checkpoint on one device, whatever mesh saved them."""
    from jaxlm.checkpoint import Checkpoints
    from jaxlm.engine import restore_state

    state, _ = restore_state(run, Checkpoints(directory), which)  # type: ignore[arg-type]
    return state.params
