"""Batches of examples and pairs: what rows hold, against a loop; epochs, exact resumption, shares of processes."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import DataConfig, TrainConfig
from jaxlm.data.corpus import DataError
from jaxlm.data.example_rows import best_fit
from jaxlm.data.examples import Examples, Pairs
from jaxlm.data.tune_batches import TuneBatches, TuneSettings, eval_tune_batches, make_tune_loader

T, B = 12, 4
KEYS = {
    "inputs": np.int32,
    "targets": np.int32,
    "loss_mask": np.float32,
    "segments": np.int32,
    "positions": np.int32,
}
EXAMPLES_OF_SEED_7 = [[1], [9, 4, 3], [6, 5, 2], [8], [10], [7, 0]]


def _examples(lengths, tokenizer="t", seed=0):
    """Examples of these lengths; every id occurs once, so that it says where it came from."""
    rng = np.random.default_rng(seed)
    ids = np.split(np.arange(1, 1 + sum(lengths)), np.cumsum(lengths)[:-1])
    carries = [rng.random(n) < 0.5 for n in lengths]
    for own in carries:
        own[-1] = True
    return Examples.of(zip(ids, carries, strict=True), tokenizer)


def _pairs(lengths):
    return Pairs(_examples(lengths), _examples(lengths[::-1], seed=1))


def _settings(**changes):
    return TuneSettings(**{"seq_len": T, "batch_size": B, "seed": 3, **changes})


LENGTHS = [2, 13, 5, 5, 9, 3, 2, 7, 12, 4, 6, 3, 2, 8, 5, 3, 11]
CHOICES = {
    "packed": (_examples(LENGTHS), {}),
    "in order": (_examples(LENGTHS), {"shuffle": False}),
    "padded": (_examples(LENGTHS), {"packing": False}),
    "pairs": (_pairs(LENGTHS), {"packing": False}),
}
choices = pytest.mark.parametrize(("data", "changes"), CHOICES.values(), ids=CHOICES)


def _reference(data):
    """Log-probabilities that say which pair they belong to; none for examples."""
    return {"reference": -1.0 - np.arange(2.0 * len(data)).reshape(-1, 2)} if isinstance(data, Pairs) else {}


def _equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def _read(data, row):
    """Numbers of the examples in a row of a batch, in order; fails unless the row is exactly what they make."""
    starts = {int(data.ids[start]): i for i, start in enumerate(data.starts[:-1])}
    wanted, found = {key: np.zeros_like(row[key]) for key in KEYS}, []
    column = 0
    while column < row["inputs"].size and row["inputs"][column]:
        found.append(starts[int(row["inputs"][column])])
        ids, carries = data.example(found[-1])
        for t in range(len(ids) - 1):
            wanted["inputs"][column], wanted["targets"][column] = ids[t], ids[t + 1]
            wanted["loss_mask"][column] = float(carries[t + 1])
            wanted["segments"][column], wanted["positions"][column] = len(found), t
            column += 1
    assert _equal(wanted, {key: row[key] for key in KEYS})
    return found


def _rows(data, batch):
    """What `_read` gives for each row; of pairs, both sides must be of the same pair."""
    rows = [{key: batch[key][i] for key in KEYS} for i in range(len(batch["inputs"]))]
    if isinstance(data, Examples):
        return [_read(data, row) for row in rows]
    sides = [[{key: value[i] for key, value in row.items()} for row in rows] for i in (0, 1)]
    chosen, rejected = (
        [_read(side, row) for row in own]
        for side, own in zip((data.chosen, data.rejected), sides, strict=True)
    )
    assert chosen == rejected
    return chosen


def test_examples_say_what_is_wrong_with_them():
    """Nothing to predict, nothing that carries loss (the first token is never a target), none at all, unequal sides."""
    data = _examples([3, 2])
    assert len(data) == 2 and data.example(1)[0].tolist() == [4, 5] and data.lengths.tolist() == [3, 2]
    assert data.loss_tokens == sum(int(data.example(i)[1][1:].sum()) for i in range(2))
    assert data.example(0)[0].base is not None
    ok = ([1, 2], [False, True])
    for bad, message in (
        ([], "there are no examples"),
        ([ok, ([1], [True])], "example 1 has 1 tokens"),
        ([ok, ([], [])], "example 1 has 0 tokens"),
        (
            [ok, ok, ([1, 2, 3], [True, False, False])],
            "example 2 has no token after its first that carries loss",
        ),
    ):
        with pytest.raises(DataError, match=message):
            Examples.of(bad, "t")
    with pytest.raises(ValueError, match=r"example 0: ids \[2\] and carries \[3\] differ"):
        Examples.of([([1, 2], [True] * 3)], "t")
    with pytest.raises(DataError, match="2 chosen answers have 1 rejected ones"):
        Pairs(data, _examples([3]))
    for i in (-1, 2):
        with pytest.raises(IndexError, match=f"there is no example {i}"):
            data.example(i)
    parts = (data.ids, data.carries, data.starts, data.answers)
    for i, changed in (
        (0, data.ids[:-1]),
        (0, data.ids.astype(np.int64)),
        (2, data.starts[:2]),
        (2, -data.starts),
        (3, data.answers[:1]),
        (3, data.answers.astype(np.int32)),
        (3, data.answers - 9),
        (3, data.answers + 9),
        (3, data.answers + [1, 0]),
    ):
        with pytest.raises(ValueError, match=r"ids|starts|answers"):
            Examples(*parts[:i], changed, *parts[i + 1 :], "f")
    with pytest.raises(ValueError, match="starts do not ascend"):
        Examples(data.ids, data.carries, np.array([0, 4, 3, 5]), data.answers, "f")


def test_answers_are_the_runs_that_carry_loss_unless_they_are_given():
    """Before the first, and before the last."""
    ids, carries = [1, 2, 3, 4, 5, 6, 7], [False, True, False, False, True, True, False]
    made = Examples.of([(ids, carries), (ids, carries, [0, 3]), (ids[:2], [True, True])], "t")
    assert made.answers.tolist() == [[1, 4], [0, 3], [0, 0]]


def test_a_fingerprint_tells_examples_apart():
    """Other ids, borders, masks, tokenizers and sides; the same for the same."""
    ids, carries = [1, 2, 3, 4], [True] * 4
    split = [(ids[:2], carries[:2]), (ids[2:], carries[2:])]
    made = [
        Examples.of([(ids, carries)], "t"),
        Examples.of([([1, 2, 3, 5], carries)], "t"),
        Examples.of([(ids, [False, *carries[1:]])], "t"),
        Examples.of([(ids, carries)], "u"),
        Examples.of(split, "t"),
    ]
    a, b = made[:2]
    assert len({*(data.fingerprint for data in made), Pairs(a, b).fingerprint, Pairs(b, a).fingerprint}) == 7
    assert Examples.of([(np.array(ids, np.uint16), carries)], "t").fingerprint == a.fingerprint


@choices
def test_every_example_comes_once_in_every_epoch(data, changes):
    """Rows are exactly what a loop makes of their examples; batches run over the borders of epochs."""
    made = TuneBatches(data, _settings(**changes), **_reference(data))
    n = made.rows_per_epoch
    assert n % B and made.batches_per_epoch == -(-n // B) and made.steps(2.5) == -(-5 * n // (2 * B))
    rows = list(itertools.chain.from_iterable(_rows(data, made[k]) for k in range(made.steps(5))))
    epochs = [rows[i * n : (i + 1) * n] for i in range(5)]
    for epoch in epochs:
        assert sorted(itertools.chain.from_iterable(epoch)) == list(range(len(data)))
    shuffled = changes.get("shuffle", True)
    assert len({str(epoch) for epoch in epochs}) == (5 if shuffled else 1)
    shares = [(made[k]["segments"] > 0).mean() for k in range(n)]  # n batches are B epochs
    assert made.filled == pytest.approx(np.mean(shares))
    for batch in (made[0], next(eval_tune_batches(data, _settings(**changes), **_reference(data)))):
        shape = (B, 2, T) if isinstance(data, Pairs) else (B, T)
        assert {key: batch[key].dtype for key in KEYS} == KEYS
        assert all(batch[key].shape == shape and batch[key].flags.c_contiguous for key in KEYS)
        assert set(batch) - set(KEYS) == ({"reference"} if isinstance(data, Pairs) else set())


def test_a_reference_stays_with_its_pair():
    """In training and validation; zero where there is no pair; absent where none was given."""
    data, changes = CHOICES["pairs"]
    reference = _reference(data)["reference"]
    training = itertools.islice(make_tune_loader(data, _settings(**changes), reference=reference), 9)
    for batch in (*training, *eval_tune_batches(data, _settings(**changes), reference=reference)):
        for found, own in zip(_rows(data, batch), batch["reference"], strict=True):
            assert own.tolist() == (reference[found[0]].tolist() if found else [0, 0])
    assert "reference" not in next(make_tune_loader(data, _settings(**changes)))
    with pytest.raises(ValueError, match=r"\(3, 2\); it belongs to pairs, \(17, 2\)"):
        TuneBatches(data, _settings(**changes), reference=reference[:3])
    reference[5, 1] = np.nan
    with pytest.raises(DataError, match="of pair 5 are"):
        TuneBatches(data, _settings(**changes), reference=reference)


@choices
def test_resume_is_bitwise(data, changes):
    """A state taken at batch k, through JSON, continues in a new loader as if nothing had happened; also backwards."""
    make = lambda: make_tune_loader(data, _settings(**changes), **_reference(data))  # noqa: E731
    wanted = list(itertools.islice(make(), 20))
    for k in (0, 1, 7):
        loader = make()
        for _ in range(k):
            next(loader)
        state = json.loads(json.dumps(loader.get_state()))
        next(loader)
        for restored in (make(), loader, make_tune_loader(data, _settings(**changes), 3, **_reference(data))):
            restored.set_state(state)
            assert restored.get_state() == state and restored.next_batch == k
            assert all(_equal(next(restored), batch) for batch in wanted[k : k + 9])


@choices
def test_the_rows_of_several_processes_are_the_batch(data, changes):
    """Interleaved or in blocks; each process goes on from any other's state."""
    whole = [TuneBatches(data, _settings(**changes), **_reference(data))[k] for k in range(9)]
    for shares in ([[0, 2], [1, 3]], [[3], [0, 1, 2]]):
        loaders = [
            make_tune_loader(data, _settings(**changes), rows=own, **_reference(data)) for own in shares
        ]
        for k, wanted in enumerate(whole):
            got = {key: np.empty_like(value) for key, value in wanted.items()}
            for loader, own in zip(loaders, shares, strict=True):
                for key, value in next(loader).items():
                    got[key][own] = value
            assert _equal(got, wanted)
            states = [loader.get_state() for loader in loaders]
            assert states[0] == states[1] and states[0]["next_batch"] == k + 1
    for rows in ([], [4], [-1]):
        with pytest.raises(ValueError, match="must be some of the batch's rows"):
            make_tune_loader(data, _settings(**changes), rows=rows)


