"""Conversations and preferences as rows of files or data sets; each row is known by its file and line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxlm.data.blocks import BLOCK_BYTES, Block, DataError, kind_of, rows
from jaxlm.data.chat_rows import BadRow, ChatColumns, ChatRow, chat_row
from jaxlm.data.schemas import Schema
from jaxlm.data.sources import HubSource, Source, open_source
from jaxlm.tune_config import ChatSchema

_HUB = "hf:"  # before the name of any data set


@dataclass(frozen=True)
class Conversations:
    """Rows of several sources, in order; read anew each time that they are iterated over.

    Iterating raises DataError on a file or data set that cannot be read; a row that cannot be used is a BadRow.
    """

    sources: tuple[Source, ...]
    schema: ChatSchema

    def __iter__(self) -> Iterator[ChatRow]:
        for source in self.sources:
            for block in source.blocks({}, BLOCK_BYTES):
                yield from _rows(block, self.schema)

    @property
    def description(self) -> str:
        """The sources by name."""
        return ", ".join(source.description for source in self.sources)


def open_conversations(paths: Sequence[str], schema: ChatSchema = "auto") -> Conversations:
    """Conversations or preferences.

    Args:
        paths: jsonl and parquet files, folders and globs of these (packed or not); names of data sets known here, or
            hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:CONFIG of any, read through `datasets`.
        schema: what rows hold (`jaxlm.data.chat_rows`).

    Raises:
        DataError: no path is given, one does not exist, or holds no such file. Contents are checked when they are read.
    """
    if not paths:
        raise DataError("no conversations are given; name files of jsonl or parquet with --data")
    return Conversations(tuple(_source(path) for path in paths), schema)


def _source(path: str) -> Source:
    columns = Schema("messages", ChatColumns())
    if path.startswith(_HUB):
        name, _, rest = path.removeprefix(_HUB).partition(":")
        split, _, config = rest.partition(":")
        if not name:
            raise DataError(
                f"{path!r} names no data set; write hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:CONFIG"
            )
        return HubSource(name, name, columns, config or None, split or "train")
    source = open_source(path, "messages")
    if isinstance(source, HubSource):
        return replace(source, schema=columns)
    known = [file for file in source.files if kind_of(file)[0] != "text"]
    if not known and len(source.files) == 1 and _is_objects(source.files[0]):
        return replace(source, schema=columns, kind="jsonl")
    if not known:
        raise DataError(
            f"{path} is neither jsonl nor parquet; write each conversation as one line of JSON in a .jsonl"
        )
    return replace(source, schema=columns, files=tuple(known))


def _is_objects(file: Path) -> bool:
    """Whether a file of another name, such as .json, begins as jsonl does."""
    try:
        with file.open("rb") as content:
            return content.read(1 << 10).lstrip()[:1] == b"{"
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _rows(block: Block, schema: ChatSchema) -> Iterator[ChatRow]:
    """The rows of a block; a line that is no row at all does not hide those that follow."""
    if block.kind != "jsonl":
        for row in rows(block, ChatColumns()):
            assert isinstance(row.value, dict), "of Arrow's columns"
            yield chat_row(row.value, _where(block, row.where), schema)
        return
    for number, line in enumerate(block.data.split(b"\n"), block.first):
        if not line.strip():
            continue
        try:
            (row,) = rows(replace(block, data=line, first=number), ChatColumns())
        except DataError as error:
            where = f"{block.path}, line {number}"
            yield BadRow(
                where,
                "no row of JSON",
                _where(block, str(error)).removeprefix(where).lstrip(": ").removeprefix("is "),
            )
        else:
            assert isinstance(row.value, dict), "of a line of JSON"
            yield chat_row(row.value, _where(block, row.where), schema)


def _where(block: Block, text: str) -> str:
    """A place as it is told here: with a comma between file and line."""
    return text.replace(f"{block.path} ", f"{block.path}, ", 1)
