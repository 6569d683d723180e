"""Files of text, jsonl and parquet in blocks of a few megabytes that a worker can turn into rows on its own.

Reading is cheap and in order; parsing happens wherever the block is. A block says where the next one begins, so that
reading can go on there after a kill.
"""

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxlm.config import ConfigError, nearest
from jaxlm.tokenizer import segments

Kind = Literal["text", "jsonl", "parquet"]
Position = dict[str, Any]  # plain JSON; {} = the beginning
PACKED = (".gz", ".zst")
SUFFIXES = {".txt": "text", ".text": "text", ".md": "text", ".py": "text"} | {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
BLOCK_BYTES = 1 << 22


class DataError(ConfigError):
    """A text source that cannot be used; the message is one line that says what is wrong with it."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a row are wanted: one of each group of alternatives."""

    groups: tuple[tuple[str, ...], ...]

    def choose(self, known: Sequence[str], where: str) -> list[str]:
        """The columns to read of those that there are. Raises DataError that names them, and the nearest."""
        chosen = []
        for group in self.groups:
            found = [name for name in group if name in known]
            if not found:
                wanted = " or ".join(map(repr, group))
                hint = nearest(group[0], known)
                raise DataError(f"{where} has no column {wanted}{hint}; it has {', '.join(known) or 'none'}")
            chosen.append(found[0])
        return chosen


@dataclass(frozen=True)
class Block:
    """Some rows of a source, in order."""

    kind: Literal["text", "jsonl", "arrow"]
    path: str  # for messages
    name: str  # of the file within its source
    first: int  # number of the first line (from 1), row or piece (from 0)
    data: bytes  # a text, lines, or Arrow's stream format
    next: Position  # where the block after this one begins
    read: int = 0  # bytes of this file up to its end, as they lie on the disk


@dataclass(frozen=True)
class Row:
    """One row of a block; `value` is a text, or the chosen columns."""

    where: str  # for messages
    name: str  # of the document
    value: str | dict[str, Any]
    continues: bool = False  # the text of the row before goes on


def kind_of(path: Path) -> tuple[Kind, str]:
    """What a file holds by its name, and its packing ('' or '.gz' or '.zst'); whatever is unknown is text."""
    packed = path.suffix if path.suffix in PACKED else ""
    inner = Path(path.stem).suffix if packed else path.suffix
    kind: Any = SUFFIXES.get(inner, "text")
    return kind, packed


def read_blocks(
    files: Sequence[tuple[Path, str]],
    columns: Columns,
    start: Position,
    size: int,
    kind: Kind | None = None,
    lenient: bool = False,
) -> Iterator[Block]:
    """Blocks of about `size` bytes of files given as (path, name).

    Args:
        columns: of jsonl and parquet that are wanted.
        start: `next` of the last block that was used up, or {}.
        kind: of all files; None = by their names.
        lenient: whether texts that are not UTF-8 are left out instead of refused.

    Raises:
        DataError: a file cannot be read as what it should be.
    """
    for number in range(start.get("file", 0), len(files)):
        path, name = files[number]
        at = start if number == start.get("file", 0) else {}
        found, packed = kind_of(path)
        try:
            if (kind or found) == "parquet":
                yield from _parquet(path, name, columns, number, at, size)
            elif (kind or found) == "jsonl":
                yield from _lines(path, name, number, at, size, packed)
            else:
                yield from _text(path, name, number, at, size, packed)
        except NotUtf8:
            if not lenient:
                raise
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"{path} cannot be read: {reason.splitlines()[0]}") from None


def rows(block: Block, columns: Columns) -> Iterator[Row]:
    """The rows of a block. Raises DataError on one that is not what it should be."""
    if block.kind == "text":
        yield Row(block.path, block.name, block.data.decode(), continues=block.first > 0)
    elif block.kind == "jsonl":
        yield from _parsed(block, columns)
    else:
        import pyarrow as arrow

        row = block.first
        with arrow.ipc.open_stream(block.data) as reader:
            for batch in reader:
                try:
                    values = batch.to_pylist()
                except UnicodeDecodeError as error:
                    raise _not_utf8(f"{block.path} from row {row}", error) from None
                for value in values:
                    yield Row(f"{block.path} row {row}", f"{block.name}:{row}", value)
                    row += 1


