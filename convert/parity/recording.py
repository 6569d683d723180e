"""What every submodule puts out, by module path and in execution order: NNX under jit, PyTorch by forward hooks.

A module called more than once is told apart as "path#2"; outputs in tuples and dicts as "path[0]", "path[key]". The
whole module is "<output>".
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import torch
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from convert.tree import Flat, to_numpy

WHOLE = "<output>"  # the name of the outermost module's result; no attribute can be called so


class Record(NamedTuple):
    """One pass through a module, in the order in which the calls returned."""

    outputs: dict[str, Any]
    inputs: dict[str, list[Any]]  # positional arrays of the call, by the name of its outputs' module


def leaves(name: str, value: Any) -> dict[str, Any]:
    """The arrays of a result by name; what is no array (None, a flag) is not a result."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple | list):
        parts = enumerate(value)
    else:
        return {name: value} if isinstance(value, jax.Array | torch.Tensor) else {}
    return {k: v for key, part in parts for k, v in leaves(f"{name}[{key}]", part).items()}


def module_of(name: str) -> str:
    """The module that a recorded output belongs to: "mlp#2[0]" -> "mlp"."""
    return re.split(r"[#\[]", name, maxsplit=1)[0]


def numbered(path: str, calls: dict[str, int]) -> str:
    """The name of this call of a module."""
    calls[path] = calls.get(path, 0) + 1
    return path if calls[path] == 1 else f"{path}#{calls[path]}"


@contextlib.contextmanager
def recording(model: nnx.Module) -> Iterator[Record]:
    """Records the calls of `model` and its submodules made in this context, at this level of tracing.

    The classes' `__call__` are wrapped and always restored. Calls inside jax.checkpoint, scan or vmap are of another
    level: their values cannot leave it, so they are not recorded.
    """
    paths = {id(m): ".".join(map(str, path)) or WHOLE for path, m in nnx.iter_modules(model)}
    record, calls, active = Record({}, {}), {}, set()
    level = get_opaque_trace_state(convention="nnx")

    def wrapped(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            known = id(self) in paths and id(self) not in active  # super().__call__ is not another call
            if not known or get_opaque_trace_state(convention="nnx") != level:
                return original(self, *args, **kwargs)
            active.add(id(self))
            try:
                result = original(self, *args, **kwargs)
            finally:
                active.discard(id(self))
            name = numbered(paths[id(self)], calls)
            record.outputs.update(leaves(name, result))
            record.inputs[name] = list(leaves("", args).values())
            return result

        return call

    types = {type(m) for _, m in nnx.iter_modules(model)}
    classes = [
        cls for cls in types if any("__call__" in vars(base) for base in cls.__mro__)
    ]  # lists have none
    own = {cls: vars(cls).get("__call__") for cls in classes}
    originals = {cls: cls.__call__ for cls in classes}
    try:
        for cls in classes:
            cls.__call__ = wrapped(originals[cls])
        yield record
    finally:
        for cls, method in own.items():
            if method is None:
                del cls.__call__  # it was inherited
            else:
                cls.__call__ = method


def record_torch(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Record:
    """One forward pass of a torch module, as numpy. Gradients stay on: without them some layers take a fused path."""
    record, calls, handles = Record({}, {}), {}, []

    def hook(path: str) -> Any:
        def after(_: Any, args: Any, result: Any) -> None:
            name = numbered(path, calls)
            record.outputs.update(_numpy(leaves(name, result)))
            record.inputs[name] = list(_numpy(leaves("", args)).values())

        return after

    try:
        for path, part in module.named_modules():
            handles.append(part.register_forward_hook(hook(path or WHOLE)))
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return record


def _numpy(found: Mapping[str, torch.Tensor]) -> Flat:
    return {name: to_numpy(value).copy() for name, value in found.items()}  # later in-place operations
