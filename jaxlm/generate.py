"""Decoding: prompts in, tokens out, one at a time through the cache. Twin: torchref/generate.py.

    logits = f(prompt);   token = argmax(logits / temperature + noise);   logits = f(token | cache);   ...

Adding Gumbel noise and taking the largest is sampling from the softmax (arXiv:1611.01144, section 2). The
noise of a token is a pure function of (seed, its place in the answer, row), so an answer depends neither on
how many tokens one dispatch makes nor on the prompts beside it.

Rows of unequal prompts are padded on the left, so that all rows write the same cache slot; padding has
segment 0 and the first real token has position 0. On the right, prompts are padded to a power of two, whose
surplus the next tokens overwrite: one compilation serves every prompt of a bucket.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxlm.attention import KVCache, init_cache
from jaxlm.config import ConfigError, ModelConfig
from jaxlm.layers import add_bias
from jaxlm.model import Decoder, Params, Split, merge_model
from jaxlm.shapes import Float, Int

SMALLEST_BUCKET = 16
BURST = 32  # tokens of one dispatch at most; compiled once, whatever the number asked for
PATIENCE = 0.05  # seconds that a stream may keep back tokens for the sake of fewer dispatches


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = 64  # longest answer
    temperature: float = 1.0  # divides the logits; 0 = always the most likely token
    top_k: int = 0  # choose among this many most likely tokens (and ties with the last of them); 0 = all
    seed: int = 0  # of the noise
    stop: tuple[int, ...] = ()  # ids that end an answer and are not part of it

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature={self.temperature} must be finite and at least 0 (0 = greedy)")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must not be negative; 0 = no limit")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be between 0 and {2**32 - 1}")


class DecodeState(NamedTuple):
    """What the next token needs beside the parameters. Its buffers are donated: use the newest state only."""

    cache: KVCache
    positions: Int[Array, " B"]  # of the token that comes next in each row
    length: int  # slots in use, counted on the host


def gumbel(
    seed: int | Array, step: int | Array, rows: Int[Array, " B"], vocab_size: int, dtype: DTypeLike
) -> Float[Array, "B V"]:
    """The noise for token number `step` of the answers `rows`."""
    key = jax.random.fold_in(jax.random.key(jnp.asarray(seed, jnp.uint32)), step)
    draw = functools.partial(jax.random.gumbel, shape=(vocab_size,), dtype=dtype)
    return jax.vmap(lambda row: draw(jax.random.fold_in(key, row)))(rows)


def choose(
    logits: Float[Array, "B V"], settings: Sampling, noise: Float[Array, "B V"] | None = None
) -> Int[Array, " B"]:
    """The next token of each row; the lowest id on ties. `noise`: standard Gumbel, not needed when greedy."""
    return _choose(logits, settings.temperature or None, settings.top_k, noise)


def _choose(logits: Array, temperature: float | Array | None, top_k: int, noise: Array | None) -> Array:
    """`choose` with a temperature that may be traced; None = greedy."""
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert noise is not None, "sampling at a temperature needs noise"
    scaled = logits.astype(noise.dtype) / jnp.asarray(temperature, noise.dtype)
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(scaled, top_k)[0][:, -1:]
        scaled = jnp.where(scaled >= smallest, scaled, -jnp.inf)
    return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)


def prefill(
    model: Split, prompts: Sequence[Sequence[int]], slots: int
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Reads the prompts: the logits of each row's next token, and a state with room for `slots` tokens a row.

    Raises ConfigError when a prompt is empty, holds an id outside the vocabulary, or does not fit.
    """
    config = merge_model(*model).config
    _check(config, prompts, slots)
    if len(_groups(config, prompts)) > 1:
        raise ConfigError(
            "with attn_bias_table, prompts of one length are read together; `generate` sorts them"
        )
    longest = max(map(len, prompts))
    slots = min(_bucket(slots), config.context)
    padded = _pad(prompts, longest, min(_bucket(longest), slots))
    logits, cache = _compiled(model.graphdef).prefill(model.params, *padded, longest, slots)
    return logits, DecodeState(cache, jnp.asarray([len(p) for p in prompts], jnp.int32), longest)


