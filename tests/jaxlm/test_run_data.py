"""A run gets its tokens from raw text, a prepared folder or a mixture; whatever does not fit is one clear line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import tiny

from jaxlm.config import ConfigError, DataConfig, InputError, RunConfig, TrainConfig
from jaxlm.data.corpus import open_corpus
from jaxlm.data.prepare import Settings, write_dataset
from jaxlm.data.run_data import is_prepared, open_run_data, parse_mixture
from jaxlm.data.shards import ShardError, open_shards
from jaxlm.run_dir import RunDir
from jaxlm.tokenizer import SPECIAL_TOKENS, Tokenizer

BYTES = Tokenizer.train(["x"], 256 + len(SPECIAL_TOKENS))


def _run(vocab_size=BYTES.vocab_size, **data) -> RunConfig:
    model = tiny(vocab_size=vocab_size, context=64)
    return RunConfig(model, DataConfig(**data), train=TrainConfig(seq_len=16))


@pytest.fixture
def world(tmp_path):
    """Three documents' sources, two prepared folders of one tokenizer, one of another; a run directory."""
    for name, n in (("a", 60), ("b", 90)):
        rows = "".join(json.dumps({"text": f"{name} {i} " * 5}) + "\n" for i in range(n))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    tokenizers = {"a": BYTES, "b": BYTES, "other": Tokenizer.train(["x"], 300)}
    for name, tokenizer in tokenizers.items():
        corpus = open_corpus(str(tmp_path / ("a.jsonl" if name == "other" else f"{name}.jsonl")))
        write_dataset(corpus, tokenizer, tmp_path / name, Settings(0.1))
    (tmp_path / "run").mkdir()
    return tmp_path


def _open(world, run, resumed=False):
    said: list[str] = []
    return open_run_data(run, RunDir(world / "run"), resumed, said.append), said


def test_a_prepared_folder_needs_nothing_else(world):
    """Its tokens and tokenizer; the run keeps the tokenizer, and writes no tokens of its own."""
    data, said = _open(world, _run(path=str(world / "a")))
    assert data.weights == (1.0,) and data.names == (str(world / "a"),)
    assert data.tokenizer.fingerprint() == BYTES.fingerprint()
    for split, stores in (("train", data.train), ("val", data.val)):
        wanted = open_shards(world / "a" / split, BYTES.vocab_size)
        assert np.array_equal(stores[0][0 : len(wanted)], wanted[0 : len(wanted)])
        assert stores[0].fingerprint == wanted.fingerprint
    assert [p.name for p in (world / "run").iterdir()] == ["tokenizer.json"]
    assert said == [
        f"data: {len(data.train[0]):,} training and {len(data.val[0]):,} validation tokens of {world / 'a'}"
    ]


def test_raw_text_is_tokenised_into_the_run_once(world, monkeypatch):
    """And what the run's data/ holds is a prepared folder that other runs may read."""
    run = _run(path=str(world / "a.jsonl"), tokenizer=str(world / "a"))
    data, _ = _open(world, run)
    before = {p: p.stat().st_mtime_ns for p in (world / "run").rglob("*") if p.is_file()}
    again, _ = _open(world, run, resumed=True)
    assert before == {p: p.stat().st_mtime_ns for p in (world / "run").rglob("*") if p.is_file()}
    assert again.train[0].fingerprint == data.train[0].fingerprint
    assert is_prepared(str(world / "run" / "data"))
    other, _ = _open(world, _run(path=str(world / "run" / "data")))
    assert other.train[0].fingerprint == data.train[0].fingerprint


def test_a_trained_tokenizer_has_the_size_of_the_model(world):
    """data.tokenizer=train learns from the training documents, and a glob is a path like any other."""
    data, said = _open(world, _run(vocab_size=290, path=str(world / "[ab].jsonl")))
    assert data.tokenizer.vocab_size == 290 and data.train[0].meta["documents"] == 143
    assert any("training a byte-level BPE of 290 tokens" in line for line in said)


