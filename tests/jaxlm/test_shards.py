"""Tokenised data is exact, reused, written all or nothing, and every kind of damage is named."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlm.data.corpus import DataError, is_validation, open_corpus
from jaxlm.data.shards import ShardError, open_shards, prepare
from jaxlm.tokenizer import SPECIAL_TOKENS, Tokenizer

BYTES = Tokenizer.train(["x"], 256 + len(SPECIAL_TOKENS))  # one token per byte


def _many(tmp_path, n=60):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * (i % 5 + 1)}) + "\n" for i in range(n)))
    return open_corpus(str(path), "text")


def _few(tmp_path, n_bytes):
    path = tmp_path / "few.txt"
    path.write_bytes(bytes(97 + i % 26 for i in range(n_bytes)))
    return open_corpus(str(path), "text")


def _joined(texts):
    out = []
    for text in texts:
        out += [BYTES.eos_id, *BYTES.encode(text)]
    return out[1:]


@pytest.mark.parametrize("shard_tokens", [7, 100, 1 << 20])
def test_shards_hold_the_documents_joined_by_eos_whatever_their_size(tmp_path, shard_tokens):
    """Both splits, token for token; and the facts in meta.json."""
    corpus = _many(tmp_path)
    prepare(corpus, BYTES, tmp_path / "out", 0.1, 10, shard_tokens=shard_tokens)
    texts = [document.text for document in corpus]
    for split in ("train", "val"):
        wanted = [t for i, t in enumerate(texts) if is_validation(i, 0.1) == (split == "val")]
        store = open_shards(tmp_path / "out" / split, BYTES.vocab_size)
        assert store[0 : len(store)].tolist() == _joined(wanted)
        assert len(store.meta["shards"]) == -(-len(store) // shard_tokens)
        assert store.meta["documents"] == len(wanted)
        assert store.meta["bytes"] == sum(len(t.encode()) for t in wanted)
        assert store.meta["dtype"] == "uint16" and store[0:1].dtype == np.uint16


def test_slices_cross_shard_borders_as_those_of_a_list(tmp_path):
    """All starts and stops, out of range ones too."""
    prepare(_few(tmp_path, 50), BYTES, tmp_path / "out", 0.4, 10, shard_tokens=7)
    store = open_shards(tmp_path / "out" / "train", BYTES.vocab_size)
    plain = store[0 : len(store)].tolist()
    assert len(plain) == 30
    for a in range(-3, 33):
        for b in range(-3, 33):
            assert store[a:b].tolist() == plain[a:b]
    with pytest.raises(ValueError, match="step 2"):
        store[0:10:2]


def test_wide_vocabularies_use_uint32(tmp_path):
    """Ids over 65,535 must survive."""
    wide = Tokenizer(BYTES._pattern, BYTES._ranks, {"<|eos|>": 70_000})
    prepare(_many(tmp_path), wide, tmp_path / "out", 0.1, 10)
    store = open_shards(tmp_path / "out" / "train", 70_001)
    assert store.meta["dtype"] == "uint32" and 70_000 in store[0 : len(store)]


def test_few_documents_hold_out_the_last_tokens(tmp_path):
    """Training and validation together are the text; validation is its end, at least one window."""
    corpus = _few(tmp_path, 200)
    for fraction, held_out in ((0.1, 20), (0.01, 9)):
        prepare(corpus, BYTES, tmp_path / "out", fraction, 9)
        train, val = (open_shards(tmp_path / "out" / s, BYTES.vocab_size) for s in ("train", "val"))
        assert [*train[0:200], *val[0:200]] == BYTES.encode(next(iter(corpus)).text)
        assert len(val) == held_out and val.meta["bytes"] == held_out
        assert sorted(os.listdir(tmp_path / "out")) == ["train", "val"]


def test_a_long_document_is_encoded_in_parts_without_separators(tmp_path):
    """600,000 characters, more than go to the encoder at once."""
    (tmp_path / "long.txt").write_text("word " * 120_000)
    prepare(open_corpus(str(tmp_path / "long.txt"), "text"), BYTES, tmp_path / "out", 0.5, 10)
    train = open_shards(tmp_path / "out" / "train", BYTES.vocab_size)
    assert train[0 : len(train)].tolist() == BYTES.encode("word ") * 60_000
    assert train.meta["documents"] == 1


def test_text_shorter_than_the_windows_is_refused_with_both_numbers(tmp_path):
    """T = 8: 17 tokens are one too few for two windows of 9, 18 are enough."""
    with pytest.raises(DataError, match="too short: 17 tokens.* 18 tokens"):
        prepare(_few(tmp_path, 17), BYTES, tmp_path / "out", 0.05, 9)
    assert os.listdir(tmp_path) == ["few.txt"]
    prepare(_few(tmp_path, 18), BYTES, tmp_path / "out", 0.05, 9)
    with pytest.raises(DataError, match="val tokens in 3 documents, but one window needs 1000"):
        prepare(_many(tmp_path), BYTES, tmp_path / "other", 0.05, 1000)


def test_same_data_is_not_tokenised_twice_but_any_change_is_seen(tmp_path):
    """Source, tokenizer, fraction, shard size, a lost shard; a window that is longer only if it must."""
    calls = []

    def again(corpus, tokenizer=BYTES, fraction=0.1, min_tokens=10, **options):
        calls.clear()
        prepare(
            corpus,
            tokenizer,
            tmp_path / "out",
            fraction,
            min_tokens,
            lambda *done: calls.append(done),
            **options,
        )
        return bool(calls)

    assert again(_many(tmp_path))
    assert calls[-1][0] == 60 and [c[0] for c in calls] == list(range(1, 61))
    assert not again(_many(tmp_path))
    assert not again(_many(tmp_path), min_tokens=20)
    assert again(_many(tmp_path), shard_tokens=64)
    assert again(_many(tmp_path), fraction=0.2)
    assert again(_many(tmp_path), Tokenizer.train(["x"], 300))
    assert again(_many(tmp_path, 61))
    (tmp_path / "out" / "train" / "shard_0000.npy").unlink()
    assert again(_many(tmp_path, 61))
    assert again(_few(tmp_path, 200), min_tokens=10)
    assert not again(_few(tmp_path, 200), min_tokens=20)
    assert again(_few(tmp_path, 200), min_tokens=21)


def test_somebody_elses_folder_is_left_alone(tmp_path):
    """`prepare` replaces only what it wrote itself."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(DataError, match="holds 'thesis.tex', which is no tokenised data"):
        prepare(_many(tmp_path), BYTES, tmp_path / "out", 0.1, 10)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "dear"
    with pytest.raises(DataError, match="is a file"):
        prepare(_many(tmp_path), BYTES, tmp_path / "many.jsonl", 0.1, 10)