def decode_step(
    model: Split, tokens: Int[Array, " B"], state: DecodeState
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Appends one token to each row: the logits of the next, and the new state; the old one is gone.

    Raises ConfigError when the cache is full. `generate` makes many tokens per dispatch and is faster.
    """
    _check_room(state, 1)
    logits, cache, positions = _compiled(model.graphdef).step(
        model.params, state.cache, jnp.asarray(tokens, jnp.int32), state.positions
    )
    return logits, DecodeState(cache, positions, state.length + 1)


def generate(
    model: Split,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    noise: Float[Array, "M B V"] | None = None,
) -> list[list[int]]:
    """The answer to each prompt, without the prompt and without the stop id.

    noise: Gumbel noise for each token of each row, instead of the seed's. Raises ConfigError when a prompt
    and the longest answer do not fit the model's context.
    """
    config = merge_model(*model).config
    _check(config, prompts, settings.max_new_tokens + max(map(len, prompts), default=0))
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in _groups(config, prompts):
        blocks = list(_blocks(model, prompts, rows, settings, noise, BURST))
        for row, ids in zip(rows, np.concatenate(blocks, axis=1).tolist()):
            answers[row] = list(_until_stop(ids, settings.stop))
    return answers


def stream(
    model: Split, prompt: Sequence[int], settings: Sampling, noise: Float[Array, "M 1 V"] | None = None
) -> Iterator[int]:
    """The same ids as `generate` for one prompt, as they come. Raises as `generate`, at once."""
    _check(merge_model(*model).config, [prompt], len(prompt) + settings.max_new_tokens)
    blocks = _blocks(model, [prompt], [0], settings, noise, 1)
    return _until_stop((token for block in blocks for token in block[0].tolist()), settings.stop)


def _until_stop(ids: Iterable[int], stop: tuple[int, ...]) -> Iterator[int]:
    return itertools.takewhile(lambda token: token not in stop, ids)


class _Draws(NamedTuple):
    """What choosing tokens on the device needs; all of it may be traced."""

    temperature: float | None  # None = greedy
    seed: Array
    rows: Array  # [B], numbers of the answers
    noise: Array | None  # [M, B, V]; None = the seed's
    stop: np.ndarray


def _blocks(
    model: Split,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    settings: Sampling,
    noise: Any,
    count: int,
) -> Iterator[np.ndarray]:
    """New ids [B, n] of the prompts `rows`, until every row has a stop id or is long enough.

    The first dispatch makes `count` ids, the next twice as many while one takes less than PATIENCE.
    """
    chosen = [prompts[row] for row in rows]
    numbers = jnp.asarray(rows, jnp.int32)
    logits, state = prefill(model, chosen, max(map(len, chosen)) + settings.max_new_tokens)
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    noise = None if noise is None else jnp.asarray(noise, wide)[:, numbers]
    stop = np.asarray(settings.stop, np.int32)
    draws = _Draws(settings.temperature or None, jnp.asarray(settings.seed, jnp.uint32), numbers, noise, stop)
    block = np.asarray(choose(logits, settings, _noise(draws, 0, logits)))[:, None]
    done, written = np.isin(block[:, 0], stop), 1
    run = _compiled(model.graphdef).burst  # looked up once: hashing a deep graph takes milliseconds
    yield block
    while written < settings.max_new_tokens and not done.all():
        started = time.perf_counter()
        asked = min(count, settings.max_new_tokens - written)
        args = (block[:, -1], done, state, settings.top_k, draws, written, asked)
        block, state = _burst(run, model.params, *args)
        done, written = done | np.isin(block, stop).any(axis=1), written + block.shape[1]
        yield block
        if time.perf_counter() - started < PATIENCE:
            count = min(2 * count, BURST)


def _burst(
    run: Callable[..., Any],
    params: Params,
    tokens: np.ndarray,
    done: np.ndarray,
    state: DecodeState,
    top_k: int,
    draws: _Draws,
    step: int,
    count: int,
) -> tuple[np.ndarray, DecodeState]:
    """Up to `count` more ids [B, n] in one dispatch, of which the first is number `step` of its answer."""
    _check_room(state, count)
    args = (tokens, done, state.positions, draws, step, count, top_k)
    made, ids, cache, positions = run(params, state.cache, *args)
    n = int(made)
    return np.asarray(ids)[:, :n], DecodeState(cache, positions, state.length + n)


class _Compiled(NamedTuple):
    """The jitted functions of one model."""

    prefill: Callable[..., Any]
    step: Callable[..., Any]
    burst: Callable[..., Any]


@functools.lru_cache(maxsize=16)
def _compiled(graphdef: Any) -> _Compiled:
    def prefill(
        params: Params, ids: Array, positions: Array, segments: Array, length: Array, slots: int
    ) -> Any:
        decoder = merge_model(graphdef, params)
        cache = init_cache(decoder.config, ids.shape[0], slots, decoder.embed.weight[...].dtype)
        hidden, _, cache = decoder.hidden(ids, positions, segments, cache)
        last = jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False)
        return _logits(decoder, last), cache._replace(length=jnp.asarray(length, jnp.int32))

    def step(params: Params, cache: KVCache, tokens: Array, positions: Array) -> Any:
        decoder = merge_model(graphdef, params)
        hidden, _, cache = decoder.hidden(tokens[:, None], positions[:, None], cache=cache)
        return _logits(decoder, hidden[:, 0]), cache, positions + 1

    def burst(
        params: Params,
        cache: KVCache,
        tokens: Array,
        done: Array,
        positions: Array,
        draws: _Draws,
        first: Array,
        count: Array,
        top_k: int,
    ) -> Any:
        def more(carry: Any) -> Array:
            made, _, done, *_ = carry
            return (made < count) & ~jnp.all(done)

        def one(carry: Any) -> Any:
            made, tokens, done, ids, cache, positions = carry
            logits, cache, positions = step(params, cache, tokens, positions)
            tokens = _choose(logits, draws.temperature, top_k, _noise(draws, first + made, logits))
            ids = jax.lax.dynamic_update_slice_in_dim(ids, tokens[:, None], made, axis=1)
            return made + 1, tokens, done | jnp.isin(tokens, draws.stop), ids, cache, positions

        empty = jnp.zeros((tokens.shape[0], BURST), jnp.int32)
        carry = (jnp.zeros((), jnp.int32), tokens, done, empty, cache, positions)
        made, _, _, ids, cache, positions = jax.lax.while_loop(more, one, carry)
        return made, ids, cache, positions

    return _Compiled(
        jax.jit(prefill, static_argnums=5),
        jax.jit(step, donate_argnums=1),
        jax.jit(burst, donate_argnums=1, static_argnums=8),
    )


def _noise(draws: _Draws, step: int | Array, logits: Array) -> Array | None:
    if draws.temperature is None:
        return None
    if draws.noise is not None:
        return draws.noise[step]
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return gumbel(draws.seed, step, draws.rows, logits.shape[1], wide)


def _logits(decoder: Decoder, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    weight, bias = decoder.head()
    logits = hidden @ weight.astype(hidden.dtype)
    return logits if bias is None else add_bias(logits, bias)


def _bucket(n: int) -> int:
    """The next power of two: a handful of compilations serves all lengths."""
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def _pad(
    prompts: Sequence[Sequence[int]], longest: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, positions, segments, int32 [B, width]: prompts end in column longest - 1, the rest is padding."""
    ids, segments = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) : longest] = prompt
        segments[row, longest - len(prompt) : longest] = 1
    starts = np.asarray([[longest - len(prompt)] for prompt in prompts], np.int32)
    return ids, np.maximum(np.arange(width, dtype=np.int32) - starts, 0), segments


