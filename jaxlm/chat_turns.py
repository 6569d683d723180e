"""Where in the text of a conversation the assistant speaks, up to and with the end of its turns.

Templates that mark it with `{% generation %}` say it themselves, and ChatML's and Llama 3's have forms that do. Of
others it is found by what they write:

1. The turn begins where the conversation before it, with the generation prompt, ends, and ends with the first end of a
   turn after that. The conversation up to this turn, written alone, must say the same: a template may leave earlier
   thoughts out of the whole, but not change what is left.
2. Where the generation prompt is not what stands before the turn, as of templates that open a thought with it: the
   message's content is replaced by a single character. What stands around that must be what stands around the content.

A template for which neither holds is refused, since a guess would train on the wrong words.
"""

from collections.abc import Sequence

from jaxlm.chat import Chat
from jaxlm.chat_escape import characters, unused
from jaxlm.chat_template import Message, Span, has_generation, render_spans, with_generation
from jaxlm.config import ConfigError

_MARK = "put {% generation %} and {% endgeneration %} around what the assistant says, the end of its turn included"


def turns(chat: Chat, messages: Sequence[Message], first: int = 0) -> tuple[str, list[Span]]:
    """(text of a conversation, where the assistant says messages[first:] of it), in order and apart.

    Args:
        messages: escaped (`jaxlm.chat_escape`), so that the end of a turn is never in a message.

    Raises:
        ConfigError: as `jaxlm.chat.render`; or where the assistant speaks cannot be told.
    """
    template = with_generation(chat.template)
    if not has_generation(template):
        text = chat.text(messages, False)
        return text, _found(chat, text, messages, first)
    text, spans = render_spans(template, messages, False, **chat.specials)
    spans = _apart(spans)
    return text, _after(chat, text, spans, messages, first) if first else spans


def _apart(spans: Sequence[Span]) -> list[Span]:
    """Without what is empty or inside another."""
    kept: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if kept and start < kept[-1][1]:
            start, end = kept[-1][0], max(end, kept.pop()[1])
        kept.append((start, end))
    return kept


def _after(chat: Chat, text: str, spans: list[Span], messages: Sequence[Message], first: int) -> list[Span]:
    """Those of messages[first:]: behind the text of the others, or by their number."""
    for prompted in (True, False):
        before = _written(chat, messages[:first], prompted)
        if before is not None and text.startswith(before):
            return [span for span in spans if span[0] >= len(before)]
    if len(spans) == len(_speaking(messages, 0)):
        return spans[len(spans) - len(_speaking(messages, first)) :]
    raise ConfigError(
        "the chat template writes the prompt otherwise when an answer follows, so the answer's place cannot be told; "
        "use one {% generation %} block for each of the assistant's messages"
    )


def _speaking(messages: Sequence[Message], first: int) -> list[int]:
    return [i for i in range(first, len(messages)) if messages[i].get("role") == "assistant"]


def _written(chat: Chat, messages: Sequence[Message], prompted: bool) -> str | None:
    """The text of some messages, None where the template cannot write them."""
    try:
        return chat.text(messages, prompted)
    except ConfigError:
        return None


def _found(chat: Chat, text: str, messages: Sequence[Message], first: int) -> list[Span]:
    if not (speaking := _speaking(messages, first)):
        return []
    if chat.end is None:
        raise ConfigError(
            f"the chat template writes no special token after an answer, so its end cannot be told; {_MARK}"
        )
    end = chat.tokenizer.decode([chat.end])
    spans: list[Span] = []
    for i in speaking:
        span = _by_prompt(chat, text, messages, i, end) or _by_stand_in(chat, text, messages, i, end)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise ConfigError(
                f"where the chat template writes message {i + 1}, the assistant's, cannot be told; {_MARK}"
            )
        spans.append(span)
    return spans


def _by_prompt(chat: Chat, text: str, messages: Sequence[Message], i: int, end: str) -> Span | None:
    before, alone = _written(chat, messages[:i], True), _written(chat, messages[: i + 1], False)
    if before is None or alone is None or not (text.startswith(before) and alone.startswith(before)):
        return None
    start = len(before)
    stop, stop_alone = text.find(end, start), alone.find(end, start)
    if stop < 0 or stop_alone < 0 or not alone[start:stop_alone].endswith(text[start:stop]):
        return None
    return start, stop + len(end)


def _by_stand_in(chat: Chat, text: str, messages: Sequence[Message], i: int, end: str) -> Span | None:
    stand_in = unused(characters(text))
    probed = _written(chat, [*messages[:i], {**messages[i], "content": stand_in}, *messages[i + 1 :]], False)
    before, found, after = (probed or "").partition(stand_in)
    rest = after.lstrip()
    stop = len(text) - len(rest)
    if not found or stand_in in rest or not rest.startswith(end) or stop < len(before):
        return None
    return (len(before), stop + len(end)) if text.startswith(before) and text.endswith(after) else None
