"""What a model has to beat, against exact values: n-gram tables and gzip."""

import itertools
import json

import numpy as np
import pytest

from jaxlm.data.baselines import bigram_loss, gzip_bits_per_byte, unigram_loss
from jaxlm.data.corpus import open_corpus
from jaxlm.data.prepare import prepare
from jaxlm.data.shards import open_shards
from jaxlm.tokenizer import Tokenizer


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
