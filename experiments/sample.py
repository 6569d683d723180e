"""Continues a prompt with a trained model; the text goes to standard output, everything else to standard error.

    python -m experiments.sample runs/quickstart --prompt "def main(" --max-new-tokens 100 --temperature 0.8
    echo "import os" | python -m experiments.sample runs/quickstart --greedy --framework torch

Without --prompt, the prompt is read from standard input (one line end at its close is not part of it); on a terminal
this is a dialogue. TARGET is a run, a model directory with its tokenizer (of jaxlm, torchref, Hugging Face) or a .gguf.
"""

import codecs
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from convert.targets import Target, open_target
from experiments.cli import main_guard, parse, say
from jaxlm.config import ConfigError, InputError
from jaxlm.tokenizer import Tokenizer

HELP = ":t TEMPERATURE (0 = greedy)   :k TOP_K (0 = all)   :seed SEED   :help   :q   Ctrl-C stops an answer"
COMMANDS = {":t": ("temperature", float), ":k": ("top_k", int), ":seed": ("seed", int)}


@dataclass(frozen=True)
class SampleOptions:
    """Options of sampling."""

    target: Annotated[str, tyro.conf.Positional]  # run, model directory or .gguf
    prompt: str | None = None  # text to continue; left out = standard input
    max_new_tokens: int = 64  # tokens to write at most
    temperature: float = 0.8  # divides the logits; 0 = greedy
    top_k: int = 40  # choose among this many most likely tokens; 0 = all
    seed: int = 0  # of the noise; the same seed writes the same text
    greedy: bool = False  # always the most likely token, as --temperature 0
    framework: Literal["jax", "torch"] = "jax"  # which of the two models computes
    checkpoint: Literal["latest", "best"] = "latest"  # of a run: newest, or lowest validation loss


class Sampler:
    """An opened target: text in, pieces of text out."""

    def __init__(self, target: Target, options: SampleOptions):
        self.tokenizer = target.tokenizer
        specials = target.specials
        self._front = [specials.bos] if specials.adds_bos and specials.bos is not None else []
        stop = tuple(i for i in specials.eos if i < target.config.vocab_size)
        self._stream, settings = _load(target, options.framework)
        self.settings = settings(
            max_new_tokens=options.max_new_tokens,
            temperature=0.0 if options.greedy else options.temperature,
            top_k=options.top_k,
            seed=options.seed,
            stop=stop,
        )

    def change(self, **settings: Any) -> None:
        """Other settings from now on. Raises ConfigError on values that cannot work."""
        self.settings = dataclasses.replace(self.settings, **settings)

    def answer(self, prompt: str) -> Iterator[str]:
        """The continuation of a prompt, piece by piece. An empty prompt continues the separator of documents."""
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError("the prompt is not valid UTF-8") from None
        ids = [*self._front, *self.tokenizer.encode(prompt)]
        if not ids:
            if self.tokenizer.eos_id is None:
                raise ConfigError("the prompt is empty and the tokenizer has no token that starts a document")
            ids = [self.tokenizer.eos_id]
        return stream_text(self.tokenizer, self._stream(ids, self.settings))


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(SampleOptions, argv, "python -m experiments.sample", __doc__ or "")
    target = open_target(options.target, options.checkpoint)
    dialogue = options.prompt is None and sys.stdin.isatty()
    prompt = options.prompt if options.prompt is not None or dialogue else read_prompt()
    sampler = Sampler(target, options)
    if prompt is None:
        return talk(sampler)
    try:
        write(sampler, prompt)
    except BrokenPipeError:
        # Whoever read the text has enough; the interpreter must not try to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def read_prompt() -> str:
    """Standard input as text. Raises ConfigError where it is not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8: {error}") from None
    return text.removesuffix("\n")


def write(sampler: Sampler, prompt: str) -> None:
    """Prompt and continuation to standard output, as they come; a summary to standard error."""
    started, pieces = time.perf_counter(), sampler.answer(prompt)
    put(prompt)
    length = sum(map(put, pieces))
    put("\n")
    say(f"{length} characters in {time.perf_counter() - started:.1f} s")


def put(text: str) -> int:
    """Writes text as UTF-8 whatever the locale says; returns its length."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()
    return len(text)


def talk(sampler: Sampler) -> int:
    """The dialogue on a terminal: each line is a prompt or a command."""
    say(HELP)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == ":q":
            return 0
        line = line.removesuffix("\n")
        try:
            if line.startswith(":"):
                command(sampler, line)
            elif line:
                write(sampler, line)
        except InputError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            say("\n(stopped)")


def command(sampler: Sampler, line: str) -> None:
    """Carries out `:t 0.7` and its like. Raises ConfigError on anything else."""
    name, _, value = line.partition(" ")
    if name == ":help":
        say(HELP)
        return
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name}; {HELP}")
    setting, kind = COMMANDS[name]
    try:
        sampler.change(**{setting: kind(value)})
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{name} needs a number, got {value!r}") from None
    say(f"{setting} = {kind(value)}")


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of ids as it becomes certain: a character whose bytes are not all there waits for the rest.

    Joined, the pieces are `tokenizer.decode(ids)`. An id that only pads the model's vocabulary stands for no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if i < tokenizer.vocab_size and (piece := decoder.decode(tokenizer.decode_bytes([i]))):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def _load(target: Target, framework: str) -> tuple[Callable[[list[int], Any], Iterator[int]], type]:
    """`stream` with the weights in place, and the framework's Sampling."""
    if framework == "torch":
        from torchref import generate as torch_generate

        decoder = target.decoder
        return lambda ids, settings: torch_generate.stream(decoder, ids, settings), torch_generate.Sampling
    from jaxlm import generate
    from jaxlm.model import Split, abstract_model

    model = Split(abstract_model(target.config).graphdef, target.params)
    return lambda ids, settings: generate.stream(model, ids, settings), generate.Sampling


if __name__ == "__main__":
    main_guard(main)
