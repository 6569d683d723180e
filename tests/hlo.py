"""Reading compiled HLO: what a program does, where running it would not tell.

After partitioning every shape in a module is that of one device. An array that should be split and is not therefore
shows by its size alone, whoever made it: the compiler while it partitioned, or we with a missing constraint.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlm.config import MeshConfig, ModelConfig
from jaxlm.hlo import BYTES, instructions

# Hand on what they are given: whoever made the array is named, and the work is in the computation that they call.
PASSED_ON = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "while",
    "call",
    "conditional",
    "bitcast",
    "opt-barrier",
}


def bytes_read(text: str, shapes: Iterable[tuple[int, ...]]) -> int:
    """Bytes that instructions read of arrays of these shapes; a slice reads what it yields, in a loop once.

    Raises AssertionError where no array has such a shape.
    """
    wanted, total, seen = set(shapes), 0, set()
    named: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}
    for one in instructions(text, fused=True):
        dtype, shape = one.arrays[0] if len(one.arrays) == 1 else ("", ())
        size = math.prod(shape) * BYTES.get(dtype, 0)
        named[one.computation, one.name] = shape, size
        if one.operation in PASSED_ON or one.operation == "fusion":
            seen |= {shape} & wanted
            continue
        for operand in one.operands:
            there, whole = named.get((one.computation, operand), ((), 0))
            if there in wanted:
                total += size if one.operation in ("dynamic-slice", "slice") else whole
    assert seen == wanted, f"no array of shape {wanted - seen}"
    return total


def loop_bodies(text: str) -> list[str]:
    """Names of the computations that loops repeat; not of those that they call in turn."""
    return re.findall(r"\bbody=%?([\w.-]+)", text)


def whole_activations(text: str, rows: int, length: int, widths: Iterable[int]) -> list[str]:
    """Arrays that hold all of rows x length tokens at a full width: `operation name dtype[shape]`, sorted.

    widths: of a token, as the model has them (D, F, V, ...). A share of a token, as in a lookup that is split over D,
    is no full width. To be told by their shapes, rows, length and widths should share no large factors.
    """
    found = set()
    for one in instructions(text):
        if one.operation in PASSED_ON:
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
