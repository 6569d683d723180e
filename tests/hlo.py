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


def kernels_in_loop(text: str) -> list[str]:
    """What a round of the loop of known length launches on a GPU, as `operation name`; one such loop, of no inner ones.

    Raises AssertionError where there is none: the length of a loop that is asked each round is not known.
    """
    known = re.findall(r" while\([^\n]*\bbody=%?([\w.-]+)[^\n]*known_trip_count", text)
    assert len(known) == 1, f"{len(known)} loops of known length"
    free = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast"}
    inside = [one for one in instructions(text) if one.computation == known[0]]
    return [f"{one.operation} {one.name}" for one in inside if one.operation not in free]


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


KERNEL = "__gpu$xla.gpu.triton"  # the target of a Pallas kernel's custom call
_CODE = re.compile(r'\bir = "((?:[^"\\]|\\.)*)"')


def kernel_flops(text: str) -> dict[str, float]:
    """Operations of the products in a program's Pallas kernels, by kernel: what its grid and its code say.

    Of a program compiled or lowered for CUDA. Every program of a grid counts, also one that would end early. Where a
    loop's length is known on the device only, the programs along the grid's last axis share the rows of the operands.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib.triton import dialect

    context, found = mlir.make_ir_context(), {}
    dialect.register_dialect(context)
    for line in text.splitlines():
        if KERNEL not in line:
            continue
        code = re.sub(
            rb"\\\\|\\([0-9A-F]{2})",
            lambda byte: b"\\" if byte[1] is None else bytes([int(byte[1], 16)]),
            _match(_CODE, line).encode("latin-1"),
        )
        line = _CODE.sub("", line)
        x, y, z = (int(_match(re.compile(rf"\bgrid_{axis} = (\d+)"), line)) for axis in "xyz")
        shapes = line.split("operand_layout_constraints=")[-1].split(", api_version")[0].split(" -> ")[0]
        rows = max(int(rows) for rows in re.findall(r"(?:\[|tensor<)(\d+)[,x]\d+[]x]", shapes))
        module = mlir.ir.Module.parse(code, context)
        static, shared = _products(module.operation)
        name = _match(re.compile(r'\bname = "(\w+)"'), line)
        found[name] = found.get(name, 0.0) + x * y * (z * static + rows * shared)
    return found


def _match(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    assert match, f"no {pattern.pattern} in {text[:200]}"
    return match[1]


def _products(operation: Any) -> tuple[float, float]:
    """Operations of an instruction's products: of one run, and per row of those in a loop of unknown length."""
    name = operation.name
    if name == "tt.dot":
        (m, k), n = (operation.operands[0].type.shape, operation.operands[1].type.shape[1])
        return 2.0 * m * n * k, 0.0
    inner = [_products(o.operation) for region in operation.regions for block in region for o in block]
    static, shared = (sum(column) for column in zip(*inner, strict=True)) if inner else (0.0, 0.0)
    if name != "scf.for" or not static:
        return static, shared
    bounds = [_constant(operand) for operand in list(operation.operands)[:3]]
    if None not in bounds:
        start, stop, step = bounds
        return static * -(-(stop - start) // step), shared
    depth = [_depth(o.operation) for region in operation.regions for block in region for o in block]
    return 0.0, shared + static / max(depth)


def _depth(operation: Any) -> int:
    """What a product sums over at a time; 0 of another instruction."""
    return operation.operands[0].type.shape[1] if operation.name == "tt.dot" else 0


def _constant(value: Any) -> int | None:
    """The integer that the code computes without reading anything, if it does."""
    made = value.owner
    name = getattr(made, "name", "")
    if name == "arith.constant":
        return made.attributes["value"].value
    if name not in ("arith.addi", "arith.subi", "arith.muli"):
        return None
    a, b = (_constant(operand) for operand in made.operands)
    if a is None or b is None:
        return None
    return {"arith.addi": a + b, "arith.subi": a - b, "arith.muli": a * b}[name]


def dot_flops(text: str) -> float:
    """Operations of the products in compiled HLO that are no Pallas kernels, XLA's own and cuBLAS's; in a loop once."""
    shapes = {one.name: one.arrays[0][1] for one in instructions(text, fused=True) if one.arrays}
    total = 0.0
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = .* (?:dot|custom-call)\(%?([\w.-]+)", line)
        summed = re.search(r'lhs_contracting_dim\w+(?:=|":)[{\[]([\d,"]*)', line)
        if match and summed and ("custom-call(" not in line or "__cublas" in line):
            depth = [shapes[match[2]][int(d)] for d in summed[1].replace('"', "").split(",") if d]
            total += 2.0 * math.prod(shapes[match[1]]) * math.prod(depth)
    return total