def _edit_meta(directory, **changes):
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps({**meta, **changes}))


def _truncate(d):
    os.truncate(d / "shard_0001.npy", 150)


def _flip(d):
    content = bytearray((d / "shard_0001.npy").read_bytes())
    content[-1] ^= 1
    (d / "shard_0001.npy").write_bytes(content)


def _lose(d):
    (d / "shard_0001.npy").unlink()


def _cut_meta(d):
    os.truncate(d / "meta.json", 40)


def _lose_meta(d):
    (d / "meta.json").unlink()


def _future(d):
    _edit_meta(d, schema=2)


def _wrong_sum(d):
    _edit_meta(d, tokens=5)


@pytest.mark.parametrize(
    ("damage", "message", "quick_sees_it"),
    [
        (_truncate, "shard_0001.npy is truncated: 150 bytes instead of 168", True),
        (_flip, "shard_0001.npy is damaged: its checksum", False),
        (_lose, "shard_0001.npy is missing", True),
        (_cut_meta, "meta.json is damaged", True),
        (_lose_meta, "meta.json is missing", True),
        (_future, "has schema 2, this program reads 1", True),
        (_wrong_sum, "do not add up to 5 tokens", True),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, damage, message, quick_sees_it):
    """The file and its fault; only a full check reads every byte."""
    prepare(_few(tmp_path, 100), BYTES, tmp_path / "out", 0.1, 10, shard_tokens=20)
    damage(tmp_path / "out" / "train")
    for verify in ("full", "quick"):
        if verify == "full" or quick_sees_it:
            with pytest.raises(ShardError, match=message) as error:
                open_shards(tmp_path / "out" / "train", BYTES.vocab_size, verify)
            assert "\n" not in str(error.value)
        else:
            open_shards(tmp_path / "out" / "train", BYTES.vocab_size, verify)


@pytest.mark.parametrize("verify", ["full", "quick"])
def test_token_ids_outside_the_vocabulary_are_located(tmp_path, verify):
    """Data of a larger tokenizer than the model's: shard, position, id and vocabulary."""
    prepare(_few(tmp_path, 100), BYTES, tmp_path / "out", 0.1, 10, shard_tokens=20)
    train = open_shards(tmp_path / "out" / "train", BYTES.vocab_size, verify)
    ids = train[0:90]
    shard, position = divmod(int(np.argmax(ids >= ids.max())), 20)
    where = rf"shard_000{shard}.npy position {position} holds token id {ids.max()}, but .* only {ids.max()}"
    with pytest.raises(ShardError, match=where):
        open_shards(tmp_path / "out" / "train", int(ids.max()), verify)


PREPARE = """
import resource, signal, sys, time
from jaxlm.data.corpus import open_corpus
from jaxlm.data.shards import ShardError, prepare
from jaxlm.tokenizer import SPECIAL_TOKENS, Tokenizer
path, out, mode = sys.argv[1:]
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if mode == "full": resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
def slow(documents, tokens):
    if mode == "slow" and documents == 30: print("half", flush=True); time.sleep(60)
try: prepare(open_corpus(path, "text"), Tokenizer.train(["x"], 263), out, 0.1, 10, slow, shard_tokens=4000)
except ShardError as error: print(error)
"""


def _prepare_process(tmp_path, mode):
    (tmp_path / "big.jsonl").write_text((json.dumps({"text": "0123456789" * 50}) + "\n") * 60)
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "big.jsonl"), str(tmp_path / "d" / "out"), mode]
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_leaves_nothing_and_one_line(tmp_path):
    """A limit on file sizes stands for the disk: the write of the first shard fails."""
    out, err = _prepare_process(tmp_path, "full").communicate(timeout=60)
    assert "no space for the tokenised data" in out and "data.cache" in out and out.count("\n") == 1, (
        out,
        err,
    )
    assert os.listdir(tmp_path / "d") == []


