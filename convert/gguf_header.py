"""The header of a GGUF file, read strictly: nothing is allocated that the file's own size does not allow for.

Format: magic, version, two counts; key-value pairs; for each tensor its name, sizes, type and offset; then the data,
aligned. Every length and every count is checked against the bytes that are left before it is believed, so that a
damaged or hostile file costs one error message instead of the machine's memory.
"""

import math
import mmap
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.rules import ConversionError

Value = bool | int | float | str | list[str] | np.ndarray

# Type number in the file -> name, values per block, bytes per block, numpy's dtype (None: must be dequantised).
KINDS: dict[int, tuple[str, int, int, np.dtype | None]] = {
    0: ("F32", 1, 4, np.dtype(np.float32)),
    1: ("F16", 1, 2, np.dtype(np.float16)),
    8: ("Q8_0", 32, 34, None),
    30: ("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
}
_OTHER_KINDS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"} | {
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    39: "MXFP4",
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LEAST_PAIR, _LEAST_TENSOR = 13, 24  # bytes of the shortest key-value pair and the shortest tensor entry
_MOST_AXES = 4


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: shape as numpy has it (the file lists sizes innermost first), kind, place."""

    shape: tuple[int, ...]
    kind: str
    offset: int  # from the start of the file
    nbytes: int
    dtype: np.dtype  # of the values that reading gives


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    metadata: dict[str, Value]
    tensors: dict[str, Stored]


class _Cursor:
    """Walks over the bytes; every step is checked before it is taken."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def bytes(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise ConversionError(
                f"truncated: {what} of {count} bytes at byte {self.at}, {self.left} are left"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code), what))[0]

    def count(self, least: int, what: str) -> int:
        """A number of things of at least `least` bytes each."""
        n = self.number("Q", f"the number of {what}")
        if n * least > self.left:
            raise ConversionError(
                f"truncated or damaged: {n} {what} cannot be in the {self.left} bytes after byte {self.at}"
            )
        return n

    def text(self, what: str) -> str:
        raw = self.bytes(self.count(1, f"bytes of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ConversionError(f"{what} {raw[:40]!r} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Value:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise ConversionError(f"{what} is of the unknown type {kind}")
        kind = self.number("I", what)
        if kind == _STRING:
            return [self.text(what) for _ in range(self.count(8, f"strings in {what}"))]
        if kind not in _SCALARS:
            raise ConversionError(f"{what} is an array of the unsupported type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind])
        n = self.count(dtype.itemsize, f"numbers in {what}")
        return np.frombuffer(self.bytes(n * dtype.itemsize, what), dtype)


def read_header(path: Path) -> Header:
    """The header of a file, checked against its size.

    Raises:
        ConversionError: the file is missing, not GGUF, truncated or malformed, or names something twice; all tensors
            that cannot be read are reported together.
    """
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) < 24:
                raise ConversionError(f"{path}: not a GGUF file, it has only {file.tell()} bytes")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}") from None
    with data:
        try:
            return _header(_Cursor(data))
        except ConversionError as error:
            raise ConversionError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def _header(at: _Cursor) -> Header:
    magic = at.bytes(4, "the magic")
    version = at.number("I", "the version")
    if magic != b"GGUF":
        raise ConversionError(f"not a GGUF file: it starts with {magic!r}")
    if version not in (2, 3):
        hint = " (big-endian?)" if version & 0xFFFF == 0 else ""
        raise ConversionError(f"GGUF version {version} is not supported{hint}; versions 2 and 3 are")
    n_tensors = at.count(_LEAST_TENSOR, "tensors")
    metadata: dict[str, Value] = {}
    for _ in range(at.count(_LEAST_PAIR, "metadata keys")):
        key = at.text("a metadata key")
        if key in metadata:
            raise ConversionError(f"metadata key {key} stands twice")
        metadata[key] = at.value(at.number("I", key), key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ConversionError(f"general.alignment={alignment} must be a power of two")
    entries = [_entry(at) for _ in range(n_tensors)]
    start = at.at + -at.at % alignment
    return Header(metadata, _placed(entries, start, alignment, len(at.data)))


def _entry(at: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type number and offset of a tensor."""
    name = at.text("a tensor's name")
    axes = at.number("I", name)
    if axes > _MOST_AXES:
        raise ConversionError(f"{name}: {axes} axes; a tensor has at most {_MOST_AXES}")
    shape = tuple(at.number("Q", name) for _ in range(axes))[::-1]
    return name, shape, at.number("I", name), at.number("Q", name)


def _placed(
    entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
) -> dict[str, Stored]:
    """The tensors with their places; ConversionError names everything that is wrong with them."""
    names = Counter(name for name, *_ in entries)
    problems = [f"{name}: stands {n} times" for name, n in names.items() if n > 1]
    unread: dict[str, list[str]] = {}
    tensors: dict[str, Stored] = {}
    for name, shape, number, offset in entries:
        if number not in KINDS:
            unread.setdefault(_OTHER_KINDS.get(number, f"type {number}"), []).append(name)
            continue
        kind, block, block_bytes, dtype = KINDS[number]
        nbytes = math.prod(shape) // block * block_bytes
        if block > 1 and (not shape or shape[-1] % block):
            problems.append(f"{name}: {kind} needs rows of a multiple of {block} values, it has {shape}")
        elif offset % alignment:
            problems.append(f"{name}: offset {offset} is not a multiple of the alignment {alignment}")
        elif start + offset + nbytes > size:
            problems.append(f"{name}: truncated: ends at byte {start + offset + nbytes} of a file of {size}")
        tensors[name] = Stored(shape, kind, start + offset, nbytes, dtype or np.dtype(np.float32))
    for kind, named in unread.items():
        more = f" and {len(named) - 1} more tensors are" if len(named) > 1 else " is"
        readable = ", ".join(k[0] for k in KINDS.values())
        problems.append(f"{named[0]}{more} stored as {kind}, which is not read; {readable} are")
    problems += _overlaps(tensors)
    if problems:
        raise ConversionError("\n".join(problems))
    return tensors


def _overlaps(tensors: dict[str, Stored]) -> list[str]:
    spans = sorted((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items() if t.nbytes)
    return [
        f"{after}: overlaps {before}"
        for (_, end, before), (start, _, after) in zip(spans, spans[1:])
        if start < end
    ]


def reader(path: Path, tensor: Stored) -> Callable[[], np.ndarray]:
    """A way to a tensor's values: a view into the file where it holds plain numbers, else its raw blocks.

    Blocks are uint8, [..., bytes per row]. Each call maps the file anew, so that the pages go when the array goes.
    """

    def read() -> np.ndarray:
        raw, shape = tensor.kind == "Q8_0", tensor.shape
        if raw:
            shape = (*shape[:-1], shape[-1] // 32 * 34)
        dtype = np.dtype(np.uint8) if raw else tensor.dtype
        if not tensor.nbytes:
            return np.zeros(shape, dtype)
        try:
            return np.asarray(np.memmap(path, dtype, "r", tensor.offset, shape))
        except (OSError, ValueError) as error:
            raise ConversionError(f"{path}: cannot be read any more: {error}") from None

    return read
