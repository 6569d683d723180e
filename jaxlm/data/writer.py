"""Tokens to shards on the disk: appended as they come, exact to continue after a kill."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.shards import DOCUMENTS, HEADER_BYTES, ShardError, write_meta
from jaxlm.data.verify import Entry, describe, write_times
from jaxlm.disk import sync

State = dict[str, Any]  # plain JSON


class SplitWriter:
    """Writes one split. What `commit` returns, given to a new writer, continues there, whatever came after.

    Args:
        directory: of the split; made if it is not there.
        dtype: of the tokens.
        shard_tokens: tokens per file.
        state: None = from the beginning; what the directory holds is then overwritten.

    Attributes:
        tokens, documents, bytes: written so far; bytes are those of the text that the tokens stand for.
    """

    def __init__(
        self, directory: Path, dtype: np.dtype, shard_tokens: int, state: State | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._dtype, self._limit = directory, dtype, shard_tokens
        state = state or {}
        self.tokens: int = state.get("tokens", 0)
        self.documents: int = state.get("documents", 0)
        self.bytes: int = state.get("bytes", 0)
        self._starts: int = state.get("starts", 0)  # entries of documents.npy
        self._max_id: int = state.get("max_id", -1)  # of the open shard
        self._shards: list[Entry] = list(state.get("shards", []))
        self._open = self.tokens - sum(entry["tokens"] for entry in self._shards)
        for path in directory.glob("shard_*.npy"):
            if int(path.stem.partition("_")[2]) > len(self._shards):
                path.unlink()
        self._file = _Array(self._shard_path(), dtype, self._open)
        self._index = _Array(directory / DOCUMENTS, np.dtype(np.int64), self._starts)

    def add(self, ids: np.ndarray, starts: np.ndarray, text_bytes: int, documents: int) -> None:
        """Appends tokens.

        Args:
            starts: positions within `ids` at which a document starts, ascending.
            text_bytes: bytes of text that the tokens stand for.
            documents: how many to count.
        """
        self._index.append(self.tokens + np.asarray(starts, np.int64))
        self._starts += len(starts)
        self.documents += documents
        self.bytes += text_bytes
        while len(ids):
            part, ids = ids[: self._limit - self._open], ids[self._limit - self._open :]
            self._file.append(part)
            self._max_id = max(self._max_id, int(part.max()))
            self._open += len(part)
            self.tokens += len(part)
            if self._open == self._limit:
                self._end_shard()
                self._file = _Array(self._shard_path(), self._dtype, 0)

    def commit(self) -> State:
        """Makes sure that all of it is on the disk."""
        self._file.sync()
        self._index.sync()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "starts": self._starts,
            "max_id": self._max_id,
            "shards": self._shards,
        }

    @property
    def full_shards(self) -> int:
        """Shards that will not change any more."""
        return len(self._shards)

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes the last shard and meta.json, which also holds `facts`."""
        if self._open:
            self._end_shard()
        else:
            self._file.discard()
        self._index.finish()
        index: Entry = describe(self._directory / DOCUMENTS) | {"tokens": self._starts}
        meta = {
            **facts,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "dtype": self._dtype.name,
            "max_id": max((entry["max_id"] for entry in self._shards), default=-1),
            "shards": self._shards,
            "index": index,
        }
        write_meta(self._directory, meta)
        names = [str(entry["file"]) for entry in (*self._shards, index)]
        write_times(self._directory, {name: (self._directory / name).stat().st_mtime_ns for name in names})
        for name in ("meta.json", ""):
            sync(self._directory / name)

    def close(self) -> None:
        """Closes the files and leaves them as they are."""
        self._file.close()
        self._index.close()

    def _end_shard(self) -> None:
        self._file.finish()
        path = self._shard_path()
        self._shards.append(describe(path) | {"tokens": self._open, "max_id": self._max_id})
        self._open, self._max_id = 0, -1

    def _shard_path(self) -> Path:
        return self._directory / f"shard_{len(self._shards):04d}.npy"


class _Array:
    """A growing .npy file of one axis; its header is written last."""

    def __init__(self, path: Path, dtype: np.dtype, length: int) -> None:
        self._path, self._dtype, self._length = path, dtype, length
        size = HEADER_BYTES + length * dtype.itemsize
        if length and (not path.is_file() or path.stat().st_size < size):
            raise ShardError(f"{path} is shorter than what was written to it; delete {path.parent.parent}")
        self._file = open(path, "r+b" if length else "wb", buffering=0)  # noqa: SIM115  closed by finish and close
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, values: np.ndarray) -> None:
        view = np.ascontiguousarray(values, self._dtype).data.cast("B")
        while view:
            view = view[self._file.write(view) :]  # a disk that is nearly full takes a part
        self._length += len(values)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Writes the header and closes the file, all synced."""
        self._file.seek(0)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        if self._file.tell() != HEADER_BYTES:
            raise AssertionError(f"numpy wrote a header of {self._file.tell()} bytes, not {HEADER_BYTES}")
        self.sync()
        self.close()

    def discard(self) -> None:
        self.close()
        self._path.unlink()

    def close(self) -> None:
        self._file.close()
