"""The plan of windows: every token once, with the context that was stated, whatever the batch."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import ConfigError
from jaxlm.windows import WIDTHS, Scores, Window, as_documents, batches, check_window, plan

LENGTHS = st.lists(st.integers(0, 40), max_size=6)


def documents_of(lengths: Sequence[int]) -> list[np.ndarray]:
    """Documents whose ids say where they stand: 100 * document + place."""
    return [100 * d + np.arange(n) for d, n in enumerate(lengths)]


def fake_scores(lengths: Sequence[int], window: int, stride: int, rows: int) -> Scores:
    """Scores of a model whose log-probability is -(target + 1000 * tokens it may see), computed batch by batch."""
    documents = documents_of(lengths)
    scores = Scores.empty(documents)
    for batch in batches(documents, plan(lengths, window, stride), rows):
        seen = np.cumsum(batch.segments, axis=1)
        values = np.where(batch.segments > 0, -(batch.targets + 1000.0 * seen), np.nan)
        scores.put(batch, values, batch.targets % 2 == 0)
    return scores


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.data())
def test_every_token_is_scored_once_with_its_context(
    lengths: list[int], window: int, data: st.DataObject
) -> None:
    """Counted one by one: each target once, its window long enough, its context at least window - stride."""
    stride = data.draw(st.integers(1, window))
    times = [np.zeros(n, int) for n in lengths]
    for document, start, stop, first in plan(lengths, window, stride):
        assert stop - start == min(window, lengths[document] - 1)
        for target in range(first, stop + 1):
            times[document][target] += 1
            context = target - start
            assert min(target, window - stride + 1) <= context <= window
    for count in times:
        assert count[:1].sum() == 0 and (count[1:] == 1).all()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 5), st.data())
def test_scores_land_at_their_tokens(lengths: list[int], window: int, rows: int, data: st.DataObject) -> None:
    """A token's value is that of its own row and column, no value is padding's, and the context is what was read."""
    stride = data.draw(st.integers(1, window))
    scores = fake_scores(lengths, window, stride, rows)
    for document, ids in enumerate(documents_of(lengths)):
        context = scores.context[document]
        assert (context[:1] == 0).all() and (context[1:] > 0).all()
        np.testing.assert_array_equal(scores.logprobs[document][1:], -(ids + 1000.0 * context)[1:])
        assert np.isnan(scores.logprobs[document][:1]).all()
        np.testing.assert_array_equal(scores.greedy[document][1:], ids[1:] % 2 == 0)


def test_the_example_of_the_docstring() -> None:
    """Eight tokens, windows of four, every two."""
    assert plan([8], 4, 2) == [Window(0, 0, 4, 1), Window(0, 2, 6, 5), Window(0, 3, 7, 7)]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 5))
def test_batches_have_few_shapes_and_hold_every_window(lengths: list[int], window: int, rows: int) -> None:
    """At most WIDTHS widths, one count of rows; inputs and targets are neighbours; padding has segment 0."""
    windows, documents = plan(lengths, window, window), documents_of(lengths)
    made = list(batches(documents, windows, rows))
    assert sorted(w for batch in made for w in batch.windows) == sorted(windows)
    assert len({batch.inputs.shape for batch in made}) <= WIDTHS
    assert len({batch.inputs.shape[0] for batch in made}) <= 1
    for batch in made:
        used = batch.segments > 0
        assert used.sum() == sum(w.stop - w.start for w in batch.windows)
        np.testing.assert_array_equal(batch.targets[used], batch.inputs[used] + 1)
        assert not batch.inputs[~used].any() and not batch.targets[~used].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan([5], 0, 1), "window=0 must be at least 1"),
        (lambda: plan([5], 4, 0), "stride=0 must be between 1 and the window of 4"),
        (lambda: plan([5], 4, 5), "stride=5 must be between 1 and the window of 4"),
        (lambda: list(batches([np.arange(5)], plan([5], 4, 4), 0)), "batch_size=0 must be at least 1"),
        (lambda: check_window(plan([9], 8, 8), 7), "window of 8 tokens exceeds the model's context of 7"),
        (lambda: as_documents([[1], [2, 61]], None, 61), "document 1 holds id 61, outside the model's"),
        (lambda: as_documents([[-1]], 3, 61), "document 0 holds id -1"),
        (lambda: as_documents([[1]], 61, 61), "document 0 holds id 61"),
    ],
)
def test_refuses_what_cannot_be(call, message: str) -> None:
    """One line with the value that is wrong."""
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_token_in_front_is_context_only() -> None:
    """It stands before each document, gives the first token a context of one, and has no score itself."""
    documents = as_documents([[7, 8], []], 5, 10)
    assert [ids.tolist() for ids in documents] == [[5, 7, 8], [5]]
    scores = Scores.empty(documents)
    for batch in batches(documents, plan([3, 1], 4, 2), 3):
        scores.put(batch, -batch.inputs.astype(float), batch.targets > 7)
    scores = scores.without_front()
    assert [values.tolist() for values in scores.logprobs] == [[-5.0, -7.0], []]
    assert scores.context[0].tolist() == [1, 2] and scores.greedy[0].tolist() == [False, True]
