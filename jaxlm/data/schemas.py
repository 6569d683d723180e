"""What rows mean: which columns hold the text, or a conversation, and how it becomes messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.config import ConfigError, nearest
from jaxlm.data.blocks import Columns, DataError, Row

Messages = list[dict[str, str]]  # role: system, user, assistant or tool; content: text
SCHEMAS = ("text", "openorca", "ultrachat", "messages")
_COLUMNS = {
    "text": (("text",),),
    "openorca": (("system_prompt",), ("question",), ("response",)),
    "ultrachat": (("messages", "data"),),
    "messages": (("messages", "conversations"),),
}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Schema:
    """How a row becomes a document.

    text: a column of text. openorca: system_prompt, question and response, one turn. ultrachat: `messages`, or `data`,
    a list of texts in turn. messages: a list of {role, content}, or of ShareGPT's {from, value}.
    """

    name: str
    columns: Columns

    @classmethod
    def of(cls, name: str, column: str = "") -> "Schema":
        """A schema by name; `column` renames its only column. Raises ConfigError."""
        if name not in SCHEMAS:
            raise ConfigError(
                f"unknown schema {name!r}{nearest(name, SCHEMAS)}; known are {', '.join(SCHEMAS)}"
            )
        groups = _COLUMNS[name]
        if column and len(groups) > 1:
            named = ", ".join(group[0] for group in groups)
            raise ConfigError(
                f"schema {name} reads the columns {named}; a single column {column!r} cannot replace them"
            )
        return cls(name, Columns(((column,),) if column else groups))

    @property
    def chat(self) -> bool:
        """Whether documents are conversations."""
        return self.name != "text"

    def text(self, row: Row) -> str:
        """The text of a document; of a conversation, what is said, a line each."""
        if not self.chat:
            return _text(row)
        return "\n".join(message["content"] for message in self.messages(row))

    def messages(self, row: Row) -> Messages:
        """The messages of a conversation, [] for a row that holds none. Raises DataError on anything else."""
        if isinstance(row.value, str):
            raise DataError(f"{row.where} is plain text; schema {self.name} needs rows of jsonl or parquet")
        if self.name == "openorca":
            roles = zip(("system", "user", "assistant"), row.value.items())
            told = [{"role": role, "content": _content(value, row, key)} for role, (key, value) in roles]
            return [message for message in told if message["content"]]
        ((key, value),) = row.value.items()
        if value is None:
            return []
        if not isinstance(value, list):
            raise DataError(
                f"{row.where}: column {key!r} holds {type(value).__name__}, not a list of messages"
            )
        return [_message(part, i, row, key) for i, part in enumerate(value)]


def _text(row: Row) -> str:
    if isinstance(row.value, str):
        return row.value
    ((key, value),) = row.value.items()
    return _content(value, row, key)


def _content(value: Any, row: Row, key: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {key!r} holds {type(value).__name__}, not text")
    return value


def _message(part: Any, number: int, row: Row, key: str) -> dict[str, str]:
    """One entry of a list of messages; texts alone are user and assistant in turn."""
    if isinstance(part, str):
        return {"role": ("user", "assistant")[number % 2], "content": part}
    if isinstance(part, Mapping):
        role, content = _first(part, ("role", "from")), _first(part, ("content", "value"))
        told = "content" in part or "value" in part  # it may be null, but not have another name
        if isinstance(role, str) and told and (content is None or isinstance(content, str)):
            return {"role": _ROLES.get(role, role), "content": content or ""}
    raise DataError(
        f"{row.where}: entry {number} of column {key!r} is no message {{role, content}}: {str(part)[:80]}"
    )


def _first(part: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((part[name] for name in names if name in part), None)
