"""The error that every comparison uses."""

import math
from collections.abc import Mapping

import numpy as np


def relative_error(a: np.ndarray, b: np.ndarray, floor: float = 0.0) -> float:
    """||a - b|| / max(||b||, floor), in double; 0 when both are zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference, scale = float(np.linalg.norm(a - b)), max(float(np.linalg.norm(b)), floor)
    return difference / scale if difference else 0.0


def gradient_errors(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative error of each gradient of `a` against `b`.

    A gradient that is zero but for rounding has no relative error of its own, so the scale is at least
    1e-6 * ||whole gradient|| * sqrt(n / n_all). Raises KeyError when the two do not hold the same tensors.
    """
    if a.keys() != b.keys():
        raise KeyError(f"gradients of different models: only one side has {sorted(a.keys() ^ b.keys())}")
    whole = math.sqrt(sum(float(np.sum(np.square(np.asarray(g, np.float64)))) for g in b.values()))
    n_all = sum(g.size for g in b.values())
    return {k: relative_error(a[k], b[k], 1e-6 * whole * math.sqrt(b[k].size / n_all)) for k in b}
