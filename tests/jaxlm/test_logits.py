"""Choosing the next token: definitions written out as loops, and the same inside and outside of jit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from tolerances import tolerance

from jaxlm.logits import (
    History,
    ban_ngrams,
    choose,
    extend,
    gumbel,
    init_history,
    keep_top_p,
    presence_frequency,
    process,
)
from jaxlm.sampling import Sampling

B, V, STEPS = 5, 17, 24
PROMPTS = [[3, 4, 3, 4, 3], [1], [2, 2], [9, 8, 7, 6], [5, 5, 5]]
EVERYTHING = Sampling(
    max_new_tokens=STEPS,
    temperature=0.8,
    top_k=9,
    top_p=0.93,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    no_repeat_ngram=3,
)


noise_of = jax.jit(gumbel, static_argnums=(3, 4))


def step(history: History, logits: Any, number: Any) -> tuple[Any, History]:
    """One token of every row."""
    rules = EVERYTHING.top_k, EVERYTHING.no_repeat_ngram
    processed = process(logits, EVERYTHING.numbers, *rules, history)
    tokens = choose(processed, noise_of(7, number, jnp.arange(B), V, processed.dtype))
    return tokens, extend(history, tokens)


@pytest.fixture(scope="module")
def written() -> np.ndarray:
    """Tokens [STEPS, B] chosen from fixed logits in one loop on the device."""
    logits = table()
    history = init_history(EVERYTHING, PROMPTS, 5 + STEPS, V)

    def more(carry: Any) -> Any:
        return carry[0] < STEPS

    def one(carry: Any) -> Any:
        number, ids, history = carry
        tokens, history = step(history, logits[number], number)
        return number + 1, ids.at[number].set(tokens), history

    start = (jnp.zeros((), jnp.int32), jnp.zeros((STEPS, B), jnp.int32), history)
    loop = quick_jit(lambda start: jax.lax.while_loop(more, one, start))
    return np.asarray(loop(start)[1])


def table() -> Any:
    """Logits of every step."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, B, V)) * 2, jnp.float32)


def test_a_loop_on_the_device_chooses_what_single_steps_choose(written: np.ndarray) -> None:
    """All settings on, history carried through while_loop, against one jitted call per token."""
    history, logits = init_history(EVERYTHING, PROMPTS, 5 + STEPS, V), table()
    run = quick_jit(step)
    for number, expected in enumerate(written):
        tokens, history = run(history, logits[number], number)
        np.testing.assert_array_equal(tokens, expected)
    tokens, _ = step(init_history(EVERYTHING, PROMPTS, 5 + STEPS, V), logits[0], 0)
    np.testing.assert_array_equal(tokens, written[0])


def test_no_run_of_three_comes_twice(written: np.ndarray) -> None:
    """In prompt and answer together, row by row."""
    for prompt, answer in zip(PROMPTS, written.T.tolist()):
        ids = prompt + answer
        runs = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
        first = max(len(prompt) - 2, 0)  # runs before it are the prompt's own
        assert all(run not in runs[:i] for i, run in enumerate(runs) if i >= first)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    """Against the sum written out; the prompt's tokens cost nothing."""
    settings = Sampling(presence_penalty=0.75, frequency_penalty=-0.5)
    history = init_history(settings, PROMPTS, 9, V)
    answers = [[3, 3, 1], [1, 2, 3], [2, 2, 2], [0, 16, 0], [4, 5, 4]]
    for column in zip(*answers):
        history = extend(history, jnp.asarray(column))
    logits = table()[0]
    expected = np.array(logits)
    for row, answer in zip(expected, answers):
        for token in range(V):
            if token in answer:
                row[token] -= 0.75 - 0.5 * answer.count(token)
    np.testing.assert_array_equal(presence_frequency(logits, history.counts, 0.75, -0.5), expected)


@pytest.mark.parametrize("ngram", [1, 2, 3, 4, 7])
def test_ngrams_are_banned_as_a_loop_would(ngram: int) -> None:
    """Rows shorter than the n-gram ban nothing; padding is no token, and what is not written yet neither."""
    rng = np.random.default_rng(ngram)
    rows = [rng.integers(0, 3, length).tolist() for length in (1, 2, 3, 6, 9, 9)] + [[0] * 9]
    for free in (0, 3):
        ids = np.full((len(rows), 9 + free), -1, np.int32)
        expected = np.zeros((len(rows), 4), np.float32)
        for row, (known, out) in enumerate(zip(rows, expected)):
            ids[row, 9 - len(known) : 9] = known
            for i in range(len(known) - ngram + 1):
                if known[i : i + ngram - 1] == known[len(known) - ngram + 1 :]:
                    out[known[i + ngram - 1]] = -np.inf
        got = ban_ngrams(jnp.zeros((len(rows), 4)), jnp.asarray(ids), jnp.asarray(9), ngram)
        np.testing.assert_array_equal(got, expected)
        assert np.isinf(expected).any()


@pytest.mark.parametrize("levels", [None, 8.0, 1.0], ids=["distinct", "few ties", "many ties"])
def test_top_p_without_a_sort_is_top_p_by_sorting(levels: float | None) -> None:
    """32,000 tokens, sorted ascending by logit and then id by numpy in float64."""
    logits = np.random.default_rng(3).normal(size=(2, 32_000)) * 2
    logits = (logits if levels is None else np.round(logits * levels) / levels).astype(np.float32)
    for tail in (0.05, 0.3, 0.9, 1 - 1e-7):
        order = np.argsort(logits, axis=1, kind="stable")
        weights = np.exp(np.take_along_axis(logits, order, axis=1).astype(np.float64))
        mass = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
        gone = mass <= tail
        gone[:, -1] = False
        kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), tail)))
        for row in range(2):
            count = int((~gone[row]).sum())
            near = int((np.abs(mass[row] - tail) < tolerance("f32_top_p")).sum())
            assert abs(int(kept[row].sum()) - count) <= near
            assert kept[row, order[row, -int(kept[row].sum()) :]].all(), (
                "the likeliest stay, of ties the later"
            )
