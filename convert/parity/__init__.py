"""Comparison of the two frameworks: the same weights, the same batch, float64 on both sides.

    from convert.parity import assert_parity, compare_decoders, compare_modules

The names are looked up when they are asked for: pytest imports this package at its start, before anyone wants jax.
"""

import importlib
from typing import Any

HOMES = {"assert_parity": "modules", "compare_modules": "modules", "compare_decoders": "suite"}


def __getattr__(name: str) -> Any:
    """A public name from its module."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
