"""transformers as a float64 oracle.

`model.double()` is not enough: modelling code sends norms, softmax, rotary angles, router and loss through float32 by
name. Inside `double_precision(modules)` those names mean float64; `NoNarrowFloats` proves that nothing narrower was
made.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class _WideTorch(types.ModuleType):
    """Stands in for the `torch` of a module: its float32 is float64, all else is the real thing."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def double_precision(*modules: types.ModuleType) -> Iterator[None]:
    """Makes the given modelling modules compute in float64 while the context lasts."""
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "torch", _WideTorch("torch")))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float64)
        yield


class NoNarrowFloats(TorchDispatchMode):
    """Raises at the first operation that makes a floating-point tensor narrower than float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in NARROW:
                raise AssertionError(f"{func} made {leaf.dtype}")
        return result
