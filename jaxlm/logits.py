"""Choosing the next token: penalties, then filters, then the largest of logits + noise. Twin: torchref/logits.py.

    repetition, presence, frequency, n-grams -> / temperature -> top-k -> top-p -> min-p -> argmax(. + noise)

Order and definitions are those of transformers' logits processors, with ties cut at the lower id first; presence and
frequency penalties are OpenAI's. Adding Gumbel noise and taking the largest is sampling from the softmax
(arXiv:1611.01144, section 2). Everything here may be traced; only top_k, ngram and shapes are compiled in.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxlm.sampling import Numbers, Sampling
from jaxlm.shapes import Bool, Float, Int


class History(NamedTuple):
    """What penalties need to know of each row so far; a field is None where the settings do not need it."""

    seen: Bool[Array, "B V"] | None  # ids of prompt and answer
    counts: Int[Array, "B V"] | None  # how often the answer holds each id
    ids: Int[Array, "B S"] | None  # prompt and answer, left-padded with -1; -1 where nothing is written yet
    length: Int[Array, ""] | None  # columns of `ids` in use


def init_history(
    settings: Sampling, prompts: Sequence[Sequence[int]], slots: int, vocab_size: int
) -> History:
    """The history of rows that hold their prompts and no answer yet, with room for `slots` ids a row.

    The prompts' ids must lie in the vocabulary, and the longest prompt and answer in `slots`.
    """
    shape = (len(prompts), vocab_size)
    longest = max(map(len, prompts))
    seen = counts = ids = length = None
    if settings.repetition_penalty != 1:
        rows = np.zeros(shape, bool)
        for row, prompt in zip(rows, prompts):
            row[list(prompt)] = True
        seen = jnp.asarray(rows)
    if settings.presence_penalty != 0 or settings.frequency_penalty != 0:
        counts = jnp.zeros(shape, jnp.int32)
    if settings.no_repeat_ngram > 0:
        padded = np.full((len(prompts), slots), -1, np.int32)
        for row, prompt in zip(padded, prompts):
            row[longest - len(prompt) : longest] = prompt
        ids, length = jnp.asarray(padded), jnp.asarray(longest, jnp.int32)
    return History(seen, counts, ids, length)


def extend(history: History, tokens: Int[Array, " B"]) -> History:
    """The history after each row's answer got one more token."""
    seen, counts, ids, length = history
    rows = jnp.arange(tokens.shape[0])
    if seen is not None:
        seen = seen.at[rows, tokens].set(True)
    if counts is not None:
        counts = counts.at[rows, tokens].add(1)
    if ids is not None and length is not None:
        ids = jax.lax.dynamic_update_slice_in_dim(ids, tokens[:, None].astype(ids.dtype), length, axis=1)
        length = length + 1
    return History(seen, counts, ids, length)


def select_history(history: History, rows: Int[Array, " R"]) -> History:
    """Rows of the batch picked, repeated or reordered, as cached.select_rows does to the cache."""
    seen, counts, ids = (None if field is None else field[rows] for field in history[:3])
    return History(seen, counts, ids, history.length)


def process(
    logits: Float[Array, "B V"], numbers: Numbers, top_k: int, ngram: int, history: History | None = None
) -> Float[Array, "B V"]:
    """All settings applied in their order, in float32 or wider; -inf for tokens that must not come.

    top_k and ngram: 0 = off. history: what the penalties among the settings need; None where there are none.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if history is not None:
        if numbers.repetition_penalty is not None and history.seen is not None:
            logits = repetition_penalty(logits, history.seen, numbers.repetition_penalty)
        if history.counts is not None:
            presence, frequency = numbers.presence_penalty, numbers.frequency_penalty
            logits = presence_frequency(
                logits,
                history.counts,
                0.0 if presence is None else presence,
                0.0 if frequency is None else frequency,
            )
        if ngram > 0 and history.ids is not None and history.length is not None:
            logits = ban_ngrams(logits, history.ids, history.length, ngram)
    if numbers.temperature is None:
        return logits
    logits = scale_by_temperature(logits, numbers.temperature)
    logits = keep_top_k(logits, top_k)
    if numbers.tail is not None:
        logits = keep_top_p(logits, numbers.tail)
    if numbers.min_p is not None:
        logits = keep_min_p(logits, numbers.min_p)
    return logits


def repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Array
) -> Float[Array, "B V"]:
    """Logits of seen ids times `penalty` where negative, else divided by it (arXiv:1909.05858, section 4.1)."""
    penalty = jnp.asarray(penalty, logits.dtype)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def presence_frequency(
    logits: Float[Array, "B V"], counts: Int[Array, "B V"], presence: float | Array, frequency: float | Array
) -> Float[Array, "B V"]:
    """logits - presence [count > 0] - frequency count, as in OpenAI's API reference."""
    presence, frequency = jnp.asarray(presence, logits.dtype), jnp.asarray(frequency, logits.dtype)
    held, often = (counts > 0).astype(logits.dtype), counts.astype(logits.dtype)
    return logits - (presence * held + frequency * often)