def test_a_state_of_other_data_or_settings_is_refused():
    """With the name of what differs; what is no state at all likewise. The position stays where it was."""
    data, pairs = _examples(LENGTHS), _pairs(LENGTHS)
    loader = make_tune_loader(data, _settings(), 5)
    others = {
        "data": make_tune_loader(_examples(LENGTHS, "other"), _settings()),
        "kind": make_tune_loader(pairs, _settings(packing=False)),
        "seq_len": make_tune_loader(data, _settings(seq_len=T + 1)),
        "batch_size": make_tune_loader(data, _settings(batch_size=5)),
        "packing": make_tune_loader(data, _settings(packing=False)),
        "shuffle": make_tune_loader(data, _settings(shuffle=False)),
        "seed": make_tune_loader(data, _settings(seed=4)),
    }
    for name, other in others.items():
        with pytest.raises(DataError, match=f"other data or settings: {name} was .*, now it is ") as refused:
            loader.set_state(other.get_state())
        assert "\n" not in str(refused.value)
    stored = make_tune_loader(pairs, _settings(packing=False), **_reference(pairs))
    with pytest.raises(DataError, match="reference was False, now it is True"):
        stored.set_state(others["kind"].get_state())
    good = loader.get_state()
    for bad in (None, [], {}, {"next_batch": 1}, {**good, "next_batch": -1}, {**good, "next_batch": True}):
        with pytest.raises(DataError, match="is no state of a loader"):
            loader.set_state(bad)
    with pytest.raises(DataError, match="order was 'feistel-0"):
        loader.set_state({**good, "dataset": {**good["dataset"], "order": "feistel-0"}})
    assert loader.next_batch == 5


