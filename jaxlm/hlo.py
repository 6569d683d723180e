"""Reads compiled HLO: the instructions of a program, and which collectives it runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([a-z][\w-]*)\((.*)")
_FUSION = re.compile(r" fusion\(.*?\bcalls=%?([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation: its name, operation, the arrays it yields as (dtype, shape), and its operands."""

    computation: str
    name: str
    operation: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]


def instructions(text: str, fused: bool = False) -> Iterator[Instruction]:
    """All instructions of a module; those inside fusions, whose results need no memory, only if `fused`."""
    inside, computation = False, ""
    fusions = set(_FUSION.findall(text))
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            computation = line.removeprefix("ENTRY ").split(" ")[0].removeprefix("%")
            inside = computation in fusions
        match = None if inside and not fused else _INSTRUCTION.match(line)
        if match is not None:
            found = tuple(
                (dtype, tuple(int(d) for d in dims.split(",") if d))
                for dtype, dims in _ARRAY.findall(match[2])
            )
            operands = tuple(re.findall(r"%([\w.-]+)", match[4].split("metadata=")[0]))
            yield Instruction(computation, match[1], match[3], found, operands)


class Traffic(NamedTuple):
    """How often a kind of collective stands in a program, and the bytes that one device gets out of them."""

    count: int
    size: int


def collectives(text: str) -> dict[str, Traffic]:
    """Collectives by kind; what stands in a loop counts once."""
    found: dict[str, Traffic] = {kind: Traffic(0, 0) for kind in COLLECTIVES}
    for one in instructions(text):
        kind = one.operation.removesuffix("-start")
        if kind in found and one.operation in (kind, f"{kind}-start"):
            arrays = one.arrays
            if one.operation.endswith("-start") and kind != "all-reduce" and len(arrays) % 2 == 0:
                arrays = arrays[len(arrays) // 2 :]  # operands come first
            size = sum(BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in arrays)
            found[kind] = Traffic(found[kind].count + 1, found[kind].size + size)
    return found
