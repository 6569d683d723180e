"""Batches without end out of tokens: prefetched, resumed exactly, shared between processes; and those of a validation.

Batch k holds rows k*B to k*B+B-1 of the run (jaxlm.data.batches), so that the state of a loader is one number, and
processes share a batch by taking different rows of it. grain only fetches ahead; `plain_batches` gives the same
batches without it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxlm.data import mixture, order
from jaxlm.data.batches import (
    Batch,
    Batches,
    LoaderSettings,
    blank,
    checked_rows,
    checked_weights,
    count_windows,
    gather,
)
from jaxlm.data.corpus import DataError
from jaxlm.data.shards import TokenStore

__all__ = [
    "Batch",
    "DatasetIdentity",
    "Loader",
    "LoaderSettings",
    "count_windows",
    "eval_batches",
    "make_loader",
    "plain_batches",
]


@dataclass(frozen=True)
class DatasetIdentity:
    """What decides the batches of a loader besides their number; plain JSON. The rows of a process are not in it."""

    tokenizer: str  # fingerprint of the tokenizer
    files: list[str]  # SHA-256 over the shards' checksums, for each store
    weights: list[float]  # of the stores
    seq_len: int  # T
    batch_size: int  # B
    stride: int  # tokens from window to window
    packing: bool  # documents set apart or not
    shuffle: bool  # shuffled, or in the order of the text
    seed: int  # of the order
    order: str  # how rows and windows are ordered

    @classmethod
    def of(cls, stores: Sequence[TokenStore], settings: LoaderSettings) -> "DatasetIdentity":
        """Of stores with the same tokenizer."""
        return cls(
            tokenizer=stores[0].meta["tokenizer"],
            files=[store.fingerprint for store in stores],
            weights=[float(weight) for weight in checked_weights(stores, settings)],
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
            stride=settings.step,
            packing=settings.packing,
            shuffle=settings.shuffle,
            seed=settings.seed,
            order=f"{order.SCHEME}+{mixture.SCHEME}",
        )


class _Fetched:
    """Batches for grain, which adds lines of its own to the message of an error: errors travel as elements."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch | Exception:
        try:
            return self._batches[index]
        except Exception as error:
            return error


class Loader:
    """Iterates batches without end.

    Attributes:
        next_batch: number of the batch that `next` gives.
        windows_per_epoch: windows of one pass over each store.
    """

    def __init__(self, batches: Batches, identity: DatasetIdentity, threads: int) -> None:
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, 2 * threads))
        self._iterator = iter(grain.MapDataset.source(_Fetched(batches)).to_iter_dataset(options))
        self._identity = identity
        self._most = len(batches)
        self.windows_per_epoch = batches.windows
        self.next_batch = 0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises what reading it raised, as ShardError; the position stays before it then."""
        batch = next(self._iterator)
        if isinstance(batch, Exception):
            self.seek(self.next_batch)
            raise batch
        self.next_batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Plain JSON: the number of the next batch and the identity of the dataset."""
        return {"next_batch": self.next_batch, "dataset": asdict(self._identity)}

    def set_state(self, state: Any) -> None:
        """Continues where `get_state` was called, bitwise.

        Raises:
            DataError: the state belongs to other data, or is not one of `get_state`.
        """
        self.seek(checked_position(state, self._identity, self._most))

    def seek(self, batch: int) -> None:
        """Makes `batch` the next one."""
        if not 0 <= batch < self._most:
            raise ValueError(f"there is no batch {batch}")
        self._iterator.set_state({"next_index": batch})
        self.next_batch = batch

    def close(self) -> None:
        """Ends the threads that fetch ahead."""
        self._iterator.close()


def checked_position(state: Any, identity: Any, most: int) -> int:
    """The number of the next batch in a loader's `get_state`.

    identity: a dataclass of plain JSON. Raises DataError where the state is none, or of another identity: the first
    field that differs is named.
    """
    fields = state if isinstance(state, dict) else {}
    position, dataset = fields.get("next_batch"), fields.get("dataset")
    if type(position) is not int or not 0 <= position < most or not isinstance(dataset, dict):
        raise DataError(f"{str(state)[:100]} is no state of a loader: it needs next_batch and dataset")
    for name, here in asdict(identity).items():
        there = dataset.get(name)
        if type(there) is not type(here) or there != here:
            raise DataError(
                "the saved data position belongs to other data or settings: "
                f"{name} was {_short(there)}, now it is {_short(here)}; give the run the data that it began with"
            )
    return position


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:12]}..." if len(text) > 32 else repr(value)


def make_loader(
    stores: Sequence[TokenStore],
    settings: LoaderSettings,
    start_batch: int = 0,
    num_threads: int = 2,
    rows: Sequence[int] | None = None,
) -> Loader:
    """A prefetching loader over `stores`.

    Args:
        stores: tokens of one split, of the same tokenizer; as many as there are weights.
        settings: how batches are made of them. Every store is passed through in epochs of its own; its last windows
            of one epoch and the first of the next may share a batch.
        start_batch: number of the first batch.
        num_threads: that fetch ahead; 0 = none.
        rows: of every global batch, those that this process yields, in this order; None = all. The global order is
            the same whoever takes which.

    Raises:
        DataError: a store has fewer than T+1 tokens.
    """
    loader = Loader(Batches(stores, settings, rows), DatasetIdentity.of(stores, settings), num_threads)
    loader.seek(start_batch)
    return loader


def plain_batches(
    stores: Sequence[TokenStore],
    settings: LoaderSettings,
    start_batch: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """The batches of `make_loader`, without grain and without prefetching."""
    batches = Batches(stores, settings, rows)
    return (batches[k] for k in itertools.count(start_batch))


def eval_batches(
    stores: Sequence[TokenStore],
    settings: LoaderSettings,
    n: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """At most `n` batches of windows spread evenly over each store, the same every time.

    Windows do not overlap, whatever the stride. The weights decide how many each store gives of n*B, up to
    all that it has. The last batch of a short text is filled up with rows of zeros whose loss_mask is 0.

    Args:
        stores: of one split, as in `make_loader`.
        settings: seed, shuffle and stride do not matter.
        n: batches.
        rows: as in `make_loader`.

    Raises:
        DataError: a store has fewer than T+1 tokens.
    """
    B = settings.batch_size
    wanted = mixture.Mixture(checked_weights(stores, settings)).counts(n * B)
    here = checked_rows(rows, B)
    parts, starts = [], []
    for i, (store, most) in enumerate(zip(stores, wanted.tolist(), strict=True)):
        windows = count_windows(store, settings.seq_len)
        chosen = min(windows, most)
        parts.append(np.full(chosen, i))
        starts.append(np.arange(chosen) * windows // max(1, chosen) * settings.seq_len)
    part, start = np.concatenate(parts), np.concatenate(starts)
    return (_eval_batch(stores, settings, part, start, first + here) for first in range(0, len(part), B))


def _eval_batch(
    stores: Sequence[TokenStore],
    settings: LoaderSettings,
    part: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
) -> Batch:
    """Rows of a validation, [len(rows), T]; zeros where there are no such rows."""
    batch = blank(len(rows), settings)
    there = rows < len(part)
    if there.any():
        for key, value in gather(stores, part[rows[there]], starts[rows[there]], settings).items():
            batch[key][there] = value
    return batch
