"""Choosing the next token: penalties, then filters, then the largest of logits + noise. Twin: jaxlm/logits.py.

    repetition, presence, frequency, n-grams -> / temperature -> top-k -> top-p -> min-p -> argmax(. + noise)

Order and definitions are those of transformers' logits processors, with ties cut at the lower id first; presence and
frequency penalties are OpenAI's. Adding Gumbel noise and taking the largest is sampling from the softmax
(arXiv:1611.01144, section 2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jaxlm.sampling import Numbers, Sampling
from torchref.shapes import Bool, Float, Int


class History(NamedTuple):
    """What penalties need to know of each row so far; a field is None where the settings do not need it."""

    seen: Bool[Tensor, "B V"] | None  # ids of prompt and answer
    counts: Int[Tensor, "B V"] | None  # how often the answer holds each id
    ids: Int[Tensor, "B S"] | None  # prompt and answer, left-padded with -1; -1 where nothing is written yet
    length: int | None  # columns of `ids` in use


def init_history(
    settings: Sampling,
    prompts: Sequence[Sequence[int]],
    slots: int,
    vocab_size: int,
    device: torch.device | str = "cpu",
) -> History:
    """The history of rows that hold their prompts and no answer yet, with room for `slots` ids a row.

    The prompts' ids must lie in the vocabulary, and the longest prompt and answer in `slots`.
    """
    shape = (len(prompts), vocab_size)
    longest = max(map(len, prompts))
    seen = counts = ids = length = None
    if settings.repetition_penalty != 1:
        seen = torch.zeros(shape, dtype=torch.bool)
        for row, prompt in zip(seen, prompts):
            row[list(prompt)] = True
        seen = seen.to(device)
    if settings.presence_penalty != 0 or settings.frequency_penalty != 0:
        counts = torch.zeros(shape, dtype=torch.int64, device=device)
    if settings.no_repeat_ngram > 0:
        ids = torch.full((len(prompts), slots), -1)
        for row, prompt in zip(ids, prompts):
            row[longest - len(prompt) : longest] = torch.tensor(prompt)
        ids, length = ids.to(device), longest
    return History(seen, counts, ids, length)


def extend(history: History, tokens: Int[Tensor, " B"]) -> History:
    """The history after each row's answer got one more token."""
    seen, counts, ids, length = history
    column = tokens[:, None].long()
    if seen is not None:
        seen = seen.scatter(1, column, True)
    if counts is not None:
        counts = counts.scatter_add(1, column, torch.ones_like(column))
    if ids is not None and length is not None:
        ids = ids.index_copy(1, torch.tensor([length], device=ids.device), column)
        length += 1
    return History(seen, counts, ids, length)


def select_history(history: History, rows: Int[Tensor, " R"]) -> History:
    """Rows of the batch picked, repeated or reordered, as cached.select_rows does to the cache."""
    seen, counts, ids = (None if field is None else field[rows] for field in history[:3])
    return History(seen, counts, ids, history.length)


def process(
    logits: Float[Tensor, "B V"], numbers: Numbers, top_k: int, ngram: int, history: History | None = None
) -> Float[Tensor, "B V"]:
    """All settings applied in their order, in float32 or wider; -inf for tokens that must not come.

    top_k and ngram: 0 = off. history: what the penalties among the settings need; None where there are none.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if history is not None:
        if numbers.repetition_penalty is not None and history.seen is not None:
            logits = repetition_penalty(logits, history.seen, numbers.repetition_penalty)
        if history.counts is not None:
            presence, frequency = numbers.presence_penalty or 0.0, numbers.frequency_penalty or 0.0
            logits = presence_frequency(logits, history.counts, presence, frequency)
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
    logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], penalty: float
) -> Float[Tensor, "B V"]:
    """Logits of seen ids times `penalty` where negative, else divided by it (arXiv:1909.05858, section 4.1)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def presence_frequency(
    logits: Float[Tensor, "B V"], counts: Int[Tensor, "B V"], presence: float, frequency: float
) -> Float[Tensor, "B V"]:
    """logits - presence [count > 0] - frequency count, as in OpenAI's API reference."""
    held, often = (counts > 0).to(logits.dtype), counts.to(logits.dtype)
    return logits - (presence * held + frequency * often)


def ban_ngrams(
    logits: Float[Tensor, "B V"], ids: Int[Tensor, "B S"], length: int, ngram: int
) -> Float[Tensor, "B V"]:
    """-inf for each id that would complete a run of `ngram` ids which the row holds already."""
    logits = logits.clone()
    for row, known in zip(logits, ids[:, :length].tolist()):
        known = [token for token in known if token >= 0]
        last = known[len(known) - ngram + 1 :]
        for start in range(len(known) - ngram + 1):
            if known[start : start + ngram - 1] == last:
                row[known[start + ngram - 1]] = -torch.inf
    return logits


def scale_by_temperature(logits: Float[Tensor, "B V"], temperature: float) -> Float[Tensor, "B V"]:
    """Logits divided by the temperature."""
    return logits / temperature


def keep_top_k(logits: Float[Tensor, "B V"], top_k: int) -> Float[Tensor, "B V"]:
    """-inf for all but the `top_k` largest and what ties with the last of them; 0 keeps all. NaN is largest."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Float[Tensor, "B V"], tail: float) -> Float[Tensor, "B V"]:
    """-inf for the least likely tokens as long as their probabilities sum to `tail` = 1 - top_p at most.

    Among equal logits the lower ids go first; one token stays always. Nothing goes from a row that has no softmax
    (a NaN, +inf, or -inf alone). Source: arXiv:1904.09751, section 3.1.
    """
    ascending, ids = logits.sort(stable=True)
    gone = ascending.softmax(-1).cumsum(-1) <= tail
    gone[:, -1] = False
    return logits.masked_fill(torch.empty_like(gone).scatter(1, ids, gone), -torch.inf)


def keep_min_p(logits: Float[Tensor, "B V"], min_p: float) -> Float[Tensor, "B V"]:
    """-inf for tokens less than `min_p` times as likely as the likeliest (arXiv:2407.01082)."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)


def gumbel(
    seed: int, step: int, rows: Sequence[int], vocab_size: int, dtype: torch.dtype
) -> Float[Tensor, "B V"]:
    """The noise for token number `step` of the answers `rows`, on the CPU: a pure function of (seed, step, row)."""
    noise = torch.empty((len(rows), vocab_size), dtype=dtype)
    for out, row in zip(noise, rows):
        state = np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)
        out.exponential_(generator=torch.Generator().manual_seed(int(state[0])))
    return -noise.log()


def choose(logits: Float[Tensor, "B V"], noise: Float[Tensor, "B V"] | None = None) -> Int[Tensor, " B"]:
    """The next token of each row: the largest logit, plus noise where given; the lowest id on ties.

    logits: of `process`. noise: standard Gumbel, for a token of their softmax; None = the most likely token.
    """
    return (logits if noise is None else logits + noise).argmax(-1)
