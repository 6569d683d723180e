"""safetensors files, tensor by tensor: read through memory maps, written in pieces while they are hashed.

Format: eight bytes of header length, a JSON header, then the tensors without gaps. The reader checks more than the
format's own library does: keys that stand twice, sizes that do not add up, dtypes that nothing here can hold. All that
is wrong with a file is reported at once.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.config import InputError

Index = tuple[int | slice, ...]
Box = tuple[slice, ...]  # a slice with both ends for each axis
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format's own library
_CALL = 1 << 20  # bytes written by one call: the system finds room for few pages faster than for many
_UNFLUSHED = 128 << 20  # bytes after which the disk is asked to begin
_PIECE = 8 << 20  # bytes handled at once


class TensorFileError(InputError):
    """A file that cannot be read as tensors; one line per fault, each with the file's and the tensor's name."""


@dataclass(frozen=True)
class Lazy:
    """A tensor that is still where it was stored: its facts, and a way to its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # a fresh view; the memory behind it goes when the array goes
    origin: str = "memory"  # file, for messages
    take: Callable[[Index], np.ndarray] | None = None  # a part alone, where it costs no more than its size

    @classmethod
    def of(cls, array: np.ndarray, origin: str = "memory") -> "Lazy":
        """An array that is in memory already."""
        return cls(tuple(array.shape), array.dtype, lambda: array, origin, lambda index: array[index])


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its facts, and its values in C order, piece by piece (see `boxes`)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]
    make: Callable[[Box], np.ndarray] | None = None  # any part alone, where it costs no more than its size

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Lazy) -> "Planned":
        """A tensor written as it is stored."""
        if (take := tensor.take) is None:
            return cls(tensor.shape, tensor.dtype, lambda: blocks(tensor.read()))

        def make(box: Box) -> np.ndarray:
            return np.asarray(take(box), order="C")

        return cls(tensor.shape, tensor.dtype, lambda: map(make, boxes(tensor.shape, tensor.dtype)), make)


def boxes(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Box]:
    """A tensor cut into parts that follow each other in C order, none larger than a piece whatever the shape.

    Axes before the one that is cut are taken index by index, those after it whole.
    """
    if 0 in shape:
        return
    sizes = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    cut = next((axis for axis, size in enumerate(sizes) if size <= _PIECE), None)
    if cut is None:  # no axes
        yield ()
        return
    step, rest = max(1, _PIECE // sizes[cut]), tuple(slice(0, n) for n in shape[cut + 1 :])
    for leading in np.ndindex(*shape[:cut]):
        for start in range(0, shape[cut], step):
            rows = slice(start, min(start + step, shape[cut]))
            yield (*(slice(i, i + 1) for i in leading), rows, *rest)


def rows_at_once(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many slices along the first axis make one piece."""
    return max(1, _PIECE // max(1, math.prod(shape[1:]) * dtype.itemsize))


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in C order, piece by piece."""
    for box in boxes(array.shape, array.dtype):
        yield np.asarray(array[box], order="C")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, tuple[np.dtype, tuple[int, ...], int]]  # name -> dtype, shape, offset in the file
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file, checked against its size.

    Raises:
        TensorFileError: the file is missing, truncated, malformed, has a key twice or a dtype that numpy cannot hold.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little") if len(head) == 8 else -1
            if length < 0 or length > min(_LONGEST_HEADER, size - 8):
                raise TensorFileError(
                    f"{path}: not a safetensors file: a header of {max(length, 0)} bytes in a file of {size}"
                )
            raw = file.read(length)
    except OSError as error:
        raise TensorFileError(f"{path}: {error.strerror}") from None
    entries, metadata, problems = _parse(raw)
    tensors, spans = {}, []
    for name, entry in entries.items():
        try:
            dtype, shape, start, end = _entry(entry)
        except ValueError as error:
            problems.append(f"{shown(name)}: {error}")
            continue
        tensors[name] = (dtype, shape, 8 + length + start)
        spans.append((start, end, name))
    if not problems:
        problems = _gaps(sorted(spans), size - 8 - length)
    if problems:
        raise TensorFileError("\n".join(f"{path}: {problem}" for problem in problems))
    return Header(tensors, metadata)


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys stood twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.twice = [key for key, count in counts.items() if count > 1]


def _parse(raw: bytes) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Entries, metadata, and the keys that stand twice, at the top or in an entry."""
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        return {}, {}, [f"not a safetensors file: its header is not JSON ({type(error).__name__})"]
    if not isinstance(entries, _Object):
        return {}, {}, ["not a safetensors file: its header is not an object"]
    problems = [f"{shown(key)}: stands twice in the header" for key in entries.twice]
    for name, entry in entries.items():
        if isinstance(entry, _Object):
            problems += [f"{shown(name)}: {shown(key)} stands twice in its entry" for key in entry.twice]
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return {}, {}, [*problems, "__metadata__: must be an object of strings"]
    return entries, metadata, problems


def shown(name: str) -> str:
    """A name from a file as it can be printed: on one line, without control characters."""
    return repr(name)[1:-1][:200]


def _entry(entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, start and end of a header's entry; ValueError says what is wrong."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("needs dtype, shape and data_offsets")
    dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"dtype {repr(entry['dtype'])[:40]} is unknown; known are {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise ValueError(f"{what} {str(numbers)[:80]} must be a list of counts")
    if len(offsets) != 2 or len(shape) > 64:
        raise ValueError(f"{len(shape)} axes and {len(offsets)} offsets; at most 64 axes, exactly 2 offsets")
    need, have = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if need != have:
        raise ValueError(f"{entry['dtype']}{shape} needs {need} bytes, data_offsets give {have}")
    if math.prod(n for n in shape if n) >= 2**62:  # numpy overflows even where another axis is 0
        raise ValueError(f"shape {str(shape)[:80]} is larger than any array")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _gaps(spans: list[tuple[int, int, str]], size: int) -> list[str]:
    """Where tensors overlap, leave bytes out, or reach past the end of a file's `size` bytes of data."""
    problems, end = [], 0
    for start, stop, name in spans:
        if start != end and (start, stop) != (start, start):
            what = "overlaps the tensor before it" if start < end else f"leaves {start - end} bytes before it"
            problems.append(f"{shown(name)}: {what}")
        end = max(end, stop)
    if end > size:
        problems.append(f"truncated: the tensors end at byte {end} of the data, the file has {size}")
    elif end < size:
        problems.append(f"{size - end} bytes after the last tensor belong to nothing")
    return problems


def open_file(path: Path) -> dict[str, Lazy]:
    """All tensors of a file, unread. Raises TensorFileError as `read_header`."""
    path = Path(path)
    return {
        name: _mapped(path, dtype, shape, offset)
        for name, (dtype, shape, offset) in read_header(path).tensors.items()
    }


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Lazy:
    """A map of its own for each reading: when the array goes, its pages leave the process too."""

    def read() -> np.ndarray:
        count = math.prod(shape)
        if count == 0:
            return np.zeros(shape, dtype)
        first = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            with open(path, "rb") as file:
                length = offset - first + count * dtype.itemsize
                mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=first)
        except (OSError, ValueError) as error:
            raise TensorFileError(f"{path}: cannot be read any more: {error}") from None
        return np.frombuffer(mapped, dtype, count, offset - first).reshape(shape)

    return Lazy(shape, dtype, read, str(path), lambda index: read()[index])


