"""Conversion without holding a model: tensors are planned from their facts, and made when they are written.

`there` plans the tensors of a table's other side from ours, `here` ours from the other side's. A plan reads nothing.
What is made of it is a box at a time, from just the boxes of the sources that it needs, through several conversions
in a row; transposes are done in blocks that fit the cache.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.rules import SAME, TRANSPOSE, ConversionError, Index, Pair, Transform, require
from jaxlm.tensor_file import Box, Lazy, Planned, boxes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ROWS, _COLUMNS = 1024, 16  # of a block: each line of the source is used up before it leaves the cache
_REACH = 16 << 20  # bytes of a source that are mapped at once


class _Piece(NamedTuple):
    """What goes from a part of one tensor to a part of another."""

    to: Index  # where it goes
    source: Lazy
    part: Index  # of the source
    transform: Transform
    inverse: bool


def there(
    pairs: list[Pair], tensors: Mapping[str, Lazy], dtype: np.dtype | None = None
) -> dict[str, Planned]:
    """The other side's tensors, in the order of the table; `dtype` casts. Raises ConversionError as `convert`."""
    require(pairs, tensors)
    plans = {}
    for pair in pairs:
        source, shape = tensors[pair.path], pair.other_shape
        piece = _Piece(_filled((), shape), source, _filled(pair.index, source.shape), pair.transform, False)
        plans[pair.other] = _plan(shape, dtype or source.dtype, [piece])
    return plans


def here(pairs: list[Pair], tensors: Mapping[str, Lazy], dtype: np.dtype | None = None) -> dict[str, Planned]:
    """Our tensors, in the order of the model; `dtype` casts. Raises ConversionError as `convert`."""
    require(pairs, tensors, inverse=True)
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.path, []).append(pair)
    plans = {}
    for path, group in groups.items():
        kinds = {tensors[pair.other].dtype for pair in group}
        kept = dtype or _common(kinds)
        pieces = [
            _Piece(
                _filled(pair.index, pair.shape),
                tensors[pair.other],
                _filled((), tensors[pair.other].shape),
                pair.transform,
                True,
            )
            for pair in group
        ]
        plans[path] = _plan(group[0].shape, kept, pieces)
    return plans


def _common(kinds: set[np.dtype]) -> np.dtype:
    """The smallest dtype that holds all of them; float32 for float16 beside bfloat16."""
    try:
        return np.result_type(*kinds)
    except TypeError:
        return np.dtype(np.float32)


def lazy(planned: Planned, origin: str = "memory") -> Lazy:
    """A planned tensor as one to be read: reading makes it whole, or the part that is asked for."""
    make = planned.make

    def take(index: Index) -> np.ndarray:
        assert make is not None
        index = _filled(index, planned.shape)
        box = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in index)
        return make(box)[tuple(0 if isinstance(i, int) else slice(None) for i in index)]

    return Lazy(planned.shape, planned.dtype, lambda: array(planned), origin, take if make else None)


def cast(tensors: Mapping[str, Lazy], dtype: np.dtype | None) -> dict[str, Planned]:
    """Tensors as they are, or rounded to `dtype`, piece by piece."""
    whole = [Pair(path, tensor.shape, path, SAME, ()) for path, tensor in tensors.items()]
    return there(whole, tensors, dtype)


def guarded(plans: Mapping[str, Planned]) -> tuple[dict[str, Planned], list[str]]:
    """The same plans, and a list that fills with a line per tensor that turns out to hold NaN or infinity."""
    faults: list[str] = []
    counts = dict.fromkeys(plans, 0)

    def add(name: str, values: np.ndarray) -> np.ndarray:
        if bad := _count_not_finite(values):
            counts[name] += bad
            faults[:] = [
                f"{n}: {count} of {piece_count(plans[n])} values are not finite in {plans[n].dtype}"
                for n, count in counts.items()
                if count
            ]
        return values

    def watched(name: str, plan: Planned) -> Planned:
        make = plan.make

        def pieces() -> Iterator[np.ndarray]:
            counts[name] = 0
            for piece in plan.pieces():
                yield add(name, piece)

        return Planned(plan.shape, plan.dtype, pieces, (lambda box: add(name, make(box))) if make else None)

    return {name: watched(name, plan) for name, plan in plans.items()}, faults


@contextlib.contextmanager
def finite(plans: Mapping[str, Planned]) -> Iterator[dict[str, Planned]]:
    """The same plans, for a block that writes them; at its end ConversionError names those with NaN or infinity."""
    watched, faults = guarded(plans)
    yield watched
    if faults:
        raise ConversionError("weights that are not finite are not written:\n" + "\n".join(faults))


def piece_count(plan: Planned) -> int:
    """Values of a planned tensor."""
    return plan.nbytes // plan.dtype.itemsize


