"""Conversations as the text that a model was trained on: chat templates, rendered as transformers renders them.

A template is a program that came with a model's files, so it runs in Jinja's immutable sandbox. Its environment is the
one that Hugging Face's templates are written for: blocks leave no white space, `break` and `continue` work in loops,
`{% generation %}` marks what the assistant says, and `tojson`, `raise_exception` and `strftime_now` are there.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import ConfigError, nearest
from jaxlm.text import require_utf8
from jaxlm.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError
from jaxlm.tokenizer_base import UNUSED

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]  # role: system, user or assistant; content: text; more if the template reads more

# How the two tokens of ChatML may be spelled.
TURNS = (("<|im_start|>", "<|im_end|>"), ("<im_start>", "<im_end>"), ("im_start", "im_end"))
THOUGHTS = ("<think>", "<|think|>")  # likewise, of the token that opens a thought
# What an assistant may write as tokens in the middle of its turn.
_THOUGHT = re.compile(r"(<think>|</think>|<\|think\|>|<\|/think\|>|</\|think\|>)")
_WORD = re.compile(r"[\w-]+")
_PROBE = "qwxz"  # content that no template writes of itself
_PRIVATE = 0xF0000  # first of 65,534 characters that mean nothing (Unicode's plane 15)


def chatml(start: str = "<|im_start|>", end: str = "<|im_end|>") -> str:
    """ChatML (release notes of OpenAI's ChatGPT API): each message between `start` role and `end`."""
    start, end = json.dumps(start), json.dumps(end)
    return (
        "{% for message in messages %}"
        f"{{{{ {start} + message['role'] + '\\n' + message['content'] + {end} + '\\n' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {start} + 'assistant\\n' }}}}{{% endif %}}"
    )


# Llama 3 (its model card's prompt format): bos, then each message behind a header, without white space around it.
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
NAMED_TEMPLATES = {"chatml": chatml(), "llama3": LLAMA3}
_MARK = re.compile(r"<\|[^|<>\s]+\|>")  # how special tokens are spelled in templates


def open_template(spec: str) -> str:
    """The template that `spec` means: chatml, llama3, or a file of Jinja.

    Raises:
        ConfigError: it is none of these, cannot be read, is not valid, or cannot write a question and its answer.
    """
    if spec in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[spec]
    path = Path(spec)
    if not path.is_file():
        known = ", ".join(NAMED_TEMPLATES)
        raise ConfigError(
            f"chat template {spec!r} is neither a file nor one of {known}{nearest(spec, NAMED_TEMPLATES)}"
        )
    try:
        template = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"chat template {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat template {path} is not UTF-8: {error.reason}") from None
    try:
        text = render(template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if _PROBE not in text:
        raise ConfigError(f"{path}: the chat template leaves out what the assistant says; is it one?")
    return template


def special_tokens(template: str, more: Sequence[str] = ()) -> tuple[str, ...]:
    """The special tokens to train a tokenizer with: bos, eos, pad, those of the form `<|name|>` that the template
    writes, `<think>` and `</think>`, and `more`.
    """
    thoughts = [token for token in SPECIAL_TOKENS if "think" in token]
    return tuple(dict.fromkeys((*SPECIAL_TOKENS[:3], *_MARK.findall(template), *thoughts, *more)))


def template_for(tokenizer: Tokenizer, stored: str | None = None) -> str:
    """The template that a model's files hold, or the tokenizer's own, or ChatML where the tokenizer has its tokens.

    Raises:
        ConfigError: none of these.
    """
    if stored is not None:
        return stored
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    for start, end in TURNS:
        if _is_special(tokenizer, start) and _is_special(tokenizer, end):
            return chatml(start, end)
    raise ConfigError(
        "the model has no chat template and its tokenizer no <|im_start|> and <|im_end|>; "
        "put chat_template.jinja beside its weights, or continue plain text"
    )


def render(
    template: str, messages: Sequence[Message], add_generation_prompt: bool = True, **specials: str
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja.
        add_generation_prompt: whether what opens the assistant's turn is put at the end.
        specials: texts of special tokens that the template may write, such as `bos_token="<s>"`.

    Raises:
        ConfigError: the template is not valid, refuses these messages or cannot work with them.
    """
    import jinja2

    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **specials,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not valid Jinja, line {error.lineno}: {_line(error)}"
        ) from None
    except Exception as error:  # whatever a foreign program does wrong is the same to whoever called it
        raise ConfigError(f"the chat template cannot write this conversation: {_line(error)}") from None


def encode_conversation(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    """Ids of a conversation to learn from: special tokens where the template writes them, nowhere else.

    What is said is data: `<|im_end|>` in a message stays those characters. Only an assistant's own thought tokens,
    `<think>` and `</think>`, are tokens in its messages. Where no message holds a special token's text, these are the
    ids of `render` and `encode(special=True)`, and of transformers' `apply_chat_template`.

    While the template runs, each character with which a special token begins is replaced in the messages by one that
    stands nowhere else, so that a message cannot complete a token whatever the template puts together. A template
    that looks for such a text in a message will not find it.

    Args:
        template: Jinja.
        add_generation_prompt: whether what opens the assistant's turn is put at the end.

    Raises:
        ConfigError: as `render`, a role is no plain word, or the conversation is not valid UTF-8.
    """
    borders, firsts = _borders(tokenizer)
    hidden = _stand_ins(firsts, template, messages)
    chat = Chat.of(tokenizer, template, bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
    text = chat.text([_masked(message, hidden) for message in messages], add_generation_prompt)
    require_utf8(text, "the conversation")
    shown = {stand_in: first for first, stand_in in hidden.items()}
    ids: list[int] = []
    for n, part in enumerate(borders.split(text)):
        if n % 2:
            ids.append(tokenizer.specials[part])
        elif part:
            ids += tokenizer.encode(_swapped(part, shown))
    return ids


@functools.lru_cache(maxsize=8)
def _borders(tokenizer: Tokenizer) -> tuple[re.Pattern[str], str]:
    """What finds special tokens in a text, the longest first, and the characters with which they begin.

    Those that stand for nothing are left out: there may be thousands, and each would be tried at every mark.
    """
    used = (text for text in tokenizer.specials if not UNUSED.fullmatch(text))
    longest_first = sorted(used, key=len, reverse=True)
    found = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
    return found, "".join(sorted({text[0] for text in longest_first}))


def _stand_ins(firsts: str, template: str, messages: Sequence[Message]) -> dict[str, str]:
    """{character: one that neither the template nor a message holds}."""
    used = set(template).union(*(_characters(dict(message)) for message in messages))
    free = (c for code in range(_PRIVATE, _PRIVATE + 65_534) if (c := chr(code)) not in used)
    return {first: next(free) for first in firsts if first in used}


def _characters(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set().union(*(_characters(part) for pair in value.items() for part in pair))
    if isinstance(value, list | tuple):
        return set().union(*map(_characters, value))
    return set(value) if isinstance(value, str) else set()


def _masked(message: Message, hidden: Mapping[str, str]) -> dict[str, Any]:
    """A message whose texts cannot begin a special token, but for an assistant's thought tokens."""
    role = message.get("role")
    if isinstance(role, str) and not _WORD.fullmatch(role):
        raise ConfigError(f"the role {role!r} of a message is no plain word, such as user or assistant")
    thinks = role == "assistant"

    def name(key: Any) -> Any:  # of a field: what the template asks for stays
        return key if _WORD.fullmatch(str(key)) else masked(key)

    def masked(value: Any) -> Any:
        if isinstance(value, str):
            parts = _THOUGHT.split(value) if thinks else [value]
            return "".join(part if n % 2 else _swapped(part, hidden) for n, part in enumerate(parts))
        if isinstance(value, Mapping):
            return {name(key): masked(part) for key, part in value.items()}
        return [masked(part) for part in value] if isinstance(value, list | tuple) else value

    return {key: value if key == "role" else masked(value) for key, value in message.items()}


def _swapped(text: str, characters: Mapping[str, str]) -> str:
    for old, new in characters.items():
        text = text.replace(old, new)
    return text


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> "jinja2.Template":
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` writes what is inside; trainers read the mark, we do not."""

        tags = {"generation"}  # noqa: RUF012  jinja2's declared type

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write `<` as an HTML escape."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@dataclass(frozen=True)
class Chat:
    """How conversations with one model are written."""

    tokenizer: Tokenizer
    template: str  # Jinja
    specials: Mapping[str, str]  # texts of bos_token, eos_token, pad_token

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        stored: str | None = None,
        *,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
    ) -> "Chat":
        """The stored template, or ChatML. Raises ConfigError where neither can be had."""
        ids = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        known = {name: i for name, i in ids.items() if i is not None and 0 <= i < tokenizer.vocab_size}
        texts = {name: tokenizer.decode([i]) for name, i in known.items()}
        return cls(tokenizer, template_for(tokenizer, stored), texts)

    def text(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, think: bool = False
    ) -> str:
        """The conversation; with `think`, the answer is begun with what opens a thought. Raises as `render`."""
        text = render(self.template, messages, add_generation_prompt, **self.specials)
        opening = self.opening
        if not think or text.rstrip().endswith(opening.rstrip()):
            return text
        return text + opening

    def encode(self, messages: Sequence[Message], think: bool = False) -> list[int]:
        """Ids that an answer of the assistant continues; the texts of special tokens are those tokens.

        That holds for the messages as well, as in transformers: who may write them may also end a turn.
        Raises as `render`, and ConfigError where the text is not valid UTF-8.
        """
        text = self.text(messages, think=think)
        require_utf8(text, "the conversation")
        return self.tokenizer.encode(text, special=True)

    @property
    def opening(self) -> str:
        """What makes the model think before it answers: its own token, or the same as text; and a line end."""
        known = (token for token in THOUGHTS if _is_special(self.tokenizer, token))
        return next(known, THOUGHTS[0]) + "\n"

    @functools.cached_property
    def end(self) -> int | None:
        """The special token that the template writes after an answer, None where it writes none."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = render(self.template, messages, False, **self.specials)
        except ConfigError:
            return None
        _, found, after = text.rpartition(_PROBE)
        first = self.tokenizer.encode(after.lstrip(), special=True)[:1] if found else []
        return first[0] if first and self.tokenizer.encode(self.tokenizer.decode(first)) != first else None


def _is_special(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.special_id(text)
    except TokenizerError:
        return False
    return True
