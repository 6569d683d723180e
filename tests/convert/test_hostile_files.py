"""Malformed safetensors files: refused with the file's and the tensor's name, and never another exception.

Odd files that break no rule of the format are read.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from jaxlm.tensor_file import Lazy, Planned, TensorFileError, open_file, read_header, write_file

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header (JSON text, bytes or an object) and data; `length` is claimed instead of the true one."""
    raw = header if isinstance(header, bytes) else header if isinstance(header, str) else json.dumps(header)
    raw = raw.encode() if isinstance(raw, str) else raw
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def one(data: int = 8, **changes: Any) -> bytes:
    """A file whose only tensor is `a`, with some of its facts changed; None takes a fact away."""
    facts = {key: value for key, value in (A | changes).items() if value is not None}
    return packed({"a": facts}, bytes(data))


def zipped() -> bytes:
    """A zip archive, as torch.save makes them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return file.getvalue()


class Bad(NamedTuple):
    """A file's bytes, and what one line of the refusal says after the file's name."""

    raw: bytes
    says: str


NO_FILE = "not a safetensors file"
BAD: dict[str, Bad] = {
    "empty": Bad(b"", NO_FILE),
    "four bytes": Bad(b"\x08\0\0\0", NO_FILE),
    "zeros": Bad(bytes(4096), NO_FILE),
    "only a length": Bad((8).to_bytes(8, "little"), NO_FILE),
    "length past the end": Bad(packed({"a": A}, bytes(8), length=4096), NO_FILE),
    "length 2^62": Bad(packed({"a": A}, bytes(8), length=2**62), NO_FILE),
    "length 2^64-1": Bad(packed({"a": A}, bytes(8), length=2**64 - 1), NO_FILE),
    "length 100 MB": Bad(packed({"a": A}, bytes(8), length=100_000_000), NO_FILE),
    "length cuts the header": Bad(packed({"a": A}, bytes(8), length=20), NO_FILE),
    "length 0": Bad(packed(b"", bytes(8)), NO_FILE),
    "a pickle": Bad(pickle.dumps({"a": [1.0, 2.0]}), NO_FILE),
    "a zip": Bad(zipped(), NO_FILE),
    "text": Bad(b'{"a": {"dtype": "F32"}}', NO_FILE),
    "header is not JSON": Bad(packed(b"{'a': 1}"), NO_FILE),
    "header is not UTF-8": Bad(packed(b'{"\xff\xfe": 1}'), NO_FILE),
    "header is UTF-16": Bad(packed(json.dumps({"a": A}).encode("utf-16"), bytes(8)), NO_FILE),
    "two headers": Bad(packed(json.dumps({"a": A}) * 2, bytes(8)), NO_FILE),
    "header is a list": Bad(packed([A], bytes(8)), "its header is not an object"),
    "header is a number": Bad(packed(b"7"), "its header is not an object"),
    "header is null": Bad(packed(b"null"), "its header is not an object"),
    "nested 100,000 deep": Bad(packed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), NO_FILE),
    "nested objects": Bad(packed('{"a":' * 100_000 + "1" + "}" * 100_000), NO_FILE),
    "metadata of numbers": Bad(packed({"__metadata__": {"step": 1}, "a": A}, bytes(8)), "__metadata__"),
    "metadata is a list": Bad(packed({"__metadata__": ["pt"], "a": A}, bytes(8)), "__metadata__"),
    "metadata is an empty list": Bad(packed({"__metadata__": [], "a": A}, bytes(8)), "__metadata__"),
    "metadata is 0": Bad(packed({"__metadata__": 0, "a": A}, bytes(8)), "__metadata__"),
    "metadata nested": Bad(packed({"__metadata__": {"x": {"y": "z"}}, "a": A}, bytes(8)), "__metadata__"),
    "key twice": Bad(
        packed(f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', bytes(8)), "a: stands twice in the header"
    ),
    "metadata twice": Bad(
        packed(f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {json.dumps(A)}}}', bytes(8)),
        "__metadata__: stands twice in the header",
    ),
    "key twice in an entry": Bad(
        packed('{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        "a: shape stands twice in its entry",
    ),
    "entry is a list": Bad(packed({"a": [1]}), "a: needs dtype, shape and data_offsets"),
    "entry is null": Bad(packed({"a": None}), "a: needs dtype, shape and data_offsets"),
    "no dtype": Bad(one(dtype=None), "a: needs dtype, shape and data_offsets"),
    "no shape": Bad(one(shape=None), "a: needs dtype, shape and data_offsets"),
    "no offsets": Bad(one(data_offsets=None), "a: needs dtype, shape and data_offsets"),
    "unknown dtype": Bad(one(dtype="F7"), "a: dtype 'F7' is unknown"),
    "8-bit floats": Bad(one(dtype="F8_E4M3", shape=[8]), "a: dtype 'F8_E4M3' is unknown"),
    "dtype in small letters": Bad(one(dtype="f32"), "a: dtype 'f32' is unknown"),
    "dtype is a list": Bad(one(dtype=["F32"]), "a: dtype ['F32'] is unknown"),
    "negative shape": Bad(one(shape=[-2]), "a: shape [-2] must be a list of counts"),
    "two negative axes": Bad(one(shape=[-1, -2]), "a: shape [-1, -2] must be a list of counts"),
    "shape of floats": Bad(one(shape=[2.0]), "a: shape [2.0] must be a list of counts"),
    "shape of bools": Bad(
        one(4, shape=[True], data_offsets=[0, 4]), "a: shape [True] must be a list of counts"
    ),
    "shape of strings": Bad(one(shape=["2"]), "a: shape ['2'] must be a list of counts"),
    "shape is a number": Bad(one(shape=2), "a: shape 2 must be a list of counts"),
    "shape is null": Bad(
        packed('{"a":{"dtype":"F32","shape":null,"data_offsets":[0,8]}}'), "a: shape None must"
    ),
    "shape is NaN": Bad(
        packed('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "a: shape [nan] must"
    ),
    "shape overflows 64 bits": Bad(one(shape=[2**40, 2**40]), "a: F32[1099511627776, 1099511627776] needs"),
    "shape wraps to the right size": Bad(one(shape=[2**61, 2**61, 2]), "a: F32["),
    "shape of 2^70": Bad(one(shape=[2**70]), "a: shape [1180591620717411303424] must be a list of counts"),
    "65 axes": Bad(one(4, shape=[1] * 65, data_offsets=[0, 4]), "a: 65 axes and 2 offsets"),
    "shape and dtype do not fill": Bad(one(shape=[3]), "a: F32[3] needs 12 bytes, data_offsets give 8"),
    "offsets reversed": Bad(one(data_offsets=[8, 0]), "a: F32[2] needs 8 bytes, data_offsets give -8"),
    "negative offsets": Bad(one(data_offsets=[-8, 0]), "a: data_offsets [-8, 0] must be a list of counts"),
    "one offset": Bad(one(data_offsets=[8]), "a: 1 axes and 1 offsets"),
    "three offsets": Bad(one(data_offsets=[0, 8, 8]), "a: 1 axes and 3 offsets"),
    "offsets of floats": Bad(one(data_offsets=[0, 8.0]), "a: data_offsets [0, 8.0] must be a list of counts"),
    "truncated data": Bad(one(7), "truncated: the tensors end at byte 8 of the data, the file has 7"),
    "no data": Bad(one(0), "truncated: the tensors end at byte 8 of the data, the file has 0"),
    "trailing byte": Bad(one(9), "1 bytes after the last tensor belong to nothing"),
    "data without tensors": Bad(packed({}, bytes(3)), "3 bytes after the last tensor belong to nothing"),
    "hole at the start": Bad(packed({"b": B}, bytes(16)), "b: leaves 8 bytes before it"),
    "hole between": Bad(
        packed({"a": A, "c": B | {"data_offsets": [12, 20]}}, bytes(20)), "c: leaves 4 bytes before it"
    ),
    "overlap": Bad(
        packed({"a": A, "c": B | {"data_offsets": [4, 12]}}, bytes(12)), "c: overlaps the tensor before it"
    ),
    "the same bytes twice": Bad(packed({"a": A, "c": A}, bytes(8)), "c: overlaps the tensor before it"),
    "integer of 5,000 digits": Bad(packed('{"a":' + "9" * 5_000 + "}"), NO_FILE),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("opened", [read_header, open_file], ids=lambda f: f.__name__)
def test_a_malformed_file_is_refused_by_name(
    name: str, opened: Callable[[Path], Any], tmp_path: Path
) -> None:
    """TensorFileError and nothing else; each line starts with the path, one says which tensor and what is wrong."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[name].raw)
    with pytest.raises(TensorFileError) as caught:
        opened(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert sum(BAD[name].says in line for line in lines) == 1, caught.value
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("opened", [read_header, open_file], ids=lambda f: f.__name__)
def test_what_is_no_file_is_refused_by_name(opened: Callable[[Path], Any], tmp_path: Path) -> None:
    """A directory, an absent file, a path through a file, a link to nothing."""
    (tmp_path / "file").write_bytes(one())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for wrong in (tmp_path, tmp_path / "absent", tmp_path / "file" / "inside", tmp_path / "link"):
        with pytest.raises(TensorFileError, match=f"^{wrong}: [A-Z][a-z ]+$"):
            opened(wrong)


def test_all_faults_of_a_file_are_reported_together(tmp_path: Path) -> None:
    """Every tensor's own fault in one message; the layout's faults in one message."""
    path = tmp_path / "model.safetensors"
    entries = {
        "a": A | {"dtype": "F7"},
        "b": B | {"shape": [-1]},
        "c": {"dtype": "F32"},
        "d": A | {"data_offsets": [0, 8, 16]},
        "e": A | {"shape": [5]},
    }
    text = json.dumps(entries)[:-1] + ', "e": ' + json.dumps(A) + "}"
    path.write_bytes(packed(text, bytes(16)))
    with pytest.raises(TensorFileError) as caught:
        read_header(path)
    starts = sorted(line.removeprefix(f"{path}: ")[:2] for line in str(caught.value).splitlines())
    assert starts == ["a:", "b:", "c:", "d:", "e:"]
    layout = {"a": A, "b": B | {"data_offsets": [4, 12]}, "c": B | {"data_offsets": [20, 28]}}
    path.write_bytes(packed(layout, bytes(30)))
    with pytest.raises(TensorFileError) as caught:
        read_header(path)
    said = [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]
    assert said == [
        "b: overlaps the tensor before it",
        "c: leaves 8 bytes before it",
        "2 bytes after the last tensor belong to nothing",
    ]


@pytest.mark.parametrize(
    "name", [name for name in BAD if not name.startswith(("key twice", "metadata twice"))]
)
def test_what_is_refused_here_the_formats_own_library_refuses_too_or_numpy_cannot_hold(
    name: str, tmp_path: Path
) -> None:
    """No file that others can use is turned away; what only this reader refuses is listed, with the reason."""
    stricter = {"8-bit floats": "numpy has no such dtype", "65 axes": "numpy has at most 64 axes"}
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[name].raw)
    try:
        with safe_open(path, framework="numpy") as file:
            accepted = list(file.keys()) is not None
    except SafetensorError:
        accepted = False
    assert accepted == (name in stricter)


