"""Windows and their order, exact resumption, shares of processes, validation batches."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from helpers import tiny

from jaxlm.config import DataConfig, RunConfig, TrainConfig
from jaxlm.data.corpus import DataError
from jaxlm.data.loader import LoaderSettings, count_windows, eval_batches, make_loader, plain_batches
from jaxlm.data.shards import ShardError, TokenStore

T, B = 8, 3
# Windows of 12 rows of two stores with weights 0.6 and 0.4; 100 and more are the second store's.
MIXED_ROWS_OF_SEED_5 = [5, 122, 1, 107, 3, 4, 120, 0, 102, 6, 9, 106]


def _store(n, name="a", tokenizer="t", first=0):
    meta = {"dtype": "uint16", "shards": [{"sha256": name}], "tokenizer": tokenizer}
    tokens = np.arange(first, first + n, dtype=np.uint16)
    starts = np.arange(0, n, 5)
    return TokenStore([tokens[: n // 3], tokens[n // 3 :]], meta, starts)


def _settings(**changes):
    return LoaderSettings(**{"seq_len": T, "batch_size": B, "seed": 2, "shuffle": True, **changes})


def _equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def _rows(stores, settings, n):
    """First tokens of the first `n` rows."""
    batches = itertools.islice(plain_batches(stores, settings), -(-n // settings.batch_size))
    return np.concatenate([batch["inputs"][:, 0] for batch in batches])[:n].tolist()


# Two stores of 10 and 25 windows, and what one may ask for.
STORES = [_store(10 * T + 3), _store(25 * T + 1, "b", first=1000)]
MIXED = {"weights": (0.6, 0.4)}
CHOICES = [
    {},
    {"shuffle": False},
    {"stride": 3},
    {"packing": True},
    MIXED,
    {**MIXED, "packing": True, "stride": 5, "shuffle": False},
]


def _stores(settings):
    return STORES[: max(1, len(settings.weights))]


def test_windows_start_a_stride_apart_and_targets_are_the_next_tokens():
    """Stride T by default, the last token of a window only a target; T tokens are refused, T+1 are one window."""
    for stride, n in ((0, 8), (1, 58), (3, 20), (T, 8), (T + 3, 6)):
        store = _store(8 * T + 2)
        assert count_windows(store, T, stride) == n
        plain = plain_batches([store], _settings(batch_size=1, shuffle=False, stride=stride))
        for i, batch in zip(range(n), plain, strict=False):
            first = i * (stride or T)
            assert batch["inputs"].tolist() == [list(range(first, first + T))]
            assert batch["targets"].tolist() == [list(range(first + 1, first + T + 1))]
            assert batch["loss_mask"].tolist() == [[1.0] * T]
            assert [batch[k].dtype for k in batch] == [np.int32, np.int32, np.float32]
        assert next(plain)["inputs"][0, 0] == 0
    assert count_windows(_store(8 * T), T) == 7 and count_windows(_store(T + 1), T) == 1
    with pytest.raises(DataError, match=f"has {T} tokens, but one window of seq_len={T} needs {T + 1}"):
        make_loader([_store(T)], _settings())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_every_token_is_seen_once_in_every_epoch(shuffle, packing):
    """Texts and windows of many lengths; only less than a window at the end is left out. Overlap as the stride says."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        seq_len, epochs = int(rng.integers(1, 40)), 3
        store = _store(int(rng.integers(seq_len + 1, 900)))
        n = count_windows(store, seq_len)
        settings = _settings(seq_len=seq_len, batch_size=n, shuffle=shuffle, packing=packing)
        orders = []
        for batch in itertools.islice(plain_batches([store], settings), epochs):
            assert np.array_equal(np.sort(batch["inputs"], axis=None), np.arange(n * seq_len))
            assert np.array_equal(batch["targets"], batch["inputs"] + 1)
            orders.append(tuple(batch["inputs"][:, 0].tolist()))
        assert n * seq_len + seq_len >= len(store) - 1
        assert not shuffle or n < 10 or len(set(orders)) == epochs
    stride = 4
    n = count_windows(store, 12, stride)
    settings = _settings(seq_len=12, batch_size=n, shuffle=shuffle, stride=stride)
    seen = np.bincount(next(plain_batches([store], settings))["inputs"].ravel())
    assert (seen[12:-12] == 3).all() and seen.sum() == n * 12


def test_every_store_of_a_mixture_has_its_own_epochs_and_order():
    """Rows of each follow each other as without the other; the shares hold in every prefix."""
    settings = _settings(**MIXED)
    rows = np.array(_rows(STORES, settings, 300))
    second = rows >= 1000
    for i in range(1, 301):
        assert abs(second[:i].sum() - 0.4 * i) <= 1
    assert rows[~second].tolist() == _rows(STORES[:1], _settings(), 180)
    for store, own in ((STORES[0], rows[~second]), (STORES[1], rows[second])):
        n = count_windows(store, T)
        epochs = own[: len(own) // n * n].reshape(-1, n)
        assert len(epochs) > 3 and all(len(set(epoch)) == n for epoch in epochs.tolist())
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)
    alike = [_store(25 * T + 1), _store(25 * T + 1, "b", first=1000)]
    both = np.array(_rows(alike, _settings(weights=(0.5, 0.5)), 50))
    assert (
        both[both < 1000].tolist() != (both[both >= 1000] - 1000).tolist()
    )  # equal stores, different orders


