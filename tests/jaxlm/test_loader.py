"""Windows and their order, exact resumption, validation batches; and the baselines computed from the same tokens."""

import itertools
import json

import numpy as np
import pytest

from jaxlm.data.baselines import bigram_loss, gzip_bits_per_byte, unigram_loss
from jaxlm.data.corpus import DataError, open_corpus
from jaxlm.data.loader import ShuffledWindows, WindowSource, eval_batches, make_loader, plain_batches
from jaxlm.data.shards import TokenStore, open_shards, prepare
from jaxlm.tokenizer import Tokenizer

T, B = 8, 3
ORDER_OF_SEED_5 = [9, 2, 4, 3, 1, 5, 0, 6, 7, 8, 7, 4, 5, 1, 9, 6, 8, 0, 2, 3]


def _store(n, name="a"):
    meta = {"dtype": "uint16", "shards": [{"sha256": name}], "tokenizer": "t"}
    tokens = np.arange(n, dtype=np.uint16)
    return TokenStore([tokens[: n // 3], tokens[n // 3 :]], meta)


def _equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_windows_tile_the_text_and_targets_are_the_next_tokens():
    """Stride T, the last token of a window only a target; T tokens are refused, T+1 are one window."""
    source = WindowSource(_store(8 * T + 5), T)
    assert len(source) == 8
    for i in range(8):
        window = source[i]
        assert window["inputs"].tolist() == list(range(i * T, i * T + T))
        assert window["targets"].tolist() == list(range(i * T + 1, i * T + T + 1))
        assert window["loss_mask"].tolist() == [1.0] * T
        assert [window[k].dtype for k in ("inputs", "targets", "loss_mask")] == [
            np.int32,
            np.int32,
            np.float32,
        ]
    with pytest.raises(IndexError):
        source[8]
    assert len(WindowSource(_store(8 * T), T)) == 7
    assert len(WindowSource(_store(T + 1), T)) == 1
    with pytest.raises(DataError, match=f"has {T} tokens, but one window of seq_len={T} needs {T + 1}"):
        WindowSource(_store(T), T)


def test_every_epoch_visits_each_window_once_in_its_own_order():
    """Keyed by seed and epoch; without shuffle, the order of the text."""
    source = WindowSource(_store(50 * T + 1), T)
    orders = []
    for seed, epoch in itertools.product((0, 1), (0, 1, 7)):
        windows = ShuffledWindows(source, seed, True)
        order = [int(windows[epoch * 50 + i]["inputs"][0]) // T for i in range(50)]
        assert sorted(order) == list(range(50))
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 6
    plain = ShuffledWindows(source, 0, False)
    assert [int(plain[i]["inputs"][0]) // T for i in range(100)] == [*range(50), *range(50)]


def test_the_order_never_changes_between_versions():
    """Runs are resumed under newer libraries; these numbers are the contract."""
    windows = ShuffledWindows(WindowSource(_store(10 * T + 1), T), 5, True)
    assert [int(windows[i]["inputs"][0]) // T for i in range(20)] == ORDER_OF_SEED_5


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("threads", [0, 3])
def test_grain_gives_the_batches_of_the_plain_loop(shuffle, threads):
    """Same values, same order, across epochs (10 windows, batches of 3), from any start."""
    store = _store(10 * T + 3)
    for start in (0, 4):
        loader = make_loader(store, T, B, 1, shuffle, start, threads)
        plain = plain_batches(store, T, B, 1, shuffle, start)
        for batch, wanted in itertools.islice(zip(loader, plain, strict=False), 12):
            assert _equal(batch, wanted) and batch["inputs"].shape == (B, T)
        loader.close()


def test_resume_is_bitwise():
    """A state taken at batch k, through JSON, continues as if nothing had happened; seeking back as well."""
    store = _store(10 * T + 3)
    reference = list(itertools.islice(plain_batches(store, T, B, 2, True), 20))
    for k in (0, 1, 7):
        loader = make_loader(store, T, B, 2, True)
        for _ in range(k):
            next(loader)
        state = json.loads(json.dumps(loader.get_state()))
        next(loader), next(loader)
        resumed = make_loader(store, T, B, 2, True)
        next(resumed)
        for restored in (resumed, loader):
            restored.set_state(state)
            assert restored.get_state() == state
            assert all(_equal(next(restored), wanted) for wanted in reference[k : k + 10])
            restored.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": _store(80, "b")}, "shards was"),
        ({"seq_len": 4}, "seq_len was 8, now it is 4"),
        ({"batch_size": 5}, "batch_size was 3, now it is 5"),
        ({"seed": 9}, "seed was 0, now it is 9"),
        ({"shuffle": False}, "shuffle was True, now it is False"),
    ],
)
def test_the_state_of_another_dataset_is_refused(change, message):
    """With what differs; and anything that is no state."""
    told = {"store": _store(80), "seq_len": T, "batch_size": B, "seed": 0, "shuffle": True}
    state = make_loader(**told).get_state()
    other = make_loader(**{**told, **change})
    with pytest.raises(DataError, match=f"belongs to another dataset: {message}"):
        other.set_state(state)
    for nonsense in ({}, {"next_batch": -1, "dataset": state["dataset"]}, {"next_batch": 3}):
        with pytest.raises(DataError, match="no state of a loader"):
            other.set_state(nonsense)


def test_validation_batches_are_spread_evenly_and_padded():
    """All windows if there are few; else evenly spaced ones; rows that fill the last batch have no loss."""
    store = _store(7 * T + 1)
    batches = list(eval_batches(store, T, B, 100))
    assert [b["inputs"].shape for b in batches] == [(B, T)] * 3
    rows = np.concatenate([b["inputs"][b["loss_mask"][:, 0] == 1] for b in batches])
    assert rows.ravel().tolist() == list(range(7 * T))
    assert batches[-1]["loss_mask"].sum() == T and batches[-1]["inputs"][1:].sum() == 0
    spread = list(eval_batches(_store(60 * T + 1), T, B, 2))
    assert [int(r[0]) // T for b in spread for r in b["inputs"]] == [0, 10, 20, 30, 40, 50]
    assert all(_equal(a, b) for a, b in zip(spread, eval_batches(_store(60 * T + 1), T, B, 2), strict=True))


def test_bigram_loss_approaches_the_entropy_of_a_markov_chain():
    """Above the exact entropy rate by less than 1 %; the unigram stays at its own entropy."""
    rng = np.random.default_rng(0)
    V, n = 12, 200_000
    transition = rng.dirichlet(np.full(V, 0.3), V)
    cumulative, draws = transition.cumsum(1), rng.random(n)
    chain = np.zeros(n, np.uint16)
    for i in range(1, n):
        chain[i] = min(V - 1, np.searchsorted(cumulative[chain[i - 1]], draws[i]))
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    entropy = -(stationary[:, None] * transition * np.log(np.maximum(transition, 1e-300))).sum()
    train, val = chain[: n // 2], chain[n // 2 :]
    assert 0.99 * entropy < bigram_loss(train, val, V) < 1.01 * entropy
    assert unigram_loss(train, val, V) == pytest.approx(-(stationary * np.log(stationary)).sum(), rel=0.01)


def test_bigram_table_is_a_distribution_also_for_what_it_never_saw():
    """Probabilities of all followers of seen and unseen tokens sum to one."""
    from jaxlm.data.baselines import _DISCOUNTS, _STRENGTHS, _bigram_loss, _Counts

    counts = _Counts(np.array([0, 1, 0, 2, 2, 1, 0, 1]), 5)
    for left in range(5):
        for setting in itertools.product(_DISCOUNTS, _STRENGTHS):
            losses = [_bigram_loss(counts, np.array([left, right]), [setting])[0] for right in range(5)]
            assert np.exp(-np.array(losses)).sum() == pytest.approx(1.0, abs=1e-12)


def test_bigram_beats_unigram_on_the_corpus_and_is_never_worse(tmp_path):
    """Real text, much and little of it; on independent draws both are equal."""
    texts = [d.text for d in open_corpus("", "text")][:40]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    corpus, tokenizer = open_corpus(str(tmp_path / "a.jsonl"), "text"), Tokenizer.train(texts, 512)
    prepare(corpus, tokenizer, tmp_path / "out", 0.1, 100)
    train, val = (open_shards(tmp_path / "out" / s, 512) for s in ("train", "val"))
    assert bigram_loss(train, val, 512) < 0.75 * unigram_loss(train, val, 512)
    assert bigram_loss(train, val, 512, 10_000) < unigram_loss(train, val, 512, 10_000)
    assert bigram_loss(train, val, 512, 1000) < unigram_loss(train, val, 512, 1000) + 0.01
    noise = np.random.default_rng(0).integers(0, 500, 20_000)
    assert (
        bigram_loss(noise[:5000], noise[5000:], 500) <= unigram_loss(noise[:5000], noise[5000:], 500) + 1e-3
    )


def test_gzip_floor_is_bits_per_byte():
    """Noise costs eight bits per byte, repetition almost none."""
    assert gzip_bits_per_byte(np.random.default_rng(0).bytes(100_000)) == pytest.approx(8.0, rel=0.01)
    assert gzip_bits_per_byte(b"abc" * 100_000) < 0.05
    with pytest.raises(ValueError, match="at least one byte"):
        gzip_bits_per_byte(b"")
