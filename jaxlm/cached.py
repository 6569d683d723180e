"""Tokens through the cache: reading prompts, appending one token. Twin: torchref/cached.py.

Rows of unequal prompts are padded on the left, so that all rows write the same cache slot; padding has segment 0 and
the first real token has position 0. Long prompts are read in chunks, the last one padded on the right to a power of
two, which the cache forgets: a handful of compilations serves every prompt.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.attention import KVCache, init_cache
from jaxlm.config import ConfigError
from jaxlm.layers import add_bias
from jaxlm.model import Decoder, Params, Split, merge_model
from jaxlm.sampling import check_prompts, groups
from jaxlm.shapes import Float, Int

SMALLEST_BUCKET = 16
CHUNK = 512  # tokens of a prompt that are read at once, a power of two; bounds the scores' memory


class DecodeState(NamedTuple):
    """What the next token needs beside the parameters. Its buffers are donated: use the newest state only."""

    cache: KVCache
    positions: Int[Array, " B"]  # of the token that comes next in each row
    length: int  # tokens so far, counted on the host


def prefill(
    model: Split, prompts: Sequence[Sequence[int]], slots: int
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Reads the prompts: the logits of each row's next token, and a state with room for `slots` tokens a row.

    Raises ConfigError when a prompt is empty, holds an id outside the vocabulary, or does not fit.
    """
    config = merge_model(*model).config
    check_prompts(config, prompts, slots)
    if len(groups(config, prompts)) > 1:
        raise ConfigError(
            "with attn_bias_table, prompts of one length are read together; `decode` sorts them"
        )
    longest, slots = max(map(len, prompts)), min(_bucket(slots), config.context)
    run = _compiled(model.graphdef)
    cache, logits = run.empty(model.params, len(prompts), slots), None
    for start in range(0, longest, CHUNK):
        width = min(_bucket(min(longest - start, CHUNK)), slots - start)
        logits, cache = run.prefill(model.params, cache, *_pad(prompts, longest, start, width))
    assert logits is not None
    return logits, DecodeState(cache, jnp.asarray([len(p) for p in prompts], jnp.int32), longest)


def decode_step(
    model: Split, tokens: Int[Array, " B"], state: DecodeState
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Appends one token to each row: the logits of the next, and the new state; the old one is gone.

    Raises ConfigError when the cache is full. `decode` makes many tokens per dispatch and is faster.
    """
    check_room(state, 1)
    logits, cache, positions = _compiled(model.graphdef).step(
        model.params, state.cache, jnp.asarray(tokens, jnp.int32), state.positions
    )
    return logits, DecodeState(cache, positions, state.length + 1)


def select_rows(state: DecodeState, rows: Int[Array, " R"]) -> DecodeState:
    """The state of the rows `rows`, in that order, repeated where they are: for samples and beams."""
    cache, positions = _rows((state.cache, state.positions), jnp.asarray(rows, jnp.int32))
    return DecodeState(cache, positions, state.length)


@jax.jit
def _rows(state: tuple[KVCache, Array], rows: Array) -> tuple[KVCache, Array]:
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, state)


class _Compiled(NamedTuple):
    """The jitted functions of one model."""

    empty: Callable[..., Any]
    prefill: Callable[..., Any]
    step: Callable[..., Any]


@functools.lru_cache(maxsize=16)
def _compiled(graphdef: Any) -> _Compiled:
    def empty(params: Params, batch: int, slots: int) -> KVCache:
        decoder = merge_model(graphdef, params)
        return init_cache(decoder.config, batch, slots, decoder.embed.weight[...].dtype)

    def prefill(params: Params, cache: KVCache, ids: Array, positions: Array, segments: Array) -> Any:
        decoder = merge_model(graphdef, params)
        before = cache.length
        hidden, _, cache = decoder.hidden(ids, positions, segments, cache)
        last = cache.length - before - 1
        hidden = jax.lax.dynamic_index_in_dim(hidden, last, axis=1, keepdims=False)
        return head_logits(decoder, hidden), cache

    return _Compiled(
        jax.jit(empty, static_argnums=(1, 2)),
        jax.jit(prefill, donate_argnums=1),
        jax.jit(functools.partial(step, graphdef), donate_argnums=1),
    )


def step(
    graphdef: Any, params: Params, cache: KVCache, tokens: Int[Array, " B"], positions: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache, Int[Array, " B"]]:
    """One token per row through the cache, to be traced: logits of the next, the cache, the next positions."""
    decoder = merge_model(graphdef, params)
    hidden, _, cache = decoder.hidden(tokens[:, None], positions[:, None], cache=cache)
    return head_logits(decoder, hidden[:, 0]), cache, positions + 1


def head_logits(decoder: Decoder, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """The head on one hidden state per row."""
    weight, bias = decoder.head()
    logits = hidden @ weight.astype(hidden.dtype)
    return logits if bias is None else add_bias(logits, bias)


def _bucket(n: int) -> int:
    """The next power of two: a handful of compilations serves all lengths."""
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def _pad(
    prompts: Sequence[Sequence[int]], longest: int, start: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns start .. start + width of ids, positions, segments, int32 [B, width].

    Prompts end in column longest - 1; what is left and right of them is padding.
    """
    ids, segments = np.zeros((2, len(prompts), max(longest, start + width)), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) : longest] = prompt
        segments[row, longest - len(prompt) : longest] = 1
    starts = np.asarray([[longest - len(prompt)] for prompt in prompts], np.int32)
    positions = np.maximum(np.arange(ids.shape[1], dtype=np.int32) - starts, 0)
    return (
        ids[:, start : start + width],
        positions[:, start : start + width],
        segments[:, start : start + width],
    )


def check_room(state: DecodeState, count: int) -> None:
    """Raises ConfigError where the cache has no room for `count` more tokens."""
    slots = state.cache.segment.shape[1]
    if state.length + count > slots:
        raise ConfigError(f"the cache of {slots} slots holds {state.length} tokens, no room for {count} more")
