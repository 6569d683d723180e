"""The dialogue: every command, bad values, conversations; and on a real terminal line editing, Unicode and Ctrl-C."""

import contextlib
import fcntl
import io
import os
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from helpers import random_params, tiny  # noqa: E402

from convert.native import export_torch  # noqa: E402
from convert.targets import open_target  # noqa: E402
from experiments import sample  # noqa: E402
from experiments.dialogue import Dialogue  # noqa: E402
from experiments.sampler import SampleOptions, Sampler  # noqa: E402
from jaxlm.config import ConfigError, InputError  # noqa: E402
from jaxlm.tokenizer import PATTERN, Tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal"),
]

ROOT = Path(__file__).resolve().parents[2]
MODEL = tiny(n_layers=1, vocab_size=280, context=4096, init="fan_in")
LONG = 1000  # tokens: half a second or so, time enough for Ctrl-C


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchref checkpoint of random weights, with a tokenizer that has ChatML's tokens."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    params = random_params(MODEL, dtype="float32")
    params["lm_head.weight"][:, 256:] = 0  # no special token is ever the likeliest
    export_torch(MODEL, params, path)
    Tokenizer.train(["ab abc abcd"] * 3, 270).save(path / "tokenizer.json")
    return path


def options(target: Path, **changes: object) -> SampleOptions:
    """Few tokens, in torch."""
    return SampleOptions(str(target), **({"framework": "torch", "max_new_tokens": 6} | changes))


def sampler(target: Path, **changes: object) -> Sampler:
    """What a dialogue is led with."""
    return Sampler(open_target(target), options(target, **changes))


Handle = Callable[[str], tuple[str, str]]


def listening(dialogue: Dialogue, capfdbinary: pytest.CaptureFixture[bytes]) -> Handle:
    """`handle`, which says what went to standard output and to standard error."""

    def handle(line: str) -> tuple[str, str]:
        capfdbinary.readouterr()
        dialogue.handle(line)
        said = capfdbinary.readouterr()
        return said.out.decode(), said.err.decode()

    return handle


