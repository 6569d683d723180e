"""The canonical form between formats: a flat {dotted path: numpy array}, and its two ends.

jaxlm's parameters are such a dict already; torch modules and numpy meet here. bfloat16 has no numpy dtype in torch, so
it travels as its 16 bits and is re-read as ml_dtypes' bfloat16: bit-exact both ways. torch is imported where it is
needed: what only reads and writes files works without it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch

Flat = dict[str, np.ndarray]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def from_jax(params: Mapping[str, jax.Array | np.ndarray]) -> Flat:
    """jaxlm parameters as host arrays."""
    return {path: np.asarray(value) for path, value in params.items()}


def to_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """One tensor as a host array, bit for bit."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    return (
        tensor.view(torch.uint16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def to_tensor(array: np.ndarray) -> "torch.Tensor":
    """One host array as a tensor of its own memory, bit for bit."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(module: "torch.nn.Module") -> Flat:
    """A module's parameters as host arrays, each once (a tied head is one parameter)."""
    return {path: to_numpy(value) for path, value in module.named_parameters()}


def load_torch(module: "torch.nn.Module", flat: Flat) -> None:
    """Writes a flat dict into a module, in the dict's dtypes. Raises on missing or unexpected names."""
    module.load_state_dict({path: to_tensor(value) for path, value in flat.items()}, strict=True, assign=True)
