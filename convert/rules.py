"""Conversion as a table: each rule pairs a path here with names there, an invertible transform between them.

Directions are derived, never written twice. A tensor here may be split over several tensors there (the experts of a
layer, gate and up): a `Part` says how, and the parts must tile it exactly. What no rule or more than one rule names, a
missing, an unused and a misshapen tensor are all reported together in one ConversionError.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxlm.config import InputError
from jaxlm.tensor_file import shown

Index = tuple[int | slice, ...]


class ConversionError(InputError):
    """Names every tensor that could not be converted, one line each."""


class Shaped(Protocol):
    """Anything that has a shape: an array, or a tensor that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...


@dataclass(frozen=True)
class Transform:
    """A named, invertible map between two layouts of one tensor, with the shape it makes."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def __call__(self, x: np.ndarray, inverse: bool = False) -> np.ndarray:
        """Applies the map, or undoes it."""
        return np.ascontiguousarray(self.view(x, inverse))

    def view(self, x: np.ndarray, inverse: bool = False) -> np.ndarray:
        """The same, without a copy where the map needs none: axes exchanged, nothing moved."""
        return (self.inverse if inverse else self.forward)(x)


def _swap(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


SAME = Transform("same", lambda x: x, lambda x: x)
TRANSPOSE = Transform("transpose", _swap, _swap)  # [in, out] <-> [out, in], the last two axes


@dataclass(frozen=True)
class Part:
    """How a tensor here is split over several there: shape -> the number and the index of each piece."""

    name: str
    pieces: Callable[[tuple[int, ...]], list[tuple[int, Index]]]


def _halves(shape: tuple[int, ...], second: bool) -> Index:
    half = shape[-1] // 2
    last = slice(half, shape[-1]) if second else slice(0, half)
    return (*(slice(None) for _ in shape[:-1]), last)


def _each(shape: tuple[int, ...], second: bool) -> list[tuple[int, Index]]:
    return [(e, (e, *_halves(shape[1:], second))) for e in range(shape[0])]


WHOLE = Part("whole", lambda shape: [(0, tuple(slice(None) for _ in shape))])
FIRST_HALF = Part(
    "first half", lambda shape: [(0, _halves(shape, False))]
)  # of the last axis: gate of gate_up
SECOND_HALF = Part("second half", lambda shape: [(0, _halves(shape, True))])  # up
EACH = Part("each", lambda shape: [(e, (e, *(slice(None) for _ in shape[1:]))) for e in range(shape[0])])
EACH_FIRST_HALF = Part("first half of each", lambda shape: _each(shape, False))
EACH_SECOND_HALF = Part("second half of each", lambda shape: _each(shape, True))


@dataclass(frozen=True)
class Rule:
    """`source` is a regular expression over paths here; `target` its replacement there (templates \\1, \\2).

    With a `part` that numbers its pieces, `{e}` in the target is that number.
    """

    source: str
    target: str
    transform: Transform
    part: Part = WHOLE


@dataclass(frozen=True)
class Pair:
    """One tensor there: the path and shape here of the tensor it belongs to, which piece, and how to get across."""

    path: str
    shape: tuple[int, ...]
    other: str
    transform: Transform
    index: Index = ()

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the piece here, without touching data."""
        return self._abstract.shape

    @property
    def other_shape(self) -> tuple[int, ...]:
        """The shape there, without touching data."""
        return self.transform.view(self._abstract).shape

    @property
    def _abstract(self) -> np.ndarray:
        try:
            return np.broadcast_to(np.zeros((), np.int8), self.shape)[self.index]
        except ValueError:
            raise ConversionError(f"{self.path}: {self.shape} is larger than any array") from None


