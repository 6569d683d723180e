"""Reading compiled HLO: what a program does, where running it would not tell."""

import math
import re
from collections.abc import Iterable

BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\((.*)")
# Hand on what they are given: the work is in the computation they call, or there is none.
FREE = {"parameter", "get-tuple-element", "tuple", "fusion", "call", "while", "conditional", "bitcast"}


def bytes_read(text: str, shapes: Iterable[tuple[int, ...]]) -> int:
    """Bytes that instructions read of arrays of these shapes; a slice reads what it yields, in a loop once.

    Raises AssertionError where no array has such a shape.
    """
    wanted, total, seen = set(shapes), 0, set()
    named: dict[str, tuple[tuple[int, ...], int]] = {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            named = {}  # names belong to a computation
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        name, dtype, dims, operation, rest = match.groups()
        shape = tuple(int(d) for d in dims.split(",") if d)
        size = math.prod(shape) * BYTES.get(dtype, 0)
        named[name] = shape, size
        if operation in FREE:
            seen |= {shape} & wanted
            continue
        for operand in re.findall(r"%([\w.-]+)", rest.split("metadata=")[0]):
            there, whole = named.get(operand, ((), 0))
            if there in wanted:
                total += size if operation in ("dynamic-slice", "slice") else whole
    assert seen == wanted, f"no array of shape {wanted - seen}"
    return total