def write_file(
    path: Path,
    tensors: Mapping[str, Planned],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[int, dict[str, str]]:
    """Writes a file, its tensors in the given order, and flushes it to the disk.

    Values are prepared here while two threads hash and write those before them. A file that could not be
    written whole is removed.

    Returns:
        Where the first tensor starts, and the SHA-256 of each tensor's bytes.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        facts = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[name], offset = facts, end
    text = json.dumps({"__metadata__": dict(metadata)} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor starts at a multiple of its item size
    raw = len(text).to_bytes(8, "little") + text
    try:
        with open(path, "wb") as file:
            file.write(raw)
            digests = _write_values(file, tensors, progress)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return len(raw), digests


def _write_values(
    file: Any, tensors: Mapping[str, Planned], progress: Callable[[int], None]
) -> dict[str, str]:
    digests = {name: hashlib.sha256() for name in tensors}

    written = 0

    def write(name: str, raw: memoryview) -> None:
        nonlocal written
        for start in range(0, len(raw), _CALL):
            file.write(raw[start : start + _CALL])
        written += len(raw)
        if written >= _UNFLUSHED:  # the disk works while the next pieces are made
            flushing.offer(name, raw[:0])
            written = 0
        progress(len(raw))

    def flush(name: str, raw: memoryview) -> None:
        os.fdatasync(file.fileno())

    # The threads take the same pieces at their own speed; few wait, so that little memory is held.
    with (
        _Worker(flush) as flushing,
        _Worker(lambda name, raw: digests[name].update(raw)) as hashing,
        _Worker(write) as writing,
    ):
        for name, tensor in tensors.items():
            prepared = 0
            for piece in tensor.pieces():
                raw = piece.reshape(-1).view(np.uint8).data
                writing.put(name, raw)
                hashing.put(name, raw)
                prepared += piece.nbytes
            if prepared != tensor.nbytes:
                raise AssertionError(f"{name}: {prepared} of {tensor.nbytes} bytes were prepared")
    return {name: digest.hexdigest() for name, digest in digests.items()}


class _Worker:
    """A thread that does one thing with every piece; what it raises is raised in `put`, or at the end."""

    def __init__(self, work: Callable[[str, memoryview], None]):
        self._waiting: queue.Queue[tuple[str, memoryview] | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name="tensor-writer", daemon=True)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._failure is None:
                try:
                    self._work(*item)
                except BaseException as error:
                    self._failure = error
            del item  # or it would be held until the next one comes

    def offer(self, name: str, raw: memoryview) -> None:
        """Hands a piece over unless one is waiting already."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((name, raw))

    def put(self, name: str, raw: memoryview) -> None:
        """Hands a piece over; waits while another one is waiting already."""
        if self._failure is not None:
            raise self._failure
        self._waiting.put((name, raw))

    def __enter__(self) -> "_Worker":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._waiting.put(None)
        self._thread.join()
        if error is None and self._failure is not None:
            raise self._failure
