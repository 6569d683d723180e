"""A source to a folder of shards: by all cores, the same whatever their number, and exact to continue after a kill.

Everything is written to .NAME.partial beside the folder, which gets its name when all is written and synced. Every few
seconds, and with every full shard, the state of the writers and the position in the source are noted there
(progress.json), so that the same command goes on from the last note.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.blocks import BLOCK_BYTES, DataError, rows
from jaxlm.data.corpus import FEW_DOCUMENTS, Corpus, validation_indices
from jaxlm.data.folder import (
    DATASET,
    PROGRESS,
    SPLITS,
    TOKENIZER,
    check_folder,
    disk_error,
    holds,
    locked,
    publish,
    refuse,
    tail,
)
from jaxlm.data.shards import SCHEMA, open_shards, read_meta
from jaxlm.data.sources import Source
from jaxlm.data.tokenise import Recipe, Tokens, tokenised
from jaxlm.data.writer import SplitWriter, State
from jaxlm.disk import replace_text, sync
from jaxlm.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 26
_EVERY = 10.0  # seconds between notes of the progress
Progress = Callable[[int, int], None]  # documents and tokens so far


@dataclass(frozen=True)
class Settings:
    """How a source becomes a folder."""

    val_fraction: float  # share of documents held out; of few documents, of tokens, the last ones
    min_tokens: int = 2  # tokens that each split needs
    shard_tokens: int = SHARD_TOKENS  # tokens per file
    limit_documents: int = 0  # documents to take, 0 = all
    max_tokens: int = 0  # stop after the document that reaches so many tokens; 0 = never
    workers: int = 1  # processes that tokenise
    threads: int = 1  # of the tokenizer, with one worker


@dataclass(frozen=True)
class Done:
    """How far a preparation is."""

    documents: int
    tokens: int
    read: int  # of the source's total
    resumed: int = 0  # tokens that an earlier process had made


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
    """Tokenises texts into `out_dir`/train and `out_dir`/val in this process, unless they already hold exactly that.

    What `prepare` wrote there before is replaced; a full disk leaves nothing half-written.

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
    settings = Settings(val_fraction, min_tokens, shard_tokens, threads=threads)
    tell = progress and (lambda done: progress(done.documents, done.tokens))
    write_dataset(
        corpus, tokenizer, out_dir, settings, stamp=corpus.fingerprint, progress=tell, temporary=True
    )


def write_dataset(
    source: Source,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    settings: Settings,
    template: str | None = None,
    stamp: str = "",
    progress: Callable[[Done], None] | None = None,
    temporary: bool = False,
) -> bool:
    """Tokenises a source into a folder; False where it already held exactly that.

    Args:
        template: chat template, for conversations.
        stamp: what decides the source's documents; '' = `source.stamp`.
        temporary: the folder belongs to a run: other data of ours in it is replaced, and unfinished data removed on
            errors, rather than kept for the next attempt.

    Raises:
        DataError: the source is too short or cannot be read, or the folder holds something else.
        ShardError: the disk is full or cannot be written.
    """
    out_dir = Path(out_dir).resolve()
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    job = _Job(source, tokenizer, settings, template, partial, progress)
    try:
        check_folder(out_dir)
        recipe = job.facts | {"source_fingerprint": stamp or source.stamp}
        with locked(partial):
            if holds(out_dir, recipe, settings.min_tokens):
                shutil.rmtree(partial, ignore_errors=True)
                return False
            if not temporary and out_dir.exists() and any(out_dir.iterdir()):
                refuse(out_dir, recipe, out_dir / DATASET)
            try:
                if not holds(partial, recipe, settings.min_tokens):
                    job.run(recipe, temporary)
                publish(partial, out_dir)
            except BaseException:
                if temporary:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise disk_error(error, out_dir, partial, temporary) from None
    return True