def utf8(content: bytes, where: str) -> str:
    """The text of some bytes. Raises DataError that names the first byte which is wrong."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{where} is not UTF-8 but looks like UTF-16 (byte 0 is 0x{content[0]:02x}); convert it"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None


class NotUtf8(DataError):
    """A file of text in some other encoding."""


def _not_utf8(where: str, error: UnicodeDecodeError) -> NotUtf8:
    return NotUtf8(
        f"{where} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x} ({error.reason}); convert it"
    )


def _open(path: Path, packed: str, stack: ExitStack) -> tuple[io.BufferedIOBase, io.BufferedIOBase]:
    """(what to read from, the file as it lies on the disk)."""
    raw = stack.enter_context(path.open("rb"))
    if packed == ".gz":
        return stack.enter_context(gzip.open(raw, "rb")), raw
    if packed == ".zst":
        arrow = need_arrow(path)
        stream: Any = stack.enter_context(closing(arrow.CompressedInputStream(raw, "zstd")))
        return stack.enter_context(io.BufferedReader(stream, 1 << 20)), raw
    return raw, raw


def need_arrow(path: Any) -> Any:
    """pyarrow, with parquet. Raises DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install 'jaxlm[parquet]'") from None
    return pyarrow


def _text(path: Path, name: str, number: int, at: Position, size: int, packed: str) -> Iterator[Block]:
    """One document; a long one in pieces, cut where tokenizers cut anyway."""
    with ExitStack() as stack:
        content, raw = _open(path, packed, stack)
        text, length = utf8(content.read(), str(path)), raw.tell()
    pieces = [text] if len(text) <= size else list(segments(text, size))
    for i in range(at.get("piece", 0), len(pieces)):
        last = i + 1 == len(pieces)
        following = {"file": number + 1} if last else {"file": number, "piece": i + 1}
        read = length if last else length * (i + 1) // len(pieces)
        yield Block("text", str(path), name, i, pieces[i].encode(), following, read)


def _lines(path: Path, name: str, number: int, at: Position, size: int, packed: str) -> Iterator[Block]:
    offset, line = at.get("offset", 0), at.get("line", 1)
    with ExitStack() as stack:
        content, raw = _open(path, packed, stack)
        content.seek(offset) if packed != ".zst" else _skip(content, offset)
        while data := content.read(size):
            if not data.endswith(b"\n"):
                data += content.readline()
            offset, first = offset + len(data), line
            line += data.count(b"\n")
            following = {"file": number, "offset": offset, "line": line}
            yield Block("jsonl", str(path), name, first, data, following, raw.tell())


def _skip(content: io.BufferedIOBase, count: int) -> None:
    while count and (data := content.read(min(count, 1 << 20))):
        count -= len(data)


def _parsed(block: Block, columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(block.data.split(b"\n")):
        where = f"{block.path} line {block.first + number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise DataError(f"{where} is nested too deeply") from None
        if not isinstance(row, dict):
            keys = " or ".join(map(repr, columns.groups[0]))
            raise DataError(f"{where} is a JSON {type(row).__name__}, not an object with the key {keys}")
        chosen = columns.choose(list(row), where)
        yield Row(where, f"{block.name}:{block.first + number}", {key: row[key] for key in chosen})


def _parquet(
    path: Path, name: str, columns: Columns, number: int, at: Position, size: int
) -> Iterator[Block]:
    arrow = need_arrow(path)
    row = at.get("row", 0)
    length = path.stat().st_size
    try:
        with arrow.parquet.ParquetFile(path) as file:
            chosen = columns.choose([field.name for field in file.schema_arrow], str(path))
            count = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            group = before = 0
            while group < len(count) and before + count[group] <= row:
                before, group = before + count[group], group + 1
            batches = file.iter_batches(
                _rows_per_batch(file, size), row_groups=list(range(group, len(count))), columns=chosen
            )
            for batch in batches:
                skipped = min(max(0, row - before), batch.num_rows)
                before += batch.num_rows
                if skipped == batch.num_rows:
                    continue
                first, row = before - batch.num_rows + skipped, before
                data = packed_arrow(arrow, batch.slice(skipped).select(chosen))
                read = length * before // max(1, file.metadata.num_rows)
                yield Block("arrow", str(path), name, first, data, {"file": number, "row": before}, read)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def _rows_per_batch(file: Any, size: int) -> int:
    """So many rows that a batch has about `size` bytes; all columns are counted, which errs on the small side."""
    meta = file.metadata
    total = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    return max(1, min(1 << 16, size * max(1, meta.num_rows) // max(1, total)))


def packed_arrow(arrow: Any, batch: Any) -> bytes:
    """A record batch or table in Arrow's stream format."""
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write(batch)
    return sink.getvalue().to_pybytes()
