"""Which examples stand in a row, and the arrays of rows.

Packing is best-fit decreasing (Johnson, Demers, Ullman, Garey & Graham 1974): each example goes to the fullest row
that has room for it. Only examples that take an eighth of a row or more are sorted; with those placed, shorter ones
fill gaps of any size well (it costs about 0.2 % of the columns), and stay in random order, so that no row
is a sample of one length. An example is never split, and its last token is only a target: nothing predicts the next
example's first.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxlm.data.batches import Batch
from jaxlm.data.examples import Examples

SCHEME = "best-fit-1"  # in saved positions: what a row holds must not change under this name
_SORTED = 8  # examples that take 1/8 of a row or more are packed in order of length
# Of what a batch holds, [b, T] each: tokens, loss, and what sets examples and padding apart.
DTYPES = {
    "inputs": np.int32,
    "targets": np.int32,
    "loss_mask": np.float32,
    "segments": np.int32,
    "positions": np.int32,
}


@dataclass(frozen=True, eq=False)
class Rows:
    """Which examples stand in each row: those of row r are members[starts[r]:starts[r+1]], from left to right."""

    members: np.ndarray  # int64 [n], numbers of examples
    starts: np.ndarray  # int64 [R+1]

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    @classmethod
    def single(cls, members: np.ndarray) -> "Rows":
        """One example to a row."""
        return cls(members, np.arange(len(members) + 1))

    @classmethod
    def packed(cls, members: np.ndarray, sizes: np.ndarray, room: int, ties: np.ndarray) -> "Rows":
        """Rows of `room` columns; sizes[j] is what members[j] takes, ties a permutation of all j (see best_fit)."""
        row = best_fit(sizes, room, ties)
        by_row = ties[np.argsort(row[ties], kind="stable")]
        return cls(members[by_row], np.concatenate([[0], np.cumsum(np.bincount(row))]))

    def pick(self, chosen: np.ndarray) -> "Slots":
        """What stands in the rows `chosen` [b]; nothing where there is no such row."""
        there = chosen < len(self)
        row = np.where(there, chosen, 0)
        first = self.starts[row]
        counts = np.where(there, self.starts[row + 1] - first, 0)
        own = np.repeat(np.arange(len(chosen)), counts)
        place = np.arange(len(own)) - (np.cumsum(counts) - counts)[own]
        return Slots(self.members[first[own] + place], own, place, len(chosen))


class Slots(NamedTuple):
    """Examples in the rows of a batch, row by row and from left to right."""

    members: np.ndarray  # int64 [m], numbers of examples
    row: np.ndarray  # int64 [m], 0 .. b-1
    place: np.ndarray  # int64 [m], from 0 in each row
    b: int  # rows of the batch


def best_fit(sizes: np.ndarray, room: int, ties: np.ndarray) -> np.ndarray:
    """The row of each size, int64 [n]: rows of `room` columns, none exceeded.

    Sizes of room/8 or more come first, from the largest; all that are alike in this come in the order `ties`. Each
    goes to the row with the least room that is enough, to a new one where there is none.

    Args:
        sizes: int64 [n], 1 to room.
        room: columns of a row.
        ties: a permutation of 0 .. n-1.
    """
    key = np.where(sizes * _SORTED >= room, sizes, 0)[ties]
    turns = ties[np.argsort(-key, kind="stable")]
    row = np.empty(len(sizes), np.int64)
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by columns left
    some = 0  # bit c: a row has c columns left
    rows = 0
    for i, size in zip(turns.tolist(), sizes[turns].tolist(), strict=True):
        enough = some >> size
        if enough:
            left = size + (enough & -enough).bit_length() - 1
            found = with_room[left].pop()
            if not with_room[left]:
                some ^= 1 << left
        else:
            left, found = room, rows
            rows += 1
        row[i] = found
        with_room[left - size].append(found)
        some |= 1 << (left - size)
    return row


def lay_out(examples: Examples, slots: Slots, seq_len: int) -> Batch:
    """The arrays [b, T] of a batch: the examples of each row one after the other, then padding."""
    sizes = examples.lengths[slots.members] - 1
    before = np.cumsum(sizes) - sizes  # columns of all examples before each
    column = before - before[np.arange(len(sizes)) - slots.place]  # less those of the rows before
    position = np.arange(sizes.sum()) - np.repeat(before, sizes)
    source = np.repeat(examples.starts[slots.members], sizes) + position
    values = {
        "inputs": examples.ids[source],
        "targets": examples.ids[source + 1],
        "loss_mask": examples.carries[source + 1],
        "segments": np.repeat(slots.place + 1, sizes),
        "positions": position,
    }
    target = np.repeat(slots.row * seq_len + column, sizes) + position
    batch: Batch = {key: np.zeros((slots.b, seq_len), dtype) for key, dtype in DTYPES.items()}
    for key, value in values.items():
        batch[key].reshape(-1)[target] = value
    return batch
