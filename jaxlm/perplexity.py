"""What scores of tokens come to: loss, perplexity, bits per byte, and the loss at each length of context.

Means are over tokens, whatever window or batch they were computed in; sums are exact (math.fsum). bits per byte is the
total in bits over the UTF-8 bytes that the scored tokens stand for: it compares models of different tokenizers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.metrics import bits_per_byte, perplexity
from jaxlm.windows import Scores

BINS = 48  # of a drawing


class Total(NamedTuple):
    """Results over some tokens; NaN where none was scored, or none that stands for text."""

    tokens: int  # scored
    unscored: int  # without context
    bytes: int  # UTF-8 bytes that the scored tokens stand for; special tokens stand for none
    loss: float  # mean -log p in nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float
    accuracy: float  # share of tokens that were the most likely one


class Position(NamedTuple):
    """The loss where between `first` and `last` tokens were read before the one that is predicted."""

    first: int
    last: int
    tokens: int
    loss: float  # mean, in nats per token


def totals(scores: Scores, documents: Sequence[np.ndarray], byte_lengths: np.ndarray) -> list[Total]:
    """The result of each document. `documents`: their ids; `byte_lengths`: of each id of the tokenizer."""
    return [
        _total([logprobs], [greedy], [context], [ids], byte_lengths)
        for logprobs, greedy, context, ids in zip(*scores, documents, strict=True)
    ]


def total(scores: Scores, documents: Sequence[np.ndarray], byte_lengths: np.ndarray) -> Total:
    """The result over all tokens of all documents: every token weighs the same."""
    return _total(*scores, documents, byte_lengths)


def _total(
    logprobs: Sequence[np.ndarray],
    greedy: Sequence[np.ndarray],
    context: Sequence[np.ndarray],
    documents: Sequence[np.ndarray],
    byte_lengths: np.ndarray,
) -> Total:
    scored = [seen > 0 for seen in context]
    tokens = sum(int(mask.sum()) for mask in scored)
    unscored = sum(len(mask) for mask in scored) - tokens
    size = sum(
        int(byte_lengths[ids[mask]].sum(dtype=np.int64)) for ids, mask in zip(documents, scored, strict=True)
    )
    if not tokens:
        return Total(0, unscored, 0, math.nan, math.nan, math.nan, math.nan)
    surprise = -math.fsum(x for values, mask in zip(logprobs, scored) for x in values[mask].tolist())
    loss = surprise / tokens
    hits = sum(int(values[mask].sum()) for values, mask in zip(greedy, scored))
    bits = bits_per_byte(loss, size / tokens) if size else math.nan
    return Total(tokens, unscored, size, loss, perplexity(loss), bits, hits / tokens)


def by_position(scores: Scores) -> list[Position]:
    """The mean loss at each length of context that occurs, shortest first."""
    context = np.concatenate([np.zeros(0, np.int32), *scores.context])
    logprobs = np.concatenate([np.zeros(0), *scores.logprobs])
    scored = context > 0
    counts = np.bincount(context[scored])
    sums = np.bincount(context[scored], weights=-logprobs[scored])
    return [
        Position(i, i, int(counts[i]), float(sums[i] / counts[i])) for i in np.flatnonzero(counts).tolist()
    ]


def binned(positions: Sequence[Position], bins: int = BINS) -> list[Position]:
    """Neighbouring positions joined into about `bins` groups, each wider than the one before by the same factor."""
    if not positions:
        return []
    edges = np.unique(np.geomspace(1, positions[-1].last + 1, bins + 1).round().astype(int))
    groups: dict[int, list[Position]] = {}
    for position in positions:
        groups.setdefault(int(np.searchsorted(edges, position.first, "right")), []).append(position)
    joined = []
    for group in groups.values():
        tokens = sum(position.tokens for position in group)
        loss = math.fsum(position.loss * position.tokens for position in group) / tokens
        joined.append(Position(group[0].first, group[-1].last, tokens, loss))
    return joined
