"""Tokenised text as checksummed, memory-mapped shards: what `jaxlm.data.prepare` writes, opened and checked.

    DIR/train/shard_0000.npy, shard_0001.npy, ...    tokens, flat; uint16, or uint32 for vocabularies over 65,536
    DIR/train/documents.npy                          where documents start, int64
    DIR/train/meta.json, times.json                  what these are, and when they were last known to be whole
    DIR/val/...                                      the same
    DIR/tokenizer.json, dataset.json                 what made the tokens, and from what

The end-of-text token joins documents.
"""

import hashlib
import itertools
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.verify import Entry, ShardError, Verify, Watch, check_files

__all__ = ["SCHEMA", "ShardError", "TokenStore", "open_shards", "read_meta", "write_meta"]

SCHEMA = 2
HEADER_BYTES = 128  # of an .npy file that holds one axis: numpy leaves room for 21 digits
DOCUMENTS = "documents.npy"
_FIELDS = {"dtype": str, "vocab_size": int, "tokenizer": str, "tokens": int, "documents": int, "max_id": int}
_ENTRY = ("file", "bytes", "sha256", "sample", "tokens")


class TokenStore:
    """All tokens of a split as one long sequence over memory-mapped shards: `store[a:b]`, `len(store)`.

    Args:
        shards: tokens, in order.
        meta: contents of meta.json; dtype, tokenizer and shards[i].sha256 are needed.
        starts: positions of first tokens of documents, ascending, int64; None = one document.
        watch: of the shards, and of the document starts as the last of its files; None = they are right.

    Attributes:
        meta: contents of meta.json.
        fingerprint: SHA-256 of the files' checksums and the tokenizer's fingerprint.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        meta: dict[str, Any],
        starts: np.ndarray | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._shards, self.meta, self._watch = [np.asarray(shard) for shard in shards], meta, watch
        self._documents = np.zeros(1, np.int64) if starts is None else np.asarray(starts)
        self._borders = np.array([0, *itertools.accumulate(len(shard) for shard in shards)], np.int64)
        self._length = int(self._borders[-1])
        self._dtype = np.dtype(meta["dtype"])
        sums = [entry["sha256"] for entry in _entries(meta)]
        self.fingerprint = hashlib.sha256(json.dumps([sums, meta["tokenizer"]]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice) -> np.ndarray:
        """Tokens a to b-1 as a new array in the shards' dtype; bounds behave as those of any sequence.

        Raises:
            ShardError: a shard that was used before has been found damaged.
        """
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in order; step {step} is not supported")
        out = np.empty(max(0, stop - start), self._dtype)
        if not len(out):
            return out
        first, last = (int(i) for i in np.searchsorted(self._borders, (start, stop - 1), side="right") - 1)
        self._use(range(first, last + 1))
        filled = 0
        for i in range(first, last + 1):
            offset = start + filled - int(self._borders[i])
            part = self._shards[i][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens starts[i] to starts[i]+length-1 as row i, [len(starts), length] in the shards' dtype.

        Raises:
            IndexError: a window does not lie within the tokens.
            ShardError: as `store[a:b]`.
        """
        starts = np.asarray(starts, np.int64)
        if len(starts) and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(
                f"windows of {length} start at {starts.min()} to {starts.max()}, outside {len(self)} tokens"
            )
        where = np.searchsorted(self._borders, starts, side="right") - 1
        if self._watch is not None:
            self._use(() if self._watch.quiet else np.unique(where).tolist())
        out = np.empty((len(starts), length), self._dtype)
        offsets = (starts - self._borders[where]).tolist()
        for row, (start, shard, offset) in enumerate(zip(starts.tolist(), where.tolist(), offsets)):
            part = self._shards[shard][offset : offset + length]
            out[row, : len(part)] = part
            if len(part) < length:
                out[row, len(part) :] = self[start + len(part) : start + length]
        return out

    def document_starts(self, a: int, b: int) -> np.ndarray:
        """Positions s of first tokens of documents with a <= s < b, ascending, int64; 0 always counts as one.

        Raises:
            ShardError: as `store[a:b]`.
        """
        self._use((len(self._shards),))
        first, last = np.searchsorted(self._documents, (a, b))
        return np.array(self._documents[first:last])

    def expect_random_reads(self) -> None:
        """Turns reading ahead off: a window of kilobytes would drag megabytes of its shard in, 20 ms a cold batch."""
        for array in (*self._shards, self._documents):
            base: Any = array
            while isinstance(base, np.ndarray):
                base = base.base
            if isinstance(base, mmap.mmap):
                base.madvise(mmap.MADV_RANDOM)

    def _use(self, numbers: Sequence[int]) -> None:
        if self._watch is not None:
            self._watch.use(numbers)


