"""Shards are read exactly, at a cost that does not grow with them, and every kind of damage is named."""

import functools
import json
import os
import time

import numpy as np
import pytest
from damage import flip
from tolerances import tolerance

from jaxlm.data.corpus import open_corpus
from jaxlm.data.prepare import prepare
from jaxlm.data.shards import DOCUMENTS, SCHEMA, ShardError, TokenStore, open_shards, read_meta, write_meta
from jaxlm.data.verify import describe
from jaxlm.tokenizer import SPECIAL_TOKENS, Tokenizer

BYTES = Tokenizer.train(["x"], 256 + len(SPECIAL_TOKENS))  # one token per byte


@pytest.fixture
def folder(tmp_path):
    """A training split: 90 tokens of one document in shards of 20, or 168 bytes."""
    text = tmp_path / "few.txt"
    text.write_bytes(bytes(97 + i % 26 for i in range(100)))
    prepare(open_corpus(str(text)), BYTES, tmp_path / "out", 0.1, 10, shard_tokens=20)
    return tmp_path / "out" / "train"


def _open(folder, verify="quick") -> TokenStore:
    return open_shards(folder, BYTES.vocab_size, verify)


def _wait(store) -> None:
    """Until the background has read what was asked for."""
    for _ in range(500):
        if not store._watch.pending:
            return
        time.sleep(0.01)
    raise AssertionError("the background thread has not finished")


def test_slices_cross_shard_borders_as_those_of_a_list(folder):
    """All starts and stops, out of range ones too."""
    store = _open(folder)
    plain = store[0 : len(store)].tolist()
    assert plain == BYTES.encode("".join(chr(97 + i % 26) for i in range(90)))
    for a in range(-3, 93, 2):
        for b in range(-3, 93):
            assert store[a:b].tolist() == plain[a:b]
    with pytest.raises(ValueError, match="step 2"):
        store[0:10:2]


@pytest.mark.parametrize("length", [1, 7, 20, 33, 90])
def test_windows_are_slices(folder, length):
    """Any starts, in any order, across any number of shards, are the rows that slices give."""
    store = _open(folder)
    starts = np.random.default_rng(0).permutation(np.arange(90 - length + 1))
    found = store.windows(starts, length)
    assert found.dtype == np.uint16 and found.shape == (len(starts), length)
    for row, start in zip(found, starts.tolist(), strict=True):
        assert row.tolist() == store[start : start + length].tolist()
    assert store.windows(np.empty(0, np.int64), length).shape == (0, length)
    for outside in (-1, 90 - length + 1):
        with pytest.raises(IndexError, match=f"windows of {length} .* outside 90 tokens"):
            store.windows(np.array([0, outside]), length)


def test_document_starts_are_those_of_a_scan(tmp_path):
    """Every interval: the positions after a separator, and 0, in both splits."""
    rows = "".join(json.dumps({"text": f"document {i} " * (i % 3)}) + "\n" for i in range(60))
    (tmp_path / "many.jsonl").write_text(rows)
    prepare(open_corpus(str(tmp_path / "many.jsonl")), BYTES, tmp_path / "out", 0.2, 10, shard_tokens=50)
    for split in ("train", "val"):
        store = _open(tmp_path / "out" / split)
        scanned = [0, *(np.flatnonzero(store[0 : len(store)] == BYTES.eos_id) + 1).tolist()]
        assert store.meta["documents"] == len(scanned)
        for a in range(0, len(store), 13):
            for b in range(a, len(store) + 1, 17):
                found = store.document_starts(a, b)
                assert found.dtype == np.int64 and found.tolist() == [s for s in scanned if a <= s < b]


def _edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def _keep_time(path, change):
    """As a disk that forgets does it: the contents change, size and time do not."""
    stat = path.stat()
    change()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _outside_sample(folder, name) -> int:
    """A byte of the file that a quick check does not read, -1 where it reads all."""
    meta = read_meta(folder)
    entry = next(e for e in (*meta["shards"], meta["index"]) if e["file"] == name)
    sample = entry["sample"]
    if sample["bytes"] == entry["bytes"]:
        return -1
    return sample["offset"] - 1 if sample["offset"] else sample["bytes"]


