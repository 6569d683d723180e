"""A trained model that writes text: the options of sampling, an opened target, and how its answers reach a terminal."""

import dataclasses
import functools
import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from convert.targets import Target
from experiments.cli import say
from experiments.loading import Dtype, Framework, Quant, TargetPath
from experiments.sampler_adapters import Switch, with_adapters
from jaxlm.chat import Chat
from jaxlm.config import ConfigError
from jaxlm.sampling import Answer, Sampling
from jaxlm.text import Completion, complete, encode_prompt, separator, stream_text, token_ids

Texts = tyro.conf.UseAppendAction[tuple[str, ...]]
TEMPERATURE, TOP_K = 0.8, 40  # where nothing else is said


@dataclass(frozen=True)
class SampleOptions:
    """Options of sampling."""

    target: TargetPath  # run, model directory or .gguf
    prompt: Texts = ()  # text to continue; may be repeated; left out = standard input
    file: str | None = None  # file whose text is the prompt
    lines: bool = False  # each line of --file or standard input is a prompt; they are decoded together
    unprompted: bool = False  # no prompt: start as after the end of a document
    max_new_tokens: int = 64  # tokens to write at most
    greedy: bool = False  # always the likeliest token, whatever temperature, top-k, top-p, min-p and seed
    temperature: float | None = None  # divides the logits, above 0; left out = 0.8
    top_k: int | None = None  # choose among this many most likely tokens, 0 = all; left out = 40
    top_p: float | None = None  # choose among the fewest tokens whose probabilities sum to this; 1 = all
    min_p: float | None = None  # choose among tokens at least this times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens seen in prompt or answer become less likely
    presence_penalty: float = 0.0  # taken from the logit of each token that the answer holds
    frequency_penalty: float = 0.0  # the same times how often the answer holds it
    no_repeat_ngram: int = 0  # no run of this many tokens occurs twice in prompt and answer; 0 = off
    num_beams: int = 1  # beam search over this many hypotheses, without chance; 1 = none
    length_penalty: float = 1.0  # beams: exponent of the length that divides the score; above 0 favours long
    # beams: yes = as soon as num_beams answers are finished; never = only when none can improve; no = by estimate
    early_stopping: Literal["no", "yes", "never"] = "no"
    samples: int = 1  # answers to each prompt
    seed: int = 0  # of the noise; the same seed writes the same text
    stop: Texts = ()  # text that ends an answer and is not part of it; may be repeated
    stop_token: Texts = ()  # token that ends an answer, as text; may be repeated
    json: bool = False  # one JSON object per answer: prompt, text, ids, logprobs, finish, score
    logprobs: bool = False  # with --json: the log-probability of each token
    chat: bool = False  # the prompt is a user's turn, written with the model's chat template
    system: str | None = None  # with --chat: the system message
    think: bool = False  # with --chat: begin the answer with <think>
    framework: Framework = "jax"  # which of the two models computes
    dtype: Dtype = "float32"  # of the computation
    quant: Quant = "none"  # weights rounded to this before anything is computed
    checkpoint: Literal["latest", "best"] = "latest"  # of a run: newest, or lowest validation loss
    adapter: Texts = ()  # LoRA adapter (ours, peft's, a run) to merge: DIR; NAME=DIR, repeated, answers with each


def settings_of(options: SampleOptions, stop: tuple[int, ...]) -> Sampling:
    """What the options say of decoding. Raises ConfigError on values that cannot work."""
    chance = ("temperature", "top_k", "top_p", "min_p")
    given: dict[str, Any] = {n: v for n in chance if (v := getattr(options, n)) is not None}
    if options.num_beams > 1 and given:
        name = next(iter(given)).replace("_", "-")
        raise ConfigError(
            f"--num-beams {options.num_beams} takes the likeliest answers, it does not sample: leave out --{name}"
        )
    if options.num_beams == 1 and not options.greedy:
        given = {"temperature": TEMPERATURE, "top_k": TOP_K} | given
    same = {f.name for f in dataclasses.fields(Sampling)} - set(chance) - {"stop"}
    return Sampling(**{name: getattr(options, name) for name in same}, **given, stop=stop)


