"""Text sources as documents: files and directories of text, jsonl and parquet, or the standard library."""

import glob
import hashlib
import itertools
import math
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from jaxlm.config import nearest
from jaxlm.data.blocks import (
    BLOCK_BYTES,
    PACKED,
    SUFFIXES,
    Block,
    DataError,
    Kind,
    Position,
    read_blocks,
    rows,
)
from jaxlm.data.schemas import Schema

__all__ = ["Corpus", "DataError", "Document", "is_validation", "open_corpus", "validation_indices"]

FEW_DOCUMENTS = 20  # sources under this hold out the last share of their tokens instead of whole documents
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_IN_DIRECTORY = tuple(SUFFIXES) + tuple(s + p for s in SUFFIXES for p in PACKED)


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
    schema: Schema = field(default_factory=lambda: Schema.of("text"))  # what rows of jsonl and parquet mean
    lenient: bool = False
    kind: Kind | None = None  # of all files; None = by their names

    def __iter__(self) -> Iterator[Document]:
        found, name, parts = False, "", []
        for block in self.blocks({}, BLOCK_BYTES):
            for row in rows(block, self.schema.columns):
                if not row.continues:
                    if text := "".join(parts):
                        found = True
                        yield Document(name, text)
                    name, parts = row.name, []
                parts.append(self.schema.text(row))
        if text := "".join(parts):
            found = True
            yield Document(name, text)
        if not found:
            raise self.empty()

    def empty(self) -> DataError:
        """What to raise when no document has any text."""
        return DataError(f"{self.description} is empty: no text in {len(self.files)} file(s)")

    def blocks(self, start: Position, size: int) -> Iterator[Block]:
        """The source in blocks of about `size` bytes, from where `start` says; `read` counts bytes of all files."""
        files = [(path, path.relative_to(self.root).as_posix()) for path in self.files]
        sizes = dict(zip((str(path) for path in self.files), itertools.accumulate((0, *self._sizes))))
        for block in read_blocks(files, self.schema.columns, start, size, self.kind, self.lenient):
            yield replace(block, read=sizes[block.path] + block.read)

    @property
    def total(self) -> int | None:
        """What `read` of the last block will be."""
        return sum(self._sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        return [_stat(path).st_size for path in self.files]

    @cached_property
    def stamp(self) -> str:
        """SHA-256 of names, sizes and times of the files and of the columns: enough to go on after a kill."""
        facts = [(path.relative_to(self.root).as_posix(), _stat(path)) for path in self.files]
        listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts]
        return hashlib.sha256(
            repr((self.schema, self.kind, listed)).encode("utf-8", "surrogateescape")
        ).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names and contents of the files and of the columns, in order."""
        digest = hashlib.sha256(repr((self.schema, self.kind)).encode())
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
    return index == _held_out(math.floor(index * share), share)


def validation_indices(first: int, after: int, val_fraction: float) -> np.ndarray:
    """The indices in [first, after) for which `is_validation` holds, ascending, int64."""
    share = Fraction(str(val_fraction))
    runs = range(math.floor(first * share), math.floor((after - 1) * share) + 1) if after > first else ()
    found = (_held_out(run, share) for run in runs)
    return np.array([index for index in found if first <= index < after], np.int64)


def _held_out(run: int, share: Fraction) -> int:
    """The one document of a run that is held out."""
    first, after = math.ceil(run / share), math.ceil((run + 1) / share)
    draw = int.from_bytes(hashlib.sha256(f"validation {run}".encode()).digest()[:8], "big")
    return first + draw % (after - first)


def open_corpus(path: str, column: str = "", schema: str = "text", kind: Kind | None = None) -> Corpus:
    """The documents of `path`.

    Args:
        path: a .jsonl or .parquet file (one document per row), any other file (UTF-8 text, one document), a directory
            of .txt, .text, .md, .py, .jsonl and .parquet files, a glob of such files, or '' for the interpreter's
            standard library. Texts and jsonl may be packed as .gz or .zst.
        column: key of the text, or of the messages, in jsonl and parquet; '' = the schema's own.
        schema: what rows mean (`jaxlm.data.schemas`).
        kind: what all files are; None = by their names.

    Raises:
        DataError: there is no such path, or nothing in it to read. Contents are checked when they are read.
        ConfigError: the schema is unknown or has no single column.
    """
    means = Schema.of(schema, column)
    if not path:
        return _standard_library()
    root = Path(path)
    if root.is_file():
        if root.stat().st_size == 0:
            raise DataError(f"data path {path} is empty")
        return Corpus(path, root.parent, (root,), means, kind=kind)
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.name.endswith(_IN_DIRECTORY) and p.is_file()]
        if not found and (root / "meta.json").is_file():
            raise DataError(f"{path} is one split of prepared data; give its folder, {root.parent}")
        if not found:
            raise DataError(f"directory {path} holds none of {', '.join(SUFFIXES)} (or these as .gz, .zst)")
        return Corpus(path, root, _sorted(found, root), means, kind=kind)
    if glob.has_magic(path):
        found = [p for p in map(Path, glob.glob(path, recursive=True)) if p.is_file()]
        if not found:
            raise DataError(f"data path {path} matches no file")
        root = Path(re.split(r"[*?\[]", path)[0] + "x").parent
        return Corpus(path, root, _sorted(found, root), means, kind=kind)
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    if f".{root.name}.partial" in siblings:
        raise DataError(f"{path} is not prepared to its end; give the same prepare_data command again")
    raise DataError(f"data path {path} does not exist{nearest(root.name, siblings)}")


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not _NOT_STDLIB.intersection(p.relative_to(root).parts[:-1])]
    return Corpus("the standard library", root, _sorted(files, root), lenient=True)


def _sorted(files: list[Path], root: Path) -> tuple[Path, ...]:
    return tuple(sorted(files, key=lambda p: p.relative_to(root).as_posix()))


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
