"""Continues prompts with a trained model; the text goes to standard output, everything else to standard error.

    python -m experiments.sample runs/quickstart --prompt "def main(" --max-new-tokens 100 --temperature 0.8
    python -m experiments.sample runs/quickstart --chat --prompt "What is a cache?" --system "Be brief."
    python -m experiments.sample runs/quickstart --file prompts.txt --lines --samples 4 --json > answers.jsonl
    echo "import os" | python -m experiments.sample runs/quickstart --greedy --framework torch
    python -m experiments.sample runs/base --adapter brief=runs/a --adapter long=peft/b --prompt "What is a cache?"

One answer is written as it comes, after its prompt (with --chat, alone). Several are decoded together; each follows its
prompt, and a line of --- stands between them (of several adapters, `--- NAME` before each); with --json each is an
object on a line of its own. Without --prompt the prompt is read from standard input (a byte order mark and one line end
at its close are not part of it); on a terminal this is a dialogue. A text that begins with - is given as --prompt=-x.
TARGET is a run, a model directory with its tokenizer (of jaxlm, torchref, Hugging Face) or a .gguf.
"""

import codecs
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.targets import open_target
from experiments.cli import main_guard, parse, say
from experiments.loading import precision
from experiments.sampler import Meter, SampleOptions, Sampler, put, write
from jaxlm.config import ConfigError
from jaxlm.text import Completion

BETWEEN = "---\n"


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(SampleOptions, argv, "python -m experiments.sample", __doc__ or "")
    prompts = read_prompts(options)
    check(options, dialogue=prompts is None)
    sampler = Sampler(open_target(options.target, options.checkpoint, optimizer=False), options)
    with precision(options.framework, options.dtype):
        if prompts is None:
            from experiments.dialogue import Dialogue

            return Dialogue(sampler).run()
        rows = [ids_of(sampler, prompt) for prompt in prompts]
        if options.json or len(rows) > 1 or options.samples > 1 or len(sampler.adapters) > 1:
            write_all(sampler, prompts, rows)
        else:
            write(sampler, rows[0], opening(sampler) if options.chat else prompts[0])
    return 0


def check(options: SampleOptions, dialogue: bool) -> None:
    """Raises ConfigError on options that contradict each other."""
    if not options.chat and (options.system is not None or options.think):
        raise ConfigError(f"--{'think' if options.think else 'system'} belongs to a conversation: add --chat")
    if options.chat and options.unprompted:
        raise ConfigError("--chat answers a user's turn, --unprompted has none: leave one of the two out")
    if options.logprobs and not options.json:
        raise ConfigError("--logprobs are written as JSON only: add --json")
    if dialogue and (options.json or options.samples > 1):
        name = "--json" if options.json else f"--samples {options.samples}"
        raise ConfigError(f"{name} needs a prompt: a dialogue shows one answer at a time")


def read_prompts(options: SampleOptions) -> list[str] | None:
    """The texts to continue; None = a person at a terminal will say. Raises ConfigError where there are none.

    An empty text stands for no prompt at all, which only --unprompted allows.
    """
    given = {
        "--prompt": options.prompt,
        "--file": options.file is not None,
        "--unprompted": options.unprompted,
    }
    names = [name for name, there in given.items() if there]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} both say what to continue; give one of them")
    if options.lines and names and options.file is None:
        raise ConfigError(f"--lines splits --file or standard input, not {names[0]}")
    if options.prompt:
        return list(options.prompt)
    if options.unprompted:
        return [""]
    if options.file is None and sys.stdin is None:  # closed by whoever started this
        raise ConfigError("there is no standard input: give --prompt, --file or --unprompted")
    if options.file is None and sys.stdin.isatty() and not options.lines:
        return None
    text, name = read_text(options.file)
    if not options.lines:
        return [text]
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if empty := [n for n, line in enumerate(lines, 1) if not line]:
        raise ConfigError(f"line {empty[0]} of {name} is empty, and so no prompt")
    return lines


def read_text(path: str | None) -> tuple[str, str]:
    """Text of a file, or of standard input, without byte order mark and the line end at its close; and its name.

    Raises ConfigError where it cannot be read or is not UTF-8.
    """
    if path == "":
        raise ConfigError("--file '' names no file")
    name = "standard input" if path is None else path
    try:
        data = sys.stdin.buffer.read() if path is None else Path(path).read_bytes()
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        return text.removesuffix("\n").removesuffix("\r"), name
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None


def ids_of(sampler: Sampler, prompt: str) -> list[int]:
    """Ids to continue: of a text, of a conversation of one turn, or of nothing. Raises ConfigError."""
    if sampler.options.unprompted:
        return sampler.separator()
    ids = sampler.encode(prompt)
    if not sampler.options.chat:
        return ids
    system = sampler.options.system
    first = [] if system is None else [{"role": "system", "content": system}]
    turn = {"role": "user", "content": prompt}
    return sampler.chat.encode([*first, turn], sampler.options.think)


def opening(sampler: Sampler) -> str:
    """What stands before the answer of a conversation: where it was begun with a thought, that."""
    return sampler.chat.opening if sampler.options.think else ""


def write_all(sampler: Sampler, prompts: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
    """All answers of the model, or of each of several adapters, when all are there."""
    for name in sampler.adapters or ("",):
        sampler.use(name)
        meter = Meter()
        answers = sampler.complete(rows, meter)
        done = [c._replace(prompt=prompt) for prompt, of_one in zip(prompts, answers) for c in of_one]
        meter.tokens = sum(len(completion.ids) for completion in done)
        for n, completion in enumerate(done):
            between = f"--- {name}\n" if name else BETWEEN * (n > 0)
            text = as_json(completion, name) if sampler.options.json else as_text(sampler, completion)
            put(text if sampler.options.json else between + text)
        if not all(math.isfinite(x) for completion in done for x in (*completion.logprobs, completion.score)):
            say("warning: the model gives NaN or infinite logits")
        meter.report()


def as_text(sampler: Sampler, completion: Completion) -> str:
    """An answer after its prompt; in a conversation on the next line."""
    between = f"\n{opening(sampler)}" if sampler.options.chat else ""
    return f"{completion.prompt}{between}{completion.text}\n"


def as_json(completion: Completion, adapter: str = "") -> str:
    """An answer as one line of JSON, with the adapter where several have names; what is not finite is null."""
    finite = [x if math.isfinite(x) else None for x in (*completion.logprobs, completion.score)]
    values = completion._asdict() | {"logprobs": finite[:-1], "score": finite[-1]}
    values |= {"adapter": adapter} if adapter else {}
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


if __name__ == "__main__":
    main_guard(main)