def test_commands_change_what_is_written(target: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Each setting takes effect with the next answer, says so on standard error only, and :t ends greedy."""
    dialogue = Dialogue(sampler(target))
    handle = listening(dialogue, capfdbinary)
    for line, note in (
        (":t 0.7", "temperature = 0.7"),
        (":k 5", "top_k = 5"),
        (":p 0.9", "top_p = 0.9"),
        (":seed 11", "seed = 11"),
        (":greedy", "greedy = True"),
        (":help", ":reset"),
    ):
        out, err = handle(line)
        assert out == "" and note in err
    settings = dialogue.sampler.settings
    chosen = (settings.temperature, settings.top_k, settings.top_p, settings.seed, settings.greedy)
    assert chosen == (0.7, 5, 0.9, 11, True)
    greedy = sampler(target, greedy=True)
    out, err = handle("ab")
    assert out == "ab" + "".join(greedy.answer("ab")) + "\n" and "6 tokens" in err
    handle(":t 1.5")
    drawn = sampler(target, temperature=1.5, top_k=5, top_p=0.9, seed=11)
    assert handle("ab")[0] == "ab" + "".join(drawn.answer("ab")) + "\n" != out
    assert handle("") == ("", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (":t 0", "temperature=0.0 must be finite and above 0"),
        (":t -1", "temperature=-1.0"),
        (":t nan", "temperature=nan"),
        (":t hot", ":t needs a number, got 'hot'"),
        (":t", ":t needs a number, got ''"),
        (":k -1", "top_k=-1"),
        (":k 1.5", ":k needs a whole number, got '1.5'"),
        (":p 0", "top_p=0.0"),
        (":p 1.1", "top_p=1.1"),
        (":seed -3", "seed=-3"),
        (":rest", r"unknown command :rest \(did you mean ':reset'\?\)"),
        (":system be brief", ":system belongs to a conversation: :chat"),
        (":think", ":think belongs to a conversation"),
        ("a" * 5000, "exceed the model's context of 4096"),
        ("a\udcff", "not valid UTF-8"),
    ],
)
def test_a_bad_line_is_one_line_and_changes_nothing(target: Path, line: str, message: str) -> None:
    """Values out of range, no values at all, unknown commands, prompts that cannot be continued."""
    dialogue = Dialogue(sampler(target, greedy=True))
    before = (dialogue.sampler.settings, dialogue.system, dialogue.thinking, dialogue.chat)
    with pytest.raises(InputError, match=message) as caught:
        dialogue.handle(line)
    assert "\n" not in str(caught.value)
    assert (dialogue.sampler.settings, dialogue.system, dialogue.thinking, dialogue.chat) == before


def test_a_conversation_is_remembered(target: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Every turn stands in the next prompt, with the system message and the opened thought; :reset forgets."""
    plain = sampler(target, greedy=True)
    dialogue = Dialogue(sampler(target, greedy=True))
    handle = listening(dialogue, capfdbinary)
    plain.chatting = True
    messages: list[dict[str, str]] = []

    def turn(text: str, think: bool = False) -> None:
        messages.append({"role": "user", "content": text})
        opening = "<think>\n" if think else ""
        expected = opening + "".join(plain.answer(plain.chat.encode(messages, think)))
        assert handle(text)[0] == expected + "\n"
        messages.append({"role": "assistant", "content": expected})

    assert "chat = True" in handle(":chat")[1]
    turn("hi")
    turn("漢字 😀")
    assert "system = 'be brief'" in handle(":system be brief")[1]
    messages.insert(0, {"role": "system", "content": "be brief"})
    assert "think = True" in handle(":think")[1]
    turn("why?", think=True)
    assert dialogue.turns == messages[1:]
    with pytest.raises(ConfigError, match=r"tokens long, and 6 new ones .* no turn is dropped: .*:reset"):
        handle("a" * 4000)
    assert dialogue.turns == messages[1:]
    handle(":reset")
    del messages[1:]
    handle(":think")
    turn("again")
    handle(":system")
    assert dialogue.system is None
    assert "chat = False" in handle(":chat")[1] and not dialogue.sampler.chatting
    assert handle("ab")[0].startswith("ab")


def test_the_end_of_a_turn_ends_an_answer(target: Path) -> None:
    """A template of one's own ends answers with what it writes after them, in conversations only."""
    led = sampler(target)
    (end,) = (i for i in led.settings.stop if led.tokenizer.decode([i]) == "<|im_end|>")
    led.settings = led.settings.__class__(stop=())
    stops = []
    led._stream = lambda ids, settings: stops.append(settings.stop) or iter(())
    list(led.answer("ab"))
    led.chatting = True
    list(led.answer("ab"))
    assert stops == [(), (end,)]


def test_no_conversation_without_a_template(target: Path, tmp_path: Path) -> None:
    """A tokenizer without ChatML's tokens and no template: one line, from --chat, :chat and a single prompt."""
    for path in target.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bare = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, {"<|eos|>": 256})
    bare.save(tmp_path / "tokenizer.json")
    for ask in (
        lambda: Dialogue(sampler(tmp_path, chat=True)),
        lambda: Dialogue(sampler(tmp_path)).handle(":chat"),
        lambda: sample.main([str(tmp_path), "--prompt", "a", "--chat", "--framework", "torch"]),
    ):
        with pytest.raises(ConfigError, match="no chat template") as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (b":t 0\n:q\nab\n", b"error: temperature=0.0"),
        (b":t 0\n :q \n", b"error: temperature=0.0"),
        (b":k x\n", b"error: :k needs"),
        (b"caf\xe9\n", b"error: the line is not valid"),
    ],
)
def test_q_and_the_end_of_input_leave(
    target: Path,
    typed: bytes,
    message: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    """Exit code 0, errors said on the way, and nothing on standard output, not even where there is no terminal."""
    with open(1, "w", closefd=False) as output:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        monkeypatch.setattr(sys, "stdout", output)
        assert Dialogue(sampler(target)).run() == 0
        said = capfdbinary.readouterr()
        monkeypatch.undo()
    assert said.out == b"" and message in said.err and said.err.count(b"> ") >= 2


class Terminal:
    """The program on a pseudo-terminal of its own; its standard output goes elsewhere."""

    def __init__(self, *args: object) -> None:
        # A test run in the background inherits an ignored SIGINT, and so would the program.
        heed = "signal.signal(signal.SIGINT, signal.default_int_handler)"
        control = "fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        start = "runpy.run_module('experiments.sample', run_name='__main__')"
        code = f"import fcntl, runpy, signal, termios; {heed}; {control}; {start}"
        self._leader, follower = os.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            cwd=ROOT,
            env=os.environ | {"TERM": "dumb", "LC_ALL": "C.UTF-8", "INPUTRC": os.devnull},
            start_new_session=True,
            stdin=follower,
            stdout=subprocess.PIPE,
            stderr=follower,
        )
        os.close(follower)

    def type(self, text: str) -> None:
        """Keys pressed."""
        os.write(self._leader, text.encode())

    def screen(self, last: str = "\n> ") -> str:
        """What appears until `last` does."""
        assert self.process.stdout is not None
        return self._read(self._leader, last.encode()).decode().replace("\r", "")

    def output(self, last: str) -> str:
        """What goes to standard output until `last` does."""
        assert self.process.stdout is not None
        return self._read(self.process.stdout.fileno(), last.encode()).decode()

    def close(self) -> None:
        """No process and no file stays behind."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]
        os.close(self._leader)

    def _read(self, source: int, last: bytes) -> bytes:
        found, deadline = b"", time.monotonic() + 60
        while not found.replace(b"\r", b"").endswith(last):
            ready, _, _ = select.select([source], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"waited for {last!r} after {found[-2000:]!r}"
            found += os.read(source, 65536)
        return found


@pytest.fixture(scope="module")
def terminal(target: Path) -> Iterator[Terminal]:
    """A dialogue that writes long answers."""
    started = Terminal(target, "--framework", "torch", "--max-new-tokens", LONG, "--greedy")
    try:
        yield started
    finally:
        started.close()


def after(led: Sampler, user: dict[str, str], answer: str) -> str:
    """What is written to `and?` after `answer`."""
    turns = [user, {"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]
    return "".join(led.answer(led.chat.encode(turns))) + "\n"


def test_a_dialogue_on_a_terminal(terminal: Terminal, target: Path) -> None:
    """Lines are edited and remembered, text of any script goes in and out, Ctrl-C stops an answer, or leaves."""
    assert ":help" in terminal.screen()
    terminal.type("wrong\x15:seed 9\n")  # Ctrl-U empties the line
    assert "seed = 9" in terminal.screen()
    terminal.type("\x10\x7f8\n")  # Ctrl-P brings the last line back, backspace takes its 9
    assert "seed = 8" in terminal.screen()
    terminal.type(":t 0\n")
    assert "error: temperature=0.0" in terminal.screen()
    led = sampler(target, greedy=True, max_new_tokens=LONG)
    prompt = "naïve 漢字 😀"
    terminal.type(prompt + "\n")
    expected = prompt + "".join(led.answer(prompt)) + "\n"
    assert terminal.output(expected[-40:]) == expected
    assert "tokens/s" in terminal.screen()

    terminal.type(":chat\n")
    assert "chat = True" in terminal.screen()
    terminal.type("hi\n")
    begun = os.read(terminal.process.stdout.fileno(), 20)  # type: ignore[union-attr]
    terminal.type("\x03")
    assert "(stopped)" in terminal.screen()
    user = {"role": "user", "content": "hi"}
    led.chatting = True
    whole = "".join(led.answer(led.chat.encode([user])))
    terminal.type("and?\n")
    assert "tokens/s" in terminal.screen()
    os.set_blocking(terminal.process.stdout.fileno(), False)  # type: ignore[union-attr]
    written = (begun + terminal.process.stdout.read()).decode()  # type: ignore[union-attr]
    assert any(
        written == whole[:n] + "\n" + after(led, user, whole[:n])
        for n in range(len(whole), -1, -1)
        if written.startswith(whole[:n] + "\n")
    ), "the next turn continues the part that was written"
    for _ in range(5):  # the first may come before it listens
        terminal.type("\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(5)
            break
    assert terminal.process.returncode == 130
