"""Tokens through the cache: reading prompts, appending one token. Twin: jaxlm/cached.py.

Rows of unequal prompts are padded on the left, so that all rows write the same cache slot; padding has segment 0 and
the first real token has position 0. Long prompts are read in chunks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jaxlm.config import ConfigError
from jaxlm.sampling import check_prompts, groups
from torchref.attention import KVCache, LayerCache, init_cache
from torchref.model import Decoder
from torchref.shapes import Float, Int

CHUNK = 512  # tokens of a prompt that are read at once, which bounds the scores' memory


class DecodeState(NamedTuple):
    """What the next token needs beside the model. The cache is written in place: use the newest only."""

    cache: KVCache
    positions: Int[Tensor, " B"]  # of the token that comes next in each row
    length: int  # tokens so far


@torch.inference_mode()
def prefill(
    model: Decoder, prompts: Sequence[Sequence[int]], slots: int
) -> tuple[Float[Tensor, "B V"], DecodeState]:
    """Reads the prompts: the logits of each row's next token, and a state with room for `slots` tokens a row.

    Raises ConfigError when a prompt is empty, holds an id outside the vocabulary, or does not fit.
    """
    check_prompts(model.config, prompts, slots)
    if len(groups(model.config, prompts)) > 1:
        raise ConfigError(
            "with attn_bias_table, prompts of one length are read together; `decode` sorts them"
        )
    longest, weight = max(map(len, prompts)), model.embed.weight
    cache = init_cache(model.config, len(prompts), slots, weight.dtype, weight.device)
    ids, positions, segments = (torch.from_numpy(a).to(weight.device) for a in _pad(prompts, longest))
    for part in torch.arange(longest, device=weight.device).split(CHUNK):
        hidden, _, cache = model.hidden(ids[:, part], positions[:, part], segments[:, part], cache)
        assert cache is not None
    return head_logits(model, hidden[:, -1]), DecodeState(cache, positions[:, -1] + 1, longest)


@torch.inference_mode()
def decode_step(
    model: Decoder, tokens: Int[Tensor, " B"], state: DecodeState
) -> tuple[Float[Tensor, "B V"], DecodeState]:
    """Appends one token to each row: the logits of the next, and the new state; the old one is overwritten.

    Raises ConfigError when the cache is full.
    """
    check_room(state, 1)
    hidden, _, cache = model.hidden(tokens[:, None], state.positions[:, None], cache=state.cache)
    assert cache is not None
    return head_logits(model, hidden[:, 0]), DecodeState(cache, state.positions + 1, state.length + 1)


@torch.inference_mode()
def select_rows(state: DecodeState, rows: Int[Tensor, " R"]) -> DecodeState:
    """The state of the rows `rows`, in that order, repeated where they are: for samples and beams."""
    rows = torch.as_tensor(rows, device=state.positions.device)
    layers = tuple(LayerCache(layer.k[rows], layer.v[rows]) for layer in state.cache.layers)
    cache = KVCache(layers, state.cache.segment[rows], state.cache.length)
    return DecodeState(cache, state.positions[rows], state.length)


def head_logits(decoder: Decoder, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
    """The head on one hidden state per row."""
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


def check_room(state: DecodeState, count: int) -> None:
    """Raises ConfigError where the cache has no room for `count` more tokens."""
    slots = state.cache.segment.shape[1]
    if state.length + count > slots:
        raise ConfigError(f"the cache of {slots} slots holds {state.length} tokens, no room for {count} more")