def test_a_kill_leaves_nothing_that_looks_finished_and_the_next_run_cleans_up(tmp_path):
    """SIGKILL in the middle of the text, then an ordinary run."""
    process = _prepare_process(tmp_path, "slow")
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "d" / "out").exists()
    with pytest.raises(ShardError, match="meta.json is missing"):
        open_shards(tmp_path / "d" / "out" / "train", 263)
    prepare(
        open_corpus(str(tmp_path / "big.jsonl"), "text"),
        BYTES,
        tmp_path / "d" / "out",
        0.1,
        10,
        shard_tokens=4000,
    )
    assert os.listdir(tmp_path / "d") == ["out"]
    assert open_shards(tmp_path / "d" / "out" / "train", 263).meta["documents"] == 54


def test_two_processes_prepare_the_same_folder_once(tmp_path):
    """The second waits for the first and uses its files."""
    first = _prepare_process(tmp_path, "slow")
    assert first.stdout.readline() == "half\n"
    second = _prepare_process(tmp_path, "plain")
    time.sleep(1.5)
    assert second.poll() is None, "the second must wait while the first writes"
    first.kill()
    first.communicate(timeout=60)
    assert second.communicate(timeout=60) == ("", "")
    assert open_shards(tmp_path / "d" / "out" / "val", 263).meta["documents"] == 6
