"""Guesses what turned one array into another: a rounding, a factor, a transpose, a permutation, an exchange of experts.

Every guess is verified on all elements before it is made, so a guess is a fact about the two arrays, not an opinion.
"""

import ml_dtypes
import numpy as np

REMAINDER = 1e-6  # of a difference may stay unexplained by a factor or a shift
NARROWER = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}


def explain(a: np.ndarray, b: np.ndarray) -> str:
    """How `b` can be made from `a`, in words; '' where nothing simple does it."""
    if a.shape != b.shape or a.size < 2 or not (_real(a) and _real(b)):
        return ""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return ""
    return _rounded(a, b) or _scaled(a, b) or _moved(a, b)


def _real(x: np.ndarray) -> bool:
    return x.dtype.kind == "f" or x.dtype == ml_dtypes.bfloat16


def _rounded(a: np.ndarray, b: np.ndarray) -> str:
    for name, dtype in NARROWER.items():
        with np.errstate(over="ignore"):
            if np.array_equal(a.astype(dtype).astype(np.float64), b):
                return f"torch's is jax's rounded to {name}"
            if np.array_equal(b.astype(dtype).astype(np.float64), a):
                return f"jax's is torch's rounded to {name}"
    return ""


def _scaled(a: np.ndarray, b: np.ndarray) -> str:
    if not a.any():
        return "jax's is all zeros"
    if not b.any():
        return "torch's is all zeros"
    gap = float(np.linalg.norm(b - a))
    factor = float(np.vdot(a, b) / np.vdot(a, a))
    if float(np.linalg.norm(b - factor * a)) <= REMAINDER * gap:
        return f"torch's is jax's times {factor:.6g}"
    shift = float((b - a).mean())
    if float(np.linalg.norm(b - a - shift)) <= REMAINDER * gap:
        return f"torch's is jax's plus {shift:.6g}"
    return ""


def _moved(a: np.ndarray, b: np.ndarray) -> str:
    if not np.array_equal(np.sort(a, axis=None), np.sort(b, axis=None)):
        return ""
    if a.ndim >= 2 and a.shape[-1] == a.shape[-2] and np.array_equal(np.swapaxes(a, -1, -2), b):
        return "torch's is jax's transposed"
    for axis in range(a.ndim):
        order = _permutation(a, b, axis)
        if order is not None:
            return _name_permutation(order, axis, a.ndim)
    return "torch's holds jax's values in another order"


def _permutation(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray | None:
    """The order of slices of `a` along `axis` that gives `b`, if there is one."""
    rows_a = np.ascontiguousarray(np.moveaxis(a, axis, 0)).reshape(a.shape[axis], -1)
    rows_b = np.ascontiguousarray(np.moveaxis(b, axis, 0)).reshape(a.shape[axis], -1)
    place = {row.tobytes(): i for i, row in enumerate(rows_a)}
    order = [place.get(row.tobytes(), -1) for row in rows_b]
    if len(place) != len(rows_a) or sorted(order) != list(range(len(order))):
        return None
    return np.asarray(order)


def _name_permutation(order: np.ndarray, axis: int, ndim: int) -> str:
    n = len(order)
    moved = np.flatnonzero(order != np.arange(n))
    what = "experts" if ndim == 3 and axis == 0 else f"slices along axis {axis} (jax's layout)"
    for head in (h for h in range(4, n + 1, 2) if n % h == 0):
        half_split = np.arange(head).reshape(2, head // 2).T.reshape(-1)
        for pattern in (half_split, np.argsort(half_split)):
            heads = (order.reshape(-1, head) - np.arange(0, n, head)[:, None]).tolist()
            turned = [i for i, rows in enumerate(heads) if rows == pattern.tolist()]
            if turned and all(rows in (pattern.tolist(), list(range(head))) for rows in heads):
                which = "all heads" if len(turned) == n // head else f"head {turned[0]}"
                return f"{what} permuted between RoPE's half-split and interleaved layout ({which}, H={head})"
    if np.array_equal(order, np.arange(n)[::-1]):
        return f"{what} in reverse order"
    if len(moved) == 2:
        return f"{what} {moved[0]} and {moved[1]} exchanged"
    if n % 2 == 0 and np.array_equal(order, np.roll(np.arange(n), n // 2)):
        return f"the two halves of axis {axis} (jax's layout) exchanged"
    return f"{len(moved)} {what} permuted, first {moved[0]} <- {order[moved[0]]}"