def _groups(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows that are decoded together: all, or those of one length where a bias table is indexed by slot."""
    if not config.attn_bias_table:
        return [list(range(len(prompts)))]
    lengths = sorted({len(p) for p in prompts})
    return [[row for row, p in enumerate(prompts) if len(p) == length] for length in lengths]


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], slots: int) -> None:
    if not prompts:
        raise ConfigError("there is no prompt")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {row} is empty; it needs at least one token")
        # A gather would clamp an id that is out of range, silently.
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise ConfigError(f"prompt {row} holds id {wrong}, outside the vocabulary of {config.vocab_size}")
    longest = max(map(len, prompts))
    if max(longest, slots) > config.context:
        new, room = max(slots - longest, 0), max(config.context - longest, 0)
        raise ConfigError(
            f"a prompt of {longest} tokens and {new} new ones exceed the model's context of {config.context}"
            f"; shorten the prompt or ask for at most {room} new tokens"
        )
    if slots < longest:
        raise ConfigError(f"slots={slots} are too few for a prompt of {longest} tokens")


def _check_room(state: DecodeState, count: int) -> None:
    slots = state.cache.segment.shape[1]
    if state.length + count > slots:
        raise ConfigError(f"the cache of {slots} slots holds {state.length} tokens, no room for {count} more")