def open_shards(directory: str | Path, vocab_size: int, verify: Verify = "full") -> TokenStore:
    """Memory-maps one split.

    Args:
        directory: DIR/train or DIR/val of `jaxlm.data.prepare`.
        vocab_size: of the model; every token id must be below it.
        verify: full = every byte of every file now; quick = sizes, times and a sampled block of each, and every byte
            of a shard in the background once it is used.

    Raises:
        ShardError: something is missing, truncated, damaged, or a token id is not in the vocabulary.
    """
    directory = Path(directory)
    meta, remedy = read_meta(directory), _remedy(directory)
    entries = _entries(meta)
    done = check_files(directory, entries, verify, remedy)
    shards = [_map(directory, e, meta["dtype"], remedy) for e in meta["shards"]]
    starts = _map(directory, meta["index"], "int64", remedy)
    if meta["max_id"] >= vocab_size:
        _locate(directory, meta["shards"], shards, vocab_size)
    return TokenStore(shards, meta, starts, Watch(directory, entries, done, remedy))


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json of a split. Raises ShardError unless it is what was written, by this version."""
    path, remedy = directory / "meta.json", _remedy(directory)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["schema"] != SCHEMA:
            raise ShardError(f"{path} has schema {meta['schema']}, this program reads {SCHEMA}; {remedy}")
        if sum(entry["tokens"] for entry in meta["shards"]) != meta["tokens"]:
            raise ShardError(
                f"{path} is damaged: its shards do not add up to {meta['tokens']} tokens; {remedy}"
            )
        if meta.pop("checksum") != _checksum(meta):
            raise ShardError(f"{path} is damaged: its checksum is not that of its contents; {remedy}")
        for entry in _entries(meta):
            _ = [entry[key] for key in _ENTRY]
        for key, kind in _FIELDS.items():
            if not isinstance(meta[key], kind):
                raise TypeError(f"{key} is {meta[key]!r}")
        return dict(meta)
    except ShardError:
        raise
    except FileNotFoundError:
        raise ShardError(f"{directory} holds no tokenised data: meta.json is missing") from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise ShardError(f"{path} is damaged: {type(error).__name__} {reason}; {remedy}") from None


def write_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Writes meta.json with the checksum of its contents; not synced."""
    text = json.dumps({**meta, "checksum": _checksum(meta)}, indent=1)
    (directory / "meta.json").write_text(text + "\n", encoding="utf-8")


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _entries(meta: dict[str, Any]) -> list[Entry]:
    """Every file of a split: the shards, then the document starts."""
    return [*meta["shards"], *([meta["index"]] if "index" in meta else [])]


def _remedy(directory: Path) -> str:
    return f"restore it, or delete {directory.parent} and tokenise anew"


def _map(directory: Path, entry: Entry, dtype: str, remedy: str) -> np.ndarray:
    path = directory / entry["file"]
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        more = "; prepare it with a larger --shard-tokens, or raise `ulimit -n`" if error.errno == 24 else ""
        raise ShardError(f"{path} cannot be opened: {error.strerror or error}{more}") from None
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise ShardError(f"{path} is damaged: {str(error).splitlines()[0]}; {remedy}") from None
    if found.dtype != dtype or found.shape != (entry["tokens"],):
        raise ShardError(
            f"{path} holds {found.dtype}{list(found.shape)} instead of {dtype}[{entry['tokens']}]; {remedy}"
        )
    return found.view(np.ndarray)  # slices of a memmap cost ten times those of an array


def _locate(directory: Path, entries: Sequence[Entry], shards: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raises ShardError that names the first token id which the vocabulary does not have."""
    for entry, shard in zip(entries, shards):
        for start in range(0, len(shard) if entry["max_id"] >= vocab_size else 0, 1 << 24):
            part = shard[start : start + (1 << 24)]
            if part.max() >= vocab_size:
                at = int(np.argmax(part >= vocab_size))
                raise ShardError(
                    f"{directory / entry['file']} position {start + at} holds token id {part[at]}, "
                    f"but the vocabulary has only {vocab_size}"
                )