def test_the_rows_of_a_run_never_change_between_versions():
    """Runs are resumed under newer libraries; these numbers are the contract."""
    data = _examples([6, 12, 4, 10, 3, 6, 5, 8, 5, 2, 13])
    made = TuneBatches(data, _settings(seed=7, batch_size=6))
    assert made.rows_per_epoch == 6 and _rows(data, made[2]) == EXAMPLES_OF_SEED_7


@choices
@pytest.mark.parametrize("n", [None, 1, 7, 17, 40])
def test_a_validation_takes_each_example_once(data, changes, n):
    """All or n of them spread evenly, the same every time, and rows of zeros at the end."""
    reference = _reference(data)
    batches = list(eval_tune_batches(data, _settings(**changes), n, **reference))
    rows = list(itertools.chain.from_iterable(_rows(data, batch) for batch in batches))
    filled = [row for row in rows if row]
    assert rows == filled + [[]] * (len(rows) - len(filled)) and len(rows) - len(filled) < B
    count = min(n or 17, 17)
    assert sorted(itertools.chain.from_iterable(filled)) == [i * 17 // count for i in range(count)]
    assert changes.get("packing", True) or [i for (i,) in filled] == [i * 17 // count for i in range(count)]
    for own in ([1, 3], [0, 2]):
        for part, whole in zip(
            eval_tune_batches(data, _settings(**changes), n, own, **reference), batches, strict=True
        ):
            assert _equal(part, {key: value[own] for key, value in whole.items()})
    blank = {key: value[len(rows) - len(filled) and -1] for key, value in batches[-1].items()}
    assert len(rows) == len(filled) or not any(value.any() for value in blank.values())


def test_what_does_not_fit_into_a_row_is_refused():
    """T + 1 tokens fill a row, one more is too long, whichever side of a pair; pairs are not packed."""
    fits = _examples([2, T + 1])
    assert TuneBatches(fits, _settings(packing=False, batch_size=2))[0]["segments"].sum(axis=1).max() == T
    long = _examples([2, T + 2])
    message = f"has {T + 2} tokens, but a row of seq_len={T} holds an example of at most {T + 1}; raise train.seq_len"
    for data, name in (
        (long, "example"),
        (Pairs(fits, long), "rejected answer"),
        (Pairs(long, fits), "chosen answer"),
    ):
        for use in (TuneBatches, eval_tune_batches):
            with pytest.raises(DataError, match=f"{name} 1 {message}"):
                use(data, _settings(packing=False))
    with pytest.raises(DataError, match="pairs of answers cannot be packed"):
        make_tune_loader(Pairs(fits, fits), _settings())
    for name in ("seq_len", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            _settings(**{name: 0})


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 40), st.booleans(), st.integers(0, 2**40))
def test_packing_never_splits_or_overfills(draw, seq_len, shuffle, seed):
    """Any lengths: rows are whole examples, none over T columns, each once; no two rows would fit into one."""
    lengths = draw.draw(st.lists(st.integers(2, seq_len + 1), min_size=1, max_size=60))
    data = _examples(lengths)
    made = TuneBatches(data, TuneSettings(seq_len, 1, seed, shuffle))
    rows = [_rows(data, made[k])[0] for k in range(made.rows_per_epoch)]
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(data)))
    used = sorted(sum(lengths[i] - 1 for i in row) for row in rows)
    assert used[-1] <= seq_len and (len(used) == 1 or used[0] + used[1] > seq_len)
    assert made.filled == pytest.approx(sum(used) / (len(rows) * seq_len))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(5, 40), min_size=1, max_size=80), st.randoms(use_true_random=False))
