"""What a row says to a model that is fine-tuned: a conversation, or a prompt with a chosen and a rejected answer."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.config import nearest
from jaxlm.data.blocks import Columns, DataError
from jaxlm.tune_config import ChatSchema

Messages = list[dict[str, Any]]  # role: one of ROLES; content: text; more of what templates read
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """A row to learn from: at least one message is the assistant's, and none of these is empty."""

    messages: Messages
    where: str  # for messages of error: file and line, or data set and row


@dataclass(frozen=True)
class Preference:
    """A row of two answers: each is what follows the prompt, up to and with a message of the assistant."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    where: str


@dataclass(frozen=True)
class BadRow:
    """A row that is neither, and why."""

    where: str
    reason: str  # a few words, the same for all such rows
    message: str  # one line with values


ChatRow = Conversation | Preference | BadRow
ROLES = ("system", "developer", "user", "assistant", "tool")
# Names of columns, the first that is there counts.
_LISTS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "prompt", "question")
_CONTEXTS = ("input", "context")
_ANSWERS = ("output", "response", "completion", "answer")
_SYSTEMS = ("system", "system_prompt")
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning")
CHAT_COLUMNS = (*_LISTS, "data", *_QUESTIONS, *_CONTEXTS, *_ANSWERS, *_SYSTEMS, "chosen", "rejected")
_WANTED = {  # what a row of each schema has: one of each group
    "preference": (("chosen",), ("rejected",)),
    "messages": (_LISTS,),
    "sharegpt": (_LISTS,),
    "ultrachat": (("messages", "data"),),
    "openorca": (("question",), ("response",)),
    "instruction": (_QUESTIONS, _ANSWERS),
}


class _Refused(Exception):
    """(reason, message) of a BadRow."""


@dataclass(frozen=True)
class ChatColumns(Columns):
    """Every column that may belong to a conversation, of those that there are."""

    groups: tuple[tuple[str, ...], ...] = (CHAT_COLUMNS,)

    def choose(self, known: Sequence[str], where: str) -> list[str]:
        """See `Columns`."""
        found = [name for name in CHAT_COLUMNS if name in known]
        if not found:
            raise DataError(
                f"{where} has no column of a conversation, such as messages, conversations, prompt and response, or "
                f"chosen and rejected; it has {', '.join(known) or 'none'}"
            )
        return found


def chat_row(row: Mapping[str, Any], where: str, schema: ChatSchema = "auto") -> ChatRow:
    """What a row says.

    Args:
        row: of CHAT_COLUMNS those that there are; null is as if it were not there.
        where: to call the row by.
        schema: messages: a list of {role, content}. sharegpt: of {from, value}. instruction: instruction, prompt or
            question, with an input or context, and output, response, completion or answer; prompt and completion may
            be lists of messages. openorca: system_prompt, question, response. ultrachat: `messages`, or `data`, a list
            of texts in turn. preference: chosen and rejected, texts behind a prompt or lists of messages. auto: the
            first of preference, lists and instruction whose keys are there.
    """
    row = {key: value for key, value in row.items() if value is not None}
    try:
        if schema == "auto":
            schema = _detected(row)
        missing = [group for group in _WANTED[schema] if not any(name in row for name in group)]
        if missing:
            has = ", ".join(row) or "nothing"
            raise _Refused("other columns", f"schema {schema} needs {' or '.join(missing[0])}; it has {has}")
        if schema == "preference":
            return _preference(row, where)
        messages = _instructed(row) if schema in ("instruction", "openorca") else _listed(row, schema)
        _require_answers(messages)
        return Conversation(messages, where)
    except _Refused as refused:
        return BadRow(where, *refused.args)


def _detected(row: Mapping[str, Any]) -> ChatSchema:
    for schema in ("preference", "messages", "ultrachat", "instruction"):
        if all(any(name in row for name in group) for group in _WANTED[schema]):
            return schema
    keys = "messages, conversations, instruction and output, prompt and completion, or chosen and rejected"
    raise _Refused("other columns", f"it is no conversation: has {', '.join(row) or 'nothing'}, not {keys}")


def _listed(row: Mapping[str, Any], schema: ChatSchema) -> Messages:
    key = next(name for name in (*_WANTED[schema][0], "data") if name in row)
    return _led(_system(row), _messages(row[key], key))


def _instructed(row: Mapping[str, Any]) -> Messages:
    question, answer = _of(row, _QUESTIONS), _of(row, _ANSWERS)
    asked = _messages(question, "prompt") if isinstance(question, list) else [_user(row, question)]
    said = _messages(answer, "completion") if isinstance(answer, list) else [_said("assistant", answer)]
    return _led(_system(row), [*asked, *said])


def _user(row: Mapping[str, Any], question: Any) -> dict[str, Any]:
    """A question, and behind an empty line what it is about."""
    asked, about = _said("user", question), _said("user", _of(row, _CONTEXTS) or "")["content"]
    return asked | ({"content": f"{asked['content']}\n\n{about}"} if about.strip() else {})


def _system(row: Mapping[str, Any]) -> Messages:
    text = _of(row, _SYSTEMS)
    return [_said("system", text)] if text else []


def _led(system: Messages, messages: Messages) -> Messages:
    """Behind `system`, unless they begin with a system message of their own."""
    return messages if messages[:1] and messages[0]["role"] == "system" else [*system, *messages]


def _preference(row: Mapping[str, Any], where: str) -> Preference:
    chosen, rejected = row["chosen"], row["rejected"]
    question = _of(row, _QUESTIONS)
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise _Refused(
            "chosen unlike rejected", "of chosen and rejected one is text, the other a list of messages"
        )
    if isinstance(chosen, list):
        sides = [_messages(chosen, "chosen"), _messages(rejected, "rejected")]
        asked = _messages(question, "prompt") if isinstance(question, list) else None
        prompt, sides = _prompt_of(sides, asked, lambda: [_user(row, question)] if question else [])
    elif question is None:
        raise _Refused("no prompt", "chosen and rejected are texts, so a prompt is needed")
    else:
        prompt = _messages(question, "prompt") if isinstance(question, list) else [_user(row, question)]
        sides = [[_said("assistant", chosen)], [_said("assistant", rejected)]]
    if not prompt:
        raise _Refused("no prompt", "chosen and rejected have no prompt and no first message in common")
    prompt = _led(_system(row), prompt)
    for name, side in zip(("chosen", "rejected"), sides):
        try:
            _require_answers([*prompt, *side], len(prompt))
        except _Refused as refused:
            raise _Refused(refused.args[0], f"{name}: {refused.args[1]}") from None
        while side[-1]["role"] != "assistant":
            side.pop()
    if sides[0] == sides[1]:
        raise _Refused("chosen equals rejected", "chosen and rejected are the same, which teaches nothing")
    chosen, rejected = sides
    return Preference(prompt, chosen, rejected, where)


def _prompt_of(
    sides: list[Messages], asked: Messages | None, single: Callable[[], Messages]
) -> tuple[Messages, list[Messages]]:
    """(the prompt, what follows it on each side) of lists that may hold the prompt.

    Where they begin with it, or with a message that is neither the assistant's nor a tool's, the prompt is in them,
    however it is written there: all that they have in common.
    """
    held = asked and all(side[: len(asked)] == asked for side in sides)
    if not held and all(side and side[0]["role"] in ("assistant", "tool") for side in sides):
        return asked or single(), sides
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides)))
    shorter = min(sides, key=len)
    if common == len(shorter) and shorter[-1:] and shorter[-1]["role"] == "assistant":
        common -= 1  # what it says last is its answer
    prompt = sides[0][:common]
    if prompt and asked and asked[0]["role"] == "system":
        prompt = _led(asked[:1], prompt)
    return prompt, [side[common:] for side in sides]


def _messages(value: Any, key: str) -> Messages:
    if not isinstance(value, list):
        raise _Refused("no messages", f"column {key!r} holds {type(value).__name__}, not a list of messages")
    return [_checked(part, i, key) for i, part in enumerate(value)]


def _checked(part: Any, number: int, key: str) -> dict[str, Any]:
    """One message; texts alone are user and assistant in turn."""
    if isinstance(part, str):
        return _said(("user", "assistant")[number % 2], part)
    role = _of(part, ("role", "from")) if isinstance(part, Mapping) else None
    if not isinstance(role, str):
        raise _Refused(
            "no messages",
            f"entry {number + 1} of {key!r} is no message {{role, content}}: {str(part)[:80]!r}",
        )
    known = _ROLES.get(role, role)
    if known not in ROLES:
        raise _Refused(
            "unknown role",
            f"message {number + 1} has the unknown role {role!r}{nearest(role, (*ROLES, *_ROLES))}; "
            f"known are {', '.join((*ROLES, *_ROLES))}",
        )
    kept = {name: part[name] for name in _KEPT if part.get(name) not in (None, "", [])}
    if not {"content", "value", "tool_calls"} & part.keys():
        raise _Refused(
            "no text",
            f"message {number + 1} has neither 'content' nor 'value', but {', '.join(map(repr, part))}",
        )
    for name in ("weight", "train"):
        if name in part and part[name] is not None and not part[name]:
            raise _Refused(
                "turns without loss",
                f"message {number + 1} says {name!r}: {part[name]}, and what an assistant says always carries loss: "
                "end the conversation before it",
            )
    return _said(known, _of(part, ("content", "value"))) | kept


def _said(role: str, content: Any) -> dict[str, Any]:
    """A message of text; parts of text are put together."""
    if isinstance(content, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
    ):
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise _Refused(
            "no text", f"what the {role} says is {type(content).__name__}, not text: {str(content)[:80]!r}"
        )
    return {"role": role, "content": content or ""}


def _require_answers(messages: Messages, first: int = 0) -> None:
    """Raises _Refused unless messages[first:] have one of the assistant and none of its is empty."""
    if not any(message["content"].strip() for message in messages):
        raise _Refused("no text", "it holds no text")
    answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise _Refused(
            "no assistant turn", f"no message is the assistant's, so there is nothing to learn: {roles}"
        )
    for i in answers:
        if not messages[i]["content"].strip() and "tool_calls" not in messages[i]:
            raise _Refused("empty answer", f"message {i + 1}, the assistant's, is empty")


def _of(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if name in row), None)
