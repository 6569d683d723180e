"""Tokenised text as checksummed, memory-mapped shards: written once, atomically; checked when opened.

    DIR/train/shard_0000.npy, shard_0001.npy, ..., meta.json
    DIR/val/...                                               the same

A shard is a flat array of uint16, or uint32 for vocabularies over 65,536. The end-of-text token joins documents.
"""

import bisect
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.data.corpus import Corpus, DataError, is_validation
from jaxlm.tokenizer import Tokenizer, segments

SCHEMA = 1
SHARD_TOKENS = 1 << 26
_SPLITS = ("train", "val")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BATCH_CHARACTERS = 1 << 23  # text encoded at once
Progress = Callable[[int, int], None]  # documents and tokens so far


class ShardError(DataError):
    """Tokenised data that is damaged or belongs to something else; the message names file and place."""


class TokenStore:
    """All tokens of a split as one long sequence over memory-mapped shards: `store[a:b]`, `len(store)`.

    Attributes:
        meta: contents of meta.json.
        fingerprint: SHA-256 of the shards' checksums and the tokenizer's fingerprint.
    """

    def __init__(self, shards: list[np.ndarray], meta: dict[str, Any]) -> None:
        self._shards, self.meta = shards, meta
        self._starts = [0, *itertools.accumulate(len(shard) for shard in shards)]
        self._dtype = np.dtype(meta["dtype"])
        sums = [entry["sha256"] for entry in meta["shards"]]
        self.fingerprint = hashlib.sha256(json.dumps([sums, meta["tokenizer"]]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        """Tokens a to b-1 as a new array in the shards' dtype; bounds behave as those of any sequence."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in order; step {step} is not supported")
        out = np.empty(max(0, stop - start), self._dtype)
        filled = 0
        i = bisect.bisect_right(self._starts, start) - 1
        while filled < len(out):
            offset = start + filled - self._starts[i]
            part = self._shards[i][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled, i = filled + len(part), i + 1
        return out


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    val_fraction: float,
    min_tokens: int,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
    threads: int = 2,
) -> None:
    """Tokenises `corpus` into `out_dir`/train and `out_dir`/val, unless they already hold exactly that.

    The folder appears under its name only when all is written and synced: a process that is killed, or a full disk,
    leaves nothing half-written.

    Args:
        val_fraction: share of documents held out; with fewer than FEW_DOCUMENTS, of tokens, the last ones
            (no fewer than min_tokens).
        min_tokens: tokens that each split needs, one training window: T+1.
        progress: called with the documents and tokens done so far.
        shard_tokens: tokens per file.
        threads: of the tokenizer.

    Raises:
        DataError: the text is too short or cannot be read, or `out_dir` holds something else.
        ShardError: the disk is full or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    recipe = {
        "schema": SCHEMA,
        "source": corpus.description,
        "source_fingerprint": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "split_by": "tokens" if corpus.few_documents else "documents",
    }
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out_dir.parent):
            if _holds(out_dir, recipe, min_tokens):
                return
            partial = out_dir.with_name(f".{out_dir.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _write_splits(corpus, tokenizer, partial, recipe, min_tokens, progress, threads)
                _publish(partial, out_dir)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise ShardError(
                f"no space for the tokenised data in {out_dir.parent} ({error.strerror}); nothing was left there: "
                "free some space or set data.cache to a folder on another disk"
            ) from None
        raise ShardError(
            f"tokenised data cannot be written to {out_dir}: {error.strerror or error}"
        ) from None


def open_shards(
    directory: str | Path, vocab_size: int, verify: Literal["full", "quick"] = "full"
) -> TokenStore:
    """Memory-maps one split.

    Args:
        directory: DIR/train or DIR/val of `prepare`.
        vocab_size: of the model; every token id must be below it.
        verify: full = sizes, checksums and all token ids; quick = sizes, and ids only if the file allows higher ones.

    Raises:
        ShardError: something is missing, truncated, damaged, or a token id is not in the vocabulary.
    """
    directory = Path(directory)
    meta = _read_meta(directory)
    shards = []
    for entry in meta["shards"]:
        path = directory / entry["file"]
        shards.append(_open_shard(path, entry, meta["dtype"], verify == "full"))
        if verify == "full" or meta["vocab_size"] > vocab_size:
            _check_ids(path, shards[-1], vocab_size)
    return TokenStore(shards, meta)


def _read_meta(directory: Path) -> dict[str, Any]:
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["schema"] != SCHEMA:
            raise ShardError(
                f"{path} has schema {meta['schema']}, this program reads {SCHEMA}; delete {directory.parent}"
            )
        if sum(entry["tokens"] for entry in meta["shards"]) != meta["tokens"]:
            raise ShardError(f"{path} is damaged: its shards do not add up to {meta['tokens']} tokens")
        for key, kind in {"dtype": str, "vocab_size": int, "tokenizer": str}.items():
            if not isinstance(meta[key], kind):
                raise TypeError(f"{key} is {meta[key]!r}")
        return dict(meta)
    except FileNotFoundError:
        raise ShardError(f"{directory} holds no tokenised data: meta.json is missing") from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path} is damaged: {type(error).__name__} {error}; delete {directory.parent}"
        ) from None


