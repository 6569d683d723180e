"""What is said is data: no message of a conversation can write a special token, whatever a template makes of it.

While a template runs, each character with which a special token begins is replaced in the messages by one that stands
nowhere else. The text is cut at the special tokens that it then holds, and the characters are put back in between.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.chat_template import Message
from jaxlm.config import ConfigError
from jaxlm.tokenizer import Tokenizer
from jaxlm.tokenizer_base import UNUSED

# What an assistant may write as tokens in the middle of its turn.
THOUGHT = re.compile(r"(<think>|</think>|<\|think\|>|<\|/think\|>|</\|think\|>)")
_WORD = re.compile(r"[\w-]+")
_PRIVATE = 0xF0000  # first of 65,534 characters that mean nothing (Unicode's plane 15)


@functools.lru_cache(maxsize=8)
def borders(tokenizer: Tokenizer) -> re.Pattern[str]:
    """What splits a text at special tokens, the longest first, and keeps them.

    Those that stand for nothing are left out: there may be thousands, and each would be tried at every mark.
    """
    longest_first = sorted(_used(tokenizer), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def escaped(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(messages that cannot begin a special token, {stand-in: character} to put back with `shown`).

    An assistant's thought tokens stay.

    Raises:
        ConfigError: a role is no plain word.
    """
    used = characters([template, *messages])
    hidden = {first: unused(used, n) for n, first in enumerate(sorted(_firsts(tokenizer) & used))}
    return [_masked(message, hidden) for message in messages], {new: old for old, new in hidden.items()}


def shown(text: str, characters: Mapping[str, str]) -> str:
    """`text` with each of `characters` replaced, one for one: no place in it moves."""
    for old, new in characters.items():
        text = text.replace(old, new)
    return text


def unused(used: set[str], number: int = 0) -> str:
    """The character without a meaning that is `number` places after the first which is not used."""
    free = (c for code in range(_PRIVATE, _PRIVATE + 65_534) if (c := chr(code)) not in used)
    return next(c for n, c in enumerate(free) if n == number)


def _used(tokenizer: Tokenizer) -> list[str]:
    return [text for text in tokenizer.specials if not UNUSED.fullmatch(text)]


@functools.lru_cache(maxsize=8)
def _firsts(tokenizer: Tokenizer) -> frozenset[str]:
    """The characters with which special tokens begin."""
    return frozenset(text[0] for text in _used(tokenizer))


def characters(value: Any) -> set[str]:
    """All that stand in texts, however deep."""
    found: set[str] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.update(value)
        elif isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return found


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
            parts = THOUGHT.split(value) if thinks else [value]
            return "".join(part if n % 2 else shown(part, hidden) for n, part in enumerate(parts))
        if isinstance(value, Mapping):
            return {name(key): masked(part) for key, part in value.items()}
        return [masked(part) for part in value] if isinstance(value, list | tuple) else value

    return {key: value if key == "role" else masked(value) for key, value in message.items()}
