"""The dialogue of `experiments.sample` on a terminal: lines are continued, or are turns of a conversation."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from experiments.cli import say
from experiments.sampler import Sampler, write
from jaxlm.chat import Chat, Message
from jaxlm.cli import readable
from jaxlm.config import ConfigError, InputError, nearest

HELP = """\
:t X         temperature, above 0; ends greedy     :chat          conversation on or off
:k N         choose among the N likeliest, 0 = all :system TEXT   system message; without text, none
:p X         nucleus: share of probability, 1 = all :think        begin answers with a thought, on or off
:greedy      always the likeliest token, on or off :reset         forget the conversation
:seed N      of the noise                          :adapter NAME  which one answers; without name, none
:help   :q   Ctrl-C stops an answer, Ctrl-D leaves"""
PROMPT = "> "
_VALUES: dict[str, tuple[str, type, str]] = {
    ":t": ("temperature", float, "a number"),
    ":k": ("top_k", int, "a whole number"),
    ":p": ("top_p", float, "a number"),
    ":seed": ("seed", int, "a whole number"),
}


class Dialogue:
    """One person at a terminal. Answers go to standard output; prompts, notes and errors to standard error."""

    def __init__(self, sampler: Sampler):
        options = sampler.options
        self.sampler = sampler
        self.chat = sampler.chat if options.chat else None  # refused now where there is no template
        self.system, self.thinking = options.system, options.think
        self.turns: list[Message] = []
        self._commands: dict[str, Callable[[str], None]] = {
            ":greedy": self._greedy,
            ":chat": self._chat,
            ":system": self._system,
            ":think": self._think,
            ":reset": self._reset,
            ":adapter": self._adapter,
            ":help": lambda _: say(HELP),
        }

    def run(self) -> int:
        """Until :q or the end of input: exit code 0. Raises KeyboardInterrupt where nothing is being answered."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` line editing and history

        say(HELP)
        while True:
            try:
                line = read_line()
            except EOFError:
                say("")
                return 0
            except UnicodeDecodeError:
                say("error: the line is not valid in the encoding of this terminal")
                continue
            if line.strip() == ":q":
                return 0
            try:
                self.handle(line)
            except InputError as error:
                say(f"error: {readable(str(error))}")
            except KeyboardInterrupt:
                say("(stopped)")

    def handle(self, line: str) -> None:
        """A command, or text to answer. Raises InputError on what cannot be done, and then nothing has changed."""
        if line.startswith(":"):
            self._command(line)
        elif line and self.chat:
            self._turn(self.chat, line)
        elif line:
            write(self.sampler, self.sampler.encode(line), line)

    def _turn(self, chat: Chat, line: str) -> None:
        """The user's turn and the answer join the conversation; one that Ctrl-C ended as far as it came."""
        user = {"role": "user", "content": line}
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = chat.encode([*first, *self.turns, user], self.thinking)
        room, new = self.sampler.config.context, self.sampler.settings.max_new_tokens
        if len(ids) + new > room:
            raise ConfigError(
                f"the conversation with this turn is {len(ids)} tokens long, and {new} new ones exceed the model's "
                f"context of {room}; no turn is dropped: say less, or :reset to start again"
            )
        opening = chat.opening if self.thinking else ""
        said: list[str] = []
        try:
            write(self.sampler, ids, opening, said)
        except KeyboardInterrupt:
            if said:
                self._remember(user, opening + "".join(said))
            raise
        self._remember(user, opening + "".join(said))

    def _remember(self, user: Message, answer: str) -> None:
        self.turns += [user, {"role": "assistant", "content": answer}]

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        name, value = name.strip(), value.strip()
        if name in _VALUES:
            self._set(name, value)
        elif name in self._commands:
            self._commands[name](value)
        else:
            known = [*_VALUES, *self._commands, ":q"]
            raise ConfigError(f"unknown command {name}{nearest(name, known)}; :help lists them")

    def _set(self, name: str, value: str) -> None:
        setting, kind, expected = _VALUES[name]
        try:
            number = kind(value)
        except ValueError:
            raise ConfigError(f"{name} needs {expected}, got {value!r}") from None
        also = {"greedy": False} if name == ":t" else {}
        self.sampler.change(**{setting: number}, **also)
        say(f"{setting} = {number}")

    def _greedy(self, _: str) -> None:
        self.sampler.change(greedy=not self.sampler.settings.greedy)
        say(f"greedy = {self.sampler.settings.greedy}")

    def _chat(self, _: str) -> None:
        self.chat = None if self.chat else self.sampler.chat
        self.sampler.chatting = self.chat is not None
        say(f"chat = {self.sampler.chatting}")

    def _system(self, text: str) -> None:
        self._need_chat(":system")
        self.system = text or None
        say(f"system = {text!r}")

    def _think(self, _: str) -> None:
        self._need_chat(":think")
        self.thinking = not self.thinking
        say(f"think = {self.thinking}")

    def _adapter(self, name: str) -> None:
        self.sampler.use(name)
        say(f"adapter = {name or None}")

    def _reset(self, _: str) -> None:
        self.turns.clear()
        say("the conversation starts again")

    def _need_chat(self, name: str) -> None:
        if self.chat is None:
            raise ConfigError(f"{name} belongs to a conversation: :chat starts one")


def read_line() -> str:
    """A line from the terminal, with editing and history. Raises EOFError and KeyboardInterrupt as `input` does."""
    with _output_aside():
        return input(PROMPT)


@contextlib.contextmanager
def _output_aside() -> Iterator[None]:
    """`input` and readline write prompts and echoes to standard output; meanwhile that is standard error.

    Not where only standard output is a terminal: they would not edit there, and no result can be spoilt.
    """
    if sys.stdout.isatty() and not sys.stderr.isatty():
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
