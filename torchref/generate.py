"""Decoding: prompts in, tokens out, one at a time through the cache. Twin: jaxlm/generate.py.

    logits = f(prompt);   token = argmax(logits / temperature + noise);   logits = f(token | cache);   ...

Adding Gumbel noise and taking the largest is sampling from the softmax (arXiv:1611.01144, section 2). The
noise of a token is a pure function of (seed, its place in the answer, row), the same on every device.

Rows of unequal prompts are padded on the left, so that all rows write the same cache slot; padding has
segment 0 and the first real token has position 0.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jaxlm.config import ConfigError, ModelConfig
from torchref.attention import KVCache, init_cache
from torchref.model import Decoder
from torchref.shapes import Float, Int


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
    """What the next token needs beside the model. The cache is written in place: use the newest only."""

    cache: KVCache
    positions: Int[Tensor, " B"]  # of the token that comes next in each row
    length: int  # slots in use


def gumbel(
    seed: int, step: int, rows: Sequence[int], vocab_size: int, dtype: torch.dtype
) -> Float[Tensor, "B V"]:
    """The noise for token number `step` of the answers `rows`, on the CPU."""
    noise = torch.empty((len(rows), vocab_size), dtype=dtype)
    for out, row in zip(noise, rows):
        state = np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)
        out.exponential_(generator=torch.Generator().manual_seed(int(state[0])))
    return -noise.log()


def choose(
    logits: Float[Tensor, "B V"], settings: Sampling, noise: Float[Tensor, "B V"] | None = None
) -> Int[Tensor, " B"]:
    """The next token of each row; the lowest id on ties. `noise`: standard Gumbel, not needed when greedy."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    assert noise is not None, "sampling at a temperature needs noise"
    scaled = logits.to(noise.dtype) / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        smallest = scaled.topk(settings.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    return (scaled + noise).argmax(-1)


@torch.inference_mode()
def prefill(
    model: Decoder, prompts: Sequence[Sequence[int]], slots: int
) -> tuple[Float[Tensor, "B V"], DecodeState]:
    """Reads the prompts: the logits of each row's next token, and a state with room for `slots` tokens a row.

    Raises ConfigError when a prompt is empty, holds an id outside the vocabulary, or does not fit.
    """
    _check(model.config, prompts, slots)
    if len(_groups(model.config, prompts)) > 1:
        raise ConfigError(
            "with attn_bias_table, prompts of one length are read together; `generate` sorts them"
        )
    longest = max(map(len, prompts))
    weight = model.embed.weight
    ids, positions, segments = (torch.from_numpy(a).to(weight.device) for a in _pad(prompts, longest))
    cache = init_cache(model.config, len(prompts), slots, weight.dtype, weight.device)
    hidden, _, filled = model.hidden(ids, positions, segments, cache)
    assert filled is not None
    return _logits(model, hidden[:, -1]), DecodeState(filled, positions[:, -1] + 1, longest)


@torch.inference_mode()
def decode_step(
    model: Decoder, tokens: Int[Tensor, " B"], state: DecodeState
) -> tuple[Float[Tensor, "B V"], DecodeState]:
    """Appends one token to each row: the logits of the next, and the new state; the old one is overwritten.

    Raises ConfigError when the cache is full.
    """
    slots = state.cache.segment.shape[1]
    if state.length == slots:
        raise ConfigError(f"the cache of {slots} slots is full")
    hidden, _, cache = model.hidden(tokens[:, None], state.positions[:, None], cache=state.cache)
    assert cache is not None
    return _logits(model, hidden[:, 0]), DecodeState(cache, state.positions + 1, state.length + 1)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    noise: Float[Tensor, "M B V"] | None = None,
) -> list[list[int]]:
    """The answer to each prompt, without the prompt and without the stop id.

    noise: Gumbel noise for each token of each row, instead of the seed's. Raises ConfigError when a prompt
    and the longest answer do not fit the model's context.
    """
    _check(model.config, prompts, settings.max_new_tokens + max(map(len, prompts), default=0))
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in _groups(model.config, prompts):
        columns = list(_tokens(model, prompts, rows, settings, noise))
        for row, ids in zip(rows, np.stack(columns, axis=1).tolist()):
            answers[row] = list(_until_stop(ids, settings.stop))
    return answers


def stream(
    model: Decoder, prompt: Sequence[int], settings: Sampling, noise: Float[Tensor, "M 1 V"] | None = None
) -> Iterator[int]:
    """The same ids as `generate` for one prompt, as they come. Raises as `generate`, at once."""
    _check(model.config, [prompt], len(prompt) + settings.max_new_tokens)
    columns = _tokens(model, [prompt], [0], settings, noise)
    return _until_stop((int(column[0]) for column in columns), settings.stop)


def _until_stop(ids: Iterable[int], stop: tuple[int, ...]) -> Iterator[int]:
    return itertools.takewhile(lambda token: token not in stop, ids)


def _tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    settings: Sampling,
    noise: Tensor | None,
) -> Iterator[np.ndarray]:
    """New ids [B] of the prompts `rows`, until every row has a stop id or is long enough."""
    chosen = [prompts[row] for row in rows]
    logits, state = prefill(model, chosen, max(map(len, chosen)) + settings.max_new_tokens)
    wide = torch.promote_types(logits.dtype, torch.float32)
    done = np.zeros(len(rows), bool)
    for step in range(settings.max_new_tokens):
        draw = None
        if settings.temperature > 0:
            own = noise is None
            draw = gumbel(settings.seed, step, rows, logits.shape[1], wide) if own else noise[step, rows]
            draw = draw.to(logits.device, wide)
        tokens = choose(logits, settings, draw)
        yield (column := tokens.cpu().numpy())
        done |= np.isin(column, settings.stop)
        if done.all() or step + 1 == settings.max_new_tokens:
            return
        logits, state = decode_step(model, tokens, state)


def _logits(decoder: Decoder, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
    weight, bias = decoder.head()
    logits = hidden @ weight.to(hidden.dtype)
    return logits if bias is None else logits + bias.to(hidden.dtype)


def _pad(prompts: Sequence[Sequence[int]], longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, positions and segments, int64 [B, longest], with padding on the left."""
    ids, segments = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        segments[row, longest - len(prompt) :] = 1
    starts = np.asarray([[longest - len(prompt)] for prompt in prompts])
    return ids, np.maximum(np.arange(longest) - starts, 0), segments


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