def test_packing_is_best_fit_decreasing(sizes, random):
    """The rows of a loop over all open rows, where every size is an eighth of a row or more."""
    ties = np.array(random.sample(range(len(sizes)), len(sizes)))
    left, wanted = [], {}
    for i in sorted(ties.tolist(), key=lambda i: -sizes[i]):
        fitting = [room for room in left if room >= sizes[i]]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else 40) - sizes[i])
    row = best_fit(np.array(sizes), 40, ties)
    wanted = sorted(40 - room for room in left)
    assert sorted(np.bincount(row, weights=sizes).tolist()) == wanted


def test_packing_wastes_little_and_mixes_short_examples():
    """Chats of a few hundred tokens fill 99 % of 2,048 columns; a row of short ones is no sample of one length."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(300), 0.9, 3000), 8, 2049).astype(int)
    assert TuneBatches(_examples(lengths.tolist()), TuneSettings(2048, 8, 0)).filled > 0.99
    short = _examples(rng.integers(20, 60, 4000).tolist())
    made = TuneBatches(short, TuneSettings(2048, 1, 0))
    assert made.filled > 0.97
    means = [short.lengths[_rows(short, made[k])[0]].mean() for k in range(made.rows_per_epoch - 1)]
    assert np.std(means) < 4  # 11.5 / sqrt(52) if drawn at random; sorted rows would have 11.5


def test_settings_come_from_the_run():
    """Length, rows, seed and order as in pretraining; packing as the chat says, never for pairs."""
    from helpers import tiny

    from jaxlm.tune_config import ChatConfig, TuneConfig, TuneRun

    train = TrainConfig(seq_len=19, batch_size=6, seed=11)
    for method, packing, wanted in (("sft", True, True), ("sft", False, False), ("dpo", True, False)):
        tune = TuneConfig(method, "base", chat=ChatConfig(packing=packing))
        run = TuneRun(tiny(), train=train, data=DataConfig(shuffle=False), tune=tune)
        assert TuneSettings.of(run) == TuneSettings(19, 6, 11, False, wanted)
