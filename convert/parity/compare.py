"""The errors that every comparison uses, and the record of one compared tensor."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.parity.explain import explain


@dataclass(frozen=True)
class Finding:
    """One compared tensor or number."""

    name: str  # path of the tensor, or what was compared
    value: float  # its error
    limit: float
    detail: Mapping[str, Any] = field(default_factory=dict)  # where it failed: values, shapes, a guess

    @property
    def passed(self) -> bool:
        """Within the limit; NaN is not."""
        return bool(self.value <= self.limit)

    @property
    def severity(self) -> float:
        """Error over limit, to find the worst of tensors with different limits."""
        if math.isnan(self.value):
            return math.inf
        if self.limit == 0:
            return 0.0 if self.value == 0 else math.inf
        return self.value / self.limit


def norm(x: Any) -> float:
    """Euclidean norm in double."""
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def relative_error(a: Any, b: Any, floor: float = 0.0) -> float:
    """||a - b|| / max(||b||, floor), in double; 0 when both are equal, infinite on NaN or another shape.

    Infinities (scores of keys that may not be seen) must stand in the same places and count as equal there.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return math.inf
    infinite = np.isinf(a) | np.isinf(b)
    if infinite.any():
        if not np.array_equal(a[infinite], b[infinite]):
            return math.inf
        a, b = np.where(infinite, 0, a), np.where(infinite, 0, b)
    difference = norm(a - b)
    if difference == 0:
        return 0.0
    scale = max(norm(b), floor)
    return difference / scale if math.isfinite(difference) and scale > 0 else math.inf


def compare(name: str, a: Any, b: Any, limit: float, floor: float = 0.0) -> Finding:
    """The finding of one pair, `a` from JAX and `b` the reference; details only where it fails."""
    a, b = np.asarray(a), np.asarray(b)
    value = relative_error(a, b, floor)
    return Finding(name, value, limit, {} if value <= limit else describe(a, b))


def compare_all(
    a: Mapping[str, Any], b: Mapping[str, Any], limit: float, order: Iterable[str] | None = None
) -> list[Finding]:
    """Findings of two dicts; a name that only one side has is infinitely wrong."""
    return [
        compare(name, a[name], b[name], limit)
        if name in a and name in b
        else Finding(name, math.inf, limit, {"missing": "jax" if name not in a else "torch"})
        for name in _names(a, b, order)
    ]


def compare_gradients(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    limit: float,
    order: Iterable[str] | None = None,
    zero: Collection[str] = (),
    zero_limit: float = 0.0,
) -> list[Finding]:
    """Findings of gradients, or of anything that is nearly zero in places.

    A gradient that is zero but for rounding has no relative error of its own, so the scale is at least
    1e-6 * ||whole gradient|| * sqrt(n / n_all). Those in `zero` are zero by mathematics: the larger of their two
    norms over ||whole gradient|| is compared with `zero_limit`.
    """
    floors, whole = gradient_floors(b)
    findings = []
    for name in _names(a, b, order):
        if name not in a or name not in b:
            findings.append(Finding(name, math.inf, limit, {"missing": "jax" if name not in a else "torch"}))
        elif name in zero:
            size = max(norm(a[name]), norm(b[name])) / max(whole, 1e-300)
            findings.append(Finding(name, size, zero_limit, {"zero": True}))
        else:
            findings.append(compare(name, a[name], b[name], limit, floors[name]))
    return findings


def gradient_floors(b: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """1e-6 * ||whole|| * sqrt(n / n_all) of each tensor, and ||whole||."""
    whole = math.sqrt(sum(norm(g) ** 2 for g in b.values()))
    n_all = max(1, sum(np.size(g) for g in b.values()))
    return {name: 1e-6 * whole * math.sqrt(np.size(g) / n_all) for name, g in b.items()}, whole


def describe(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """What a person wants to see of two arrays that differ: sizes, the worst element, and a guess at the cause."""
    found: dict[str, Any] = {"jax_shape": list(a.shape), "torch_shape": list(b.shape)}
    if a.shape != b.shape:
        return found
    wide_a, wide_b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(wide_a - wide_b)
    gap = np.where(np.isnan(gap), np.where(wide_a == wide_b, 0, np.inf), gap)
    at = np.unravel_index(int(np.argmax(gap)), gap.shape) if gap.size else ()
    found |= {
        "index": [int(i) for i in at],
        "jax": float(wide_a[at]) if gap.size else math.nan,
        "torch": float(wide_b[at]) if gap.size else math.nan,
        "differing": float(np.mean(gap > 0)) if gap.size else 0.0,
        "jax_norm": norm(np.where(np.isfinite(wide_a), wide_a, 0)),
        "torch_norm": norm(np.where(np.isfinite(wide_b), wide_b, 0)),
    }
    guess = explain(a, b)
    return found | ({"looks_like": guess} if guess else {})


def kl_divergence(reference: Any, other: Any) -> np.ndarray:
    """KL(softmax(reference) || softmax(other)) of each token in nats: logits [..., V] -> [...], in double."""
    p, q = (_log_softmax(np.asarray(x, np.float64)) for x in (reference, other))
    return np.maximum(np.sum(np.exp(p) * (p - q), axis=-1), 0.0)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _names(a: Mapping[str, Any], b: Mapping[str, Any], order: Iterable[str] | None) -> list[str]:
    known = list(a) if order is None else [name for name in order if name in a or name in b]
    return list(dict.fromkeys([*known, *a, *b]))
