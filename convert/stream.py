"""Conversion without holding a model: tensors are planned from their facts, and made when they are written.

`there` plans the tensors of a table's other side from ours, `here` ours from the other side's. A plan reads nothing.
Its pieces run along the first axis; transposes are done in blocks that fit the cache.
"""

from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np

from convert.rules import SAME, Index, Pair, Transform, require
from jaxlm.tensor_file import Lazy, Planned, rows_at_once

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ROWS, _COLUMNS = 512, 16  # of a block: each line of the source is used up before it leaves the cache


def there(
    pairs: list[Pair], tensors: Mapping[str, Lazy], dtype: np.dtype | None = None
) -> dict[str, Planned]:
    """The other side's tensors, in the order of the table; `dtype` casts. Raises ConversionError as `convert`."""
    require(pairs, tensors)
    return {
        pair.other: _plan(
            pair.other_shape, dtype or tensors[pair.path].dtype, _taken(pair, tensors[pair.path])
        )
        for pair in pairs
    }


def here(pairs: list[Pair], tensors: Mapping[str, Lazy], dtype: np.dtype | None = None) -> dict[str, Planned]:
    """Our tensors, in the order of the model; `dtype` casts. Raises ConversionError as `convert`."""
    require(pairs, tensors, inverse=True)
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.path, []).append(pair)
    plans = {}
    for path, group in groups.items():
        parts = [(pair.index, pair.transform, tensors[pair.other]) for pair in group]
        kinds = {tensors[pair.other].dtype for pair in group}
        kept = dtype or np.result_type(*kinds) if len(kinds) > 1 else dtype or kinds.pop()
        plans[path] = _plan(group[0].shape, kept, _assembled(parts))
    return plans


def lazy(planned: Planned, origin: str = "memory") -> Lazy:
    """A planned tensor as one to be read: reading makes it whole."""
    return Lazy(planned.shape, planned.dtype, lambda: array(planned), origin)


def cast(tensors: Mapping[str, Lazy], dtype: np.dtype | None) -> dict[str, Planned]:
    """Tensors as they are, or rounded to `dtype`, piece by piece."""
    whole = [Pair(path, tensor.shape, path, SAME, ()) for path, tensor in tensors.items()]
    return there(whole, tensors, dtype)


def guarded(plans: Mapping[str, Planned]) -> tuple[dict[str, Planned], list[str]]:
    """The same plans, and a list that fills with a line per tensor that turns out to hold NaN or infinity."""
    faults: list[str] = []

    def watched(name: str, plan: Planned) -> Planned:
        def pieces() -> Iterator[np.ndarray]:
            bad = 0
            for piece in plan.pieces():
                bad += _count_not_finite(piece)
                yield piece
            if bad:
                faults.append(f"{name}: {bad} of {piece_count(plan)} values are not finite in {plan.dtype}")

        return Planned(plan.shape, plan.dtype, pieces)

    return {name: watched(name, plan) for name, plan in plans.items()}, faults


def piece_count(plan: Planned) -> int:
    """Values of a planned tensor."""
    return plan.nbytes // plan.dtype.itemsize


def _count_not_finite(piece: np.ndarray) -> int:
    if (
        piece.dtype == BFLOAT16
    ):  # numpy's own test goes value by value here; all exponent bits set says the same
        bits = piece.reshape(-1).view(np.uint16) & 0x7F80
        return int(np.count_nonzero(bits == 0x7F80)) if bits.size and bits.max() == 0x7F80 else 0
    if piece.dtype.kind != "f":
        return 0
    with np.errstate(over="ignore", invalid="ignore"):
        total = piece.sum()  # finite sums cannot hide NaN or infinity, and are several times as fast
    return 0 if np.isfinite(total) else int(piece.size - np.count_nonzero(np.isfinite(piece)))


def array(planned: Planned) -> np.ndarray:
    """A planned tensor in memory, as an array of its own."""
    out = np.empty(planned.shape, planned.dtype)
    flat, start = out.reshape(-1), 0
    for piece in planned.pieces():
        flat[start : start + piece.size] = piece.reshape(-1)
        start += piece.size
    return out


Fill = Callable[[], Callable[[np.ndarray, int], None]]  # opens the sources; then (piece, first row) is filled


def _plan(shape: tuple[int, ...], dtype: np.dtype, opened: Fill) -> Planned:
    def pieces() -> Iterator[np.ndarray]:
        fill = opened()
        if not shape:
            piece = np.empty((), dtype)
            fill(piece, 0)
            yield piece
            return
        step = rows_at_once(shape, dtype)
        for start in range(0, shape[0], step):
            piece = np.empty((min(step, shape[0] - start), *shape[1:]), dtype)
            fill(piece, start)
            yield piece

    return Planned(shape, dtype, pieces)


def _taken(pair: Pair, tensor: Lazy) -> Fill:
    """A piece of a tensor of ours, in the other side's layout."""

    def opened() -> Callable[[np.ndarray, int], None]:
        view = pair.transform.view(tensor.read()[pair.index])

        def fill(piece: np.ndarray, start: int) -> None:
            copy_blocked(piece, view[start : start + len(piece)] if view.ndim else view)

        return fill

    return opened


def _assembled(parts: list[tuple[Index, Transform, Lazy]]) -> Fill:
    """A tensor of ours, from all its pieces there; a piece is read only while its rows are being made."""

    def opened() -> Callable[[np.ndarray, int], None]:
        def fill(piece: np.ndarray, start: int) -> None:
            if not piece.ndim:
                piece[...] = parts[0][2].read()
                return
            for index, transform, tensor in parts:
                rows = _rows(index, start, len(piece))
                if rows is None:
                    continue
                view = transform.view(tensor.read(), inverse=True)
                if isinstance(rows, int):
                    copy_blocked(piece[(rows, *index[1:])], view)
                else:
                    copy_blocked(piece[(slice(None), *index[1:])], view[rows])

        return fill

    return opened


def _rows(index: Index, start: int, count: int) -> int | slice | None:
    """Which row of this piece a part fills (an expert's), or which of the part's rows are this piece's."""
    if isinstance(index[0], int):
        return index[0] - start if start <= index[0] < start + count else None
    return slice(start, start + count)


def copy_blocked(out: np.ndarray, view: np.ndarray) -> None:
    """`out[...] = view`, with casts; a transposed view is copied in blocks, several times as fast."""
    if out.dtype.itemsize == 2 and out.dtype == view.dtype:
        out, view = (
            out.view(np.uint16),
            view.view(np.uint16),
        )  # numpy copies 16-bit integers faster than bfloat16
    if view.ndim < 2 or view.strides[-1] == view.itemsize:
        out[...] = view
        return
    if view.ndim > 2:
        for one, other in zip(out, view, strict=True):
            copy_blocked(one, other)
        return
    for row in range(0, view.shape[0], _ROWS):
        for column in range(0, view.shape[1], _COLUMNS):
            block = np.s_[row : row + _ROWS, column : column + _COLUMNS]
            out[block] = view[block]
