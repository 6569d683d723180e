"""Text sources as documents: files and directories of text, jsonl and parquet, or the standard library."""

import hashlib
import itertools
import json
import math
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Literal

from jaxlm.config import ConfigError, nearest

FEW_DOCUMENTS = 20  # sources under this hold out the last share of their tokens instead of whole documents
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_IN_DIRECTORY = (".txt", ".text", ".md", ".py", ".jsonl", ".parquet")


class DataError(ConfigError):
    """A text source that cannot be used; the message is one line that says what is wrong with it."""


@dataclass(frozen=True)
class Document:
    """One text; `name` says where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order; iterating reads the files anew, so that a corpus need not fit into memory.

    Empty texts are left out. With `lenient`, so are files that are not UTF-8 (the standard library has such files).
    Iterating raises DataError on files that cannot be read as what they should be, or when there is no text at all.
    """

    description: str  # what to call it in messages and files
    root: Path  # what names are relative to
    files: tuple[Path, ...]
    column: str = "text"  # key of the text in jsonl and parquet
    lenient: bool = False

    def __iter__(self) -> Iterator[Document]:
        found = False
        for document in itertools.chain.from_iterable(map(self._read, self.files)):
            if document.text:
                found = True
                yield document
        if not found:
            raise DataError(f"{self.description} is empty: no text in {len(self.files)} file(s)")

    def _read(self, path: Path) -> Iterator[Document]:
        name = path.relative_to(self.root).as_posix()
        try:
            if path.suffix == ".jsonl":
                yield from _jsonl(path, name, self.column)
            elif path.suffix == ".parquet":
                yield from _parquet(path, name, self.column)
            else:
                yield Document(name, _utf8(path.read_bytes(), str(path)))
        except UnicodeDecodeError as error:
            if not self.lenient:
                raise _not_utf8(str(path), error) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names and contents of the files and of the column, in order."""
        digest = hashlib.sha256(self.column.encode())
        for path in self.files:
            try:
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None
            digest.update(os.fsencode(path.relative_to(self.root).as_posix()) + b"\0" + content)
        return digest.hexdigest()

    @cached_property
    def few_documents(self) -> bool:
        """Whether there are fewer than FEW_DOCUMENTS, so that validation is the last share of the tokens."""
        return sum(1 for _ in itertools.islice(self, FEW_DOCUMENTS)) < FEW_DOCUMENTS

    def documents(self, split: Literal["train", "val"], val_fraction: float) -> Iterator[Document]:
        """The documents of a split; of few documents, the first or last share of all characters.

        Shards split few documents by tokens instead, so that the two borders differ a little. This one exists because
        a tokenizer must learn before there are tokens, and should not learn from what is held out.
        """
        if not self.few_documents:
            yield from (d for i, d in enumerate(self) if is_validation(i, val_fraction) == (split == "val"))
            return
        before = math.ceil((1 - val_fraction) * sum(len(document.text) for document in self))
        for document in self:
            text = document.text[:before] if split == "train" else document.text[before:]
            before -= min(before, len(document.text))
            if text:
                yield Document(document.name, text)


def is_validation(index: int, val_fraction: float) -> bool:
    """Whether document `index` of a corpus is held out.

    Every run of 1/val_fraction documents gives one, chosen by a hash of the run's number: the share is exact and
    spread evenly, and does not depend on how many documents follow.
    """
    share = Fraction(str(val_fraction))
    run = math.floor(index * share)
    first, after = math.ceil(run / share), math.ceil((run + 1) / share)
    draw = int.from_bytes(hashlib.sha256(f"validation {run}".encode()).digest()[:8], "big")
    return index == first + draw % (after - first)


def open_corpus(path: str, column: str) -> Corpus:
    """The documents of `path`.

    Args:
        path: a .jsonl or .parquet file (one document per row), any other file (UTF-8 text, one document), a directory
            of .txt, .text, .md, .py, .jsonl and .parquet files, or '' for the interpreter's standard library.
        column: key of the text in jsonl and parquet.

    Raises:
        DataError: there is no such path, or nothing in it to read. Contents are checked when they are read.
    """
    if not path:
        return _standard_library()
    root = Path(path)
    if root.is_file():
        if root.stat().st_size == 0:
            raise DataError(f"data path {path} is empty")
        return Corpus(path, root.parent, (root,), column)
    if root.is_dir():
        files = [p for p in root.rglob("*") if p.suffix in _IN_DIRECTORY and p.is_file()]
        if not files:
            raise DataError(f"directory {path} holds none of {', '.join(_IN_DIRECTORY)}")
        return Corpus(path, root, tuple(sorted(files, key=lambda p: p.relative_to(root).as_posix())), column)
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    raise DataError(f"data path {path} does not exist{nearest(root.name, siblings)}")


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not _NOT_STDLIB.intersection(p.relative_to(root).parts[:-1])]
    ordered = sorted(files, key=lambda p: p.relative_to(root).as_posix())
    return Corpus("the standard library", root, tuple(ordered), lenient=True)


def _utf8(content: bytes, where: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{where} is not UTF-8 but looks like UTF-16 (byte 0 is 0x{content[0]:02x}); convert it"
        )
    return content.decode("utf-8")


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x} ({error.reason}); convert it"
    )


def _jsonl(path: Path, name: str, column: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error) from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{where} is a JSON {type(row).__name__}, not an object with the key {column!r}"
                )
            if column not in row:
                raise DataError(f"{where} has no column {column!r}{_columns(column, list(row))}")
            if not isinstance(row[column], str):
                raise DataError(f"{where}: column {column!r} holds {type(row[column]).__name__}, not text")
            yield Document(f"{name}:{number}", row[column])


def _parquet(path: Path, name: str, column: str) -> Iterator[Document]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            field_type = {field.name: field.type for field in file.schema_arrow}
            if column not in field_type:
                raise DataError(f"{path} has no column {column!r}{_columns(column, list(field_type))}")
            kind = field_type[column]
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise DataError(f"{path}: column {column!r} holds {kind}, not text")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{name}:{row}", text or "")
                    row += 1
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def _columns(column: str, known: list[str]) -> str:
    return f"{nearest(column, known)}; it has {', '.join(known) or 'none'}"