def pair_up(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """Applies a table to a model's paths and shapes.

    Raises ConversionError unless the rules of each path cover it exactly and no name there is claimed twice.
    """
    rules, pairs, problems = list(rules), [], []
    for path, shape in shapes.items():
        hits = [(rule, m) for rule in rules if (m := re.fullmatch(rule.source, path))]
        if len(hits) != 1 and (not hits or any(rule.part is WHOLE for rule, _ in hits)):
            problems.append(f"{path}: {len(hits)} rules match, expected exactly one")
            continue
        mine = [
            Pair(path, tuple(shape), match.expand(rule.target).replace("{e}", str(e)), rule.transform, index)
            for rule, match in hits
            for e, index in rule.part.pieces(tuple(shape))
        ]
        if not _tiles(tuple(shape), [pair.index for pair in mine]):
            named = ", ".join(rule.part.name for rule, _ in hits)
            problems.append(
                f"{path}: the parts of its rules ({named}) do not cover {tuple(shape)} exactly once"
            )
        pairs += mine
    claimed: set[str] = set()
    twice = {pair.other for pair in pairs if pair.other in claimed or claimed.add(pair.other)}
    problems += [f"{other}: claimed by more than one path" for other in sorted(twice)]
    if problems:
        raise ConversionError(
            f"{len(problems)} of {len(shapes)} paths have no usable rule:\n" + "\n".join(problems)
        )
    return pairs


def _tiles(shape: tuple[int, ...], indices: list[Index]) -> bool:
    """Whether the pieces cover every element once; counted on the grid of their own borders, so size costs nothing."""
    spans = [
        [(i, i + 1) if isinstance(i, int) else i.indices(n)[:2] for i, n in zip(index, shape, strict=True)]
        for index in indices
    ]
    borders = [
        sorted({0, n, *(edge for span in spans for edge in span[axis])}) for axis, n in enumerate(shape)
    ]
    counts = np.zeros([len(edges) - 1 for edges in borders], np.int32)
    for span in spans:
        counts[tuple(slice(e.index(a), e.index(b)) for e, (a, b) in zip(borders, span, strict=True))] += 1
    return bool((counts == 1).all()) or not math.prod(shape)


def problems_of(pairs: list[Pair], tensors: Mapping[str, Shaped], inverse: bool = False) -> list[str]:
    """Every reason why these tensors cannot be converted, a line each: misshapen, missing, unused."""
    if inverse:
        arrows = {(p.other, p.other_shape): p.path for p in pairs}
    else:
        arrows = {(p.path, p.shape): p.other for p in pairs}
    problems = [
        f"{source} -> {target}: got {tuple(tensors[source].shape)}, expected {shape}"
        for (source, shape), target in arrows.items()
        if source in tensors and tuple(tensors[source].shape) != shape
    ]
    problems += [
        f"{source} -> {target}: missing" for (source, _), target in arrows.items() if source not in tensors
    ]
    known = {source for source, _ in arrows}
    return problems + [f"{shown(name)}: unused, no rule takes it" for name in tensors if name not in known]


def require(pairs: list[Pair], tensors: Mapping[str, Shaped], inverse: bool = False) -> None:
    """Raises one ConversionError with every problem of these tensors; reads no data."""
    problems = problems_of(pairs, tensors, inverse)
    if problems:
        count = len({p.other if inverse else p.path for p in pairs})
        raise ConversionError(f"{len(problems)} of {count} tensors failed:\n" + "\n".join(problems))


def convert(
    pairs: list[Pair], tensors: Mapping[str, np.ndarray], inverse: bool = False
) -> dict[str, np.ndarray]:
    """Converts all tensors there (or back here with `inverse`). Raises ConversionError with every problem at once."""
    require(pairs, tensors, inverse)
    if not inverse:
        return {pair.other: pair.transform(tensors[pair.path][pair.index]) for pair in pairs}
    back: dict[str, np.ndarray] = {}
    for pair in pairs:
        if pair.part_shape == pair.shape:
            back[pair.path] = pair.transform(tensors[pair.other], inverse=True)
            continue
        if pair.path not in back:
            back[pair.path] = np.empty(pair.shape, tensors[pair.other].dtype)
        back[pair.path][pair.index] = pair.transform.view(tensors[pair.other], inverse=True)
    return back