def test_the_rows_of_a_run_never_change_between_versions():
    """Runs are resumed under newer libraries; these numbers are the contract."""
    rows = _rows(STORES, _settings(seed=5, **MIXED), 12)
    assert [row // T if row < 1000 else 100 + (row - 1000) // T for row in rows] == MIXED_ROWS_OF_SEED_5


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("threads", [0, 3])
def test_grain_gives_the_batches_of_the_plain_loop(choice, threads):
    """Same values, same order, across epochs, from any start."""
    settings = _settings(**choice)
    for start in (0, 4):
        loader = make_loader(_stores(settings), settings, start, threads)
        plain = plain_batches(_stores(settings), settings, start)
        for batch, wanted in itertools.islice(zip(loader, plain, strict=False), 20):
            assert _equal(batch, wanted) and batch["inputs"].shape == (B, T)
            assert all(value.flags.c_contiguous for value in batch.values())
        loader.close()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_resume_is_bitwise(choice):
    """A state taken at batch k, through JSON, continues in a new loader as if nothing had happened; also backwards."""
    settings = _settings(**choice)
    stores = _stores(settings)
    reference = list(itertools.islice(plain_batches(stores, settings), 20))
    for k in (0, 1, 7):
        loader = make_loader(stores, settings)
        for _ in range(k):
            next(loader)
        state = json.loads(json.dumps(loader.get_state()))
        for _ in range(2):
            next(loader)
        resumed = make_loader(stores, settings)
        next(resumed)
        for restored in (resumed, loader):
            restored.set_state(state)
            assert restored.get_state() == state
            assert all(_equal(next(restored), wanted) for wanted in reference[k : k + 10])
            restored.close()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_global_order_is_the_same_for_any_number_of_processes(choice, processes):
    """Interleaved rows or blocks: together the processes have the global batch, and go on from each other's states."""
    settings = _settings(batch_size=4, **choice)
    stores = _stores(settings)
    whole = list(itertools.islice(plain_batches(stores, settings), 12))
    state = None
    for assign in (
        lambda p: range(p, 4, processes),
        lambda p: range(p * 4 // processes, (p + 1) * 4 // processes),
    ):
        loaders = [make_loader(stores, settings, rows=assign(p), num_threads=1) for p in range(processes)]
        first = 0
        if state is not None:
            first = state["next_batch"]
            for loader in loaders:
                loader.set_state(state)
        for wanted in whole[first : first + 6]:
            got = {key: np.empty_like(value) for key, value in wanted.items()}
            for p, loader in enumerate(loaders):
                part = next(loader)
                for key in got:
                    got[key][list(assign(p))] = part[key]
            assert _equal(got, wanted)
        states = [loader.get_state() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[-1]
        for loader in loaders:
            loader.close()
    for rows in ([2], [3, 0, 2]):
        other = make_loader(stores, settings, rows=rows, num_threads=0)
        other.set_state(state)
        assert np.array_equal(
            next(other)["inputs"], next(plain_batches(stores, settings, 12))["inputs"][rows]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stores": [_store(83, "c")]}, r"files was \[[0-9a-f]{12}\.\.\.\], now it is \["),
        ({"stores": [_store(83, tokenizer="u")]}, "tokenizer was 't', now it is 'u'"),
        ({"stores": STORES, "weights": (0.5, 0.5)}, "files was"),
        ({"seq_len": 4, "stride": 8}, "seq_len was 8, now it is 4"),
        ({"batch_size": 5}, "batch_size was 3, now it is 5"),
        ({"stride": 7}, "stride was 8, now it is 7"),
        ({"packing": True}, "packing was False, now it is True"),
        ({"seed": 9}, "seed was 2, now it is 9"),
        ({"shuffle": False}, "shuffle was True, now it is False"),
    ],
    ids=["files", "tokenizer", "mixture", "seq_len", "batch_size", "stride", "packing", "seed", "shuffle"],
)
def test_the_state_of_another_dataset_is_refused(change, message):
    """With what differs, files and tokenizer included."""
    state = make_loader(STORES[:1], _settings()).get_state()
    stores = change.pop("stores", STORES[:1])
    other = make_loader(stores, _settings(**change))
    with pytest.raises(DataError, match=f"belongs to other data or settings: {message}"):
        other.set_state(state)
    assert other.next_batch == 0


def test_the_state_of_another_mixture_or_order_is_refused():
    """Weights, the order of the stores, and the way that rows are ordered."""
    state = make_loader(STORES, _settings(**MIXED)).get_state()
    other = make_loader(STORES, _settings(weights=(0.5, 0.5)))
    with pytest.raises(DataError, match=r"weights was \[0.6, 0.4\], now it is \[0.5, 0.5\]"):
        other.set_state(state)
    with pytest.raises(DataError, match="files was"):
        make_loader(STORES[::-1], _settings(**MIXED)).set_state(state)
    state["dataset"]["order"] = "numpy-0"
    with pytest.raises(DataError, match=r"order was 'numpy-0', now it is 'feistel-1\+"):
        make_loader(STORES, _settings(**MIXED)).set_state(state)


@pytest.mark.parametrize("position", [-1, 1.0, True, None, "3", 2**63, 10**30, float("nan"), [1]], ids=str)
def test_a_state_that_is_none_is_refused(position):
    """Positions that no loader has, missing parts, and other things than states; the loader stays where it is."""
    loader = make_loader(STORES[:1], _settings())
    next(loader)
    dataset = loader.get_state()["dataset"]
    for nonsense in ({"next_batch": position, "dataset": dataset}, {"next_batch": 3}, {}, None, [], "x"):
        with pytest.raises(DataError, match="no state of a loader"):
            loader.set_state(nonsense)
    del dataset["seed"]
    with pytest.raises(DataError, match="seed was None, now it is 2"):
        loader.set_state({"next_batch": 3, "dataset": dataset})
    assert loader.next_batch == 1
    assert _equal(next(loader), next(plain_batches(STORES[:1], _settings(), 1)))
    loader.close()


def test_settings_come_from_a_run():
    """All that the data section says, weights included."""
    data = DataConfig(mixture=("x=0.25", "y=0.75"), shuffle=False, stride=5, packing=True)
    run = RunConfig(tiny(), data=data, train=TrainConfig(batch_size=6, seq_len=16, seed=4))
    assert LoaderSettings.of(run) == LoaderSettings(16, 6, 4, False, 5, True, (0.25, 0.75))
    assert LoaderSettings.of(dataclasses.replace(run, data=DataConfig())).weights == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _settings(seq_len=0), "seq_len=0 must be at least 1"),
        (lambda: _settings(stride=-1), "stride=-1 must be at least 0"),
        (lambda: make_loader(STORES, _settings()), "2 stores have 1 weights"),
        (lambda: make_loader(STORES[:1], _settings(**MIXED)), "1 stores have 2 weights"),
        (lambda: make_loader(STORES[:1], _settings(), rows=[3]), "rows 0 to 2"),
        (lambda: make_loader(STORES[:1], _settings(), rows=[]), "rows 0 to 2"),
        (lambda: make_loader(STORES[:1], _settings(), start_batch=-1), "there is no batch -1"),
    ],
)
def test_calls_that_cannot_be_meant_are_refused(make, message):
    """Before anything is read."""
    with pytest.raises(ValueError, match=message):
        make()