# Odd, but within the rules.


def test_odd_but_valid_files_are_read(tmp_path: Path) -> None:
    """No tensors; padding; a scalar; no elements; any order; unaligned; names and metadata of any kind."""
    path = tmp_path / "model.safetensors"
    for raw in (
        packed({}),
        packed(b"{}      "),
        packed({"__metadata__": {}}),
        packed({"__metadata__": {"a": "b"}}),
    ):
        path.write_bytes(raw)
        assert open_file(path) == {}
    assert read_header(path).metadata == {"a": "b"}
    values = np.arange(8, dtype=np.float32)
    path.write_bytes(packed(json.dumps({"a": A, "b": B}) + " " * 13, values[:4].tobytes()))
    assert np.array_equal(open_file(path)["b"].read(), values[2:4])
    odd = {
        "last first": {"dtype": "F32", "shape": [2, 1], "data_offsets": [6, 14]},
        "scalar": {"dtype": "BF16", "shape": [], "data_offsets": [4, 6]},
        "nothing": {"dtype": "I64", "shape": [3, 0, 2], "data_offsets": [14, 14]},
        "\u03b8 \U0001f9ca": {"dtype": "U16", "shape": [1], "data_offsets": [2, 4]},
        "": {"dtype": "BOOL", "shape": [1, 2], "data_offsets": [0, 2]},
    }
    data = b"\x01\x00" + np.uint16(513).tobytes() + b"\x80\x3f" + values[1:3].tobytes()
    path.write_bytes(packed(odd, data))
    tensors = {name: lazy.read() for name, lazy in open_file(path).items()}
    assert {name: (x.shape, str(x.dtype), x.tolist()) for name, x in tensors.items()} == {
        "last first": ((2, 1), "float32", [[1.0], [2.0]]),
        "scalar": ((), "bfloat16", 1.0),
        "nothing": ((3, 0, 2), "int64", [[], [], []]),
        "\u03b8 \U0001f9ca": ((1,), "uint16", [513]),
        "": ((1, 2), "bool", [[True, False]]),
    }


