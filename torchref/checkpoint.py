"""torchref checkpoints: a directory with config.json and model.safetensors, nothing that executes on loading.

A run keeps `latest/`, `previous/` and `best/`, each with what it continues from and a manifest over all of it
(`jaxlm.checkpoint_files`). Each is made under another name and renamed into place.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jaxlm.checkpoint_files import (
    DamagedError,
    DiskFullError,
    check,
    seal,
)
from jaxlm.config import ConfigError, InputError, ModelConfig, load, save
from jaxlm.disk import free_bytes, is_full, sync
from torchref.guard import Guard
from torchref.layers import Backends
from torchref.model import Decoder
from torchref.optim import load_state_tensors, state_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"
OPTIMIZER, FACTS, GUARD = "optimizer.safetensors", "training.json", "guard.safetensors"
MANIFEST = "checksums.json"
FORMAT = 2  # of training.json; the first had neither guard nor manifest
PLACES = ("latest", "previous", "best")  # folders of a run's checkpoints
NEW, OLD = ".new", ".old"  # suffixes of what is being written, and of what it replaces


class CheckpointError(InputError):
    """A checkpoint that cannot be read; the message is one line with the file's name."""


class NoSpaceError(CheckpointError, DiskFullError):
    """A checkpoint for which there was no room; earlier ones are as they were."""


class DamagedCheckpointError(CheckpointError, DamagedError):
    """A checkpoint that is not as it was written; the message names the file and what is wrong."""


def save_model(model: Decoder, directory: Path) -> None:
    """Writes a model; the new file takes the old one's place only once it is complete."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {path: p.detach().contiguous() for path, p in model.named_parameters()}
    _write(tensors, directory / WEIGHTS)
    save(model.config, directory / CONFIG)


def load_model(directory: Path, backends: Backends = Backends(), device: str = "cpu") -> Decoder:
    """Reads a model in the dtype it was saved in. Raises CheckpointError on a missing, damaged or misfitting file."""
    directory = Path(directory)
    try:
        config = load(ModelConfig, directory / CONFIG)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    tensors = read_tensors(directory / WEIGHTS, device)
    with torch.device("meta"):
        model = Decoder(config, backends, rngs=None)
    expected = {path: tuple(p.shape) for path, p in model.named_parameters()}
    found = {path: tuple(t.shape) for path, t in tensors.items()}
    if expected != found:
        wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        first = wrong[0]
        raise CheckpointError(
            f"{directory / WEIGHTS}: {len(wrong)} of {len(expected)} tensors do not fit config.json, first {first}: "
            f"got {found.get(first)}, expected {expected.get(first)}"
        )
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def read_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError when it is missing or damaged."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None


def save_training(state: Any, directory: Path, extra: dict[str, Any]) -> None:
    """Writes what a run continues from: weights, optimizer, guard, JSON facts (step, data position), a manifest."""
    directory = Path(directory)
    save_model(state.model, directory)
    _write(state_tensors(state.model, state.optimizer), directory / OPTIMIZER)
    guard = state.guard._asdict()
    rings = {name: value for name, value in guard.items() if isinstance(value, torch.Tensor)}
    _write(rings, directory / GUARD)
    counts = {name: value for name, value in guard.items() if name not in rings}
    facts = {"format": FORMAT, "step": state.step, "guard": counts} | extra
    (directory / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    seal(directory, MANIFEST, {"step": state.step})


def load_training(state: Any, directory: Path) -> tuple[Any, dict[str, Any]]:
    """Continues a fresh state from `save_training`'s files; returns it with the JSON facts.

    Raises CheckpointError; DamagedCheckpointError where a file is not as it was written.
    """
    directory = Path(directory)
    extra = verify(directory)
    device = str(next(state.model.parameters()).device)
    weights = read_tensors(directory / WEIGHTS, device)
    moments = read_tensors(directory / OPTIMIZER, device)
    guard = state.guard
    if extra["format"] == FORMAT:
        rings: dict[str, Any] = read_tensors(directory / GUARD)
        guard = Guard(**extra["guard"], **rings)
    if updates := extra["step"] - guard.skipped:
        try:
            load_state_tensors(state.model, state.optimizer, moments, updates)
        except InputError as error:
            raise CheckpointError(f"{directory / OPTIMIZER}: {error}") from None
    with torch.no_grad():
        for path, p in state.model.named_parameters():
            p.copy_(weights[path])
    return state._replace(step=extra["step"], guard=guard), extra


def verify(directory: Path) -> dict[str, Any]:
    """The JSON facts of a checkpoint, after every file of it was compared with its size and SHA-256.

    Checkpoints of the first format have no checksums; they are taken as they are. Raises DamagedCheckpointError.
    """
    directory = Path(directory)
    try:
        facts = _facts(directory)
        if facts["format"] == FORMAT or (directory / MANIFEST).exists():
            check(directory, MANIFEST)
        return facts
    except (DamagedError, CheckpointError) as error:
        raise DamagedCheckpointError(f"checkpoint {directory.name} of torch is damaged: {error}") from None


def candidates(directory: Path) -> list[tuple[float, str]]:
    """(step, folder) of every checkpoint of a run, newest first; infinity for a step that cannot be read."""
    found = []
    for order, name in enumerate(PLACES):
        if (Path(directory) / name).is_dir():
            try:
                step = float(_facts(Path(directory) / name)["step"])
            except CheckpointError:
                step = math.inf
            found.append((step, -order, name))
    return [(step, name) for step, _, name in sorted(found, reverse=True)]


def save_run(state: Any, directory: Path, extra: dict[str, Any], is_best: bool) -> None:
    """Writes best/ where this is the best, and then latest/; which was the last one becomes previous/.

    In this order no latest/ names a best value whose weights a kill has left unwritten. A kill at any moment leaves one
    of them whole. Raises NoSpaceError, with those before as they were.
    """
    directory = Path(directory)
    size = state_bytes(state)
    for name in ("best", "latest") if is_best else ("latest",):
        fresh = directory / (name + NEW)
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            if (free := free_bytes(directory)) < size:
                raise NoSpaceError(f"disk full: {size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")
            save_training(state, fresh, extra)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            kind = NoSpaceError if is_full(error) or isinstance(error, DiskFullError) else CheckpointError
            raise kind(
                f"checkpoint of step {state.step} was not written to {directory / name}: {error}"
            ) from None
        if name == "latest":
            _move(directory / name, directory / "previous")
        _move(fresh, directory / name)
        sync(directory)


def state_bytes(state: Any) -> int:
    """Bytes of a checkpoint, nearly."""
    parameters = sum(p.nbytes for p in state.model.parameters())
    entries = [x for entry in state.optimizer.state.values() for x in entry.values()]
    moments = sum(x.nbytes for x in entries if isinstance(x, torch.Tensor))
    return parameters + (moments or 2 * parameters)  # before the first step there are none


def _move(source: Path, destination: Path) -> None:
    """Renames a directory, and removes what had its new name before."""
    old = destination.with_name(destination.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    if source.exists():
        if destination.exists():
            destination.rename(old)
        source.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _facts(directory: Path) -> dict[str, Any]:
    path = directory / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {"format": 1} | facts | {"step": int(facts["step"])}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        kind = NoSpaceError if is_full(error) else CheckpointError
        raise kind(f"{path}: could not be written, {error}") from None