class _Job:
    """One preparation."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        settings: Settings,
        template: str | None,
        partial: Path,
        progress: Callable[[Done], None] | None,
    ) -> None:
        self._source, self._tokenizer, self._settings = source, tokenizer, settings
        self._template, self._partial, self._progress = template, partial, progress
        self._separator = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self._byte_lengths = tokenizer.byte_lengths()
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.facts: dict[str, Any] = {
            "schema": SCHEMA,
            "source": source.description,
            "rows": source.schema.name,
            "tokenizer": tokenizer.fingerprint(),
            "template": template,
            "vocab_size": tokenizer.vocab_size,
            "val_fraction": settings.val_fraction,
            "shard_tokens": settings.shard_tokens,
            "limit_documents": settings.limit_documents,
            "max_tokens": settings.max_tokens,
        }

    def run(self, recipe: dict[str, Any], temporary: bool) -> None:
        """Writes the whole folder, from where an earlier process stopped."""
        noted = self._noted(recipe, temporary)
        if noted is None:
            for path in self._partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            noted = {
                "recipe": recipe,
                "split_by": self._split_by(),
                "position": {},
                "documents": 0,
                "splits": {},
            }
        self._tokenizer.save(self._partial / TOKENIZER)
        by_documents = noted["split_by"] == "documents"
        facts = recipe | {"split_by": noted["split_by"]}
        names = SPLITS if by_documents else ("all",)
        writers = {name: self._writer(name, noted["splits"].get(name)) for name in names}
        try:
            self._write(noted, writers)
            self._check_lengths(writers)
            for writer in writers.values():
                writer.finish(facts)
        finally:
            for writer in writers.values():
                writer.close()
        if not by_documents:
            self._split_tail(facts)
        self._describe(facts)

    def _noted(self, recipe: dict[str, Any], temporary: bool) -> dict[str, Any] | None:
        """The state that an earlier process left, None = begin anew."""
        path = self._partial / PROGRESS
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if noted["recipe"] == recipe:
            return noted
        if not temporary:
            refuse(self._partial, recipe, path)
        return None

    def _split_by(self) -> str:
        few, found = self._settings.limit_documents or FEW_DOCUMENTS, 0
        for block in self._source.blocks({}, BLOCK_BYTES):
            for row in rows(block, self._source.schema.columns):
                found += not row.continues and bool(self._source.schema.text(row))
                if found >= min(few, FEW_DOCUMENTS):
                    return "documents" if found >= FEW_DOCUMENTS else "tokens"
        if not found:
            raise self._source.empty()
        return "tokens"

    def _writer(self, name: str, state: State | None = None) -> SplitWriter:
        return SplitWriter(self._partial / name, self._dtype, self._settings.shard_tokens, state)

    def _write(self, noted: dict[str, Any], writers: dict[str, SplitWriter]) -> None:
        settings = self._settings
        documents, said = noted["documents"], time.monotonic()
        resumed = sum(writer.tokens for writer in writers.values())
        recipe = Recipe(self._tokenizer, self._source.schema, self._template, settings.threads)
        size = min(BLOCK_BYTES, 4 * settings.shard_tokens)  # a kill costs about a shard at most
        blocks = self._source.blocks(noted["position"], size)
        made = tokenised(blocks, recipe, settings.workers, self._partial / TOKENIZER)
        try:
            for block in made:
                full = sum(writer.full_shards for writer in writers.values())
                documents, over = self._add(block, documents, writers)
                tokens = sum(writer.tokens for writer in writers.values())
                if self._progress:
                    self._progress(Done(documents, tokens, block.read, resumed))
                if over:
                    break
                now = sum(writer.full_shards for writer in writers.values())
                if now > full or time.monotonic() - said >= _EVERY:
                    states = {name: writer.commit() for name, writer in writers.items()}
                    self._note(noted | {"position": block.next, "documents": documents, "splits": states})
                    said = time.monotonic()
        finally:
            made.close()  # ends the workers

    def _add(self, block: Tokens, documents: int, writers: dict[str, SplitWriter]) -> tuple[int, bool]:
        """Appends a block to the splits; the documents so far, and whether there are enough."""
        first = documents - block.continues  # index of the block's first document
        lengths, over = self._limited(block, first, writers)
        total = int(lengths.sum())
        held_out = np.zeros(len(lengths), bool)
        if "val" in writers:
            chosen = validation_indices(first, first + len(lengths), self._settings.val_fraction)
            held_out[chosen - first] = True
        begins = np.ones(len(lengths), bool)
        begins[: block.continues] = False
        own = np.repeat(held_out, lengths)
        for name, writer in writers.items():
            which = held_out if name == "val" else ~held_out
            ids = block.ids[:total][own if name == "val" else ~own]
            self._append(writer, ids, lengths[which], begins[which])
        return first + len(lengths), over

    def _limited(self, block: Tokens, first: int, writers: dict[str, SplitWriter]) -> tuple[np.ndarray, bool]:
        """Lengths of those documents that the limits allow, and whether a limit is reached."""
        settings, lengths, over = self._settings, block.lengths, False
        if settings.limit_documents and first + len(lengths) >= settings.limit_documents:
            # Where the last document may go on in the next block, that one is still needed.
            over = first + len(lengths) > settings.limit_documents
            lengths = lengths[: settings.limit_documents - first]
        if settings.max_tokens:
            had = sum(writer.tokens for writer in writers.values())
            reached = had + np.cumsum(lengths + len(self._separator)) >= settings.max_tokens
            if reached.any():
                lengths, over = lengths[: int(np.argmax(reached)) + 1], True
        return lengths, over

    def _append(self, writer: SplitWriter, ids: np.ndarray, lengths: np.ndarray, begins: np.ndarray) -> None:
        """Documents with the separator before each that begins, but the very first of the split."""
        before = begins.copy()
        if len(before) and not writer.documents:
            before[0] = False
        counts = before * len(self._separator)
        after = np.cumsum(lengths + counts)
        out = np.empty(int(after[-1]) if len(after) else 0, self._dtype)
        starts = after - lengths
        if self._separator:
            out[starts[before] - 1] = self._separator[0]
        own = np.ones(len(out), bool)
        own[starts[before] - 1] = not self._separator
        out[own] = ids
        writer.add(out, starts[begins], self._text_bytes(ids), int(begins.sum()))

    def _text_bytes(self, ids: np.ndarray) -> int:
        return int(self._byte_lengths[ids].sum(dtype=np.int64))

    def _note(self, noted: dict[str, Any]) -> None:
        replace_text(self._partial / PROGRESS, json.dumps(noted))
        sync(self._partial)

    def _check_lengths(self, writers: dict[str, SplitWriter]) -> None:
        settings, name = self._settings, self._source.description
        if not sum(writer.documents for writer in writers.values()):
            raise self._source.empty()
        if "all" in writers:
            tail(writers["all"].tokens, settings.val_fraction, settings.min_tokens, name)
            return
        for split, writer in writers.items():
            if writer.tokens < settings.min_tokens:
                raise DataError(
                    f"{name} is too short: {writer.tokens} {split} tokens in {writer.documents} documents, but one "
                    f"window needs {settings.min_tokens} (val_fraction={settings.val_fraction})"
                )

    def _split_tail(self, facts: dict[str, Any]) -> None:
        """partial/all -> partial/train and the last tokens to partial/val."""
        store = open_shards(self._partial / "all", self._tokenizer.vocab_size, verify="quick")
        settings = self._settings
        cut = len(store) - tail(
            len(store), settings.val_fraction, settings.min_tokens, self._source.description
        )
        for split, first, last in (("train", 0, cut), ("val", cut, len(store))):
            with closing(self._writer(split)) as writer:
                for start in range(first, last, 1 << 22):
                    ids = store[start : min(start + (1 << 22), last)]
                    starts = store.document_starts(start, start + len(ids)) - start
                    if start == cut and starts[:1].tolist() != [0]:
                        starts = np.insert(
                            starts, 0, 0
                        )  # a document that began before the cut begins here again
                    writer.add(ids, starts, self._text_bytes(ids), len(starts))
                writer.finish(facts)
        shutil.rmtree(self._partial / "all")

    def _describe(self, facts: dict[str, Any]) -> None:
        """Writes dataset.json: what the folder was made of, and what is in it."""
        metas = {split: read_meta(self._partial / split) for split in SPLITS}
        counts = {
            s: {key: meta[key] for key in ("documents", "tokens", "bytes")} for s, meta in metas.items()
        }
        text = json.dumps({**facts, "splits": counts}, indent=1)
        (self._partial / DATASET).write_text(text + "\n", encoding="utf-8")
        (self._partial / PROGRESS).unlink(missing_ok=True)
        for path in (self._partial / DATASET, self._partial / TOKENIZER, self._partial):
            sync(path)
