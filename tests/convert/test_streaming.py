"""Conversion holds a few pieces, never a model: peak memory, sharded targets, and the pieces' own arithmetic.

Memory is measured in processes of their own: the highest resident size (file-mapped pages and thread stacks included)
while a model of 230 MB is converted, over the resident size after the same was done with a tiny model.
"""

import contextlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import random_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import native, stream
from convert.__main__ import main
from convert.rules import (
    EACH,
    EACH_FIRST_HALF,
    EACH_SECOND_HALF,
    SAME,
    TRANSPOSE,
    Rule,
    Transform,
    convert,
    pair_up,
)
from convert.targets import load_params
from convert.targets import open_weights as open_all
from jaxlm import tensor_file
from jaxlm.config import MeshConfig, ModelConfig, MoEConfig, save
from jaxlm.model import abstract_model
from jaxlm.model_dir import write_manifest, write_shards
from jaxlm.sharding import make_mesh, sharding
from jaxlm.tensor_file import Lazy, Planned, boxes

ROOT = Path(__file__).resolve().parents[2]
SMALL = tiny(moe={})
LARGE = ModelConfig(
    vocab_size=32_000,
    d_model=512,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    head_dim=64,
    d_ff=512,
    context=256,
    rope_theta=5e4,
    norm_eps=3e-6,
    moe=MoEConfig(n_experts=8, n_active=2, d_ff=1024),
)
KINDS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
# Runs in a process of its own: jobs are (what, source for small, source for large, out), their peaks are printed.
WORKER = """
    import contextlib, ctypes, gc, io, json, sys
    from pathlib import Path

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    def convert(*argv):
        from convert.__main__ import main
        with contextlib.redirect_stderr(io.StringIO()):
            assert main([str(word) for word in argv]) == 0

    def job(kind, source, out):
        options = ["--no-tokenizer", "--max-shard-gb", "0.07"]
        if kind == "params":
            from convert.targets import open_target
            return open_target(source).params
        if kind == "import":
            return convert("import", source, out, *options)
        return convert("export", source, "--to", kind, out, *options)

    peaks = []
    for kind, small, large, out in json.loads(sys.argv[1]):
        kept = job(kind, small, out + "-small")
        del kept
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # nothing that was freed may count as a part of the baseline
        base = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest size starts again
        kept = job(kind, large, out)
        peaks.append(status("VmHWM") - base)
        del kept
    print(json.dumps(peaks))
"""


