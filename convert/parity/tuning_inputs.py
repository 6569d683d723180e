"""What fine-tuning is compared on: generated conversations and preferences, through the loader that users' data takes.

The batches that a loader makes are compared with examples written out one by one, so that a mask, a border or a
position that is wrong for both frameworks alike shows here.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.parity.compare import Finding, compare
from convert.parity.inputs import Arrays, hard_length
from convert.parity.limits import limit
from jaxlm.data.examples import Examples, Pairs
from jaxlm.data.tune_batches import TuneBatches, TuneSettings, eval_tune_batches

CONVERSATIONS = 8  # of the rung `sft`; even, for two micro-batches
PREFERENCES = 4
POSITIONS = 63  # of a row where the context allows: an example is as long as three turns, whatever the model
TURNS = 2  # rows of a trajectory's batches


def length_of(context: int, wanted: int = POSITIONS) -> int:
    """Columns of a row."""
    return hard_length(context, wanted)


def conversations(count: int, length: int, vocab: int, seed: int = 0) -> Examples:
    """Examples of 2 to length + 1 tokens: turns of a user and an assistant, whose tokens carry loss.

    One fills a row, one is a single question with an answer of one token, the others have two to four turns.
    """
    rng = np.random.default_rng(seed)
    sizes = [length + 1, 2, *rng.integers(3, max(4, 2 * length // 3), max(0, count - 2))][:count]
    made = []
    for size in map(int, sizes):
        cuts = np.sort(rng.choice(np.arange(1, size), min(size - 1, 2 * int(rng.integers(1, 3)) - 1), False))
        speaker = np.searchsorted(cuts, np.arange(size), side="right") % 2
        made.append((rng.integers(0, vocab, size).astype(np.int32), speaker == 1))
    return Examples.of(made, f"drawn {vocab}")


def preferences(count: int, length: int, vocab: int, seed: int = 0) -> Pairs:
    """Two answers of unequal lengths to each of `count` prompts; some end where the row does."""
    rng = np.random.default_rng(seed + 1)
    sides: tuple[list[Any], list[Any]] = ([], [])
    for pair in range(count):
        prompt = rng.integers(0, vocab, int(rng.integers(1, max(2, length // 2))))
        room = length + 1 - len(prompt)
        for side, answers in enumerate(sides):
            size = room if pair % 2 == side else int(rng.integers(1, max(2, room)))
            ids = np.concatenate([prompt, rng.integers(0, vocab, size)]).astype(np.int32)
            answers.append((ids, np.arange(len(ids)) >= len(prompt)))
    chosen, rejected = (Examples.of(answers, f"drawn {vocab}") for answers in sides)
    return Pairs(chosen, rejected)


def rows_of(data: Examples | Pairs, length: int, packing: bool, seed: int = 0, **options: Any) -> Arrays:
    """All examples once in one batch of as many rows as there are examples; rows that packing leaves are empty."""
    settings = TuneSettings(length, len(data), seed, packing=packing)
    (batch,) = eval_tune_batches(data, settings, **options)
    return batch


def in_turn(data: Examples, length: int, seed: int = 0) -> Iterator[Arrays]:
    """Packed batches as training takes them, epoch after epoch."""
    batches = TuneBatches(data, TuneSettings(length, TURNS, seed))
    return (batches[k] for k in range(len(batches)))


def written_out(examples: Examples, length: int) -> Arrays:
    """One example a row, by a loop: x[:-1] predicts x[1:], loss where the predicted token carries it."""
    shape = (len(examples), length)
    names = ("inputs", "targets", "segments", "positions")
    batch: Arrays = {name: np.zeros(shape, np.int32) for name in names}
    batch["loss_mask"] = np.zeros(shape, np.float32)
    for row in range(len(examples)):
        ids, carries = examples.example(row)
        _place(batch, row, 0, ids, carries, 1)
    return batch


def _place(
    batch: Mapping[str, np.ndarray], row: int, start: int, ids: Any, carries: Any, segment: int
) -> int:
    """Writes an example into a row; returns the column after it."""
    for t in range(len(ids) - 1):
        batch["inputs"][row, start + t] = ids[t]
        batch["targets"][row, start + t] = ids[t + 1]
        batch["loss_mask"][row, start + t] = float(carries[t + 1])
        batch["segments"][row, start + t] = segment
        batch["positions"][row, start + t] = t
    return start + len(ids) - 1


def packed_rows(examples: Examples, batch: Arrays) -> Arrays:
    """What a packed batch must hold, by its inputs alone: the examples found in them, written out anew.

    Where a row's inputs go on with no example that is still to come, the rest of it is padding.
    """
    waiting = dict(enumerate(examples.example(i) for i in range(len(examples))))
    made = {name: np.zeros_like(value) for name, value in batch.items()}
    for row, ids in enumerate(batch["inputs"]):
        start = segment = 0
        while found := [i for i, (x, _) in waiting.items() if _begins(ids[start:], x[:-1])]:
            # Of several the longest: a short one may be how a long one begins.
            chosen = max(found, key=lambda i: len(waiting[i][0]))
            segment += 1
            start = _place(made, row, start, *waiting.pop(chosen), segment)
    if waiting:
        made["inputs"] = made["inputs"] - 1  # of no batch: some examples are not in it
    return made


def _begins(ids: np.ndarray, with_: np.ndarray) -> bool:
    return len(with_) <= len(ids) and np.array_equal(ids[: len(with_)], with_)


def same_rows(name: str, batch: Arrays, expected: Arrays) -> list[Finding]:
    """Every array of a batch, exactly."""
    return [compare(f"{name} {key}", batch[key], value, limit("exact")) for key, value in expected.items()]


def drawn_factors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Factors of an adapter in double, neither of them zero: a product is as large as a weight of its width."""
    rng = np.random.default_rng(seed + 2)
    return {
        path: rng.standard_normal(shape) * (0.3 if path.endswith("_b") else 1) / math.sqrt(shape[-2])
        for path, shape in sorted(shapes.items())
    }


def shifted(params: Mapping[str, np.ndarray], seed: int = 0) -> Arrays:
    """Weights a little away from the given ones: a policy that has left its reference."""
    rng = np.random.default_rng(seed + 3)
    return {
        path: (x * (1 + 0.1 * rng.standard_normal(x.shape))).astype(x.dtype)
        for path, x in sorted(params.items())
    }
