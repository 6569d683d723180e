"""model.pt: the weights as a plain PyTorch state dict, config.json beside it; opened without running any code.

    import torch
    from jaxlm.config import ModelConfig, load
    from torchref.model import Decoder
    model = Decoder(load(ModelConfig, "config.json"), rngs=None)
    model.load_state_dict(torch.load("model.pt", weights_only=True), strict=True, assign=True)

Names and layouts are torchref's. A tied head is the embedding and not stored again.
"""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch

from convert.rules import ConversionError
from jaxlm.config import ModelConfig, load, save
from torchref.model import Decoder

WEIGHTS, CONFIG = "model.pt", "config.json"

Source = torch.Tensor | np.ndarray


def write(
    directory: Path, config: ModelConfig, tensors: Mapping[str, Source] | Iterable[tuple[str, Source]]
) -> None:
    """Writes `model.pt` and `config.json`.

    Args:
        directory: existing directory.
        config: the model.
        tensors: torchref's parameters by name, in the dtype to be stored; a mapping, or pairs one after the other.

    Raises:
        ConversionError: names or shapes that are not the model's, all of them at once.
    """
    pairs = cast(Iterable[tuple[str, Source]], tensors.items() if isinstance(tensors, Mapping) else tensors)
    state = {name: _own(value) for name, value in pairs}
    _require(config, state, f"{WEIGHTS} cannot be written")
    torch.save(state, Path(directory) / WEIGHTS)
    save(config, Path(directory) / CONFIG)


def read(directory: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The model and its parameters by torchref's names, still in their file until they are used.

    Raises:
        ConfigError: config.json is missing or wrong.
        ConversionError: model.pt is missing, damaged, needs code to open, is no state dict, or not this model's.
    """
    config = load(ModelConfig, Path(directory) / CONFIG)
    path = Path(directory) / WEIGHTS
    state = _load(path)
    if not isinstance(state, Mapping):
        raise ConversionError(f"{path}: it holds {_kind(state)}, not a state dict of tensors by name")
    wrong = [
        f"{key!r} is {_kind(value)}"
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided)
    ]
    if wrong:
        raise ConversionError(f"{path}: not a state dict of tensors by name: " + ", ".join(wrong[:5]))
    plain = {name: value.detach() for name, value in state.items()}
    _require(config, plain, f"{path} does not fit {CONFIG}")
    return config, {name: value.contiguous() for name, value in plain.items()}


def _load(path: Path) -> Any:
    """The unpickled file: tensors and plain containers only, mapped into memory."""
    if not path.is_file():
        raise ConversionError(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise ConversionError(f"{path}: it is damaged, or not in the zip form that torch.save writes")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file can make the unpickler raise anything
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            raise ConversionError(
                f"{path}: opening it needs code, which is never run; save a plain state dict of tensors"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"{path}: it cannot be read: {reason}") from None


def _own(value: Source) -> torch.Tensor:
    """A contiguous tensor on the CPU whose storage holds nothing else: torch.save writes whole storages."""
    if isinstance(value, np.ndarray):
        array = np.require(value, requirements=["C", "W"])
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    tensor = value.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _require(config: ModelConfig, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises one ConversionError with every missing, unused and misshapen tensor and every one without fractions."""
    with torch.device("meta"):
        model = Decoder(config, rngs=None)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems = [f"{name}: missing" for name in shapes if name not in state]
    for name, value in state.items():
        if name not in shapes:
            problems.append(f"{name}: unused, the model has no such parameter")
        elif tuple(value.shape) != shapes[name]:
            problems.append(f"{name}: got {tuple(value.shape)}, expected {shapes[name]}")
        elif not value.is_floating_point():
            problems.append(f"{name}: got {_kind(value)}, expected a floating-point dtype")
    if problems:
        raise ConversionError(f"{what}: {len(problems)} tensors are wrong:\n" + "\n".join(problems))


def _kind(value: Any) -> str:
    return (
        f"a tensor of {value.dtype}, {value.layout}"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
    )
