"""Where documents come from: data sets of the Hugging Face hub by name, streamed, or local files."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxlm.config import nearest
from jaxlm.data.blocks import Block, DataError, Kind, Position, need_arrow, packed_arrow
from jaxlm.data.corpus import Corpus, open_corpus
from jaxlm.data.schemas import Schema

_ROW_BYTES = 4096  # of a typical row, to make blocks of about the size that is wanted


@dataclass(frozen=True)
class HubSource:
    """A data set read through `datasets`, streamed: nothing of it is kept on the disk.

    Any other way that `datasets` can load rows will do as well, such as path="json" with data_files.
    """

    description: str  # what to call it in messages and files
    path: str  # first argument of datasets.load_dataset
    schema: Schema
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = field(default=())

    def blocks(self, start: Position, size: int) -> Iterator[Block]:
        """The source in blocks of about `size` bytes, from where `start` says; `read` counts rows.

        Raises:
            DataError: the data set cannot be reached or read, or lacks a column.
        """
        arrow = need_arrow(self.description)
        columns = self.schema.columns.choose(self._columns, self.description)
        rows = self._rows.select_columns(columns).with_format("arrow")
        if "state" in start:
            rows.load_state_dict(start["state"])
        row = start.get("row", 0)
        batches = rows.iter(batch_size=max(1, min(1024, size // _ROW_BYTES)))
        while True:
            try:
                table = next(batches, None)
            except Exception as error:  # whatever the network, the hub or a file does
                raise self._failed(error, f"stopped at row {row}") from None
            if table is None:
                return
            first, row = row, row + table.num_rows
            data = packed_arrow(arrow, table.select(columns))
            following = {"row": row, "state": rows.state_dict()}
            yield Block("arrow", self.description, self.description, first, data, following, row)

    @property
    def total(self) -> int | None:
        """Rows, where the hub knows."""
        splits = self._rows.info.splits or {}
        return splits[self.split].num_examples or None if self.split in splits else None

    @cached_property
    def stamp(self) -> str:
        """SHA-256 of what is loaded. The hub's own changes are not seen, unless the revision is a commit."""
        facts = (self.path, self.config, self.split, self.revision, self.data_files, self.schema)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def empty(self) -> DataError:
        """What to raise when no document has any text."""
        return DataError(f"{self.description} is empty: no text in its {self.split} split")

    @cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{self.description} needs datasets to be read: pip install 'jaxlm[datasets]', "
                "or give a local copy of its files"
            ) from None
        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(
                self.path,
                self.config,
                split=self.split,
                revision=self.revision,
                data_files=list(self.data_files) or None,
                streaming=True,
            )
        except Exception as error:  # datasets raises its own, the hub's, the network's and the file system's
            raise self._failed(error, "cannot be loaded") from None

    @cached_property
    def _columns(self) -> list[str]:
        """Names of all columns; where the hub does not tell, those of the first row."""
        try:
            return list(self._rows.column_names or next(iter(self._rows), {}))
        except DataError:  # says all that there is to say
            raise
        except Exception as error:
            raise self._failed(error, "cannot be read") from None

    def _failed(self, error: Exception, what: str) -> DataError:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
        where = self.path if self.path != self.description else ""
        return DataError(
            f"{self.description}{f' ({where})' if where else ''} {what}: {reason}; "
            f"start it again (a preparation goes on where it was), or give local files: "
            f"FOLDER --schema {self.schema.name}"
        )


Source = Corpus | HubSource


@dataclass(frozen=True)
class Named:
    """A data set that has a name here."""

    path: str  # id on the hub
    schema: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


# The hub's ids, and what decides which rows are read. RedPajama's sample is published as a loading script, which
# `datasets` no longer runs; the hub keeps what that script gave as parquet, in a branch of its own.
NAMED = {
    "tinystories": Named("roneneldan/TinyStories", "text"),
    "fineweb-edu": Named("HuggingFaceFW/fineweb-edu", "text", config="sample-10BT"),
    "slimpajama-6b": Named("DKYoon/SlimPajama-6B", "text"),
    "redpajama": Named("togethercomputer/RedPajama-Data-1T-Sample", "text", revision="refs/convert/parquet"),
    "openorca": Named("Open-Orca/OpenOrca", "openorca"),
    "ultrachat": Named("HuggingFaceH4/ultrachat_200k", "ultrachat", split="train_sft"),
}


def open_source(
    name: str,
    schema: str = "",
    column: str = "",
    kind: Kind | None = None,
    config: str = "",
    split: str = "",
    revision: str = "",
) -> Source:
    """A source by name, or local files as `open_corpus`; a path of the same name is given as ./NAME.

    Args:
        schema, column: '' = those of the named source, or plain text.
        kind: of local files; None = by their names.
        config, split, revision: of a named source; '' = those of the table above.

    Raises:
        DataError: the source is neither, or cannot be used, or what is given fits named ones only; nearest names are
            shown.
        ConfigError: the schema is unknown.
    """
    if name in NAMED:
        known = NAMED[name]
        return HubSource(
            name,
            known.path,
            Schema.of(schema or known.schema, column),
            config or known.config,
            split or known.split,
            revision or known.revision,
        )
    for option, value in (("config", config), ("split", split), ("revision", revision)):
        if value:
            raise DataError(f"--{option} {value} chooses a part of a named source; {name!r} is none")
    if not name or (not Path(name).exists() and Path(name).name == name and not set("*?[.") & set(name)):
        there = [p.name for p in Path().iterdir()]
        raise DataError(
            f"source {name!r} is no path and no known data set{nearest(name, [*NAMED, *there])}; "
            f"known are {', '.join(NAMED)}"
        )
    return open_corpus(name, column, schema or "text", kind)
