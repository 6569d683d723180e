"""Reads compiled HLO: which collectives a program runs, and which arrays are whole where a share was meant.

After partitioning every shape in a module is that of one device. An array that should be split and is not therefore
shows by its size alone, whoever made it: the compiler while it partitioned, or we with a missing constraint.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxlm.config import MeshConfig, ModelConfig

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
# Hand on what they are given: whoever made the array is named.
_PASSED_ON = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "while",
    "call",
    "conditional",
    "bitcast",
    "opt-barrier",
}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation: its name, operation, and the arrays it yields as (dtype, shape)."""

    computation: str
    name: str
    operation: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]


def instructions(text: str, fused: bool = False) -> Iterator[Instruction]:
    """All instructions of a module; those inside fusions, whose results need no memory, only if `fused`."""
    inside, computation = False, ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            computation = line.removeprefix("ENTRY ").split(" ")[0].removeprefix("%")
            inside = "fused_computation" in computation or computation.startswith("wrapped_")
        match = None if inside and not fused else _INSTRUCTION.match(line)
        if match is not None:
            found = tuple(
                (dtype, tuple(int(d) for d in dims.split(",") if d))
                for dtype, dims in _ARRAY.findall(match[2])
            )
            yield Instruction(computation, match[1], match[3], found)


def loop_bodies(text: str) -> list[str]:
    """Names of the computations that loops repeat; not of those that they call in turn."""
    return re.findall(r"\bbody=%?([\w.-]+)", text)


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


def whole_activations(text: str, rows: int, length: int, widths: Iterable[int]) -> list[str]:
    """Arrays that hold all of rows x length tokens at a full width: `operation name dtype[shape]`, sorted.

    widths: of a token, as the model has them (D, F, V, ...). A share of a token, as in a lookup that is split over D,
    is no full width. To be told by their shapes, rows, length and widths should share no large factors.
    """
    found = set()
    for one in instructions(text):
        if one.operation in _PASSED_ON:
            continue
        for dtype, shape in one.arrays:
            rest = _beside_tokens(shape, rows, length)
            if rest and any(rest % width == 0 for width in widths):
                found.add(f"{one.operation} {one.name} {dtype}[{','.join(map(str, shape))}]")
    return sorted(found)


def _beside_tokens(shape: tuple[int, ...], rows: int, length: int) -> int:
    """Elements per token of an array that holds rows x length tokens; 0 if it does not."""
    size = math.prod(shape)
    split = list(shape)
    if rows in split and (split.remove(rows) or length in split):
        return size // (rows * length)
    return size // (rows * length) if any(d and d % (rows * length) == 0 for d in shape) else 0


def whole_shares(text: str, model: ModelConfig, mesh: MeshConfig, rows: int, length: int) -> list[str]:
    """Every activation of a training step that some mesh axis should have split and did not.

    Over data, fsdp and expert tokens are split; experts alone see those of all devices along `expert`. Over tensor,
    heads and hidden layers are split; the residual stream is not.
    """
    heads, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    outside = [heads, kv, model.vocab_size] + [model.d_ff] * any(
        not model.is_moe(i) for i in range(model.n_layers)
    )
    experts = [model.expert_d_ff, model.moe.n_experts] if model.moe.n_experts else []
    ways = mesh.data * mesh.fsdp * mesh.expert
    groups = rows // (mesh.data * mesh.fsdp)  # rows that an expert sees
    found: set[str] = set()
    if ways > 1:
        found |= set(whole_activations(text, rows, length, outside))
        found |= set(whole_activations(text, groups, length, outside)) if mesh.expert > 1 else set()
    if mesh.data * mesh.fsdp > 1:
        found |= set(whole_activations(text, rows, length, [model.d_model, *experts]))
    if mesh.tensor > 1:
        inner = [heads, kv, model.vocab_size, *([w for w in outside if w == model.d_ff])]
        found |= set(whole_activations(text, rows // ways, length, inner))
        found |= set(whole_activations(text, groups, length, experts[:1]))
    return sorted(found)


def whole_parameters(shapes: Mapping[str, Any], places: Mapping[str, Any], ways: int) -> list[str]:
    """Parameters of two or more dimensions of which a device holds more than one part in `ways`: `path [shape]`.

    shapes: with .shape; places: their shardings, for example of the executable.
    """
    found = []
    for path, array in shapes.items():
        own = math.prod(places[path].shard_shape(array.shape))
        if len(array.shape) > 1 and own * ways > math.prod(array.shape):
            found.append(f"{path} {list(array.shape)}")
    return found
