"""Planting a fault: something is replaced for a while, and nothing of it stays."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jaxlm.beam
import jaxlm.cached
import jaxlm.generate
import jaxlm.rope_table
import torchref.model
from jaxlm.config import InputError


class SelfTestError(InputError):
    """The self-test itself could not run: a worker does not start, or the suite fails without any fault."""


@contextlib.contextmanager
def planted(target: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces what `target` names; whatever happens inside, it is put back and no compiled trace of it stays."""
    owner, name = resolve(target)
    original = vars(owner)[name]
    setattr(owner, name, change(original))
    try:
        _forget()
        yield
    finally:
        setattr(owner, name, original)
        _forget()


def resolve(target: str) -> tuple[Any, str]:
    """The module or class that holds a dotted path, and the name in it. Raises SelfTestError if there is none."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part, None)
        if owner is not None and parts[-1] in vars(owner):
            return owner, parts[-1]
        break
    raise SelfTestError(f"the fault's target {target!r} does not exist")


def _forget() -> None:
    """Empties the caches of the three packages that would answer with what was there before."""
    compiled = (module._compiled for module in (jaxlm.cached, jaxlm.beam, jaxlm.generate))
    for cached in (*compiled, jaxlm.rope_table._table, torchref.model._made_rope_tensors):
        cached.cache_clear()