def test_a_mixture_has_stores_and_weights_in_its_order(world):
    """Two folders of one tokenizer."""
    data, said = _open(world, _run(mixture=(f"{world / 'b'}=0.7", f"{world / 'a'}=0.3")))
    assert data.weights == (0.7, 0.3) and data.names == (str(world / "b"), str(world / "a"))
    wanted = [open_shards(world / name / "train", BYTES.vocab_size).fingerprint for name in ("b", "a")]
    assert [store.fingerprint for store in data.train] == wanted
    assert "0.7 of the mixture" in said[0] and "0.3 of the mixture" in said[1]


def test_mixtures_that_sum_by_rounding_are_taken(world):
    """Three thirds of six digits are one within 1e-6; names may hold = themselves."""
    thirds = parse_mixture(("a=0.333333", "b=0.333333", "x=y/c=0.333334"))
    assert [name for name, _ in thirds] == ["a", "b", "x=y/c"]


BAD = {
    "sum": (("{a}=0.7", "{b}=0.2"), "weights sum to 0.9, not 1: 0.7 [+] 0.2"),
    "sum over": (("{a}=0.7", "{b}=0.300002"), "weights sum to 1.000002, not 1"),
    "negative": (("{a}=1.5", "{b}=-0.5"), "the weight of .*b is -0.5; weights must be positive"),
    "zero": (("{a}=1", "{b}=0"), "is 0; weights must be positive"),
    "infinite": (("{a}=inf",), "is inf; weights must be positive"),
    "no weight": (("{a}",), "is not of the form FOLDER=WEIGHT"),
    "no folder": (("=1",), "is not of the form FOLDER=WEIGHT"),
    "no number": (("{a}=half",), "is not of the form FOLDER=WEIGHT"),
    "twice": (("{a}=0.5", "{a}/=0.5"), "twice; give it once"),
    "not prepared": (("{a}.jsonl=1",), r"holds no prepared data .*prepare_data SOURCE --out FOLDER"),
    "not there": (("{a}=0.5", "{a}a=0.5"), r"holds no prepared data .*did you mean 'a'"),
    "other tokenizer": (("{a}=0.5", "{other}=0.5"), "was tokenised by another tokenizer than .*prepare both"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_mixtures_are_one_line(world, name):
    """Each with its values, before anything is written."""
    entries, message = BAD[name]
    folders = {folder: world / folder for folder in ("a", "b", "other")}
    with pytest.raises(InputError, match=message) as error:
        _open(world, _run(300, mixture=tuple(entry.format(**folders) for entry in entries)))
    assert "\n" not in str(error.value) and not list((world / "run").iterdir())


def test_a_tokenizer_that_does_not_fit_is_named(world):
    """Larger than the model, other than asked for, other than the run began with, or not that of the shards."""
    for size in (262, 60):  # of which the second is below ids that stand in the shards
        with pytest.raises(ConfigError, match=f"a has 263 tokens but model.vocab_size={size}; set .* 263"):
            _open(world, _run(size, path=str(world / "a")))
    with pytest.raises(ConfigError, match="another tokenizer than data.tokenizer="):
        _open(world, _run(300, path=str(world / "a"), tokenizer=str(world / "other")))
    _open(world, _run(300, path=str(world / "a"), tokenizer=str(world / "a")))
    with pytest.raises(ConfigError, match="was trained with another tokenizer than that of its data now"):
        _open(world, _run(300, path=str(world / "other")), resumed=True)
    shutil.copy(world / "other" / "tokenizer.json", world / "a" / "tokenizer.json")
    with pytest.raises(
        ConfigError, match="tokenizer.json is not the tokenizer that its shards were made with"
    ):
        _open(world, _run(300, path=str(world / "a")))


def test_damage_is_refused_and_full_verification_reads_everything(world):
    """A flipped bit whose time gives it away, and one that only reading shows."""
    run = _run(path=str(world / "a"))
    shard = world / "a" / "train" / "shard_0000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for verify in ("quick", "full"):
        settings = dataclasses.replace(run, data=dataclasses.replace(run.data, verify=verify))
        with pytest.raises(ShardError, match="shard_0000.npy is damaged or was changed"):
            _open(world, settings)


def test_a_larger_model_pads_the_vocabulary(world):
    """Said in one line; too large an id cannot come of it."""
    _, said = _open(world, _run(320, path=str(world / "a")))
    assert "the vocabulary of 263 tokens is padded to model.vocab_size=320" in said