def ban_ngrams(
    logits: Float[Array, "B V"], ids: Int[Array, "B S"], length: int | Array, ngram: int
) -> Float[Array, "B V"]:
    """-inf for each id that would complete a run of `ngram` ids which the row holds already."""
    windows = ids.shape[1] - ngram + 1
    if windows < 1:
        return logits
    # An id follows a window of n - 1 others; where these are the row's last n - 1, it must not come again.
    banned = ids[:, ngram - 1 :] >= 0
    start = jnp.maximum(jnp.asarray(length) - (ngram - 1), 0)
    for i in range(ngram - 1):
        last = jax.lax.dynamic_slice_in_dim(ids, start + i, 1, axis=1)
        banned &= (ids[:, i : i + windows] == last) & (last >= 0)
    targets = jnp.where(banned, ids[:, ngram - 1 :], logits.shape[1])
    rows = jnp.arange(ids.shape[0])[:, None]
    return logits.at[rows, targets].set(-jnp.inf, mode="drop")


def scale_by_temperature(logits: Float[Array, "B V"], temperature: float | Array) -> Float[Array, "B V"]:
    """Logits divided by the temperature."""
    return logits / jnp.asarray(temperature, logits.dtype)


def keep_top_k(logits: Float[Array, "B V"], top_k: int) -> Float[Array, "B V"]:
    """-inf for all but the `top_k` largest and what ties with the last of them; 0 keeps all. NaN is largest."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    # XLA puts a NaN of negative sign, which is what x86 makes of inf - inf, below everything.
    ranked = jnp.where(jnp.isnan(logits), jnp.nan, logits)
    smallest = jax.lax.top_k(ranked, top_k)[0][:, -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], tail: float | Array) -> Float[Array, "B V"]:
    """-inf for the least likely tokens as long as their probabilities sum to `tail` = 1 - top_p at most.

    Among equal logits the lower ids go first; one token stays always. Nothing goes from a row that has no softmax
    (a NaN, +inf, or -inf alone). It is what sorting would find (arXiv:1904.09751, section 3.1), without the sort: the
    first logit to stay is found by bisection, in as many sums over the vocabulary as a logit has bits.
    """
    tail = jnp.asarray(tail, logits.dtype)
    probs, keys = _softmax(logits), _keys(logits)
    cut = jnp.minimum(_bisect(probs, keys, tail), jnp.max(keys, axis=-1, keepdims=True))
    below, tied = keys < cut, keys == cut
    rank = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)
    mass = jnp.sum(jnp.where(below, probs, 0), axis=-1, keepdims=True) + rank.astype(probs.dtype) * probs
    gone = below | (tied & (mass <= tail) & (rank < rank[:, -1:]))
    return jnp.where(gone, -jnp.inf, logits)


def keep_min_p(logits: Float[Array, "B V"], min_p: float | Array) -> Float[Array, "B V"]:
    """-inf for tokens less than `min_p` times as likely as the likeliest (arXiv:2407.01082)."""
    probs = _softmax(logits)
    least = jnp.asarray(min_p, probs.dtype) * jnp.max(probs, axis=-1, keepdims=True)
    return jnp.where(probs < least, -jnp.inf, logits)


def gumbel(
    seed: int | Array, step: int | Array, rows: Int[Array, " B"], vocab_size: int, dtype: DTypeLike
) -> Float[Array, "B V"]:
    """The noise for token number `step` of the answers `rows`: a pure function of (seed, step, row)."""
    key = jax.random.fold_in(jax.random.key(jnp.asarray(seed, jnp.uint32)), step)
    draw = functools.partial(jax.random.gumbel, shape=(vocab_size,), dtype=dtype)
    return jax.vmap(lambda row: draw(jax.random.fold_in(key, row)))(rows)


def choose(logits: Float[Array, "B V"], noise: Float[Array, "B V"] | None = None) -> Int[Array, " B"]:
    """The next token of each row: the largest logit, plus noise where given; the lowest id on ties.

    logits: of `process`. noise: standard Gumbel, for a token of their softmax; None = the most likely token.
    """
    return jnp.argmax(logits if noise is None else logits + noise, axis=-1).astype(jnp.int32)


def _softmax(logits: Array) -> Array:
    """NaN all along a row that holds NaN or +inf, or nothing but -inf."""
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _keys(x: Array) -> Array:
    """Integers that are ordered, and equal, as the numbers are."""
    bits = jnp.finfo(x.dtype).bits
    integers: Any = {32: jnp.int32, 64: jnp.int64}[bits]
    raw = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), integers)
    return raw ^ ((raw >> (bits - 1)) & jnp.iinfo(integers).max)


def _bisect(probs: Array, keys: Array, tail: Array) -> Array:
    """The smallest key, [B 1], up to which the probabilities sum to more than `tail`; the largest of all if none."""
    limits = jnp.iinfo(keys.dtype)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean of two integers, without overflow
        enough = ~(jnp.sum(jnp.where(keys <= middle, probs, 0), axis=-1, keepdims=True) <= tail)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    column = (keys.shape[0], 1)
    bounds = jnp.full(column, limits.min, keys.dtype), jnp.full(column, limits.max, keys.dtype)
    return jax.lax.fori_loop(0, limits.bits, halve, bounds)[1]