def _count_not_finite(piece: np.ndarray) -> int:
    if piece.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            total = piece.sum()  # finite sums cannot hide NaN or infinity, and are several times as fast
        return 0 if np.isfinite(total) else int(piece.size - np.count_nonzero(np.isfinite(piece)))
    if piece.dtype != BFLOAT16:
        return 0
    flat = piece.reshape(-1)
    if not flat.size or (flat.view(np.int16).max() < 0x7F80 and flat.view(np.uint16).max() < 0xFF80):
        return 0  # all exponent bits set says NaN or infinity; numpy's own test goes value by value here
    return int(np.count_nonzero((flat.view(np.uint16) & 0x7F80) == 0x7F80))


def array(planned: Planned) -> np.ndarray:
    """A planned tensor in memory, as an array of its own."""
    out = np.empty(planned.shape, planned.dtype)
    flat, start = out.reshape(-1), 0
    for piece in planned.pieces():
        flat[start : start + piece.size] = piece.reshape(-1)
        start += piece.size
    return out


def _plan(shape: tuple[int, ...], dtype: np.dtype, parts: list[_Piece]) -> Planned:
    alike = len(parts) == 1 and parts[0].transform is SAME and parts[0].source.dtype == dtype

    def made(box: Box, held: dict[int, np.ndarray]) -> np.ndarray:
        overlaps = [(i, *inner) for i, part in enumerate(parts) if (inner := _overlap(part.to, box))]
        for i in held.keys() - {i for i, *_ in overlaps}:
            del held[i]
        if alike:
            return np.asarray(_fetched(0, parts[0], box, held), order="C")
        out = np.empty([s.stop - s.start for s in box], dtype)
        for i, to, within in overlaps:
            for columns, strip in _strips(parts[i], within):
                copy_blocked(out[(*to, ...)][columns], _fetched(i, parts[i], strip, held))
        return out

    def pieces() -> Iterator[np.ndarray]:
        held: dict[int, np.ndarray] = {}
        for box in boxes(shape, dtype):
            yield made(box, held)

    apart = all(part.source.take is not None and part.transform in (SAME, TRANSPOSE) for part in parts)
    return Planned(shape, dtype, pieces, (lambda box: made(box, {})) if apart else None)


def _strips(piece: _Piece, within: Box) -> Iterator[tuple[Any, Box]]:
    """A box cut along its last axis: a few columns of a transpose need every page of as many rows of the source."""
    if piece.transform is not TRANSPOSE or piece.source.take is None:
        yield ..., within
        return
    columns, rows = within[-1], math.prod(s.stop - s.start for s in within[:-2])
    step = max(1, _REACH // (rows * piece.source.shape[-1] * piece.source.dtype.itemsize))
    for start in range(columns.start, columns.stop, step):
        stop = min(start + step, columns.stop)
        yield (..., slice(start - columns.start, stop - columns.start)), (*within[:-1], slice(start, stop))


def _fetched(key: int, piece: _Piece, within: Box, held: dict[int, np.ndarray]) -> np.ndarray:
    """A box of what a piece brings, in the target's layout; sources that are only had whole are `held`."""
    take, transform = piece.source.take, piece.transform
    if take is not None and transform is SAME:
        return take(_composed(piece.part, within))
    if take is not None and transform is TRANSPOSE:
        *leading, rows, columns = within
        return np.swapaxes(take(_composed(piece.part, (*leading, columns, rows))), -1, -2)
    if key not in held:
        whole = piece.source.read()[piece.part] if take is None else take(piece.part)
        held[key] = transform.view(whole, piece.inverse)
    return held[key][within]


def _filled(index: Index, shape: tuple[int, ...]) -> Index:
    """An index with an entry for every axis, its slices with both ends."""
    full = (*index, *(slice(None) for _ in shape[len(index) :]))
    return tuple(
        i if isinstance(i, int) else slice(*i.indices(n)[:2]) for i, n in zip(full, shape, strict=True)
    )


def _composed(index: Index, box: Box) -> Index:
    """The index of a box of what an index gives."""
    rest = iter(box)
    return tuple(
        i if isinstance(i, int) else slice(i.start + (s := next(rest)).start, i.start + s.stop) for i in index
    )


def _overlap(index: Index, box: Box) -> tuple[Index, Box] | None:
    """Where in a box the values of an index lie, and which of its own they are; None where they do not meet."""
    to: list[int | slice] = []
    within: list[slice] = []
    for i, s in zip(index, box, strict=True):
        first, last = (i, i + 1) if isinstance(i, int) else (i.start, i.stop)
        low, high = max(first, s.start), min(last, s.stop)
        if low >= high:
            return None
        if isinstance(i, int):
            to.append(low - s.start)
        else:
            to.append(slice(low - s.start, high - s.start))
            within.append(slice(low - first, high - first))
    return tuple(to), tuple(within)


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