def _open_shard(path: Path, entry: dict[str, Any], dtype: str, checksum: bool) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            fault = "truncated" if size < entry["bytes"] else "too long"
            raise ShardError(
                f"{path} is {fault}: {size} bytes instead of {entry['bytes']}; delete {path.parent.parent}"
            )
        if checksum and _sha256(path) != entry["sha256"]:
            raise ShardError(
                f"{path} is damaged: its checksum is not that of meta.json; delete {path.parent.parent}"
            )
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; delete {path.parent.parent} to tokenise anew") from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(
            f"{path} is damaged: {str(error).splitlines()[0]}; delete {path.parent.parent}"
        ) from None
    if shard.dtype != dtype or shard.shape != (entry["tokens"],):
        raise ShardError(
            f"{path} holds {shard.dtype}{list(shard.shape)} instead of {dtype}[{entry['tokens']}]"
        )
    return shard


def _check_ids(path: Path, shard: np.ndarray, vocab_size: int) -> None:
    for start in range(0, len(shard), 1 << 24):
        part = shard[start : start + (1 << 24)]
        if part.max() >= vocab_size:
            at = int(np.argmax(part >= vocab_size))
            raise ShardError(
                f"{path} position {start + at} holds token id {part[at]}, but the vocabulary has only {vocab_size}"
            )


def _holds(out_dir: Path, recipe: dict[str, Any], min_tokens: int) -> bool:
    """Whether `out_dir` already is what `prepare` would write; DataError if it is not ours to replace."""
    if not out_dir.exists():
        return False
    if not out_dir.is_dir():
        raise DataError(f"{out_dir} is a file; tokenised data needs a folder")
    others = sorted(p.name for p in out_dir.iterdir() if p.name not in _SPLITS)
    if others:
        raise DataError(f"{out_dir} holds {others[0]!r}, which is no tokenised data; choose another folder")
    try:
        metas = [_read_meta(out_dir / split) for split in _SPLITS]
        for meta, split in zip(metas, _SPLITS):
            for entry in meta["shards"]:
                _open_shard(out_dir / split / entry["file"], entry, meta["dtype"], checksum=False)
    except ShardError:
        return False
    same = all(meta.get(key) == value for meta in metas for key, value in recipe.items() if key != "source")
    train, val = (meta["tokens"] for meta in metas)
    if same and recipe["split_by"] == "tokens":
        return bool(val == _tail(train + val, recipe["val_fraction"], min_tokens, recipe["source"]))
    return same and min(train, val) >= min_tokens


def _tail(tokens: int, val_fraction: float, min_tokens: int, source: str) -> int:
    """Tokens held out of a source of few documents."""
    held_out = max(math.floor(tokens * val_fraction), min_tokens)
    if tokens - held_out < min_tokens:
        raise DataError(
            f"{source} is too short: {tokens} tokens, but training and validation need one window each, "
            f"{2 * min_tokens} tokens (windows of {min_tokens}, seq_len + 1)"
        )
    return held_out