def write_model(directory: Path, config: ModelConfig) -> Path:
    """A jaxlm directory with some values, written in a moment: the same noise again and again."""
    directory.mkdir()
    noise = np.random.default_rng(0).normal(size=tensor_file._PIECE // 4).astype(np.float32)

    def planned(shape: tuple[int, ...]) -> Planned:
        sizes = [[s.stop - s.start for s in box] for box in boxes(shape, noise.dtype)]
        return Planned(shape, noise.dtype, lambda: (noise[: np.prod(size)].reshape(size) for size in sizes))

    shapes = {path: tuple(x.shape) for path, x in abstract_model(config).shapes.items()}
    stored = write_shards(directory, {path: planned(shape) for path, shape in shapes.items()}, "jaxlm")
    save(config, directory / "config.json")
    write_manifest(directory, "jaxlm", stored)
    return directory


@contextlib.contextmanager
def log_transfers() -> Iterator[dict[tuple[int, ...], list[int]]]:
    """Bytes of every array that jax.make_array_from_callback is given for one device, by the whole tensor's shape."""
    sent: dict[tuple[int, ...], list[int]] = {}
    make = jax.make_array_from_callback

    def logged(shape: tuple[int, ...], where: Any, callback: Any, *args: Any, **kwargs: Any) -> jax.Array:
        def watched(index: Any) -> np.ndarray:
            values = callback(index)
            sent.setdefault(tuple(shape), []).append(values.nbytes)
            return values

        return make(shape, where, watched, *args, **kwargs)

    jax.make_array_from_callback = logged
    try:
        yield sent
    finally:
        jax.make_array_from_callback = make


def measure(*jobs: tuple[str, Path, Path, Path]) -> list[float]:
    """Megabytes above the baseline, job by job."""
    words = json.dumps([[str(word) for word in job] for job in jobs])
    code = textwrap.dedent(WORKER)
    done = subprocess.run([sys.executable, "-c", code, words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [peak / 1e6 for peak in json.loads(done.stdout.splitlines()[-1])]


def largest_shard(directory: Path) -> float:
    """Megabytes."""
    return max(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model, small and large."""
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "small", SMALL), write_model(root / "large", LARGE)


def test_files_go_through_within_a_part_of_a_shard(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Model directory -> Hugging Face -> jaxlm, and -> torchref: at most 1.3 times the largest shard at any time.

    The largest tensor is a whole shard, so a reader that holds a tensor and its transpose does not pass.
    """
    small, large = models
    hf, ours, torch = tmp_path / "hf", tmp_path / "ours", tmp_path / "torch"
    peaks = measure(
        ("hf", small, large, hf),
        ("import", Path(f"{hf}-small"), hf, ours),
        ("torch", small, large, torch),
    )
    shard = largest_shard(hf)
    assert 60 < shard < 70 and largest_shard(ours) < 70  # torchref has a single file
    assert max(peaks) <= 1.3 * shard, f"peaks of {peaks} MB, the largest shard has {shard} MB"
    for name, tensor in open_all(large).items():
        assert np.array_equal(tensor.read(), open_all(ours)[name].read()), name


def test_parameters_are_read_one_at_a_time(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Into arrays, from our layout and from another: at most the model and twice its largest tensor."""
    small, large = models
    hf = {path: tmp_path / path.name for path in models}
    for path in models:
        assert main(["export", str(path), "--to", "hf", str(hf[path]), "--no-tokenizer"]) == 0
    peaks = measure(("params", small, large, tmp_path), ("params", hf[small], hf[large], tmp_path))
    sizes = [tensor.read().nbytes / 1e6 for tensor in open_all(large).values()]
    assert max(peaks) <= sum(sizes) + 2 * max(sizes), f"{peaks} MB; {sum(sizes)} MB, largest {max(sizes)} MB"


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "expert": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("source", ["jaxlm", "hf"])
def test_no_device_of_a_mesh_gets_a_whole_tensor(mesh: dict[str, int], source: str, tmp_path: Path) -> None:
    """Each of 4 devices receives its part of a split tensor and no more, bit for bit, in memory of its own."""
    config = tiny(moe={})
    params = random_params(config, dtype=np.float32)
    stored = stream.cast({path: Lazy.of(value) for path, value in params.items()}, None)
    write_shards(tmp_path, stored, "jaxlm")
    tensors = open_all(tmp_path)
    if source == "hf":
        table = native.pairs(config)
        theirs = {name: stream.lazy(plan) for name, plan in stream.there(table, tensors).items()}
        tensors = {path: stream.lazy(plan) for path, plan in stream.here(table, theirs).items()}
    devices = make_mesh(MeshConfig(**mesh), jax.devices()[:4])
    before = {id(x) for x in jax.live_arrays()}
    with log_transfers() as sent:
        loaded = load_params(tensors, config, devices)
    (tmp_path / "model.safetensors").write_bytes(bytes((tmp_path / "model.safetensors").stat().st_size))
    axes, split = abstract_model(config).axes, 0
    for path, array in loaded.items():
        wanted = sharding(devices, params[path].shape, axes[path])
        assert array.sharding == wanted
        part = wanted.shard_shape(params[path].shape)
        assert [shard.data.shape for shard in array.addressable_shards] == [part] * 4
        assert np.array_equal(np.asarray(array), params[path]), path
        split += part != params[path].shape
        if part != params[path].shape:
            assert max(sent[params[path].shape]) <= np.prod(part) * 4
    assert split >= 10
    extra = [x for x in jax.live_arrays() if id(x) not in before]
    assert not [x.shape for x in extra if len(x.sharding.device_set) == 1 and x.size > 10_000]


def test_pieces_are_bounded_and_follow_each_other_in_c_order() -> None:
    """Whatever the shape: a first axis of 1, of few, of none; long rows; no axes."""
    kept = tensor_file._PIECE
    tensor_file._PIECE = 240
    try:
        for shape in [
            (),
            (0,),
            (3, 0, 2),
            (7,),
            (500,),
            (1, 6, 20, 20),
            (2, 30, 41),
            (40, 3),
            (3, 100),
            (1, 1, 999),
        ]:
            array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
            found = [array[box] for box in boxes(shape, array.dtype)]
            assert all(part.nbytes <= 240 and part.size for part in found), shape
            joined = np.concatenate([part.reshape(-1) for part in found]) if found else np.zeros(0)
            assert np.array_equal(joined, array.reshape(-1)), shape
    finally:
        tensor_file._PIECE = kept


@given(
    shape=st.lists(st.integers(1, 20), min_size=0, max_size=3),
    permutation=st.randoms(use_true_random=False),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
)
@settings(max_examples=60, deadline=None)
def test_blocked_copy_is_numpys(shape: list[int], permutation: Any, kinds: tuple[Any, Any]) -> None:
    """Any shape, axes in any order, backwards and with steps, any pair of dtypes: as `out[...] = view`."""
    axes = list(range(len(shape)))
    permutation.shuffle(axes)
    steps = tuple(slice(None, None, permutation.choice([1, 1, 2, -1])) for _ in shape)
    stream._ROWS, stream._COLUMNS, kept = 8, 4, (stream._ROWS, stream._COLUMNS)
    source = np.random.default_rng(len(shape)).normal(size=[2 * n for n in shape]).astype(kinds[0])
    view = source[steps].transpose(axes)
    out, expected = np.full(view.shape, 7, kinds[1]), np.full(view.shape, 7, kinds[1])
    expected[...] = view
    try:
        stream.copy_blocked(out, view)
    finally:
        stream._ROWS, stream._COLUMNS = kept
    assert out.tobytes() == expected.tobytes()


RULES = [
    Rule(r"(plain)", r"\1", SAME),
    Rule(r"(turned)", r"\1", TRANSPOSE),
    Rule(r"(pair)", r"\1.{e}.gate", TRANSPOSE, EACH_FIRST_HALF),
    Rule(r"(pair)", r"\1.{e}.up", TRANSPOSE, EACH_SECOND_HALF),
    Rule(r"(each)", r"\1.{e}", SAME, EACH),
    Rule(r"(reversed)", r"\1", Transform("reversed", lambda x: x[::-1], lambda x: x[::-1])),
]
SHAPES = {
    "plain": (3, 4, 50),
    "turned": (70, 90),
    "pair": (3, 40, 60),
    "each": (4, 30),
    "reversed": (50, 9),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: np.dtype(kind).name)
@pytest.mark.parametrize("size", [256, 8 << 20])
def test_there_and_back_is_the_same_bits(kind: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules with parts, transposes and a map of their own, through plans of plans, in pieces of any size."""
    monkeypatch.setattr(tensor_file, "_PIECE", size)
    monkeypatch.setattr(stream, "_REACH", 8 * size)
    rng = np.random.default_rng(0)
    ours = {path: rng.normal(size=shape).astype(kind) for path, shape in SHAPES.items()}
    table = pair_up(RULES, SHAPES)
    lazies = {path: Lazy.of(value) for path, value in ours.items()}
    theirs = stream.there(table, lazies)
    by_hand = convert(table, ours)
    assert {name: stream.array(plan).tobytes() for name, plan in theirs.items()} == {
        name: value.tobytes() for name, value in by_hand.items()
    }
    lazy = {name: stream.lazy(plan) for name, plan in theirs.items()}
    back = {path: stream.lazy(plan) for path, plan in stream.here(table, lazy).items()}
    again = stream.there(table, back)
    for path, value in ours.items():
        assert back[path].read().tobytes() == value.tobytes(), path
    for name, value in by_hand.items():
        assert stream.array(again[name]).tobytes() == value.tobytes(), name


def test_a_chain_reads_each_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From another format to a third: an expert's part is made of its own sources, not of all experts'."""
    monkeypatch.setattr(tensor_file, "_PIECE", 1024)
    table = pair_up(RULES, SHAPES)
    read = {"values": 0}

    def counted(array: np.ndarray) -> Lazy:
        def take(index: Any) -> np.ndarray:
            read["values"] += array[index].size
            return array[index]

        return Lazy(array.shape, array.dtype, lambda: take(()), "counted", take)

    paths = [path for path in SHAPES if path != "reversed"]
    table = [pair for pair in table if pair.path in paths]
    values = convert(table, {path: np.zeros(SHAPES[path], np.float32) for path in paths})
    back = stream.here(table, {name: counted(value) for name, value in values.items()})
    out = stream.there(table, {path: stream.lazy(plan) for path, plan in back.items()})
    assert sum(piece.size for plan in out.values() for piece in plan.pieces()) == read["values"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: np.dtype(kind).name)
def test_every_value_that_is_not_finite_is_counted(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any piece; the largest finite values, whose sum overflows, are none."""
    monkeypatch.setattr(tensor_file, "_PIECE", 4096)
    largest = float(ml_dtypes.finfo(kind).max)
    clean = np.full((300, 50), largest, kind)
    clean[::2] *= np.asarray(-1, kind)
    clean[0] = largest
    dirty = clean.copy()
    dirty[7, 3], dirty[150, 0], dirty[299, 49] = np.nan, np.inf, -np.inf
    tensors = {"clean": clean, "dirty": dirty, "huge": np.full((300, 50), largest, kind)}
    plans, faults = stream.guarded(stream.cast({n: Lazy.of(x) for n, x in tensors.items()}, None))
    for name, plan in plans.items():
        assert stream.array(plan).tobytes() == tensors[name].tobytes()
    assert faults == [f"dirty: 3 of 15000 values are not finite in {np.dtype(kind)}"]
    parts, faults = stream.guarded(stream.cast({n: Lazy.of(x) for n, x in tensors.items()}, None))
    experts = pair_up([Rule("(.*)", r"\1.{e}", SAME, EACH)], {name: x.shape for name, x in tensors.items()})
    for plan in stream.there(experts, {name: stream.lazy(plan) for name, plan in parts.items()}).values():
        stream.array(plan)
    assert faults == [f"dirty: 3 of 15000 values are not finite in {np.dtype(kind)}"]
