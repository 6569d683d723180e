"""What a planted fault is: one function or rule of the three packages replaced, and where the report must find it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxlm.config import RunConfig

KINDS = (
    "layout",
    "scale",
    "masks",
    "RoPE",
    "norms",
    "router",
    "balance loss",
    "optimizer",
    "schedule",
    "accumulation",
    "cache",
    "conversion",
    "sharding",
    "examples",
    "adapters",
    "quantised base",
    "preferences",
)


def unchanged(run: RunConfig) -> RunConfig:
    """Most faults show in the self-test's own model."""
    return run


@dataclass(frozen=True)
class Rewrite:
    """Another way to compute the same: the suite must stay quiet."""

    name: str
    target: str  # dotted path of what is replaced, where it is looked up: "torchref.layers.RMSNorm.forward"
    change: Callable[[Any], Any]  # the original -> its replacement
    run: Callable[[RunConfig], RunConfig] = unchanged  # the model that shows it
    rungs: tuple[str, ...] = ()  # those to climb, where no other computes anything of the target; () = all


@dataclass(frozen=True)
class Fault:
    """A mistake of the kind that ports make, and by hand where its first trace must be found."""

    name: str
    kind: str  # one of KINDS
    target: str  # as in Rewrite
    change: Callable[[Any], Any]  # as in Rewrite
    rung: str  # of the report's first divergence
    operation: str  # of the report's first divergence
    run: Callable[[RunConfig], RunConfig] = unchanged  # as in Rewrite
    beside: Rewrite | None = None  # planted with it: what computes in the way that has the fault
    rungs: tuple[str, ...] = ()  # as in Rewrite
