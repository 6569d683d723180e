"""Decoding: prompts in, tokens out, one at a time through the cache. Twin: jaxlm/generate.py.

    logits = f(prompt);   token = choose(process(logits) + noise);   logits = f(token | cache);   ...

The noise of a token is a pure function of (seed, its place in the answer, the answer's number), on every device.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jaxlm.sampling import Answer, Sampling, check_prompts, cut, groups, sampling
from jaxlm.text import Completion, Ended, complete
from jaxlm.tokenizer import Tokenizer
from torchref.beam import beam_search
from torchref.cached import DecodeState, decode_step, prefill, select_rows
from torchref.logits import choose, extend, gumbel, init_history, process
from torchref.model import Decoder
from torchref.shapes import Float


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    noise: Float[Tensor, "M R V"] | None = None,
    ended: Ended | None = None,
) -> list[list[Answer]]:
    """The answers to each prompt, `settings.samples` of them, best first where they are beams'.

    noise: Gumbel noise for each token of each answer (R = prompts times samples), instead of the seed's. ended: asked
    with an answer's number and its ids so far, whether it may end there. Raises ConfigError when a prompt and the
    longest answer do not fit the model's context.
    """
    check_prompts(model.config, prompts, settings.max_new_tokens + max(map(len, prompts), default=0))
    answers: list[list[Answer]] = [[] for _ in prompts]
    for chosen in groups(model.config, prompts):
        if settings.num_beams > 1:
            for row, best in zip(chosen, beam_search(model, [prompts[row] for row in chosen], settings)):
                answers[row] = best
            continue
        ids: list[list[int]] = [[] for _ in range(len(chosen) * settings.samples)]
        logprobs: list[list[float]] = [[] for _ in ids]
        numbers = [row * settings.samples + sample for row in chosen for sample in range(settings.samples)]
        over = np.zeros(len(ids), bool)
        for column in _tokens(model, [prompts[row] for row in chosen], numbers, settings, noise, over):
            for row in np.flatnonzero(~over):
                new, last = cut([int(column.ids[row])], settings.stop)
                ids[row] += new
                logprobs[row] += [float(column.logprobs[row])] * len(new) if settings.logprobs else []
                over[row] = last or (ended is not None and ended(numbers[row], ids[row]))
        for row, number in enumerate(numbers):
            finish = "stop" if over[row] else "length"
            answers[number // settings.samples].append(Answer(ids[row], logprobs[row], finish, 0.0))
    return answers


def stream(
    model: Decoder, prompt: Sequence[int], settings: Sampling, noise: Float[Tensor, "M 1 V"] | None = None
) -> Iterator[int]:
    """The same ids as `decode` for one prompt and sample, as they come; a beam's only when it is found.

    Raises as `decode`, at once.
    """
    check_prompts(model.config, [prompt], len(prompt) + settings.max_new_tokens)
    if settings.num_beams > 1 or settings.samples > 1:
        return iter(decode(model, [prompt], settings, noise)[0][0].ids)
    return _stream(model, prompt, settings, noise)


def _stream(model: Decoder, prompt: Sequence[int], settings: Sampling, noise: Tensor | None) -> Iterator[int]:
    for column in _tokens(model, [prompt], [0], settings, noise, np.zeros(1, bool)):
        new, last = cut([int(column.ids[0])], settings.stop)
        yield from new
        if last:
            return


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    front: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[str] = (),
    **settings: Any,
) -> list[list[Completion]]:
    """Continuations of texts, [prompt][sample]: `generate(model, tokenizer, "Once", temperature=0.7, top_k=40)`.

    settings: the fields of `Sampling`. front: ids before each text, such as bos. An answer ends at a stop string, at
    one of the tokens `stop_tokens` (as text) or `stop` (as ids), by default the one that separates the tokenizer's
    documents. Raises ConfigError on settings that cannot work and on prompts that do not fit.
    """
    if "stop" not in settings and tokenizer.eos_id is not None:
        settings["stop"] = (tokenizer.eos_id,)

    def run(ids: list[list[int]], chosen: Sampling, ended: Ended | None) -> list[list[Answer]]:
        return decode(model, ids, chosen, ended=ended)

    options = {"front": front, "stop_strings": stop_strings, "stop_tokens": stop_tokens}
    return complete(run, tokenizer, prompts, sampling(settings), **options)


class _Column(NamedTuple):
    """One new token of all rows."""

    ids: np.ndarray  # [B]
    logprobs: np.ndarray  # [B]; of no meaning unless they were asked for


@torch.inference_mode()
def _first(
    model: Decoder, prompts: Sequence[Sequence[int]], settings: Sampling
) -> tuple[Tensor, DecodeState, list[Sequence[int]]]:
    """Logits, state and prompt of every answer."""
    repeated = np.repeat(np.arange(len(prompts)), settings.samples).tolist()
    logits, state = prefill(model, prompts, max(map(len, prompts)) + settings.max_new_tokens)
    if settings.samples > 1:
        logits, state = logits[repeated], select_rows(state, torch.tensor(repeated))
    return logits, state, [prompts[row] for row in repeated]


def _tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    settings: Sampling,
    noise: Tensor | None,
    over: np.ndarray,
) -> Iterator[_Column]:
    """New tokens of the answers `numbers` to `prompts`, until all of them are over or long enough.

    over: rows that the caller wants no more of; read before each step, which goes on past single ones.
    """
    logits, state, prompts = _first(model, prompts, settings)
    slots, vocab_size = state.cache.segment.shape[1], logits.shape[1]
    history = init_history(settings, prompts, slots, vocab_size, device=logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    for step in range(settings.max_new_tokens):
        processed = process(logits, settings.numbers, settings.top_k, settings.no_repeat_ngram, history)
        draw = None
        if settings.numbers.temperature is not None:
            own = noise is None
            draw = gumbel(settings.seed, step, numbers, vocab_size, wide) if own else noise[step, numbers]
            draw = draw.to(logits.device, wide)
        tokens = choose(processed, draw)
        logprobs = torch.zeros(len(tokens))
        if settings.logprobs:
            logprobs = logits.to(wide).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        history = extend(history, tokens)
        yield _Column(tokens.cpu().numpy(), logprobs.cpu().numpy())
        if over.all() or step + 1 == settings.max_new_tokens:
            return
        logits, state = decode_step(model, tokens, state)
