"""Documents of a window kept apart, against a loop over tokens, and against training on them one by one."""

import numpy as np
import pytest
from helpers import tiny, tiny_run
from tolerances import tolerance

from jaxlm.data.loader import LoaderSettings, eval_batches, plain_batches
from jaxlm.data.packing import pack
from jaxlm.data.shards import TokenStore
from jaxlm.model import init_params
from jaxlm.train import make_eval_step, place_batch

T, V = 19, 61


def _store(lengths, seed=0):
    """Documents of these lengths, random tokens, in three shards."""
    n = sum(lengths)
    tokens = np.random.default_rng(seed).integers(0, V, n).astype(np.uint16)
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    meta = {"dtype": "uint16", "shards": [{"sha256": str(seed)}], "tokenizer": "t"}
    return TokenStore([tokens[: n // 3], tokens[n // 3 : n // 2], tokens[n // 2 :]], meta, starts)


def _lengths(seed, mean, n):
    return [int(x) for x in 1 + np.random.default_rng(seed).geometric(1 / mean, n)]


def _written_out(store, start):
    """Segments, positions and mask of the window at `start`, token by token."""
    begins = set(store.document_starts(0, len(store)).tolist())
    segment, position = 1, 0
    segments, positions, mask = [], [], []
    for t in range(T):
        if t > 0 and start + t in begins:
            segment, position = segment + 1, 0
        segments.append(segment)
        positions.append(position)
        mask.append(0.0 if start + t + 1 in begins else 1.0)
        position += 1
    return segments, positions, mask


@pytest.mark.parametrize("mean", [1, 2, 7, 20, 500])
def test_a_packed_window_is_what_a_loop_over_its_tokens_makes(mean):
    """At every offset: documents of one token, shorter and longer than the window, borders at both of its ends."""
    store = _store(_lengths(3, mean, 600 // mean + 3))
    starts = np.arange(len(store) - T)
    packed = pack(store, starts, T)
    assert [packed[k].dtype for k in ("segments", "positions", "loss_mask")] == [
        np.int32,
        np.int32,
        np.float32,
    ]
    for i, start in enumerate(starts.tolist()):
        segments, positions, mask = _written_out(store, start)
        assert packed["segments"][i].tolist() == segments
        assert packed["positions"][i].tolist() == positions
        assert packed["loss_mask"][i].tolist() == mask


def test_packing_changes_no_token():
    """Inputs, targets and their order are those without packing; nothing else is added than what packing is."""
    store = _store(_lengths(1, 9, 80))
    plain = plain_batches([store], LoaderSettings(T, 4, 0, True))
    packed = plain_batches([store], LoaderSettings(T, 4, 0, True, packing=True))
    for _ in range(20):
        a, b = next(plain), next(packed)
        assert b.keys() - a.keys() == {"segments", "positions"}
        assert np.array_equal(a["inputs"], b["inputs"]) and np.array_equal(a["targets"], b["targets"])
        assert a["loss_mask"].all() and not b["loss_mask"].all()


@pytest.mark.parametrize(("moe", "position"), [(None, "rope"), ({}, "learned")], ids=["dense", "moe"])
def test_the_loss_of_packed_rows_is_that_of_their_documents_one_by_one(moe, position, x64):
    """float64: each document a row of its own from its first column, no segments; what follows it carries no loss."""
    run = tiny_run(tiny(moe, position=position))
    params, evaluate = init_params(run.model, 1, np.float64), make_eval_step(run)
    batch = next(plain_batches([_store(_lengths(2, 6, 200))], LoaderSettings(T, 4, 0, True, packing=True)))
    rows = []
    for row in range(4):
        for segment in range(1, batch["segments"][row].max() + 1):
            own = np.flatnonzero(batch["segments"][row] == segment)
            alone = {key: np.zeros(T, batch[key].dtype) for key in ("inputs", "targets", "loss_mask")}
            for key, value in alone.items():
                value[: len(own)] = batch[key][row, own]
            alone["loss_mask"][: len(own) - 1] = (
                1  # all but the last token's, whose target may be another document's
            )
            rows.append(alone)
    assert len(rows) > 10
    apart = evaluate(params, place_batch({key: np.stack([row[key] for row in rows]) for key in rows[0]}))
    together = evaluate(params, place_batch(batch))
    assert float(apart["tokens"]) == float(together["tokens"]) < 4 * T
    assert abs(float(together["loss_sum"]) / float(apart["loss_sum"]) - 1) < tolerance("f64_packed")


def test_rows_that_fill_a_validation_batch_count_for_nothing(x64):
    """Segment 0, no loss, and finite: the sums are those of the rows that are there."""
    run = tiny_run(tiny())
    params, evaluate = init_params(run.model, 1, np.float64), make_eval_step(run)
    store = _store([5 * T // 2, T // 2, 3 * T])
    (batch,) = eval_batches([store], LoaderSettings(T, 8, 0, True, packing=True), 1)
    there = (batch["segments"] > 0).all(axis=1)
    assert there.tolist() == [True] * 5 + [False] * 3
    assert not any(value[~there].any() for value in batch.values())
    whole = evaluate(params, place_batch(batch))
    rows = evaluate(params, place_batch({key: value[there] for key, value in batch.items()}))
    assert float(whole["tokens"]) == float(rows["tokens"]) == 5 * T - 2
    assert abs(float(whole["loss_sum"]) / float(rows["loss_sum"]) - 1) < tolerance("f64_packed")
