"""The loss: chunks, micro-batches, masks, and the six balance losses in closed form."""

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    T,
    V,
    assert_close,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from scipy.special import log_softmax, logsumexp
from tolerances import tolerance

from jaxlm.layers import Backends
from jaxlm.loss import chunked_token_loss, token_loss
from jaxlm.moe import balance_loss, router_z_sum
from jaxlm.train import make_gradient_fn

LOOP = Backends(experts="loop")
MODEL = {"router_z_coef": 1e-2, "pattern": (False, True)}


def head_inputs(length: int) -> tuple[np.ndarray, ...]:
    """hidden, weight, bias, targets and a ragged mask of 3 rows."""
    rng = np.random.default_rng(0)
    hidden, weight, bias = (rng.standard_normal(s) for s in ((3, length, 10), (10, V), (V,)))
    return (
        hidden,
        weight,
        bias,
        rng.integers(0, V, (3, length)),
        (rng.random((3, length)) < 0.6).astype(float),
    )


def test_token_loss_is_the_textbook_formula(x64: None) -> None:
    """-sum of masked log-probabilities and sum of masked logsumexp^2, against scipy."""
    hidden, weight, bias, targets, mask = head_inputs(7)
    logits = hidden @ weight + bias
    picked = np.take_along_axis(log_softmax(logits, -1), targets[..., None], -1)[..., 0]
    loss = token_loss(*(jnp.asarray(x) for x in (hidden, weight, bias, targets, mask)))
    assert relative_error(loss.cross_entropy, -(picked * mask).sum()) <= tolerance("f64")
    assert relative_error(loss.z, (logsumexp(logits, -1) ** 2 * mask).sum()) <= tolerance("f64")


@pytest.mark.parametrize(("length", "chunk_logits"), [(18, 3 * 6 * V), (18, 1), (T, 3 * 8 * V)])
def test_chunked_loss_equals_the_full_one(length: int, chunk_logits: int, x64: None) -> None:
    """Values and gradients, for a length that chunks divide, chunks of one token, and a prime length."""
    inputs = [jnp.asarray(x) for x in head_inputs(length)]

    def total(form):
        def run(hidden, weight, bias):
            return form(hidden, weight, bias, *inputs[3:], z_coef=0.1).loss

        return quick_jit(jax.value_and_grad(run, (0, 1, 2)))(*inputs[:3])

    full, grads = total(token_loss)
    chunked, chunked_grads = total(
        lambda *args, **options: chunked_token_loss(*args, **options, chunk_logits=chunk_logits)
    )
    assert relative_error(chunked, full) <= tolerance("f64")
    names = ("hidden", "weight", "bias")
    errors = tree_errors(dict(zip(names, chunked_grads)), dict(zip(names, grads)))
    assert_close(errors, tolerance("f64"), "gradients")


def test_chunks_bound_the_logits_in_memory() -> None:
    """No array of a chunked loss and its gradient holds all logits."""
    inputs = [jnp.asarray(x, jnp.float32) for x in head_inputs(18)]
    inputs[3] = inputs[3].astype(jnp.int32)

    def largest(chunk_logits: int) -> int:
        loss = lambda h: chunked_token_loss(h, *inputs[1:], chunk_logits=chunk_logits).loss  # noqa: E731
        shapes = [s for e in _equations(jax.make_jaxpr(jax.grad(loss))(inputs[0]).jaxpr) for s in e]
        return max(size for size in shapes if size % V == 0)

    assert largest(3 * 6 * V) <= 3 * 6 * V < largest(2**26) == 3 * 18 * V


