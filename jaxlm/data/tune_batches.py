"""Batches of examples and pairs: whole examples packed into rows or one to a row, shuffled, resumed exactly.

Row i of a run is, whatever its batch or process, a pure function of (data, settings, i): epochs follow each other row
by row, each with an order of its own (jaxlm.data.order), so that the last rows of one and the first of the next may
share a batch. Which examples share a packed row (jaxlm.data.example_rows) is the same in every epoch.

A batch is made by one gather in numpy, in well under a millisecond, so nothing is fetched ahead.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from jaxlm.data import order
from jaxlm.data.batches import Batch, checked_rows
from jaxlm.data.corpus import DataError
from jaxlm.data.example_rows import SCHEME, Rows, lay_out
from jaxlm.data.examples import Examples, Pairs
from jaxlm.data.loader import checked_position
from jaxlm.tune_config import TuneRun

_ROWS, _TIES = 0, 1  # orders of one seed: of an epoch's rows, of examples to pack
_MOST_ROWS = 1 << 62  # of a run; keeps every row number an int64


@dataclass(frozen=True)
class TuneSettings:
    """What makes batches out of examples or pairs."""

    seq_len: int  # T, columns of a row; an example of T + 1 tokens fills it
    batch_size: int  # B, rows of a global batch: packed examples, single examples, or pairs
    seed: int  # of the order
    shuffle: bool = True  # shuffled anew in every epoch, or in the order of the data
    packing: bool = True  # several examples in a row; pairs never are

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @classmethod
    def of(cls, run: TuneRun) -> "TuneSettings":
        """The settings of a run."""
        packing = run.tune.method == "sft" and run.tune.chat.packing
        return cls(run.train.seq_len, run.train.batch_size, run.train.seed, run.data.shuffle, packing)


@dataclass(frozen=True)
class TuneIdentity:
    """What decides the batches of a loader besides their number; plain JSON. The rows of a process are not in it."""

    kind: str  # examples or pairs
    data: str  # fingerprint of the examples, their tokenizer included
    reference: bool  # whether the reference's log-probabilities come with the pairs
    seq_len: int  # T
    batch_size: int  # B
    packing: bool  # several examples in a row
    shuffle: bool  # shuffled, or in the order of the data
    seed: int  # of the order
    order: str  # how examples are packed and rows are ordered

    @classmethod
    def of(cls, data: Examples | Pairs, settings: TuneSettings, reference: bool = False) -> "TuneIdentity":
        """Of a loader's arguments."""
        kind = "pairs" if isinstance(data, Pairs) else "examples"
        how = f"{order.SCHEME}+{SCHEME}"
        return cls(kind, data.fingerprint, reference, **asdict(settings), order=how)


class TuneBatches:
    """Batch k of a run, for any k >= 0: its rows k*B + `rows`.

    Of examples, all arrays are [b, T]: inputs, targets, segments (1, 2, ... and 0 for padding) and positions (from 0 in
    each example) int32, loss_mask float32. Of pairs, they are [b, 2, T], the chosen answer first, and there is
    `reference` [b, 2] where it was given.

    Args:
        data: what to train on.
        settings: how batches are made of it.
        rows: of each global batch, those that are wanted, in this order; None = all B.
        reference: the reference's summed log-probabilities of the answers, [pairs, 2], chosen first.

    Attributes:
        rows_per_epoch: rows that hold all of the data once.
        filled: share of the rows' columns that hold a token, not padding.

    Raises:
        DataError: an example has more than T+1 tokens, or examples are to be packed that are pairs.
    """

    def __init__(
        self,
        data: Examples | Pairs,
        settings: TuneSettings,
        rows: Sequence[int] | None = None,
        reference: np.ndarray | None = None,
    ) -> None:
        check_lengths(data, settings)
        self._data, self._settings = data, settings
        self._reference = _checked_reference(data, reference)
        self._own = checked_rows(rows, settings.batch_size)
        self._rows = _arranged(data, settings, np.arange(len(data)))
        self.rows_per_epoch = len(self._rows)
        self.filled = _filled(data, settings, len(self._rows))

    @property
    def batches_per_epoch(self) -> int:
        """Batches until all of the data was seen once; the last one may have begun the next epoch."""
        return self.steps(1)

    def steps(self, epochs: float | int) -> int:
        """Batches until the data was seen `epochs` times, at least one."""
        return max(1, math.ceil(Fraction(str(epochs)) * self.rows_per_epoch / self._settings.batch_size))

    def __len__(self) -> int:
        """A number that no run reaches."""
        return _MOST_ROWS // self._settings.batch_size

    def __getitem__(self, k: int) -> Batch:
        """Batch number k."""
        places = k * self._settings.batch_size + self._own
        n = self.rows_per_epoch
        if self._settings.shuffle:
            chosen = order.shuffled(places, n, self._settings.seed, stream=_ROWS)
        else:
            chosen = places % n
        return _gather(self._data, self._rows, chosen, self._settings, self._reference)


