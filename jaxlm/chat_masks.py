"""Which tokens of a conversation the assistant says, and so carry loss: to the token, whatever the tokenizer.

A token that overlaps what is said carries loss. With `{% generation %}` in the template that is the assistant mask of
transformers' `apply_chat_template`, but for one thing: where what is said ends with a character of several tokens,
transformers marks the first of these only.
"""

import bisect
import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxlm.chat import Chat
from jaxlm.chat_escape import THOUGHT, borders, escaped, shown
from jaxlm.chat_template import Message, Span
from jaxlm.chat_turns import turns
from jaxlm.text import require_utf8
from jaxlm.tokenizer import Tokenizer
from jaxlm.tokenizer_bytes import ByteLevel

if TYPE_CHECKING:
    import tokenizers

_TAG = 16  # characters, more than any that opens a thought


def encode_with_mask(
    tokenizer: Tokenizer,
    template: str | Chat,
    messages: Sequence[Message],
    think: bool = True,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [n], carries bool [n]) of `encode_turns`, whose arguments and errors it has."""
    return encode_turns(tokenizer, template, messages, think, first)[:2]


def encode_turns(
    tokenizer: Tokenizer,
    template: str | Chat,
    messages: Sequence[Message],
    think: bool = True,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids int32 [n], carries bool [n], said bool [n]): `encode_conversation`, which tokens carry loss, which are said.

    What the assistant says carries loss, but for thoughts where these are not to. The end of a turn is said by the
    assistant; what the template writes after that is not, such as ChatML's line end.

    Args:
        template: Jinja; a Chat also has the special tokens that a model's files name.
        think: whether thoughts, `<think>` to `</think>`, carry loss; if not, no token that overlaps one does.
        first: how many messages are there before those that carry loss.

    Raises:
        ConfigError: as `encode_conversation`; or where the assistant speaks cannot be told.
    """
    chat = template if isinstance(template, Chat) else _chat(tokenizer, template)
    safe, stand_ins = escaped(tokenizer, chat.template, messages)
    text, said = turns(chat, safe, first)
    require_utf8(text, "the conversation")
    silent = [] if think else _thoughts(chat, text, said)
    ids: list[int] = []
    carries, said_at = bytearray(), bytearray()
    start = 0
    for n, part in enumerate(borders(tokenizer).split(text)):
        end = start + len(part)
        spans, without = _within(said, start, end), _within(silent, start, end)
        if n % 2:
            ids.append(tokenizer.specials[part])
            carries.append(bool(spans) and not without)
            said_at.append(bool(spans))
        elif part:
            new, learnt, spoken = _located(tokenizer, shown(part, stand_ins), spans, without)
            ids += new
            carries += learnt
            said_at += spoken
        start = end
    return np.array(ids, np.int32), np.frombuffer(carries, bool), np.frombuffer(said_at, bool)


@functools.lru_cache(maxsize=8)
def _chat(tokenizer: Tokenizer, template: str) -> Chat:
    return Chat.of(tokenizer, template, bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id)


def _within(spans: Sequence[Span], start: int, end: int) -> list[Span]:
    """What of `spans`, in order and apart, lies in [start, end), counted from `start`."""
    first = bisect.bisect_right(spans, start, key=lambda span: span[1])
    found = []
    for a, b in spans[first:]:
        if a >= end:
            break
        found.append((max(a, start) - start, min(b, end) - start))
    return found


def _thoughts(chat: Chat, text: str, said: Sequence[Span]) -> list[Span]:
    """Thoughts in what is said, with their tags; one inside another is part of it.

    A thought that ends but does not begin was begun by the template; one that does not end, ends with the turn.
    """
    end = None if chat.end is None else chat.tokenizer.decode([chat.end])
    found = []
    for start, after in said:
        tags = list(THOUGHT.finditer(text, max(0, start - _TAG), start))
        begun = bool(tags) and "/" not in tags[-1][0] and not text[tags[-1].end() : start].strip()
        depth, begin, reached = int(begun), start, len(found)
        for tag in THOUGHT.finditer(text, start, after):
            if "/" not in tag[0]:
                begin = begin if depth else tag.start()
                depth += 1
            elif depth <= 1:  # ends one, or begins the turn
                if not depth:
                    del found[reached:]
                found.append((begin if depth else start, tag.end()))
                depth = 0
            else:
                depth -= 1
        if depth:
            stop = -1 if end is None else text.rfind(end, begin, after)
            found.append((begin, after if stop < 0 else stop))
    return found


def _located(
    tokenizer: Tokenizer, text: str, spans: Sequence[Span], without: Sequence[Span]
) -> tuple[list[int], bytes, bytes]:
    """(ids of an ordinary text, a byte for each that is 1 if it carries loss, a byte for each that is 1 if it is said).

    What overlaps one of `spans` is said; unless it overlaps one of `without`, too, it carries loss.
    """
    whole = [(0, len(text))]
    if (not spans or spans == whole) and (not without or without == whole):
        ids = tokenizer.encode(text)
        return ids, bytes([bool(spans) and not without]) * len(ids), bytes([bool(spans)]) * len(ids)
    if isinstance(tokenizer.codec, ByteLevel):  # a token is bytes, and no byte is lost
        ids = tokenizer.encode(text)
        lengths = _byte_lengths(tokenizer)[ids]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        spans, without = ([_in_bytes(text, span) for span in some] for some in (spans, without))
    else:
        # A space that Metaspace puts in front has the place of the first character.
        encoding = _library(tokenizer).encode(text, add_special_tokens=False)
        ids, (starts, ends) = encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    said, silent = np.zeros((2, len(ids)), bool)
    for overlap, some in ((said, spans), (silent, without)):
        for a, b in some:
            overlap[(starts < b) & (ends > a)] = True
    return ids, (said & ~silent).tobytes(), said.tobytes()


def _in_bytes(text: str, span: Span) -> Span:
    start = len(text[: span[0]].encode())
    return start, start + len(text[span[0] : span[1]].encode())


@functools.lru_cache(maxsize=8)
def _byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.byte_lengths()


@functools.lru_cache(maxsize=8)
def _library(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """The same ids with their places, without special tokens: ordinary text finds none."""
    from tokenizers import Tokenizer as Library

    facts = tokenizer.codec.to_json() | {"added_tokens": [], "post_processor": None}
    return Library.from_str(json.dumps(facts))
