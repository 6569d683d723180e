"""Beam search: the likeliest answers that keeping the `num_beams` best beginnings finds. Twin: jaxlm/beam.py.

    score(beginning + token) = score(beginning) + processed log p(token | beginning)
    score(answer) = its last score / length ** length_penalty

Candidates, bookkeeping and the rules for stopping are those of transformers' beam search, token for token. Log-softmax
comes first, then the penalties of torchref/logits.py; a length counts the answer's tokens, its stop id included. On
equal scores the earlier beam comes first, then the lower id.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jaxlm.sampling import Answer, Sampling
from torchref.cached import decode_step, prefill, select_rows
from torchref.logits import History, extend, init_history, process, select_history
from torchref.model import Decoder

WORST = -1e9  # taken from scores that must not win; finite, so that they keep their order


@torch.inference_mode()
def beam_search(model: Decoder, prompts: Sequence[Sequence[int]], settings: Sampling) -> list[list[Answer]]:
    """The best `samples` answers to each prompt, best first, scored. An answer does not depend on other prompts.

    Raises ConfigError as `prefill` does, above all when a prompt and the longest answer do not fit.
    """
    P, N, M = len(prompts), settings.num_beams, settings.max_new_tokens
    logits, state = prefill(model, prompts, max(map(len, prompts), default=0) + M)
    slots = state.cache.segment.shape[1]
    device, stop = logits.device, torch.tensor(settings.stop, dtype=torch.int64, device=logits.device)
    beams = torch.arange(P, device=device).repeat_interleave(N)
    history = init_history(settings, prompts, slots, logits.shape[1], device=device)
    logits, state, history = logits[beams], select_rows(state, beams), select_history(history, beams)
    wide = torch.promote_types(logits.dtype, torch.float32)
    running, done = (_nothing(P, N, M, wide, device) for _ in range(2))
    running.scores[:, 0] = 0  # all beams are the prompt; only the first may grow
    can_improve = torch.ones((P, 1), dtype=torch.bool, device=device)
    for length in range(1, M + 1):
        grown, parents = _grow(running, logits, history, length, settings)
        ends = torch.isin(grown.ids[:, :, length - 1], stop) | (length == M)
        done = _finish(done, grown, ends, can_improve, length, settings)
        scores = grown.scores + ends * WORST
        order = _best(scores, N)
        running = grown._replace(scores=scores).pick(order)
        can_improve = can_improve & _improvable(running, done, length, settings)
        if not can_improve.any() or ends.all() or (settings.early_stopping == "yes" and done.finished.all()):
            break
        rows = (parents.gather(1, order) + torch.arange(P, device=device)[:, None] * N).flatten()
        tokens = running.ids[:, :, length - 1].flatten()
        history = extend(select_history(history, rows), tokens)
        logits, state = decode_step(model, tokens, select_rows(state, rows))
    return [[_answer(done, row, sample, settings) for sample in range(settings.samples)] for row in range(P)]


class _Hypotheses(NamedTuple):
    """Answers or beginnings of P prompts, N of each, best first; P = prompts, N = beams or candidates."""

    ids: Tensor  # [P, N, M]
    logprobs: Tensor  # [P, N, M], the model's own
    scores: Tensor  # [P, N]
    lengths: Tensor  # [P, N]
    finished: Tensor  # [P, N]

    def pick(self, order: Tensor) -> "_Hypotheses":
        """Those of the given places, [P, N2], in their order."""
        rows = torch.arange(order.shape[0], device=order.device)[:, None]
        return _Hypotheses(*(field[rows, order] for field in self))


def _nothing(P: int, N: int, M: int, dtype: torch.dtype, device: torch.device) -> _Hypotheses:
    ids = torch.zeros((P, N, M), dtype=torch.int64, device=device)
    scores = torch.full((P, N), WORST, dtype=dtype, device=device)
    return _Hypotheses(
        ids, ids.to(dtype), scores, ids[:, :, 0].clone(), torch.zeros_like(scores, dtype=torch.bool)
    )


def _best(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` best of each prompt, [P, count], best first; the earlier on ties."""
    return scores.sort(descending=True, stable=True).indices[:, :count]


def _grow(
    running: _Hypotheses, logits: Tensor, history: History, length: int, settings: Sampling
) -> tuple[_Hypotheses, Tensor]:
    """The best continuations of each prompt, as hypotheses of `length` tokens, and the beam that each continues."""
    P, N = running.scores.shape
    V = logits.shape[1]
    # Of all candidates, so many may end that the beams still need as many others.
    keep = min(max(2, 1 + len(settings.stop)), V) * N
    own = logits.to(running.scores.dtype).log_softmax(-1)
    processed = process(own, settings.numbers, 0, settings.no_repeat_ngram, history)
    scores = (processed + running.scores.reshape(-1, 1)).reshape(P, N * V)
    places = _best(scores, keep)
    parents = places // V
    grown = running.pick(parents)
    grown.ids[:, :, length - 1] = places % V
    grown.logprobs[:, :, length - 1] = own.reshape(P, N * V).gather(1, places)
    lengths = torch.full_like(grown.lengths, length)
    return grown._replace(scores=scores.gather(1, places), lengths=lengths), parents


def _finish(
    done: _Hypotheses,
    grown: _Hypotheses,
    ends: Tensor,
    can_improve: Tensor,
    length: int,
    settings: Sampling,
) -> _Hypotheses:
    """The best finished answers, with those candidates that end now and are among the first `num_beams`."""
    finished = ends & (torch.arange(ends.shape[1], device=ends.device) < settings.num_beams)
    full = done.finished.all(dim=1, keepdim=True) & (settings.early_stopping == "yes")
    scores = grown.scores / length**settings.length_penalty
    for barred in (full, ~can_improve, ~finished):
        scores = scores + barred * WORST
    new = grown._replace(scores=scores, finished=finished)
    merged = _Hypotheses(*(torch.cat(pair, dim=1) for pair in zip(done, new)))
    return merged.pick(_best(merged.scores, settings.num_beams))


def _improvable(running: _Hypotheses, done: _Hypotheses, length: int, settings: Sampling) -> Tensor:
    """Whether the best beginning might still beat the worst finished answer, [P, 1]; by estimate, except "never"."""
    grows = settings.early_stopping == "never" and settings.length_penalty > 0
    longest = settings.max_new_tokens if grows else length
    best = running.scores[:, :1] / longest**settings.length_penalty
    worst = torch.where(done.finished, done.scores.amin(dim=1, keepdim=True), WORST)
    return (best > worst).any(dim=1, keepdim=True)


def _answer(done: _Hypotheses, row: int, sample: int, settings: Sampling) -> Answer:
    length = int(done.lengths[row, sample])
    ids, logprobs = done.ids[row, sample, :length].tolist(), done.logprobs[row, sample, :length].tolist()
    stopped = bool(ids) and ids[-1] in settings.stop
    if stopped:
        ids, logprobs = ids[:-1], logprobs[:-1]
    score = float(done.scores[row, sample])
    return Answer(ids, logprobs if settings.logprobs else [], "stop" if stopped else "length", score)
