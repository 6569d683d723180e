"""torchref checkpoints: a directory with config.json and model.safetensors, nothing that executes on loading."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jaxlm.config import ConfigError, InputError, ModelConfig, load, save
from torchref.layers import Backends
from torchref.model import Decoder

WEIGHTS, CONFIG = "model.safetensors", "config.json"
OPTIMIZER, FACTS = "optimizer.safetensors", "training.json"


class CheckpointError(InputError):
    """A checkpoint that cannot be read; the message is one line with the file's name."""


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
    """Writes what a run continues from: weights, AdamW moments and JSON facts (step, data position)."""
    directory = Path(directory)
    save_model(state.model, directory)
    tensors = {}
    for path, p in state.model.named_parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            if p in state.optimizer.state:
                tensors[f"{name}:{path}"] = state.optimizer.state[p][name].contiguous()
    _write(tensors, directory / OPTIMIZER)
    (directory / FACTS).write_text(json.dumps({"step": state.step} | extra) + "\n", encoding="utf-8")


def load_training(state: Any, directory: Path) -> tuple[Any, dict[str, Any]]:
    """Continues a fresh state from `save_training`'s files; returns it with the JSON facts."""
    directory = Path(directory)
    extra = _facts(directory)
    device = str(next(state.model.parameters()).device)
    weights = read_tensors(directory / WEIGHTS, device)
    moments = read_tensors(directory / OPTIMIZER, device)
    _require_moments(state, moments, extra["step"], directory / OPTIMIZER)
    with torch.no_grad():
        for path, p in state.model.named_parameters():
            p.copy_(weights[path])
            if f"exp_avg:{path}" in moments:
                step = torch.tensor(
                    float(extra["step"]), device=device if state.optimizer.defaults["fused"] else "cpu"
                )
                entry = {name: moments[f"{name}:{path}"] for name in ("exp_avg", "exp_avg_sq")}
                state.optimizer.state[p] = {"step": step} | entry
    return state._replace(step=extra["step"]), extra


def latest_step(directory: Path) -> int | None:
    """Step of the newest checkpoint of a run (`latest/`), None without one. Raises CheckpointError on a damaged one."""
    latest = Path(directory) / "latest"
    return int(_facts(latest)["step"]) if (latest / FACTS).is_file() else None


def _require_moments(state: Any, moments: dict[str, torch.Tensor], step: int, path: Path) -> None:
    if step == 0 and not moments:
        return
    shapes = {name: tuple(p.shape) for name, p in state.model.named_parameters()}
    wanted = {f"{slot}:{name}": shape for name, shape in shapes.items() for slot in ("exp_avg", "exp_avg_sq")}
    found = {name: tuple(moment.shape) for name, moment in moments.items()}
    wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} of {len(wanted)} moments do not fit the model, first {wrong[0]}: "
            f"got {found.get(wrong[0])}, expected {wanted.get(wrong[0])}"
        )


def _facts(directory: Path) -> dict[str, Any]:
    path = directory / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts | {"step": int(facts["step"])}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: could not be written, {error}") from None
