"""A model of jaxlm or torchref as a model of EleutherAI's lm-evaluation-harness; needs lm_eval, which is optional.

What is asked, and how text is split into context and continuation, are lm_eval's own (`TemplateLM`); what is computed
comes from `score_windows`, `score` and `decode`. Numbers mean what those of lm_eval's HFLM mean:

    loglikelihood          sum of ln p of the continuation; of a context too long, its end is read
    loglikelihood_rolling  every token once, by windows with a stride of their whole length
    generate_until         greedy unless a task asks to sample; then only with the settings that the task states
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from convert.specials import Specials
from experiments.loading import Framework
from jaxlm.config import ConfigError, InputError, ModelConfig
from jaxlm.sampling import Answer, Sampling
from jaxlm.text import complete
from jaxlm.tokenizer import Tokenizer
from jaxlm.windows import Window, as_documents

LONGEST_ANSWER = 256  # tokens, where a task does not say; at most half the context
_PASSED_ON = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
} | {"num_beams": int}  # settings of generation that mean the same here


class JaxlmLM(TemplateLM):
    """Answers the three kinds of requests of lm_eval with a model in either framework."""

    def __init__(
        self,
        model: Any,
        framework: Framework,
        config: ModelConfig,
        tokenizer: Tokenizer,
        specials: Specials,
        prefix: int | None,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
    ):
        """model: jaxlm.model.Split or torchref.model.Decoder. prefix: what stands before a text without a context.
        max_length: tokens read at once, None = the model's context. seed: of tasks that sample.

        Raises ConfigError without a prefix, or where max_length exceeds the context.
        """
        super().__init__()
        if prefix is None:
            raise ConfigError(
                "lm_eval needs a token before a text, and the model's tokenizer has neither bos nor eos"
            )
        self.max_length = config.context if max_length is None else max_length
        if not 1 < self.max_length <= config.context:
            raise ConfigError(
                f"max_length={self.max_length} must be between 2 and the context of {config.context}"
            )
        self.model, self.config, self.tokenizer, self.specials = model, config, tokenizer, specials
        self.batch_size, self.prefix, self.seed = batch_size, prefix, seed
        self._score, self._score_windows, self._decode = _functions(framework)

    @property
    def eot_token_id(self) -> int:
        """What ends a document; the prefix where nothing does."""
        return self.specials.eos[0] if self.specials.eos else self.prefix

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, special tokens by their names; bos in front where the model's texts start with it."""
        ids = self.tokenizer.encode(string, special=True)
        front = self.specials.adds_bos if add_special_tokens is None else add_special_tokens
        bos = self.specials.bos
        return ids if bos is None or not front or ids[:1] == [bos] else [bos, *ids]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        documents, windows = [], []
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens does not fit the {self.max_length} read at once"
                )
            ids = [*context, *continuation][-(self.max_length + 1) :]
            documents.append(ids)
            windows.append(Window(number, 0, len(ids) - 1, len(ids) - len(continuation)))
        arrays = as_documents(documents, None, self.config.vocab_size)
        asked = [w for w in windows if w.first <= w.stop]  # nothing is certain
        bar = _bar(sum(w.stop + 1 - w.first for w in asked), "scoring", disable_tqdm)
        scores = self._score_windows(self.model, arrays, asked, self.batch_size, bar.update)
        bar.close()
        answers = []
        for (texts, _, _), window in zip(requests, windows, strict=True):
            chosen = slice(window.first, window.stop + 1)
            logprob = _sum(scores.logprobs[window.document][chosen])
            answers.append((logprob, bool(scores.greedy[window.document][chosen].all())))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of each whole text after the prefix."""
        documents = [self.tok_encode(request.args[0]) for request in requests]
        bar = _bar(sum(map(len, documents)), "scoring", disable_tqdm)
        length = self.max_length
        scores = self._score(self.model, documents, length, length, self.batch_size, self.prefix, bar.update)
        bar.close()
        found = [_sum(values) for values in scores.logprobs]
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to a stop string, without it.

        Raises ConfigError on settings that are not known here, and where an answer leaves no room for a context.
        """
        texts = [""] * len(requests)
        bar = _bar(len(requests), "generating", disable_tqdm)
        for rows in self._alike(requests):
            kwargs = normalize_gen_kwargs(dict(_arguments(requests[rows[0]])[1]), self._longest)
            stop_strings = [s for s in handle_stop_sequences(kwargs.pop("until", None), None) if s]
            settings = self._settings(dict(kwargs), rows[0])
            room = self.max_length - settings.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"answers of {settings.max_new_tokens} tokens leave no room for a context in the {self.max_length} "
                    "read at once; set max_gen_toks in the task"
                )
            prompts = [(self.tok_encode(requests[row].args[0]) or [self.prefix])[-room:] for row in rows]
            made = complete(self._run, self.tokenizer, prompts, settings, stop_strings=stop_strings)
            for row, answers in zip(rows, made, strict=True):
                texts[row] = answers[0].text
                self.cache_hook.add_partial("generate_until", requests[row].args, texts[row])
            bar.update(len(rows))
        bar.close()
        return texts

    def _run(self, prompts: Any, settings: Sampling, ended: Any) -> list[list[Answer]]:
        return self._decode(self.model, prompts, settings, ended=ended)

    @property
    def _longest(self) -> int:
        return min(LONGEST_ANSWER, self.max_length // 2)

    def _alike(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Numbers of requests that are decoded together: of the same settings, the longest contexts first."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(_arguments(request)[1], sort_keys=True, default=str), []).append(
                number
            )
        for group in groups.values():
            group.sort(key=lambda number: -len(requests[number].args[0]))
            yield from (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size))

    def _settings(self, kwargs: dict[str, Any], number: int) -> Sampling:
        """Decoding as a task states it; `number`: of the request, which draws apart from the others."""
        limit, sample = int(kwargs.pop("max_gen_toks")), bool(kwargs.pop("do_sample"))
        unknown = sorted(kwargs.keys() - _PASSED_ON.keys())
        if unknown:
            raise ConfigError(
                f"generation_kwargs: {', '.join(unknown)} cannot be had; known are until, max_gen_toks, do_sample, "
                + ", ".join(_PASSED_ON)
            )
        chosen: dict[str, Any] = {
            name: kind(kwargs[name]) for name, kind in _PASSED_ON.items() if kwargs.get(name) is not None
        }
        if not sample or chosen.get("temperature") == 0:
            chosen = {name: chosen[name] for name in ("repetition_penalty", "num_beams") if name in chosen}
        greedy = not sample or kwargs.get("temperature") == 0
        stop = tuple(i for i in self.specials.eos if i < self.config.vocab_size)
        return Sampling(
            max_new_tokens=limit, greedy=greedy, stop=stop, seed=(self.seed + number) % 2**32, **chosen
        )


def _functions(framework: Framework) -> tuple[Callable[..., Any], ...]:
    """`score`, `score_windows` and `decode` of a framework."""
    if framework == "torch":
        from torchref import evaluate as torch_evaluate
        from torchref import generate as torch_generate

        return torch_evaluate.score, torch_evaluate.score_windows, torch_generate.decode
    from jaxlm import evaluate, generate

    return evaluate.score, evaluate.score_windows, generate.decode


def _arguments(request: Instance) -> tuple[Any, ...]:
    """What is asked: texts, and settings where something is to be written."""
    return request.args


def _sum(logprobs: np.ndarray) -> float:
    """ln p of tokens together. Raises InputError on NaN: as an answer's it would win every choice."""
    total = math.fsum(logprobs.tolist())
    if math.isnan(total):
        raise InputError("the model gives NaN or infinite logits: nothing can be said of its answers")
    return total


def _bar(total: int, what: str, disable: bool) -> "tqdm[Any]":
    """Progress on standard error where that is a terminal."""
    return tqdm(total=total, desc=what, disable=True if disable else None)