def _write_splits(
    corpus: Corpus,
    tokenizer: Tokenizer,
    partial: Path,
    recipe: dict[str, Any],
    min_tokens: int,
    progress: Progress | None,
    threads: int,
) -> None:
    by_documents = recipe["split_by"] == "documents"
    writers = {
        split: _Writer(partial / split, recipe, tokenizer)
        for split in (_SPLITS if by_documents else ("all",))
    }
    done, tokens = 0, 0
    for index, ids in _encoded(corpus, tokenizer, threads):
        split = "all"
        if by_documents:
            split = "val" if is_validation(index, recipe["val_fraction"]) else "train"
        new_document = index == done
        done, tokens = index + 1, tokens + len(ids)
        writers[split].add(ids, new_document)
        if progress and new_document:
            progress(done, tokens)
    if by_documents:
        for split, writer in writers.items():
            if writer.tokens < min_tokens:
                raise DataError(
                    f"{corpus.description} is too short: {writer.tokens} {split} tokens in {writer.documents} "
                    f"documents, but one window needs {min_tokens} (val_fraction={recipe['val_fraction']})"
                )
            writer.close()
    else:
        writers["all"].close()
        _split_tail(partial, recipe, tokenizer, min_tokens)


def _split_tail(partial: Path, recipe: dict[str, Any], tokenizer: Tokenizer, min_tokens: int) -> None:
    """partial/all -> partial/train and the last tokens to partial/val."""
    store = open_shards(partial / "all", tokenizer.vocab_size, verify="quick")
    cut = len(store) - _tail(len(store), recipe["val_fraction"], min_tokens, recipe["source"])
    for split, first, last in (("train", 0, cut), ("val", cut, len(store))):
        writer = _Writer(partial / split, recipe, tokenizer)
        for start in range(first, last, 1 << 22):
            writer.add(store[start : min(start + (1 << 22), last)], new_document=False)
        writer.documents = store.meta["documents"]
        writer.close()
    shutil.rmtree(partial / "all")


def _encoded(corpus: Corpus, tokenizer: Tokenizer, threads: int) -> Iterator[tuple[int, np.ndarray]]:
    """(document index, ids) in order; a long document comes in several parts."""
    pieces = ((index, piece) for index, document in enumerate(corpus) for piece in segments(document.text))
    for batch in _batched(pieces):
        for (index, _), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch], threads)):
            yield index, np.asarray(ids, np.uint32)


def _batched(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Collects tokens and writes them as shards and a meta.json, all synced to disk."""

    def __init__(self, directory: Path, recipe: dict[str, Any], tokenizer: Tokenizer) -> None:
        directory.mkdir(parents=True)
        self._directory, self._recipe = directory, recipe
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._separator = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], self._dtype)
        self._byte_lengths = tokenizer.byte_lengths()
        self._buffer = np.empty(0, self._dtype)
        self._parts: list[np.ndarray] = []
        self._waiting = 0
        self._shards: list[dict[str, Any]] = []
        self.tokens, self.documents, self._bytes = 0, 0, 0

    def add(self, ids: np.ndarray, new_document: bool) -> None:
        if new_document:
            if self.documents:
                self._append(self._separator)
            self.documents += 1
        self._bytes += int(self._byte_lengths[ids].sum(dtype=np.int64))
        self._append(ids.astype(self._dtype))

    def _append(self, ids: np.ndarray) -> None:
        limit = self._recipe["shard_tokens"]
        self.tokens += len(ids)
        while self._waiting + len(ids) >= limit:
            room = limit - self._waiting
            self._parts.append(ids[:room])
            self._flush()
            ids = ids[room:]
        self._parts.append(ids)
        self._waiting += len(ids)

    def _flush(self) -> None:
        shard = np.concatenate(self._parts)
        path = self._directory / f"shard_{len(self._shards):04d}.npy"
        with open(path, "wb") as file:  # not np.save: its OSError on a full disk has no errno
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(shard))
            file.write(shard.data)
            _sync(file)
        self._shards.append(
            {"file": path.name, "tokens": len(shard), "bytes": path.stat().st_size, "sha256": _sha256(path)}
        )
        self._parts, self._waiting = [], 0

    def close(self) -> None:
        if self._waiting:
            self._flush()
        meta = {
            **self._recipe,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self._bytes,
            "dtype": self._dtype.name,
            "shards": self._shards,
        }
        with open(self._directory / "meta.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(meta, indent=2) + "\n")
            _sync(file)
        _sync_directory(self._directory)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(partial: Path, out_dir: Path) -> None:
    """Moves `partial` to `out_dir`, replacing older data there."""
    _sync_directory(partial)
    old = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    partial.rename(out_dir)
    _sync_directory(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One `prepare` at a time per folder, so that whatever is unfinished there was left by a dead process."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # network file systems refuse locks on directories
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
