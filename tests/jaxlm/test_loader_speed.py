"""What batches cost: the same for any number of tokens, and far less than a training step.

make bench-tests, or: pytest -m bench -s tests/jaxlm/test_loader_speed.py
"""

import itertools
import time

import numpy as np
import pytest

from jaxlm.data.loader import LoaderSettings, make_loader, plain_batches
from jaxlm.data.shards import TokenStore

T, B = 1024, 32
SHARD = 1 << 26
TOKENS_PER_SECOND = {"windows": 20e6, "stride": 20e6, "mixture": 20e6, "packed": 2e6}  # least, on two cores
CHOICES = {
    "windows": {},
    "stride": {"stride": T // 2},
    "mixture": {"weights": (0.7, 0.3)},
    "packed": {"packing": True},
}


def _sparse_store(folder, n, document=5000):
    """`n` tokens of zeros in shards that take no space on the disk, and the starts of documents of equal length."""
    folder.mkdir()
    shards = []
    for i, first in enumerate(range(0, n, SHARD)):
        size = min(SHARD, n - first)
        with open(folder / f"{i}.bin", "wb") as file:
            file.truncate(2 * size)
        shards.append(np.memmap(folder / f"{i}.bin", np.uint16, "r").view(np.ndarray))
    np.save(folder / "documents.npy", np.arange(0, n, document))
    meta = {"dtype": "uint16", "shards": [{"sha256": str(n)}], "tokenizer": "t"}
    return TokenStore(shards, meta, np.load(folder / "documents.npy", mmap_mode="r").view(np.ndarray))


def _settings(**changes):
    return LoaderSettings(**{"seq_len": T, "batch_size": B, "seed": 1, "shuffle": True, **changes})


def _start_up(stores, settings, start):
    """Seconds until the batch `start` of a new loader is there."""
    began = time.perf_counter()
    loader = make_loader(stores, settings, start, num_threads=0)
    next(loader)
    seconds = time.perf_counter() - began
    loader.close()
    return seconds


def _per_batch(stores, settings, start, n=40):
    """Median seconds of a batch; each reads pages that were not read before."""
    batches = plain_batches(stores, settings, start)
    times = []
    for _ in range(n):
        began = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


@pytest.mark.parametrize("choice", ["windows", "packed"])
def test_start_up_and_batches_cost_the_same_for_a_thousand_times_the_tokens(choice, tmp_path):
    """10M and 10B tokens, first and third epoch: anything that walked over windows would cost a hundred times more."""
    settings = _settings(**CHOICES[choice])
    costs = []
    for n in (10_000_000, 10_000_000_000):
        stores = [_sparse_store(tmp_path / str(n), n, document=50_000)]
        epoch = n // T // B
        costs.append(
            (
                min(_start_up(stores, settings, start) for start in (0, 1, 2, 2 * epoch + 3)),
                _per_batch(stores, settings, 3),
                _per_batch(stores, settings, 2 * epoch + 5),
            )
        )
    for small, large in zip(*costs, strict=True):
        assert large < 8 * small + 5e-3


@pytest.mark.bench
def test_cost_by_number_of_tokens(tmp_path):
    """Printed: start-up and batches of 32 x 1,024 from 10M to 10B tokens in sparse files, the third epoch."""
    print(f"\n{'tokens':>16} {'choice':>9} {'start-up':>12} {'per batch':>12}")
    for exponent, (name, choice) in itertools.product((7, 8, 9, 10), CHOICES.items()):
        folder = tmp_path / f"{exponent}{name}"
        folder.mkdir()
        weights = choice.get("weights", (1.0,))
        stores = [_sparse_store(folder / str(i), 10**exponent, 500 + i) for i in range(len(weights))]
        start = 2 * 10**exponent // T // B
        settings = _settings(**choice)
        seconds = min(_start_up(stores, settings, start + i) for i in range(3))
        batch = _per_batch(stores, settings, start + 5, 300)
        print(f"{10**exponent:16,} {name:>9} {seconds * 1e3:9.2f} ms {batch * 1e3:9.3f} ms")


@pytest.mark.bench
@pytest.mark.parametrize("choice", TOKENS_PER_SECOND)
def test_tokens_per_second_from_warm_shards(choice, tmp_path):
    """Printed, and no less than what training needs: 200M random tokens in documents of 500, through `make_loader`."""
    settings = _settings(**CHOICES[choice])
    stores = []
    for i in range(max(1, len(settings.weights))):
        rng = np.random.default_rng(i)
        tokens = rng.integers(0, 50_000, 200_000_000, dtype=np.uint16)
        tokens.tofile(tmp_path / f"{i}.bin")
        shards = np.split(np.memmap(tmp_path / f"{i}.bin", np.uint16, "r").view(np.ndarray), 4)
        starts = np.unique(np.append(rng.integers(0, len(tokens), len(tokens) // 500), 0))
        meta = {"dtype": "uint16", "shards": [{"sha256": str(i)}], "tokenizer": "t"}
        stores.append(TokenStore(shards, meta, starts))
    rates = {}
    for threads in (0, 1, 2):
        loader = make_loader(stores, settings, num_threads=threads)
        for _ in range(50):
            next(loader)
        began = time.perf_counter()
        n = 1000
        for _ in range(n):
            next(loader)
        rates[threads] = n * B * T / (time.perf_counter() - began)
        loader.close()
    print(
        f"\n{choice}: "
        + ", ".join(f"{rate / 1e6:.0f}M tokens/s with {t} threads" for t, rate in rates.items())
    )
    assert rates[2] > TOKENS_PER_SECOND[choice]