def test_damage_that_is_found_while_reading_ahead_ends_the_loop_with_its_own_error():
    """A store that raises in a prefetching thread: `next` raises the same, and does not hang."""

    class Damaged(TokenStore):
        def windows(self, starts, length):
            if starts.max() > 5 * T:
                raise ShardError("shard_0000.npy is damaged")
            return super().windows(starts, length)

    store = STORES[0]
    loader = make_loader([Damaged(store._shards, store.meta)], _settings(shuffle=False))
    with pytest.raises(ShardError, match="^shard_0000.npy is damaged$"):
        for _ in range(4):
            next(loader)
    loader.close()


def test_validation_batches_are_spread_evenly_and_padded():
    """All windows if there are few; else evenly spaced ones; rows that fill the last batch have no loss."""
    store = _store(7 * T + 1)
    batches = list(eval_batches([store], _settings(stride=3), 100))
    assert [b["inputs"].shape for b in batches] == [(B, T)] * 3
    rows = np.concatenate([b["inputs"][b["loss_mask"][:, 0] == 1] for b in batches])
    assert rows.ravel().tolist() == list(range(7 * T))
    assert batches[-1]["loss_mask"].sum() == T and batches[-1]["inputs"][1:].sum() == 0
    spread = list(eval_batches([_store(60 * T + 1)], _settings(), 2))
    assert [int(r[0]) // T for b in spread for r in b["inputs"]] == [0, 10, 20, 30, 40, 50]
    again = eval_batches([_store(60 * T + 1)], _settings(seed=8, shuffle=False), 2)
    assert all(_equal(a, b) for a, b in zip(spread, again, strict=True))


def test_validation_of_a_mixture_takes_its_shares():
    """As many windows of each store as the weights say, up to all it has; of every batch, each process its rows."""
    settings = _settings(batch_size=4, packing=True, **MIXED)
    whole = list(eval_batches(STORES, settings, 5))
    first = np.concatenate([b["inputs"][:, 0] for b in whole])
    there = np.concatenate([b["loss_mask"].any(axis=1) for b in whole])
    assert (first[there] < 1000).sum() == 10 and (
        first[there] >= 1000
    ).sum() == 8  # 12 and 8 of 20; 10 in all
    assert len(whole) == 5 and there.sum() == 18
    for rows in ([0], [3], [1, 2], [3, 0]):
        mine = list(eval_batches(STORES, settings, 5, rows=rows))
        assert all(_equal(a, {k: v[rows] for k, v in b.items()}) for a, b in zip(mine, whole, strict=True))
