"""Batches out of tokens: windows, a seeded order that never ends, prefetching, exact resumption.

Batch k of an epoch-shuffled run is a pure function of (tokens, T, B, seed, k), so that the state of a loader is one
number. grain only fetches ahead; `plain_batches` gives the same batches without it.
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxlm.data.corpus import DataError
from jaxlm.data.shards import TokenStore

Batch = dict[str, np.ndarray]  # inputs [B, T] int32, targets [B, T] int32, loss_mask [B, T] float32


class WindowSource:
    """Window i: tokens i*T to i*T+T, the last of them only as a target. Random access, no copies kept.

    Args:
        store: tokens of one split.
        seq_len: T.

    Raises:
        DataError: there are fewer than T+1 tokens.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        if len(store) < seq_len + 1:
            raise DataError(
                f"the text has {len(store)} tokens, but one window of seq_len={seq_len} needs {seq_len + 1}"
            )
        self.store, self.seq_len = store, seq_len

    def __len__(self) -> int:
        return (len(self.store) - 1) // self.seq_len

    def __getitem__(self, i: int) -> Batch:
        """{inputs [T] int32, targets [T] int32, loss_mask [T] float32 of ones}."""
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        tokens = self.store[i * self.seq_len : (i + 1) * self.seq_len + 1].astype(np.int32)
        return {"inputs": tokens[:-1], "targets": tokens[1:], "loss_mask": np.ones(self.seq_len, np.float32)}


class ShuffledWindows:
    """Windows without end: every epoch visits each window once, in an order keyed by (seed, epoch).

    `windows[i]` for the global index i = epoch * len(source) + position is a pure function of (seed, i).

    Args:
        source: the windows of one epoch.
        seed: of the order.
        shuffle: False = the order of the text, every epoch.
    """

    def __init__(self, source: WindowSource, seed: int, shuffle: bool) -> None:
        self._source, self._n, self._seed, self._shuffle = source, len(source), seed, shuffle

    def __len__(self) -> int:
        """A number that no run reaches; random-access libraries ask for one."""
        return sys.maxsize

    def __getitem__(self, i: int) -> Batch:
        """As `WindowSource`."""
        epoch, position = divmod(i, self._n)
        if self._shuffle:
            position = int(_order(self._n, self._seed, epoch)[position])
        return self._source[position]


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n. Sorts raw draws, which numpy keeps stable across versions, unlike `permutation`."""
    draws = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    return np.argsort(draws, kind="stable")


class _Batches:
    """Batch k: windows k*B to k*B+B-1 of a run, stacked."""

    def __init__(self, windows: ShuffledWindows, batch_size: int) -> None:
        self._windows, self._batch_size = windows, batch_size

    def __len__(self) -> int:
        return len(self._windows) // self._batch_size

    def __getitem__(self, k: int) -> Batch:
        rows = [self._windows[i] for i in range(k * self._batch_size, (k + 1) * self._batch_size)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@dataclass(frozen=True)
class DatasetIdentity:
    """What decides the batches of a loader besides their number."""

    shards: str  # SHA-256 over the shards' checksums
    tokenizer: str  # fingerprint of the tokenizer
    seq_len: int  # T
    batch_size: int  # B
    seed: int  # of the order
    shuffle: bool  # shuffled, or in the order of the text


class Loader:
    """Iterates batches {inputs [B,T] int32, targets [B,T] int32, loss_mask [B,T] float32} without end.

    Attributes:
        next_batch: number of the batch that `next` gives.
        windows_per_epoch: windows of one pass over the text.
    """

    def __init__(
        self, batches: _Batches, identity: DatasetIdentity, windows_per_epoch: int, threads: int
    ) -> None:
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, 2 * threads))
        source: Any = batches  # has what grain asks for, a length and __getitem__, but not its argument names
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        self._identity = identity
        self.windows_per_epoch = windows_per_epoch
        self.next_batch = 0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.next_batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Plain JSON: the number of the next batch and the identity of the dataset."""
        return {"next_batch": self.next_batch, "dataset": asdict(self._identity)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called, bitwise.

        Raises:
            DataError: the state belongs to other data, or is not one of `get_state`.
        """
        self.seek(_checked_position(state, self._identity))

    def seek(self, batch: int) -> None:
        """Makes `batch` the next one."""
        self._iterator.set_state({"next_index": batch})
        self.next_batch = batch

    def close(self) -> None:
        """Ends the threads that fetch ahead."""
        self._iterator.close()


def _checked_position(state: dict[str, Any], identity: DatasetIdentity) -> int:
    position, dataset = state.get("next_batch"), state.get("dataset")
    if not isinstance(position, int) or position < 0 or not isinstance(dataset, dict):
        raise DataError(f"{str(state)[:100]} is no state of a loader: it needs next_batch and dataset")
    for name, here in asdict(identity).items():
        there = dataset.get(name)
        if there != here:
            raise DataError(
                "the saved data position belongs to another dataset: "
                f"{name} was {_short(there)}, now it is {_short(here)}"
            )
    return position


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else repr(value)


def _run_batches(store: TokenStore, seq_len: int, batch_size: int, seed: int, shuffle: bool) -> _Batches:
    return _Batches(ShuffledWindows(WindowSource(store, seq_len), seed, shuffle), batch_size)


def make_loader(
    store: TokenStore,
    seq_len: int,
    batch_size: int,
    seed: int,
    shuffle: bool,
    start_batch: int = 0,
    num_threads: int = 2,
) -> Loader:
    """A prefetching loader over `store`.

    Args:
        store: tokens of one split.
        seq_len: T.
        batch_size: B; an epoch's last windows and the next epoch's first ones share a batch.
        seed: of the order.
        shuffle: seeded order per epoch, or the order of the text.
        start_batch: number of the first batch.
        num_threads: that fetch ahead; 0 = none.

    Raises:
        DataError: there are fewer than T+1 tokens.
    """
    batches = _run_batches(store, seq_len, batch_size, seed, shuffle)
    identity = DatasetIdentity(store.fingerprint, store.meta["tokenizer"], seq_len, batch_size, seed, shuffle)
    loader = Loader(batches, identity, len(WindowSource(store, seq_len)), num_threads)
    loader.seek(start_batch)
    return loader


def plain_batches(
    store: TokenStore, seq_len: int, batch_size: int, seed: int, shuffle: bool, start_batch: int = 0
) -> Iterator[Batch]:
    """The batches of `make_loader`, without grain and without prefetching."""
    batches = _run_batches(store, seq_len, batch_size, seed, shuffle)
    return (batches[k] for k in itertools.count(start_batch))


def eval_batches(store: TokenStore, seq_len: int, batch_size: int, n: int) -> Iterator[Batch]:
    """At most `n` batches of windows spread evenly over `store`, the same every time.

    The last batch of a short text is filled up with rows of zeros whose loss_mask is 0.

    Raises:
        DataError: there are fewer than T+1 tokens.
    """
    source = WindowSource(store, seq_len)
    chosen = min(len(source), n * batch_size)
    batches = (range(k, min(k + batch_size, chosen)) for k in range(0, chosen, batch_size))
    return (_eval_batch(source, rows, chosen, batch_size) for rows in batches)


def _eval_batch(source: WindowSource, rows: range, chosen: int, batch_size: int) -> Batch:
    windows = [source[i * len(source) // chosen] for i in rows]
    filler = {key: np.zeros_like(value) for key, value in windows[0].items()}
    windows += [filler] * (batch_size - len(windows))
    return {key: np.stack([window[key] for window in windows]) for key in filler}
