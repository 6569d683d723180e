"""Blocks of a source to tokens, by this process or by several, always in the order of the blocks."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm.chat import encode_conversation
from jaxlm.data.blocks import Block, DataError, Position, Row, rows
from jaxlm.data.schemas import Schema
from jaxlm.tokenizer import Tokenizer, TokenizerError, segments

_AHEAD = 2  # blocks waiting for each worker


@dataclass(frozen=True)
class Tokens:
    """The documents of a block. Empty ones are left out."""

    ids: np.ndarray  # of all documents, each followed by nothing
    lengths: np.ndarray  # tokens of each document, int64
    continues: bool  # the first document goes on from the block before
    next: Position  # of the source, after this block
    read: int  # bytes of the source up to its end


@dataclass(frozen=True)
class Recipe:
    """What makes tokens of blocks."""

    tokenizer: Tokenizer
    schema: Schema
    template: str | None  # chat template, for conversations
    threads: int = 1  # of the tokenizer

    def tokens(self, block: Block) -> Tokens:
        """Tokenises one block. Raises DataError or TokenizerError, naming the place."""
        found = list(rows(block, self.schema.columns))
        encode = self._conversations if self.schema.chat else self._texts
        try:
            parts = encode(found)
        except TokenizerError as error:
            raise DataError(f"{block.path} from row {block.first}: {error}") from None
        continues = bool(found) and found[0].continues and bool(parts) and bool(parts[0])
        parts = [part for part in parts if part]
        kind = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
        lengths = np.array([len(part) for part in parts], np.int64)
        ids = np.fromiter(itertools.chain.from_iterable(parts), kind, int(lengths.sum()))
        return Tokens(ids, lengths, continues, block.next, block.read)

    def _texts(self, found: Sequence[Row]) -> list[list[int]]:
        texts = [text for row in found if (text := self.schema.text(row))]
        pieces = [list(segments(text)) for text in texts]
        encoded = iter(self.tokenizer.encode_batch(list(itertools.chain(*pieces)), self.threads))
        return [
            next(encoded) if len(cut) == 1 else list(itertools.chain(*itertools.islice(encoded, len(cut))))
            for cut in pieces
        ]

    def _conversations(self, found: Sequence[Row]) -> list[list[int]]:
        assert self.template is not None, "conversations need a chat template"
        parts = []
        for row in found:
            if messages := self.schema.messages(row):
                try:
                    parts.append(encode_conversation(self.tokenizer, self.template, messages))
                except ValueError as error:
                    raise DataError(f"{row.where}: {error}") from None
        return parts


def tokenised(blocks: Iterable[Block], recipe: Recipe, workers: int, tokenizer: Path) -> Iterator[Tokens]:
    """The tokens of each block, in order, whoever makes them.

    Args:
        workers: processes; 1, or a source of a single block, needs none.
        tokenizer: file that holds the recipe's tokenizer; workers read it there.

    Raises:
        DataError: a block cannot be used, or a worker died.
    """
    blocks = iter(blocks)
    first = list(itertools.islice(blocks, 2))
    blocks = itertools.chain(first, blocks)
    if workers <= 1 or len(first) < 2:
        yield from map(recipe.tokens, blocks)
        return
    context = multiprocessing.get_context("spawn")  # a forked process that runs threads may hang
    arguments = (tokenizer, recipe.schema, recipe.template)
    pool = ProcessPoolExecutor(workers, context, _start, arguments)
    try:
        waiting: collections.deque[Future[Tokens]] = collections.deque()
        for block in blocks:
            waiting.append(pool.submit(_work, block))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, perhaps for want of memory; the same command goes on where it was, "
            f"--workers {max(1, workers // 2)} needs half the memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_recipe: Recipe | None = None


def _start(tokenizer: Path, schema: Schema, template: str | None) -> None:
    """A worker's beginning."""
    global _recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what to do
    threading.Thread(target=_follow_parent, daemon=True).start()
    _recipe = Recipe(Tokenizer.load(tokenizer), schema, template)


def _follow_parent() -> None:
    """Ends this process when the one that started it is gone, however that came about."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(block: Block) -> Tokens:
    assert _recipe is not None
    return _recipe.tokens(block)
