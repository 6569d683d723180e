"""Packed examples are the same examples one by one: loss and gradients in float64, in both frameworks.

Reductions over all valid tokens (cross-entropy, router-z, every balance loss but one) do not know rows. The `maxtext`
balance loss is a mean over rows, so that a packed row counts once, whatever it holds; and a balance loss is a product
of means, so it is that of its batch and no sum over examples or micro-batches. Capacities, too, depend on the batch.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from helpers import T, V, assert_close, quick_jit, random_params, relative_error, tiny, tiny_run, tree_errors  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert.native import build_torch, to_jax  # noqa: E402
from convert.tree import to_numpy  # noqa: E402
from jaxlm import train  # noqa: E402
from jaxlm.config import ModelConfig  # noqa: E402
from jaxlm.data.examples import Examples  # noqa: E402
from jaxlm.data.tune_batches import TuneSettings, eval_tune_batches  # noqa: E402
from torchref import train as twin  # noqa: E402

pytestmark = pytest.mark.torch

LENGTHS = (20, 4, 7, 11, 3, 12, 5, 4, 10, 2, 20, 6)  # of examples; their loss tokens are very unequal
# One layer, and always as many rows, so that few programs are compiled. Positions of a row are seen where they are
# learned: to rotary ones a constant is nothing.
ROWS, LAYERS = len(LENGTHS), 1
LEARNED = tiny(position="learned", n_layers=LAYERS)
MOE = tiny({"router_z_coef": 1e-2, "balance": "mixtral"}, n_layers=LAYERS)
SUMS = tiny(
    {"balance": "none"}, n_layers=LAYERS
)  # a mixture whose loss is a mean over loss tokens, and no more
MODELS = {"learned": LEARNED, "moe": MOE}
Arrays = dict[str, np.ndarray]


class Gradients(NamedTuple):
    """Of the whole batch, by jaxlm's names."""

    loss: float
    parts: dict[str, float]
    grads: Arrays


Side = Callable[[ModelConfig, Arrays, int], Gradients]  # model, batch, micro-batches


