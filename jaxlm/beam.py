"""Beam search: the likeliest answers that keeping the `num_beams` best beginnings finds. Twin: torchref/beam.py.

    score(beginning + token) = score(beginning) + processed log p(token | beginning)
    score(answer) = its last score / length ** length_penalty

Candidates, bookkeeping and the rules for stopping are those of transformers' beam search, token for token. Log-softmax
comes first, then the penalties of jaxlm/logits.py; a length counts the answer's tokens, its stop id included. On equal
scores the earlier beam comes first, then the lower id. The device reorders the cache, takes the step and finds the
candidates, in one dispatch a token; the bookkeeping is numpy's.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.attention import KVCache
from jaxlm.cached import DecodeState, prefill, select_rows, step
from jaxlm.logits import History, extend, init_history, process, select_history
from jaxlm.model import Params, Split
from jaxlm.sampling import Answer, Numbers, Sampling

WORST = -1e9  # taken from scores that must not win; finite, so that they keep their order


def beam_search(model: Split, prompts: Sequence[Sequence[int]], settings: Sampling) -> list[list[Answer]]:
    """The best `samples` answers to each prompt, best first, scored. An answer does not depend on other prompts.

    Raises ConfigError as `prefill` does, above all when a prompt and the longest answer do not fit.
    """
    P, N, M = len(prompts), settings.num_beams, settings.max_new_tokens
    logits, state = prefill(model, prompts, max(map(len, prompts), default=0) + M)
    slots = state.cache.segment.shape[1]
    beams = jnp.asarray(np.repeat(np.arange(P, dtype=np.int32), N))
    history = init_history(settings, prompts, slots, logits.shape[1])
    logits, state, history = logits[beams], select_rows(state, beams), select_history(history, beams)
    # Of all candidates, so many may end that the beams still need as many others.
    keep = min(max(2, 1 + len(settings.stop)), logits.shape[1]) * N
    run = _compiled(model.graphdef, settings.no_repeat_ngram, keep)
    running = _nothing(P, N, M, jnp.promote_types(logits.dtype, jnp.float32))
    running.scores[:, 0] = 0  # all beams are the prompt; only the first may grow
    done = _nothing(P, N, M, running.scores.dtype)
    can_improve = np.ones((P, 1), bool)
    found = run.candidates(logits, running.scores, history, settings.numbers)
    cache, positions = state.cache, state.positions
    for length in range(1, M + 1):
        scores, beams, ids, logprobs = map(np.asarray, found)
        grown, parents = _grow(running, scores, beams, ids, logprobs, length)
        ends = np.isin(grown.ids[:, :, length - 1], settings.stop) | (length == M)
        done = _finish(done, grown, ends, can_improve, length, settings)
        scores = grown.scores + ends * _number(WORST, grown)
        order = _best(scores, N)
        running = grown._replace(scores=scores).pick(order)
        can_improve = can_improve & _improvable(running, done, length, settings)
        if not can_improve.any() or ends.all() or (settings.early_stopping == "yes" and done.finished.all()):
            break
        rows = (np.take_along_axis(parents, order, axis=1) + np.arange(P)[:, None] * N).ravel()
        tokens = running.ids[:, :, length - 1].ravel()
        found, cache, positions, history = run.advance(
            model.params, cache, history, positions, rows, tokens, running.scores, settings.numbers
        )
    return [[_answer(done, row, sample, settings) for sample in range(settings.samples)] for row in range(P)]


class _Hypotheses(NamedTuple):
    """Answers or beginnings of P prompts, N of each, best first; P = prompts, N = beams or candidates."""

    ids: np.ndarray  # [P, N, M]
    logprobs: np.ndarray  # [P, N, M], the model's own
    scores: np.ndarray  # [P, N]
    lengths: np.ndarray  # [P, N]
    finished: np.ndarray  # [P, N]

    def pick(self, order: np.ndarray) -> "_Hypotheses":
        """Those of the given places, [P, N2], in their order."""
        rows = np.arange(order.shape[0])[:, None]
        return _Hypotheses(*(field[rows, order] for field in self))


def _nothing(P: int, N: int, M: int, dtype: Any) -> _Hypotheses:
    scores = np.full((P, N), WORST, dtype)
    ids, lengths = np.zeros((P, N, M), np.int32), np.zeros((P, N), np.int32)
    return _Hypotheses(ids, np.zeros((P, N, M), dtype), scores, lengths, np.zeros((P, N), bool))


def _number(x: float, like: _Hypotheses) -> Any:
    """A number as wide as the scores: a boolean times it would be float64."""
    return like.scores.dtype.type(x)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` best of each prompt, [P, count], best first; the earlier on ties."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _grow(
    running: _Hypotheses,
    scores: np.ndarray,
    parents: np.ndarray,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    length: int,
) -> tuple[_Hypotheses, np.ndarray]:
    """The candidates, [P, K], as hypotheses of `length` tokens, and the beam that each continues."""
    grown = running.pick(parents)
    grown.ids[:, :, length - 1] = tokens
    grown.logprobs[:, :, length - 1] = logprobs
    return grown._replace(scores=scores, lengths=np.full_like(grown.lengths, length)), parents


def _finish(
    done: _Hypotheses,
    grown: _Hypotheses,
    ends: np.ndarray,
    can_improve: np.ndarray,
    length: int,
    settings: Sampling,
) -> _Hypotheses:
    """The best finished answers, with those candidates that end now and are among the first `num_beams`."""
    finished = ends & (np.arange(ends.shape[1]) < settings.num_beams)
    full = done.finished.all(axis=1, keepdims=True) & (settings.early_stopping == "yes")
    scores = grown.scores / length**settings.length_penalty
    for barred in (full, ~can_improve, ~finished):
        scores = scores + barred * _number(WORST, grown)
    new = grown._replace(scores=scores, finished=finished)
    merged = _Hypotheses(*(np.concatenate(pair, axis=1) for pair in zip(done, new)))
    return merged.pick(_best(merged.scores, settings.num_beams))


def _improvable(running: _Hypotheses, done: _Hypotheses, length: int, settings: Sampling) -> np.ndarray:
    """Whether the best beginning might still beat the worst finished answer, [P, 1]; by estimate, except "never"."""
    grows = settings.early_stopping == "never" and settings.length_penalty > 0
    longest = settings.max_new_tokens if grows else length
    best = running.scores[:, :1] / longest**settings.length_penalty
    worst = np.where(done.finished, done.scores.min(axis=1, keepdims=True), WORST)
    return (best > worst).any(axis=1, keepdims=True)


def _answer(done: _Hypotheses, row: int, sample: int, settings: Sampling) -> Answer:
    length = int(done.lengths[row, sample])
    ids, logprobs = done.ids[row, sample, :length].tolist(), done.logprobs[row, sample, :length].tolist()
    stopped = bool(ids) and ids[-1] in settings.stop
    if stopped:
        ids, logprobs = ids[:-1], logprobs[:-1]
    score = float(done.scores[row, sample])
    return Answer(ids, logprobs if settings.logprobs else [], "stop" if stopped else "length", score)


class _Compiled(NamedTuple):
    """The jitted functions of one model and one search."""

    candidates: Callable[..., Any]
    advance: Callable[..., Any]


@functools.lru_cache(maxsize=16)
def _compiled(graphdef: Any, ngram: int, keep: int) -> _Compiled:
    def candidates(logits: Array, scores: Array, history: History, numbers: Numbers) -> tuple[Array, ...]:
        """The best `keep` continuations of each prompt, [P, keep]: scores, beams, ids, log-probabilities."""
        P, V = scores.shape[0], logits.shape[1]
        own = jax.nn.log_softmax(logits.astype(scores.dtype), axis=-1)
        processed = process(own, numbers, 0, ngram, history)
        total = (processed + scores.reshape(-1, 1)).reshape(P, -1)
        best, places = jax.lax.top_k(total, keep)
        logprobs = jnp.take_along_axis(own.reshape(P, -1), places, axis=1)
        return best, places // V, places % V, logprobs

    def advance(
        params: Params,
        cache: KVCache,
        history: History,
        positions: Array,
        rows: Array,
        tokens: Array,
        scores: Array,
        numbers: Numbers,
    ) -> tuple[tuple[Array, ...], KVCache, Array, History]:
        """The cache reordered to `rows`, one token each, and the next candidates; scores are the beams' with it."""
        state = select_rows(DecodeState(cache, positions, 0), rows)
        logits, cache, positions = step(graphdef, params, state.cache, tokens, state.positions)
        history = extend(select_history(history, rows), tokens)
        return candidates(logits, scores, history, numbers), cache, positions, history

    return _Compiled(jax.jit(candidates), jax.jit(advance, donate_argnums=(1, 2)))
