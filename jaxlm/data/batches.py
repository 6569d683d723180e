"""Which windows a batch holds: settings, windows of stores, rows of a run.

Which window row i of a run is, is a pure function of (stores, settings, i) that costs the same for every i and every
number of tokens: jaxlm.data.mixture says which store gives it, jaxlm.data.order which of the store's windows.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.config import RunConfig
from jaxlm.data.corpus import DataError
from jaxlm.data.mixture import Mixture
from jaxlm.data.order import shuffled
from jaxlm.data.packing import pack
from jaxlm.data.shards import TokenStore

# inputs, targets [b, T] int32, loss_mask [b, T] float32; with packing also segments, positions [b, T] int32.
Batch = dict[str, np.ndarray]
_MOST_ROWS = 1 << 62  # of a run; keeps every row number an int64


@dataclass(frozen=True)
class LoaderSettings:
    """What makes batches out of stores."""

    seq_len: int  # T
    batch_size: int  # B, rows of a global batch
    seed: int  # of the order
    shuffle: bool  # shuffled anew in every epoch, or in the order of the text
    stride: int = 0  # tokens from one window's start to the next; 0 = T
    packing: bool = False  # set the documents of a window apart
    weights: tuple[float, ...] = ()  # share of the rows that each store gives; () = there is one store

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("batch_size", 1), ("stride", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @classmethod
    def of(cls, run: RunConfig) -> "LoaderSettings":
        """The settings of a run, its mixture's weights included.

        Raises:
            ConfigError: the mixture's entries are not FOLDER=WEIGHT.
        """
        from jaxlm.data.run_data import parse_mixture  # what opens data knows more than batches should

        train, data = run.train, run.data
        weights = tuple(weight for _, weight in parse_mixture(data.mixture))
        return cls(
            train.seq_len, train.batch_size, train.seed, data.shuffle, data.stride, data.packing, weights
        )

    @property
    def step(self) -> int:
        """Tokens from one window's start to the next."""
        return self.stride or self.seq_len


def count_windows(store: TokenStore, seq_len: int, stride: int = 0) -> int:
    """Windows of T+1 tokens in `store`, one every `stride` tokens (0 = T); the last token of each is only a target.

    Raises:
        DataError: there are fewer than T+1 tokens.
    """
    if len(store) < seq_len + 1:
        name = f"a split of {store.meta['source']}" if "source" in store.meta else "the text"
        raise DataError(
            f"{name} has {len(store)} tokens, but one window of seq_len={seq_len} needs {seq_len + 1}; "
            "lower train.seq_len or use more text"
        )
    return (len(store) - 1 - seq_len) // (stride or seq_len) + 1


class Batches:
    """Batch k of a run, for any k >= 0: its rows k*B + `rows`, [len(rows), T].

    Args:
        stores: tokens of one split; as many as there are weights.
        settings: how batches are made of them.
        rows: of each global batch, those that are wanted, in this order; None = all B.

    Attributes:
        windows: how many each store has.

    Raises:
        DataError: a store has fewer than T+1 tokens.
    """

    def __init__(
        self, stores: Sequence[TokenStore], settings: LoaderSettings, rows: Sequence[int] | None
    ) -> None:
        self._stores, self._settings = tuple(stores), settings
        self._mixture = Mixture(checked_weights(stores, settings))
        self.windows = tuple(count_windows(store, settings.seq_len, settings.stride) for store in stores)
        self._rows = checked_rows(rows, settings.batch_size)
        if settings.shuffle:
            for store in stores:
                store.expect_random_reads()

    def __len__(self) -> int:
        """A number that no run reaches; random-access libraries ask for one."""
        return min(sys.maxsize, _MOST_ROWS) // self._settings.batch_size

    def __getitem__(self, k: int) -> Batch:
        """Batch number k."""
        part, place = self._mixture.locate(k * self._settings.batch_size + self._rows)
        return gather(self._stores, part, self._starts(part, place), self._settings)

    def _starts(self, part: np.ndarray, place: np.ndarray) -> np.ndarray:
        """First token of the window that each part gives at its `place`."""
        starts = np.empty(len(part), np.int64)
        for i, n in enumerate(self.windows):
            own = part == i
            if self._settings.shuffle:
                starts[own] = shuffled(place[own], n, self._settings.seed, stream=i)
            else:
                starts[own] = place[own] % n
        return starts * self._settings.step


def blank(rows: int, settings: LoaderSettings) -> Batch:
    """A batch [rows, T] of zeros: no tokens, no loss, no document."""
    integers = ("inputs", "targets", *(("segments", "positions") if settings.packing else ()))
    batch: Batch = {key: np.zeros((rows, settings.seq_len), np.int32) for key in integers}
    return batch | {"loss_mask": np.zeros((rows, settings.seq_len), np.float32)}


def gather(
    stores: Sequence[TokenStore], part: np.ndarray, starts: np.ndarray, settings: LoaderSettings
) -> Batch:
    """The batch [b, T] whose row i is the window of stores[part[i]] that starts at token starts[i]."""
    if len(stores) == 1:
        return _windows(stores[0], starts, settings)
    batch = blank(len(part), settings)
    for i, store in enumerate(stores):
        own = np.flatnonzero(part == i)
        if own.size:
            for key, value in _windows(store, starts[own], settings).items():
                batch[key][own] = value
    return batch


def _windows(store: TokenStore, starts: np.ndarray, settings: LoaderSettings) -> Batch:
    tokens = store.windows(starts, settings.seq_len + 1)
    batch: Batch = {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
    if settings.packing:
        return batch | pack(store, starts, settings.seq_len)
    return batch | {"loss_mask": np.ones((len(starts), settings.seq_len), np.float32)}


def checked_weights(stores: Sequence[TokenStore], settings: LoaderSettings) -> tuple[float, ...]:
    """One weight for each store. Raises ValueError where the numbers of both differ."""
    weights = settings.weights or (1.0,)
    if len(weights) != len(stores):
        raise ValueError(f"{len(stores)} stores have {len(weights)} weights: {weights}")
    return weights


def checked_rows(rows: Sequence[int] | None, batch_size: int) -> np.ndarray:
    """The rows of a batch that are wanted, int64 [b]. Raises ValueError unless they are some of 0 .. B-1."""
    chosen = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    if not chosen.size or chosen.min() < 0 or chosen.max() >= batch_size:
        raise ValueError(f"rows {rows} must be some of the batch's rows 0 to {batch_size - 1}")
    return chosen
