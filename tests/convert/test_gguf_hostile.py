"""Damaged and hostile GGUF files: one line each, no traceback, and no memory that the file's size does not justify."""

import struct
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import random_params, tiny

from convert import gguf_file
from convert.rules import ConversionError
from jaxlm.config import InputError
from jaxlm.tensor_file import Lazy

gguf = pytest.importorskip("gguf")

CONFIG = tiny(n_layers=1)
HUGE = 1 << 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A sound file."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    params = {path: Lazy.of(value) for path, value in random_params(CONFIG, dtype=np.float32).items()}
    gguf_file.write(path, CONFIG, params, kind="f32", tokenizer=None, name="test")
    return path.read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


LLAMA = key("general.architecture", 8, text("llama"))


def one(*entries: bytes, data: int = 4096) -> bytes:
    return header(len(entries), 1, LLAMA + b"".join(entries)) + bytes(data)


def place(whole: bytes, name: str) -> int:
    """Where the tensor's entry ends its name: axes, sizes, type and offset follow."""
    return whole.index(text(name)) + len(text(name))


def renamed(whole: bytes) -> bytes:
    return whole.replace(text("blk.0.attn_q.weight"), text("blk.0.attn_o.weight"))


def retyped(whole: bytes) -> bytes:
    at = place(whole, "output.weight") + 4 + 16
    return whole[:at] + struct.pack("<I", 12) + whole[at + 4 :]


def moved(whole: bytes) -> bytes:
    at = place(whole, "output.weight") + 4 + 16 + 4
    return whole[:at] + struct.pack("<Q", 0) + whole[at + 8 :]


HOSTILE: dict[str, tuple[Callable[[bytes], bytes] | bytes, str]] = {
    "empty": (b"", "not a GGUF file, it has only 0 bytes"),
    "another format": (b"PK\x03\x04" + bytes(100), "not a GGUF file: it starts with b'PK"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian?"),
    "cut in the header": (lambda whole: whole[:200], "truncated"),
    "cut in the data": (lambda whole: whole[:-100], "truncated: ends at byte"),
    "2^40 tensors": (header(1 << 40, 0), "1099511627776 tensors cannot be in"),
    "2^60 keys": (header(0, HUGE, LLAMA), "1152921504606846976 metadata keys cannot be in"),
    "a key of 2^60 bytes": (
        header(0, 1, struct.pack("<Q", HUGE) + bytes(64)),
        "bytes of a metadata key cannot",
    ),
    "a string of 2^60 bytes": (
        header(0, 1, key("general.name", 8, struct.pack("<Q", HUGE))),
        "bytes of general.name",
    ),
    "2^60 numbers": (header(0, 1, key("a", 9, struct.pack("<IQ", 0, HUGE))), "numbers in a cannot be in"),
    "2^60 strings": (header(0, 1, key("a", 9, struct.pack("<IQ", 8, HUGE))), "strings in a cannot be in"),
    "an array of arrays": (
        header(0, 1, key("a", 9, struct.pack("<IQ", 9, 1) + bytes(16))),
        "unsupported type 9",
    ),
    "an unknown type": (header(0, 1, key("a", 77, bytes(16))), "unknown type 77"),
    "a key twice": (header(0, 2, LLAMA + LLAMA), "general.architecture stands twice"),
    "no UTF-8": (header(0, 1, struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc" + bytes(16)), "is not UTF-8"),
    "alignment": (header(0, 1, key("general.alignment", 4, struct.pack("<I", 0))), "must be a power of two"),
    "nine axes": (one(tensor("t", (1,) * 9, 0)), "9 axes; a tensor has at most 4"),
    "a tensor of 2^80 values": (one(tensor("t", (1 << 40, 1 << 40), 0)), "truncated: ends at byte"),
    "a tensor twice": (one(tensor("t", (4,), 0), tensor("t", (4,), 0, 32)), "t: stands 2 times"),
    "an unaligned tensor": (one(tensor("t", (4,), 0, 4)), "offset 4 is not a multiple of the alignment 32"),
    "overlapping tensors": (moved, "overlaps"),
    "a broken row": (one(tensor("t", (3, 33), 8)), "Q8_0 needs rows of a multiple of 32"),
    "an unsupported kind": (retyped, "output.weight is stored as Q4_K, which is not read"),
    "an unknown kind": (one(tensor("t", (4,), 999)), "t is stored as type 999"),
    "a missing and an unused tensor": (renamed, "blk.0.attn_o.weight: unused, no rule takes it"),
    "no architecture": (header(0, 0, bytes(64)), "general.architecture=None is not supported"),
    "no model": (header(0, 1, LLAMA), "llama.block_count is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_costs_one_message(tmp_path, whole, name):
    """It names the file and the fault, at once, and without a big allocation."""
    make, message = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(make if isinstance(make, bytes) else make(whole))
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        gguf_file.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(error.value)
    assert all(line.startswith(f"{path}: ") for line in str(error.value).splitlines())
    assert peak < 20e6 and time.perf_counter() - start < 5


def test_all_tensors_that_cannot_be_read_are_reported_together(tmp_path):
    """A quantised model: one line per kind, with the number of tensors."""
    path = tmp_path / "bad.gguf"
    entries = [tensor(f"t{i}", (32,), kind, 32 * i) for i, kind in enumerate([2, 2, 2, 14])]
    path.write_bytes(one(*entries))
    with pytest.raises(ConversionError) as error:
        gguf_file.read(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and "t0 and 2 more tensors are stored as Q4_0" in lines[0] and "Q6_K" in lines[1]


def test_a_missing_file_is_one_line(tmp_path):
    """As every other input."""
    with pytest.raises(ConversionError, match=r"none.gguf: No such file"):
        gguf_file.read(tmp_path / "none.gguf")


@pytest.mark.parametrize("seed", range(60))
def test_flipped_header_bytes_never_escape_as_other_errors(tmp_path, whole, seed):
    """A byte of the header changed at random: the file reads, or is refused as input; nothing else happens."""
    rng = np.random.default_rng(seed)
    damaged = bytearray(whole)
    for at in rng.integers(0, whole.index(b"output.weight") + 50, 3):
        damaged[at] = rng.integers(0, 256)
    path = tmp_path / "bad.gguf"
    path.write_bytes(damaged)
    try:
        source: Any = gguf_file.read(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert source.tensors.keys()


def test_the_table_tells_what_gguf_calls_the_kinds():
    """Names and block sizes are the library's."""
    from convert.gguf_header import _OTHER_KINDS, KINDS

    for number, name in {**_OTHER_KINDS, **{n: kind[0] for n, kind in KINDS.items()}}.items():
        assert gguf.GGMLQuantizationType(number).name == name
    for number, (_, block, nbytes, _) in KINDS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (block, nbytes)