AT_ONCE = {
    "truncated": (lambda d: os.truncate(d / "shard_0001.npy", 150), "0001.npy is truncated: 150 bytes instead of 168"),
    "longer": (lambda d: os.truncate(d / "shard_0001.npy", 169), "0001.npy is too long: 169 bytes"),
    "flipped": (lambda d: flip(d / "shard_0001.npy", 167), "0001.npy is damaged or was changed: its checksum"),
    "replaced": (lambda d: (d / "shard_0000.npy").replace(d / "shard_0001.npy"), "shard_0000.npy is missing"),
    "swapped": (
        lambda d: (d / "shard_0001.npy").write_bytes((d / "shard_0000.npy").read_bytes()),
        "0001.npy is damaged or was changed",
    ),
    "lost": (lambda d: (d / "shard_0001.npy").unlink(), "shard_0001.npy is missing"),
    "starts flipped": (lambda d: flip(d / DOCUMENTS, 130), "documents.npy is damaged or was changed"),
    "starts lost": (lambda d: (d / DOCUMENTS).unlink(), "documents.npy is missing"),
    "meta cut": (lambda d: os.truncate(d / "meta.json", 40), "meta.json is damaged"),
    "meta lost": (lambda d: (d / "meta.json").unlink(), "meta.json is missing"),
    "meta of the future": (lambda d: _edit_meta(d, schema=SCHEMA + 1), f"has schema {SCHEMA + 1}, this program reads"),
    "meta of other sums": (lambda d: _edit_meta(d, tokens=5), "do not add up to 5 tokens"),
    "meta edited": (lambda d: _edit_meta(d, max_id=1), "meta.json is damaged: its checksum"),
    "meta of another kind": (lambda d: (d / "meta.json").write_text("[1]"), "meta.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("verify", ["full", "quick"])
@pytest.mark.parametrize("name", AT_ONCE)
def test_damage_is_named_in_one_line_when_opened(folder, name, verify):
    """The file and its fault, also by a quick check: the time of a changed file gives it away."""
    damage, message = AT_ONCE[name]
    damage(folder)
    with pytest.raises(ShardError, match=message) as error:
        _open(folder, verify)
    assert "\n" not in str(error.value)


def test_flipped_bits_of_meta_are_found(folder):
    """One bit in many places of meta.json: none is believed."""
    path = folder / "meta.json"
    whole = path.read_bytes()
    for byte in range(0, len(whole), 29):
        flip(path, byte, byte % 7)
        with pytest.raises(ShardError, match=r"meta\.json (is damaged|has schema)"):
            read_meta(folder)
        path.write_bytes(whole)


@pytest.fixture
def large(tmp_path):
    """A split whose shards are larger than a sample."""
    text = tmp_path / "text.txt"
    text.write_text("0123456789" * 60_000)
    prepare(open_corpus(str(text)), BYTES, tmp_path / "out", 0.1, 10, shard_tokens=200_000)
    return tmp_path / "out" / "train"


def test_damage_that_keeps_size_and_time_is_found_by_the_sample_or_in_the_background(large):
    """Outside the sample: opened, but once the shard has been used, the next read raises one line."""
    path = large / "shard_0001.npy"
    byte = _outside_sample(large, path.name)
    assert byte >= 0
    _keep_time(path, lambda: flip(path, byte))
    with pytest.raises(ShardError, match="shard_0001.npy is damaged or was changed"):
        _open(large, "full")
    store = _open(large)
    store[0:100]
    _wait(store)
    store.windows(np.array([0]), 100)  # the first shard is whole, and the second was not used yet
    store.windows(np.array([250_000]), 100)
    _wait(store)
    for read in (
        lambda: store[0:1],
        lambda: store.windows(np.array([5]), 9),
        lambda: store.document_starts(0, 9),
    ):
        with pytest.raises(ShardError, match="shard_0001.npy is damaged or was changed") as error:
            read()
        assert "\n" not in str(error.value)
    _keep_time(path, lambda: flip(path, byte))  # right again
    sample = read_meta(large)["shards"][1]["sample"]["offset"]
    _keep_time(path, lambda: flip(path, sample + 5))
    with pytest.raises(ShardError, match="shard_0001.npy is damaged or was changed"):
        _open(large)


def test_a_shard_that_changes_under_a_run_is_found(large):
    """Its first read in the background comes after the change; a shard that was read before is not read again."""
    store = _open(large)
    path = large / "shard_0002.npy"
    flip(path, path.stat().st_size - 1)
    store[450_000:450_010]
    _wait(store)
    with pytest.raises(ShardError, match="shard_0002.npy is damaged or was changed"):
        store[0:1]
    with pytest.raises(ShardError, match="shard_0002.npy is damaged or was changed"):
        _open(large)


def test_another_time_costs_one_full_read_and_no_more(large, monkeypatch):
    """A copy of a folder has other times: its files are read once, noted, and then sampled again."""
    from jaxlm.data import verify

    read: list[str] = []
    hash_of = verify.file_hash
    monkeypatch.setattr(verify, "file_hash", lambda path: read.append(path.name) or hash_of(path))
    _open(large)
    assert read == []
    os.utime(large / "shard_0001.npy", ns=(0, 0))
    for wanted in (["shard_0001.npy"], []):
        read.clear()
        _open(large)
        assert read == wanted
    (large / "times.json").write_text("[oops")
    _open(large)
    assert sorted(read) == [DOCUMENTS, "shard_0000.npy", "shard_0001.npy", "shard_0002.npy"]
    read.clear()
    store = _open(large, "full")
    assert len(read) == 4
    store[0 : len(store)]
    assert not store._watch.pending, "what was read when opened is not read again"


@pytest.mark.parametrize("verify", ["full", "quick"])
def test_token_ids_outside_the_vocabulary_are_located(folder, verify):
    """Data of a larger tokenizer than the model's: shard, position, id and vocabulary."""
    ids = _open(folder)[0:90]
    shard, position = divmod(int(np.argmax(ids >= ids.max())), 20)
    where = rf"shard_000{shard}.npy position {position} holds token id {ids.max()}, but .* only {ids.max()}"
    with pytest.raises(ShardError, match=where):
        open_shards(folder, int(ids.max()), verify)
    open_shards(folder, int(ids.max()) + 1, verify)


def test_the_fingerprint_is_that_of_the_contents(folder, tmp_path):
    """A copy has the same; other tokens, other document starts or another tokenizer give another."""
    store = _open(folder)
    meta = store.meta
    same = TokenStore([store[0:90]], json.loads(json.dumps(meta)))
    assert same.fingerprint == store.fingerprint
    for change in (
        {"tokenizer": "x"},
        {"index": meta["index"] | {"sha256": "x"}},
        {"shards": [meta["shards"][0] | {"sha256": "x"}, *meta["shards"][1:]]},
    ):
        assert TokenStore([store[0:90]], meta | change).fingerprint != store.fingerprint


def _sparse(folder, n_shards: int, shard_tokens: int) -> None:
    """A split of zeros that takes no room on the disk; what a real one's checksums would be is not known to it."""
    folder.mkdir()
    shards, one = [], None
    for i in range(n_shards):
        path = folder / f"shard_{i:04d}.npy"
        with open(path, "wb") as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (shard_tokens,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2 * shard_tokens)
        one = one or describe(path)  # all of them are alike, and reading them is what takes long
        shards.append(one | {"file": path.name, "tokens": shard_tokens, "max_id": 0})
    np.save(folder / DOCUMENTS, np.arange(0, n_shards * shard_tokens, 1 << 20, dtype=np.int64))
    index = describe(folder / DOCUMENTS)
    facts = {
        "schema": SCHEMA,
        "dtype": "uint16",
        "vocab_size": 9,
        "tokenizer": "t",
        "max_id": 0,
        "shards": shards,
    }
    count = len(np.load(folder / DOCUMENTS))
    write_meta(
        folder,
        facts | {"index": index | {"tokens": count}, "tokens": n_shards * shard_tokens, "documents": count},
    )
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    (folder / "times.json").write_text(json.dumps(times))


def _best(call, repeats: int = 5) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def test_cost_is_flat_from_ten_million_to_ten_billion_tokens(tmp_path):
    """Ten billion tokens in 150 shards are opened in milliseconds, and a batch of them costs what it costs of few."""
    _sparse(tmp_path / "few", 1, 10_000_000)
    _sparse(tmp_path / "many", 150, 1 << 26)
    opened, read = {}, {}
    for name in ("few", "many"):
        opened[name] = _best(functools.partial(open_shards, tmp_path / name, 9, "quick"))
        store = open_shards(tmp_path / name, 9, "quick")
        store._watch = None  # the background would read 20 GB of nothing
        starts = np.random.default_rng(0).integers(0, len(store) - 1025, 1000)
        read[name] = _best(functools.partial(store.windows, starts, 1025))
        read[name] += _best(functools.partial(store.document_starts, 10**6, 2 * 10**6))
    print(opened, read)
    assert opened["many"] < tolerance("open_10b_s"), (opened, read)
    assert read["many"] < tolerance("batch_10b") * read["few"], (
        opened,
        read,
    )
