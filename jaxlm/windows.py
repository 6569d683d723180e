"""Which tokens are scored with which context: strided windows over documents, in batches of few shapes. Numpy alone.

A window reads at most `window` tokens and predicts the token after each of them. The first of a document scores all of
its targets; each that follows reaches `stride` tokens further, the last one to the document's end, and scores what is
new. All but the windows of short documents read `window` tokens.

    document  a b c d e f g h      window 4, stride 2
    reads     a b c d              scores b c d e
    reads         c d e f          scores         f g
    reads           d e f g        scores             h

So every token but the first is scored once, and never with less than window - stride tokens of context while the
document has them. A document's first token has no context and no prediction, unless a token stands in front of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import ConfigError

WIDTHS = 4  # shapes of batches at most: each is half as wide as the one before


class Window(NamedTuple):
    """One row to compute: reads tokens start .. stop-1 of a document, scores its tokens first .. stop."""

    document: int
    start: int
    stop: int
    first: int


class Batch(NamedTuple):
    """Rows of one shape; rows beyond `windows` and columns beyond a window are padding, of segment 0."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]
    segments: np.ndarray  # int32 [B, T], 1 where a token is read
    windows: list[Window]


class Scores(NamedTuple):
    """What a model says of each token of each document, an array [n] per document."""

    logprobs: list[
        np.ndarray
    ]  # float64, natural log-probability of the token given its context; NaN = not scored
    greedy: list[np.ndarray]  # bool, whether the token was the most likely one
    context: list[np.ndarray]  # int32, how many tokens were read before it; 0 = not scored

    @classmethod
    def empty(cls, documents: Sequence[np.ndarray]) -> "Scores":
        """Nothing scored yet."""
        sizes = [len(document) for document in documents]
        return cls(
            [np.full(n, np.nan) for n in sizes],
            [np.zeros(n, bool) for n in sizes],
            [np.zeros(n, np.int32) for n in sizes],
        )

    def put(self, batch: Batch, logprobs: np.ndarray, greedy: np.ndarray) -> int:
        """Enters the values [B, T] of a batch's targets where its windows score them; returns how many."""
        count = 0
        for row, (document, start, stop, first) in enumerate(batch.windows):
            columns = slice(first - 1 - start, stop - start)
            tokens = slice(first, stop + 1)
            self.logprobs[document][tokens] = logprobs[row, columns]
            self.greedy[document][tokens] = greedy[row, columns]
            self.context[document][tokens] = np.arange(first - start, stop - start + 1)
            count += stop + 1 - first
        return count

    def without_front(self) -> "Scores":
        """The same without the first token of each document, which stood there as context only."""
        return Scores(*([values[1:] for values in part] for part in self))


def plan(lengths: Sequence[int], window: int, stride: int) -> list[Window]:
    """The windows over documents of so many tokens, document by document.

    Raises ConfigError unless 1 <= stride <= window.
    """
    if window < 1:
        raise ConfigError(f"window={window} must be at least 1")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride={stride} must be between 1 and the window of {window}")
    windows = []
    for document, length in enumerate(lengths):
        first, stop = 1, min(window, length - 1)
        while first < length:
            windows.append(Window(document, max(stop - window, 0), stop, first))
            first, stop = stop + 1, min(stop + stride, length - 1)
    return windows


def batches(documents: Sequence[np.ndarray], windows: Sequence[Window], rows: int) -> Iterator[Batch]:
    """The windows in batches of at most WIDTHS shapes [rows, T], the widest first, so that what does not fit in memory
    fails at once. Fewer windows than `rows` make a batch of that many. Raises ConfigError where rows < 1.
    """
    if rows < 1:
        raise ConfigError(f"batch_size={rows} must be at least 1")
    if not windows:
        return
    rows = min(rows, len(windows))
    longest = max(w.stop - w.start for w in windows)
    widths = sorted({-(-longest // 2**i) for i in range(WIDTHS)})
    by_width: dict[int, list[Window]] = {width: [] for width in reversed(widths)}
    for window in windows:
        by_width[next(width for width in widths if width >= window.stop - window.start)].append(window)
    for width, group in by_width.items():
        for i in range(0, len(group), rows):
            yield _batch(documents, group[i : i + rows], rows, width)


def _batch(documents: Sequence[np.ndarray], windows: list[Window], rows: int, width: int) -> Batch:
    inputs, targets, segments = np.zeros((3, rows, width), np.int32)
    for row, (document, start, stop, _) in enumerate(windows):
        inputs[row, : stop - start] = documents[document][start:stop]
        targets[row, : stop - start] = documents[document][start + 1 : stop + 1]
        segments[row, : stop - start] = 1
    return Batch(inputs, targets, segments, windows)


def as_documents(documents: Sequence[Any], front: int | None, vocab_size: int) -> list[np.ndarray]:
    """Documents as arrays of ids, with `front` before each where given.

    Raises ConfigError where an id lies outside the vocabulary of the model.
    """
    before = np.asarray([] if front is None else [front], np.int64)
    arrays = []
    for number, document in enumerate(documents):
        ids = np.concatenate([before, np.asarray(document, np.int64).reshape(-1)])
        # A gather would clamp an id that is out of range, silently.
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise ConfigError(
                f"document {number} holds id {wrong[0]}, outside the model's vocabulary of {vocab_size}; "
                "is this the model's tokenizer?"
            )
        arrays.append(ids.astype(np.int32))
    return arrays


def check_window(windows: Sequence[Window], context: int) -> None:
    """Raises ConfigError where a window reads more tokens than the model's context."""
    longest = max((w.stop - w.start for w in windows), default=0)
    if longest > context:
        raise ConfigError(f"a window of {longest} tokens exceeds the model's context of {context}")
