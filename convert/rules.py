"""Conversion as a table: each rule pairs a path here with a path there and an invertible transform.

Directions are derived, never written twice. A path that no rule or more than one rule names, a missing, an unused and
a misshapen tensor are all reported together in one ConversionError.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxlm.config import InputError


class ConversionError(InputError):
    """Names every tensor that could not be converted, one line each."""


@dataclass(frozen=True)
class Transform:
    """A named, invertible map between two layouts of one tensor, with the shape it makes."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def __call__(self, x: np.ndarray, inverse: bool = False) -> np.ndarray:
        """Applies the map, or undoes it."""
        return np.ascontiguousarray((self.inverse if inverse else self.forward)(x))


def _swap(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


SAME = Transform("same", lambda x: x, lambda x: x)
TRANSPOSE = Transform("transpose", _swap, _swap)  # [in, out] <-> [out, in], the last two axes


@dataclass(frozen=True)
class Rule:
    """`source` is a regular expression over paths here; `target` its replacement there (templates \\1, \\2)."""

    source: str
    target: str
    transform: Transform


@dataclass(frozen=True)
class Pair:
    """One tensor of a concrete model: its path and shape here, its path there, and how to get across."""

    path: str
    shape: tuple[int, ...]
    other: str
    transform: Transform

    @property
    def other_shape(self) -> tuple[int, ...]:
        """The shape there, without touching data."""
        return self.transform.forward(np.broadcast_to(np.zeros((), np.int8), self.shape)).shape


def pair_up(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """Applies a table to a model's paths and shapes. Raises ConversionError unless each path has exactly one rule."""
    rules, pairs, problems = list(rules), [], []
    for path, shape in shapes.items():
        hits = [rule for rule in rules if re.fullmatch(rule.source, path)]
        if len(hits) != 1:
            problems.append(f"{path}: {len(hits)} rules match, expected exactly one")
            continue
        target = re.fullmatch(hits[0].source, path)
        assert target is not None
        pairs.append(Pair(path, tuple(shape), target.expand(hits[0].target), hits[0].transform))
    others = [pair.other for pair in pairs]
    twice = sorted({other for other in others if others.count(other) > 1})
    problems += [f"{other}: claimed by more than one path" for other in twice]
    if problems:
        raise ConversionError(
            f"{len(problems)} of {len(shapes)} paths have no usable rule:\n" + "\n".join(problems)
        )
    return pairs


def convert(
    pairs: list[Pair], tensors: Mapping[str, np.ndarray], inverse: bool = False
) -> dict[str, np.ndarray]:
    """Converts all tensors there (or back here with `inverse`). Raises ConversionError with every problem at once."""
    arrows = [(p.other, p.other_shape, p.path) if inverse else (p.path, p.shape, p.other) for p in pairs]
    problems = [
        f"{source} -> {target}: got {tensors[source].shape}, expected {shape}"
        for source, shape, target in arrows
        if source in tensors and tuple(tensors[source].shape) != shape
    ]
    problems += [f"{source} -> {target}: missing" for source, _, target in arrows if source not in tensors]
    known = {source for source, _, _ in arrows}
    problems += [f"{name}: unused, no rule takes it" for name in tensors if name not in known]
    if problems:
        raise ConversionError(f"{len(problems)} of {len(arrows)} tensors failed:\n" + "\n".join(problems))
    return {
        target: pair.transform(tensors[source], inverse)
        for pair, (source, _, target) in zip(pairs, arrows, strict=True)
    }
