"""Conversations as the text and the ids that a model was trained on, with the template that belongs to it."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.chat_escape import borders, escaped, shown
from jaxlm.chat_template import LLAMA3, NAMED_TEMPLATES, TURNS, Message, chatml, render
from jaxlm.config import ConfigError, nearest
from jaxlm.text import require_utf8
from jaxlm.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError

__all__ = [
    "LLAMA3",
    "NAMED_TEMPLATES",
    "Chat",
    "Message",
    "chatml",
    "encode_conversation",
    "open_template",
    "render",
    "special_tokens",
    "template_for",
]

THOUGHTS = ("<think>", "<|think|>")  # spellings of the token that opens a thought
_PROBE = "qwxz"  # content that no template writes of itself
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
    chat = Chat.of(tokenizer, template, bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
    safe, stand_ins = escaped(tokenizer, template, messages)
    text = chat.text(safe, add_generation_prompt)
    require_utf8(text, "the conversation")
    ids: list[int] = []
    for n, part in enumerate(borders(tokenizer).split(text)):
        if n % 2:
            ids.append(tokenizer.specials[part])
        elif part:
            ids += tokenizer.encode(shown(part, stand_ins))
    return ids


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