class Sampler:
    """An opened target: text in, text out. The weights are read when they are first needed."""

    def __init__(self, target: Target, options: SampleOptions):
        target, adapters = with_adapters(target, options.adapter)
        self.target, self.options = target, options
        self.tokenizer, self.config = target.tokenizer, target.config
        self._switch = Switch(target, adapters, options.framework, options.dtype, options.quant)
        self.adapters = tuple(adapters)  # names of those that can be chosen
        self.adapter = next(iter(adapters), "")  # the name of the one that answers; '' = the model as it is
        self.chatting = options.chat  # whether the end of a turn ends an answer
        specials = target.specials
        self.front = [specials.bos] if specials.adds_bos and specials.bos is not None else []
        named = token_ids(self.tokenizer, options.stop_token)
        stop = dict.fromkeys(i for i in (*specials.eos, *named) if i < self.config.vocab_size)
        self.settings = settings_of(options, tuple(stop))
        stream_text(self.tokenizer, (), options.stop)  # refuses stop strings that cannot be

    def model(self) -> Any:
        """The weights, as the chosen framework's functions take them."""
        return self._switch.model(self.adapter)

    def use(self, adapter: str) -> None:
        """Answers with this adapter from now on; '' = with none. Raises ConfigError where there is no such name."""
        self._switch.require(adapter)
        self.adapter = adapter

    @functools.cached_property
    def chat(self) -> Chat:
        """How conversations are written. Raises ConfigError where the model's files do not say."""
        specials = self.target.specials
        eos = specials.eos[0] if specials.eos else None
        ids = {"bos": specials.bos, "eos": eos, "pad": specials.pad}
        return Chat.of(self.tokenizer, specials.chat_template, **ids)

    def change(self, **settings: Any) -> None:
        """Other settings from now on. Raises ConfigError on values that cannot work."""
        self.settings = dataclasses.replace(self.settings, **settings)

    def encode(self, prompt: str) -> list[int]:
        """Ids of a text to be continued. Raises ConfigError where it is empty or not UTF-8."""
        return encode_prompt(self.tokenizer, prompt, self.front)

    def separator(self) -> list[int]:
        """Ids of no text: what stands before the beginning of a document. Raises ConfigError where nothing does."""
        return separator(self.tokenizer, self.front)

    def answer(self, prompt: str | Sequence[int], meter: "Meter | None" = None) -> Iterator[str]:
        """The continuation of a text, or of ids, piece by piece. Raises ConfigError at once."""
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        meter = meter or Meter()
        self.model()  # read before the clock runs
        meter.start()
        settings = self._settings()
        tokens = meter.count(self._stream(ids, settings), at_once=settings.num_beams > 1)
        return stream_text(self.tokenizer, tokens, self.options.stop)

    def complete(self, rows: Sequence[Sequence[int]], meter: "Meter") -> list[list[Completion]]:
        """The answers to several prompts, decoded together. Raises ConfigError."""
        self.model()
        meter.start()
        return complete(self._decode, self.tokenizer, rows, self._settings(), stop_strings=self.options.stop)

    def _settings(self) -> Sampling:
        end = self.chat.end if self.chatting else None
        if end is None or end in self.settings.stop:
            return self.settings
        return dataclasses.replace(self.settings, stop=(*self.settings.stop, end))

    def _stream(self, ids: list[int], settings: Sampling) -> Iterator[int]:
        return self._framework().stream(self.model(), ids, settings)

    def _decode(self, rows: list[list[int]], settings: Sampling, ended: Any) -> list[list[Answer]]:
        return self._framework().decode(self.model(), rows, settings, ended=ended)

    def _framework(self) -> Any:
        package = "torchref" if self.options.framework == "torch" else "jaxlm"
        return importlib.import_module(f"{package}.generate")


class Meter:
    """Counts tokens as they come and says how fast that was."""

    def __init__(self) -> None:
        self.tokens = 0
        self._first = 0.0  # seconds to the first token
        self.start()

    def start(self) -> None:
        """The clock runs from now."""
        self._started = time.perf_counter()

    def count(self, tokens: Iterable[int], at_once: bool = False) -> Iterator[int]:
        """The same tokens, counted; at_once: the first is no sooner there than the last."""
        for token in tokens:
            self.tokens += 1
            if self.tokens == 1 and not at_once:
                self._first = time.perf_counter() - self._started
            yield token

    def report(self) -> None:
        """One line on standard error."""
        seconds = time.perf_counter() - self._started
        line = f"{self.tokens} tokens in {seconds:.2f} s"
        if self.tokens > 1 and self._first:
            rate = (self.tokens - 1) / max(seconds - self._first, 1e-9)
            line += f": the first after {self._first:.2f} s, compilation included, then {rate:.1f} tokens/s"
        elif self.tokens:
            line += f", compilation included: {self.tokens / max(seconds, 1e-9):.1f} tokens/s"
        say(line)


def write(sampler: Sampler, ids: Sequence[int], before: str, said: list[str] | None = None) -> None:
    """`before` and the answer to standard output, piece by piece, then a line end; a summary to standard error.

    said: receives the pieces, so that they are known where Ctrl-C ends the answer. Raises ConfigError before anything
    is written.
    """
    meter = Meter()
    pieces = sampler.answer(ids, meter)
    put(before)
    try:
        for piece in pieces:
            if said is not None:
                said.append(piece)
            put(piece)
    except KeyboardInterrupt:
        put("\n")
        raise
    put("\n")
    meter.report()


def put(text: str) -> None:
    """Writes text as UTF-8 whatever the locale says. Raises ConfigError where standard output is closed."""
    if sys.stdout is None:
        raise ConfigError("there is no standard output to write the text to")
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()