class TuneLoader:
    """Iterates the batches of a TuneBatches without end.

    Attributes:
        next_batch: number of the batch that `next` gives.
        batches: where they come from.
    """

    def __init__(self, batches: TuneBatches, identity: TuneIdentity) -> None:
        self.batches, self._identity = batches, identity
        self.next_batch = 0

    def __iter__(self) -> "TuneLoader":
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        batch = self.batches[self.next_batch]
        self.next_batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Plain JSON: the number of the next batch and the identity of the data."""
        return {"next_batch": self.next_batch, "dataset": asdict(self._identity)}

    def set_state(self, state: Any) -> None:
        """Continues where `get_state` was called, bitwise.

        Raises:
            DataError: the state belongs to other data or settings, or is not one of `get_state`.
        """
        self.seek(checked_position(state, self._identity, len(self.batches)))

    def seek(self, batch: int) -> None:
        """Makes `batch` the next one."""
        if not 0 <= batch < len(self.batches):
            raise ValueError(f"there is no batch {batch}")
        self.next_batch = batch


def make_tune_loader(
    data: Examples | Pairs,
    settings: TuneSettings,
    start_batch: int = 0,
    rows: Sequence[int] | None = None,
    reference: np.ndarray | None = None,
) -> TuneLoader:
    """A loader over all of the data, epoch after epoch.

    Args:
        data, settings, rows, reference: as in TuneBatches. The global order is the same whoever takes which rows.
        start_batch: number of the first batch.

    Raises:
        DataError: as TuneBatches.
    """
    identity = TuneIdentity.of(data, settings, reference is not None)
    loader = TuneLoader(TuneBatches(data, settings, rows, reference), identity)
    loader.seek(start_batch)
    return loader


def eval_tune_batches(
    data: Examples | Pairs,
    settings: TuneSettings,
    n: int | None = None,
    rows: Sequence[int] | None = None,
    reference: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Examples or pairs once each, the same every time; what is missing in the last batch are rows of zeros.

    Such rows have segment 0 and no loss. Without packing the order is that of the data.

    Args:
        data, settings, rows, reference: as in TuneBatches; seed and shuffle do not matter.
        n: how many, spread evenly over the data; None or more than there are = all.

    Raises:
        DataError: as TuneBatches.
    """
    check_lengths(data, settings)
    reference = _checked_reference(data, reference)
    own, most = checked_rows(rows, settings.batch_size), len(data)
    count = most if n is None else min(n, most)
    arranged = _arranged(data, settings, np.arange(count) * most // max(1, count))
    return (
        _gather(data, arranged, first + own, settings, reference)
        for first in range(0, len(arranged), settings.batch_size)
    )


def check_lengths(data: Examples | Pairs, settings: TuneSettings) -> None:
    """Raises DataError where an example has more than T+1 tokens, or pairs are to be packed."""
    if isinstance(data, Pairs) and settings.packing:
        raise DataError("pairs of answers cannot be packed; set packing to false")
    for name, side in _sides(data).items():
        longest = int(np.argmax(side.lengths))
        if side.lengths[longest] > settings.seq_len + 1:
            raise DataError(
                f"{name} {longest} has {side.lengths[longest]} tokens, but a row of seq_len={settings.seq_len} holds "
                f"an example of at most {settings.seq_len + 1}; raise train.seq_len, or truncate or drop what is longer"
            )


def _sides(data: Examples | Pairs) -> dict[str, Examples]:
    if isinstance(data, Pairs):
        return {"chosen answer": data.chosen, "rejected answer": data.rejected}
    return {"example": data}


def _checked_reference(data: Examples | Pairs, reference: np.ndarray | None) -> np.ndarray | None:
    if reference is not None:
        wanted = (len(data), 2)
        if isinstance(data, Examples) or reference.shape != wanted:
            raise ValueError(f"reference has shape {reference.shape}; it belongs to pairs, {wanted}")
        if not np.isfinite(reference).all():
            i = int(np.flatnonzero(~np.isfinite(reference).all(axis=1))[0])
            raise DataError(f"the reference's log-probabilities of pair {i} are {reference[i].tolist()}")
    return reference


def _filled(data: Examples | Pairs, settings: TuneSettings, rows: int) -> float:
    sides = _sides(data).values()
    used = sum(int(side.lengths.sum()) - len(side) for side in sides)
    return used / (rows * len(sides) * settings.seq_len)


def _arranged(data: Examples | Pairs, settings: TuneSettings, chosen: np.ndarray) -> Rows:
    """The rows of the chosen examples: packed, or one each in their order."""
    if not settings.packing or isinstance(data, Pairs):
        return Rows.single(chosen)
    ties = np.arange(len(chosen))
    if settings.shuffle:
        ties = order.shuffled(ties, len(chosen), settings.seed, stream=_TIES)
    return Rows.packed(chosen, data.lengths[chosen] - 1, settings.seq_len, ties)


def _gather(
    data: Examples | Pairs,
    rows: Rows,
    chosen: np.ndarray,
    settings: TuneSettings,
    reference: np.ndarray | None,
) -> Batch:
    """The batch whose row i is rows[chosen[i]]; a row of zeros where there is no such row."""
    slots = rows.pick(chosen)
    sides = [lay_out(side, slots, settings.seq_len) for side in _sides(data).values()]
    if len(sides) == 1:
        return sides[0]
    batch = {key: np.stack([side[key] for side in sides], axis=1) for key in sides[0]}
    if reference is not None:
        batch["reference"] = np.zeros((slots.b, 2), reference.dtype)
        batch["reference"][slots.row] = reference[slots.members]
    return batch