def test_what_the_formats_own_library_writes_is_read_and_the_other_way_round(tmp_path: Path) -> None:
    """Scalars, empty tensors and several dtypes, bit for bit."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "matrix": rng.standard_normal((3, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "scalar": np.array(2.5),
        "none": np.zeros((0, 4), np.int32),
        "flags": np.array([True, False, True]),
    }
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, theirs, metadata={"format": "np"})
    write_file(ours, {k: Planned.of(Lazy.of(x)) for k, x in tensors.items()}, {"format": "np"})
    for read in ({k: lazy.read() for k, lazy in open_file(theirs).items()}, load_file(ours)):
        assert {k: (x.shape, x.dtype, x.tobytes()) for k, x in read.items()} == {
            k: (x.shape, x.dtype, x.tobytes()) for k, x in tensors.items()
        }
    assert read_header(theirs).metadata == read_header(ours).metadata == {"format": "np"}


def test_an_empty_tensor_with_absurd_other_axes_reads_or_is_refused(tmp_path: Path) -> None:
    """No bytes, so no rule is broken; numpy cannot hold such a shape, and that must not come out as its own error."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"a": {"dtype": "F32", "shape": [0, 2**61, 2**61], "data_offsets": [0, 0]}}))
    try:
        assert open_file(path)["a"].read().size == 0
    except TensorFileError as error:
        assert f"{path}: a: " in str(error)


def test_names_cannot_break_the_message(tmp_path: Path) -> None:
    """A name with line breaks or half a character: one line a fault, and a message that can be printed."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        packed('{"a\\nb\\r\\u2028c\\ud800": {"dtype": "F7", "shape": [], "data_offsets": [0, 4]}}', bytes(4))
    )
    with pytest.raises(TensorFileError) as caught:
        read_header(path)
    str(caught.value).encode()
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    """The header was right once; reading says what happened instead of dying."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        packed({"a": {"dtype": "U8", "shape": [10_000], "data_offsets": [0, 10_000]}}, bytes(10_000))
    )
    lazy = open_file(path)["a"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TensorFileError, match=f"^{path}: cannot be read any more"):
        lazy.read()
    path.unlink()
    with pytest.raises(TensorFileError, match=f"^{path}: cannot be read any more"):
        lazy.read()