def examples() -> Examples:
    """Prompts and answers: the first third of each carries no loss; of the last, only one token does."""
    rng = np.random.default_rng(5)
    made = [(rng.integers(0, V, n).astype(np.int32), np.arange(n) >= n // 3) for n in LENGTHS]
    made[-2][1][:-1] = False
    return Examples.of(made, "t")


def batch_of(packing: bool) -> Arrays:
    """All examples in one batch of as many rows; those that are not needed are zeros."""
    (batch,) = eval_tune_batches(examples(), TuneSettings(T, ROWS, 0, packing=packing))
    return batch


def ours(model: ModelConfig, batch: Arrays, accumulation: int = 1) -> Gradients:
    """jaxlm."""
    run = tiny_run(model, batch_size=len(batch["inputs"]), accumulation=accumulation)
    found = _compiled(run)(random_params(model, init="fan_in"), batch)
    return _told({k: np.asarray(g) for k, g in found[0].items()}, found[1])


_PROGRAMS: dict[Any, Any] = {}


def _compiled(run: Any) -> Any:
    key = (run.model, run.train.accumulation)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = quick_jit(train.make_gradient_fn(run))
    return _PROGRAMS[key]


def theirs(model: ModelConfig, batch: Arrays, accumulation: int = 1) -> Gradients:
    """torchref."""
    run = tiny_run(model, batch_size=len(batch["inputs"]), accumulation=accumulation)
    decoder = build_torch(model, random_params(model, init="fan_in"))
    grads, metrics = twin.make_gradient_fn(run)(decoder, twin.place_batch(batch))
    return _told(to_jax(model, {k: to_numpy(g) for k, g in grads.items()}), metrics)


def _told(grads: Arrays, metrics: dict[str, Any]) -> Gradients:
    parts = {k: float(metrics[k]) for k in ("loss", "z", "balance", "router_z")}
    return Gradients(float(metrics["total_loss"]), parts, grads)


SIDES = pytest.mark.parametrize("side", [ours, theirs], ids=["jaxlm", "torchref"])


def difference(a: Gradients, b: Gradients) -> dict[str, float]:
    """Relative errors of the loss, its parts and every gradient."""
    parts = {name: relative_error(a.parts[name], b.parts[name]) for name in b.parts}
    return {"total": relative_error(a.loss, b.loss)} | parts | tree_errors(a.grads, b.grads)


def assert_same(a: Gradients, b: Gradients) -> None:
    """Within rounding, and about something."""
    assert_close(difference(a, b), tolerance("f64_examples"))
    assert b.loss > 1 and all(np.any(g) for name, g in b.grads.items() if "bias" not in name)


def worst(a: Gradients, b: Gradients) -> float:
    """The largest of the errors."""
    return max(difference(a, b).values())


@pytest.fixture(autouse=True)
def wide(x64: None) -> Iterator[None]:
    """All of it is float64."""
    yield


@pytest.mark.parametrize("name", MODELS)
@SIDES
def test_packed_and_padded_batches_give_the_same_loss_and_gradients(name: str, side: Side) -> None:
    """All terms of the loss and every gradient, z-loss, balance and router-z included."""
    packed = batch_of(True)
    assert packed["segments"].max() > 2 and (packed["segments"] == 0).any() and not packed["inputs"][-1].any()
    assert_same(side(MODELS[name], packed, 1), side(MODELS[name], batch_of(False), 1))


@pytest.mark.parametrize("name", MODELS)
def test_both_frameworks_agree_on_packed_examples(name: str) -> None:
    """Loss, its parts and gradients."""
    assert_same(ours(MODELS[name], batch_of(True)), theirs(MODELS[name], batch_of(True)))


@pytest.mark.parametrize("model", [LEARNED, SUMS], ids=MODELS)
@SIDES
def test_a_packed_batch_is_its_examples_each_alone(model: ModelConfig, side: Side) -> None:
    """A batch of each example: the mean weighted by the tokens that carry loss.

    jaxlm: its row, all others zeros. torchref: in its own length, without segments, positions or padding.
    """
    data, padded = examples(), batch_of(False)
    loss, grads = 0.0, {}
    for i in range(len(data)):
        if side is ours:
            alone = {k: np.where(np.arange(ROWS)[:, None] == i, v, v * 0) for k, v in padded.items()}
        else:
            ids, carries = data.example(i)
            alone = {"inputs": ids[None, :-1], "targets": ids[None, 1:], "loss_mask": carries[None, 1:] * 1.0}
        found, share = side(model, alone, 1), float(alone["loss_mask"].sum()) / data.loss_tokens
        loss += share * found.loss
        grads = {k: grads.get(k, 0.0) + share * g for k, g in found.grads.items()}
    packed = side(model, batch_of(True), 1)
    errors = {"total": relative_error(packed.loss, loss)} | tree_errors(packed.grads, grads)
    assert_close(errors, tolerance("f64_examples"))


@pytest.mark.parametrize("model", [LEARNED, SUMS], ids=MODELS)
@SIDES
def test_accumulation_weighs_micro_batches_by_their_loss_tokens(model: ModelConfig, side: Side) -> None:
    """One micro-batch with ten times the loss tokens of another, one with none: gradients of the full batch.

    A mean of the micro-batches' means is far from them.
    """
    M, batch = 4, batch_of(False)
    batch["loss_mask"][1::M] = 0
    tokens = [batch["loss_mask"][m::M].sum() for m in range(M)]
    assert min(tokens) == 0 and sorted(tokens)[1] * 1.5 < max(tokens), tokens
    whole = side(model, batch, 1)
    assert_same(side(model, batch, M), whole)
    apart = [
        side(model, {k: v * (np.arange(ROWS) % M == m)[:, None] for k, v in batch.items()}, 1)
        for m in range(M)
    ]
    mean = {k: np.mean([part.grads[k] for part in apart], axis=0) for k in whole.grads}
    assert max(tree_errors(mean, whole.grads).values()) > 0.1


def test_the_maxtext_balance_loss_is_a_mean_over_rows() -> None:
    """It alone differs between packed and padded; all other reductions are over valid tokens."""
    for reduction, same in (("maxtext", False), ("levanter", True), ("layer_mean", True)):
        model = tiny({"balance": reduction}, n_layers=LAYERS)
        packed, padded = (theirs(model, batch_of(packing)) for packing in (True, False))
        assert relative_error(packed.parts["loss"], padded.parts["loss"]) <= tolerance("f64_examples")
        error = relative_error(packed.parts["balance"], padded.parts["balance"])
        assert error <= tolerance("f64_examples") if same else error > 1e-3


FAULTS: dict[str, Callable[[Arrays], Arrays]] = {
    "attention leaks into the examples before": lambda b: {
        **b,
        "segments": (b["segments"] > 0).astype(np.int32),
    },
    "positions do not restart": lambda b: {
        **b,
        "positions": np.tile(np.arange(T, dtype=np.int32), (len(b["inputs"]), 1)),
    },
    "prompts carry loss": lambda b: {**b, "loss_mask": (b["segments"] > 0).astype(np.float32)},
    "padding is a valid token": lambda b: {**b, "segments": np.where(b["segments"] == 0, 9, b["segments"])},
}
UNSEEN = {("padding is a valid token", "learned")}  # padding carries no loss; only routing counts it


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_packed_batch_is_seen(fault: str, name: str) -> None:
    """Each moves loss or gradients by far more than rounding; rotary positions of a row are relative anyway."""
    padded, broken = theirs(MODELS[name], batch_of(False)), FAULTS[fault](batch_of(True))
    unseen = (fault, name) in UNSEEN or (fault, MODELS[name].position) == ("positions do not restart", "rope")
    assert worst(theirs(MODELS[name], broken), padded) > 1e-3 or unseen


def test_loss_at_the_border_of_two_examples_is_seen() -> None:
    """Examples end to end, the last token of one an input: the same without loss there, others with it."""
    data = examples()
    rows = [[0], [1, 2, 3], [4, 5], [6, 7, 8], [9, 11], [10]]  # at most T + 3 tokens
    stream = {k: np.zeros((len(rows), T + 3), v.dtype) for k, v in batch_of(False).items()}
    border = np.zeros((len(rows), T + 3), bool)
    for row, members in enumerate(rows):
        ids, carries = (
            np.concatenate(parts) for parts in zip(*(data.example(i) for i in members), strict=True)
        )
        n, sizes = len(ids) - 1, [len(data.example(i)[0]) for i in members]
        stream["inputs"][row, :n], stream["targets"][row, :n] = ids[:-1], ids[1:]
        stream["loss_mask"][row, :n] = carries[1:]
        stream["segments"][row, :n] = np.repeat(np.arange(1, len(members) + 1), sizes)[:n]
        stream["positions"][row, :n] = np.concatenate([np.arange(size) for size in sizes])[:n]
        border[row, np.cumsum(sizes)[:-1] - 1] = True
    padded = theirs(LEARNED, batch_of(False))
    assert_same(theirs(LEARNED, stream | {"loss_mask": np.where(border, 0, stream["loss_mask"])}), padded)
    assert (
        worst(theirs(LEARNED, stream | {"loss_mask": np.where(border, 1, stream["loss_mask"])}), padded)
        > 1e-2
    )