def _equations(jaxpr: Any) -> list[list[int]]:
    """Sizes of all outputs of all equations, inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        found.append([int(np.prod(v.aval.shape)) for v in equation.outvars])
        for value in equation.params.values():
            for one in value if isinstance(value, tuple) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    found += _equations(inner)
    return found


@pytest.fixture(scope="module")
def gradients() -> Any:
    """accumulation -> compiled gradient function of one model; z-losses enter the total, the balance loss does not."""
    made: dict[int, Any] = {}

    def get(accumulation: int) -> Any:
        if accumulation not in made:
            run = tiny_run(tiny(MODEL | {"balance_coef": 0.0}), accumulation=accumulation)
            made[accumulation] = quick_jit(make_gradient_fn(run, LOOP))
        return made[accumulation]

    return get


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_equal_the_full_batch(accumulation: int, gradients: Any, x64: None) -> None:
    """Cross-entropy, z, router z and every gradient, with masks so ragged that a mean of means would be 27 % off."""
    params, batch = random_params(tiny(MODEL), init="fan_in"), hard_batch()
    batch["loss_mask"][0] = 0
    batch["loss_mask"][0, :2] = 1
    full, metrics = gradients(1)(params, batch)
    parts, part_metrics = gradients(accumulation)(params, batch)
    limit = tolerance("f64_accumulation")
    entropies = ("logit_entropy", "router_entropy")
    for name in ("loss", "z", "router_z", "total_loss", "expert_load", "dropped", *entropies):
        assert relative_error(part_metrics[name], metrics[name]) <= limit, name
    assert_close(tree_errors(parts, full), limit, "gradients")


def test_the_balance_loss_is_the_mean_over_micro_batches(gradients: Any, x64: None) -> None:
    """It is a product of means, so micro-batches do not add up to the batch: the reported value is their mean."""
    params, batch = random_params(tiny(MODEL), init="fan_in"), hard_batch()
    _, metrics = gradients(2)(params, batch)
    # Micro-batch m is rows m, m+2; rows repeated twice leave shares and probabilities as they are.
    halves = [{k: np.concatenate([v[m::2], v[m::2]]) for k, v in batch.items()} for m in (0, 1)]
    values = [float(gradients(1)(params, half)[1]["balance"]) for half in halves]
    assert relative_error(metrics["balance"], np.mean(values)) <= tolerance("f64_accumulation")
    assert abs(float(gradients(1)(params, batch)[1]["balance"]) - np.mean(values)) > 1e-6


def test_an_all_masked_batch_gives_zero(gradients: Any, x64: None) -> None:
    """No loss-carrying token: zero loss and finite gradients; no real token at all: still nothing is NaN."""
    params, batch = random_params(tiny(MODEL)), hard_batch()
    batch["loss_mask"][:] = 0
    grads, metrics = gradients(1)(params, batch)
    assert float(metrics["loss"]) == 0 and float(metrics["z"]) == 0
    assert all(np.isfinite(g).all() for g in grads.values())
    batch["segments"][:] = 0
    grads, metrics = gradients(1)(params, batch)
    assert all(float(metrics[name]) == 0 for name in ("loss", "z", "router_z", "balance", "total_loss"))
    assert all(not np.asarray(g).any() for g in grads.values())


E, L, B, S = 4, 3, 2, 8
FORMS = {
    # reduction: value at perfect balance, and with all tokens on the same A experts, for A active experts
    "mixtral": (lambda a: a, lambda a: E),
    "layer_mean": (lambda a: a, lambda a: E),
    "layer_sum": (lambda a: a * L, lambda a: E * L),
    "megatron": (lambda a: L, lambda a: E * L / a),
    "levanter": (lambda a: L / a, lambda a: E * L / a**2),
    "maxtext": (lambda a: a, lambda a: E),
    "none": (lambda a: 0, lambda a: 0),
}


def both_frameworks(
    reduction: str, logits: list[np.ndarray], ids: list[np.ndarray], valid: np.ndarray
) -> list[float]:
    """The balance loss in jaxlm and, where PyTorch is installed, in torchref."""
    values = [
        float(
            balance_loss(
                reduction, [jnp.asarray(x) for x in logits], [jnp.asarray(i) for i in ids], jnp.asarray(valid)
            )
        )
    ]
    if importlib.util.find_spec("torch"):
        torch, twin = importlib.import_module("torch"), importlib.import_module("torchref.moe")
        tensors = [[torch.from_numpy(np.array(x)) for x in xs] for xs in (logits, ids)]
        values.append(float(twin.balance_loss(reduction, *tensors, torch.from_numpy(np.array(valid)))))
    return values


@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("reduction", FORMS)
def test_balance_losses_have_their_closed_form(reduction: str, active: int, x64: None) -> None:
    """Perfect balance and collapse onto A experts; padding that would change both is masked."""
    balanced, collapsed = FORMS[reduction]
    valid = np.ones((B, S), bool)
    valid[:, -4:] = [[True] * 4, [False] * 4]
    turns = np.tile((np.arange(S)[:, None] + np.arange(active)) % E, (B, 1, 1))
    even = [np.zeros((B, S, E))] * L
    for value in both_frameworks(reduction, even, [turns] * L, valid):
        assert value == pytest.approx(balanced(active), abs=tolerance("f64"))
    same = np.broadcast_to(np.arange(active), (B, S, active)).copy()
    peaked = np.where(np.arange(E) < active, 1000.0, 0.0) * np.ones((B, S, 1))
    same[1, -4:], peaked[1, -4:] = E - 1, 0.0
    for value in both_frameworks(reduction, [peaked] * L, [same] * L, valid):
        assert value == pytest.approx(collapsed(active), abs=tolerance("f64"))


def test_balance_losses_differ_where_layers_and_sequences_do(x64: None) -> None:
    """One expert per layer looks balanced to the pooled loss, one per sequence to all but the per-sequence loss."""
    valid = np.ones((E, S), bool)

    def onto(expert: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(np.arange(E) == expert[..., None], 1000.0, 0.0), expert[..., None]

    layers = [onto(np.full((E, S), layer)) for layer in range(E)]
    sequences = [onto(np.tile(np.arange(E)[:, None], (1, S)))]
    expected = {"mixtral": (1, 1), "layer_mean": (E, 1), "maxtext": (E, E)}
    for reduction, values in expected.items():
        for case, want in zip((layers, sequences), values):
            for value in both_frameworks(reduction, [x for x, _ in case], [i for _, i in case], valid):
                assert value == pytest.approx(want, abs=tolerance("f64"))


def test_router_z_sums_squares_of_logsumexp_over_real_tokens(x64: None) -> None:
    """Uniform logits c have logsumexp c + ln E."""
    valid = np.ones((B, S), bool)
    valid[0, 0] = False
    logits = [np.full((B, S, E), c) for c in (0.0, 1.5)]
    expected = sum((c + np.log(E)) ** 2 for c in (0.0, 1.5)) * (B * S - 1)
    assert relative_error(
        router_z_sum([jnp.asarray(x) for x in logits], jnp.asarray(valid)), expected
    ) <= tolerance("f64")
