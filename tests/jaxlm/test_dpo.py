"""Preferences in jaxlm: log-probabilities in chunks, the losses in closed form, references, micro-batches, meshes."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Arrays,
    T,
    V,
    assert_close,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tree_errors,
)
from pair_batches import PAIRS, dpo_run, filled_up, hard_pairs
from scipy.special import log_softmax
from tolerances import tolerance

from jaxlm.config import MeshConfig, ModelConfig
from jaxlm.finetune.dpo import answer_log_probs, dpo_task, preference_loss, reference_log_probs
from jaxlm.finetune.lora import freeze
from jaxlm.layers import Backends
from jaxlm.model import abstract_model, merge_model
from jaxlm.sharding import make_mesh
from jaxlm.train import frozen_shardings, make_gradient_fn, place_batch, state_shardings
from jaxlm.tune_config import DpoConfig, TuneRun

LOOP = Backends(experts="loop")
# The balance loss, which micro-batches do not add up to, is not in the total.
MODEL = tiny({"router_z_coef": 1e-2, "balance_coef": 0.0}, n_layers=1, n_heads=4, head_bias=True)
DENSE = tiny(n_layers=1)


def head_inputs(length: int) -> tuple[np.ndarray, ...]:
    """hidden, weight, bias, targets and a ragged mask of 4 rows, and a weight of each row's sum."""
    rng = np.random.default_rng(0)
    hidden, weight, bias, share = (rng.standard_normal(s) for s in ((4, length, 10), (10, V), (V,), (4,)))
    targets, mask = rng.integers(0, V, (4, length)), (rng.random((4, length)) < 0.6).astype(float)
    return hidden, weight, bias, targets, mask, share


@pytest.mark.parametrize(
    ("chunk_logits", "mesh"), [(None, ""), (7 * V, ""), (1, ""), (7 * V, "fsdp=4,tensor=2")]
)
def test_answers_are_summed_log_softmax_whatever_the_chunks(
    chunk_logits: int | None, mesh: str, x64: None
) -> None:
    """Values against scipy, gradients against autodiff of all logits, each row with a weight of its own."""
    *inputs, share = map(jnp.asarray, head_inputs(T))
    hidden, weight, bias, targets, mask = map(np.asarray, inputs)
    picked = np.take_along_axis(log_softmax(hidden @ weight + bias, -1), targets[..., None], -1)[..., 0]

    def readable(hidden, weight, bias):
        logits = jax.nn.log_softmax(hidden @ weight + bias)
        found = jnp.take_along_axis(logits, inputs[3][..., None], -1)[..., 0]
        return jnp.sum(share * jnp.sum(found * inputs[4], 1))

    def ours(hidden, weight, bias):
        sums = answer_log_probs(hidden, weight, bias, *inputs[3:], chunk_logits=chunk_logits)
        return jnp.sum(share * sums), sums

    wanted = quick_jit(jax.grad(readable, (0, 1, 2)))(*inputs[:3])
    run = quick_jit(jax.grad(ours, (0, 1, 2), has_aux=True))
    if mesh:
        with jax.set_mesh(make_mesh(MeshConfig.parse(mesh))):
            grads, sums = run(*inputs[:3])
    else:
        grads, sums = run(*inputs[:3])
    assert relative_error(sums, (picked * mask).sum(1)) <= tolerance("f64")
    names = ("hidden", "weight", "bias")
    assert_close(
        tree_errors(dict(zip(names, grads)), dict(zip(names, wanted))), tolerance("f64"), "gradients"
    )


def test_log_probabilities_of_half_precision_are_upcast() -> None:
    """Sums of bfloat16 hidden states are float32, their gradient bfloat16."""
    hidden, weight, bias, targets, mask, _ = head_inputs(T)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, weight, bias)]
    rest = (jnp.asarray(targets, jnp.int32), jnp.asarray(mask, jnp.float32))
    total = lambda x: jnp.sum(answer_log_probs(x, *half[1:], *rest))  # noqa: E731
    value, grad = jax.eval_shape(jax.value_and_grad(total), half[0])
    assert (value.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)


def test_chunks_bound_the_logits_in_memory() -> None:
    """No array of the log-probabilities and their gradient holds all logits, in the backward pass neither."""
    *inputs, _ = (jnp.asarray(x, jnp.float32) for x in head_inputs(18))
    inputs[3] = inputs[3].astype(jnp.int32)

    def temporary(chunk_logits: int | None) -> int:
        def loss(hidden):
            return jnp.sum(answer_log_probs(hidden, *inputs[1:], chunk_logits=chunk_logits) ** 2)

        return quick_jit(jax.grad(loss)).lower(inputs[0]).compile().memory_analysis().temp_size_in_bytes

    everything = 4 * 18 * V * 4
    assert temporary(6 * V) < everything < temporary(None)


def closed_form(
    config: DpoConfig, policy: np.ndarray, reference: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """The losses of single pairs, written out."""
    found = []
    for (c, r), (c0, r0), (n, m) in zip(policy, reference, lengths):
        if config.loss == "ipo":
            found.append(((c - c0) / n - (r - r0) / m - 1 / (2 * config.beta)) ** 2)
            continue
        x, s = config.beta * ((c - c0) - (r - r0)), config.label_smoothing
        better, worse = (max(-y, 0) + math.log1p(math.exp(-abs(y))) for y in (x, -x))  # -log sigmoid(+-x)
        found.append((1 - s) * better + s * worse)
    return np.array(found)


CONFIGS = {
    "sigmoid": DpoConfig(beta=0.3),
    "label_smoothing": DpoConfig(beta=0.3, label_smoothing=0.2),
    "ipo": DpoConfig(beta=0.3, loss="ipo"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_losses_are_their_formulas(name: str, spread: float, x64: None) -> None:
    """Values, finite gradients and rewards, of margins so large that an exponential overflows."""
    rng, config = np.random.default_rng(2), CONFIGS[name]
    policy, reference = spread * rng.standard_normal((2, 9, 2))
    lengths = rng.integers(1, 30, (9, 2)).astype(float)
    loss, rewards = preference_loss(config, *map(jnp.asarray, (policy, reference, lengths)))
    assert relative_error(loss, closed_form(config, policy, reference, lengths)) <= tolerance("f64")
    assert relative_error(rewards, 0.3 * (policy - reference)) <= tolerance("f64")
    grad = jax.grad(
        lambda p: preference_loss(config, p, jnp.asarray(reference), jnp.asarray(lengths))[0].sum()
    )
    assert np.isfinite(grad(jnp.asarray(policy))).all()


def test_label_smoothing_is_content_at_its_own_certainty(x64: None) -> None:
    """The gradient is zero where sigmoid(margin) = 1 - s, which is what makes it conservative."""
    config = CONFIGS["label_smoothing"]
    margin = math.log((1 - config.label_smoothing) / config.label_smoothing) / config.beta
    policy, zeros = jnp.array([[margin, 0.0]]), jnp.zeros((1, 2))
    slope = jax.grad(lambda p: preference_loss(config, p, zeros, zeros)[0].sum())(policy)
    assert float(jnp.abs(slope).max()) <= tolerance("f64")


def parts(run: TuneRun, seed: int = 3) -> tuple[Arrays, Arrays]:
    """What a run trains and what it keeps frozen: another model than the policy where that may be."""
    base = random_params(run.model, init="fan_in")
    if run.tune.adapter is None:
        frozen = random_params(run.model, seed, "fan_in") if run.tune.reference == "frozen" else {}
        return base, frozen
    rng = np.random.default_rng(seed)
    shapes = dpo_task(run, LOOP).shapes
    return {path: 0.2 * rng.standard_normal(s.shape) for path, s in shapes.items()}, freeze(run, base)


def on_device(params: Arrays) -> dict[str, Any]:
    """The same parameters as jax has them."""
    return {path: jnp.asarray(p) for path, p in params.items()}


@functools.cache
def gradient_fn(run: TuneRun) -> Any:
    """Compiled: (params, batch, key, loss_scale, frozen) -> gradients and metrics."""
    return quick_jit(make_gradient_fn(run, LOOP, dpo_task(run, LOOP)))


def gradients(run: TuneRun, batch: Arrays, params: Arrays, frozen: Arrays) -> tuple[Any, Any]:
    """Of a batch, with made-up references where the run wants them stored."""
    if run.tune.reference == "stored" and "reference" not in batch:
        rng = np.random.default_rng(4)
        batch = batch | {"reference": -20 - rng.random((len(batch["inputs"]), 2))}
    return gradient_fn(run)(params, batch, None, None, frozen)


@pytest.mark.parametrize(("model", "reference"), [(DENSE, "adapter_off"), (MODEL, "frozen")])
def test_a_policy_that_is_its_reference_loses_ln_2(model: ModelConfig, reference: str, x64: None) -> None:
    """Before the first step: margins and rewards are zero, and there is something to learn."""
    run = dpo_run(model, reference)
    base, batch = on_device(random_params(model, init="fan_in")), hard_pairs()
    task = dpo_task(run, LOOP)
    if run.tune.adapter is not None:
        params, frozen = quick_jit(task.fresh)(), freeze(run, base)
    else:
        params, frozen = base, base
    grads, metrics = gradients(run, batch, params, frozen)
    assert relative_error(metrics["loss"], math.log(2)) <= tolerance("f64")
    for name in ("chosen", "rejected", "margin"):
        assert abs(float(metrics[f"rewards/{name}"])) <= tolerance("f64_score")
    assert max(float(jnp.abs(g).max()) for g in grads.values()) > 1e-4


def test_a_quantised_base_is_its_own_reference() -> None:
    """QLoRA: nf4 codes are what the adapter is switched off to; evaluation in float32."""
    run = dpo_run(DENSE, "adapter_off", dtype="float32", param_dtype="float32")
    run = dataclasses.replace(run, tune=dataclasses.replace(run.tune, quant="nf4"))
    task, batch = (
        dpo_task(run),
        {k: x.astype(np.float32 if k == "loss_mask" else np.int32) for k, x in hard_pairs().items()},
    )
    frozen = freeze(run, random_params(DENSE, init="fan_in", dtype=np.float32))
    assert "blocks.0.attn.q_proj.weight.codes" in frozen
    sums = quick_jit(task.evaluate)(quick_jit(task.fresh)(), frozen, batch)
    assert float(sums["tokens"]) == PAIRS
    assert relative_error(sums["loss_sum"], PAIRS * math.log(2)) <= tolerance("f32_loss")
    stored = reference_log_probs(run, frozen, [batch])
    assert relative_error(stored.sum(0), [sums["logps/chosen"], sums["logps/rejected"]]) <= tolerance(
        "f32_loss"
    )


def test_every_reference_gives_the_same_loss_and_gradients(x64: None) -> None:
    """Of full training: frozen weights and what they say, computed once; it carries no gradient."""
    frozen_run, stored_run = dpo_run(MODEL, "frozen"), dpo_run(MODEL, "stored")
    (params, frozen), batch = parts(frozen_run), hard_pairs()
    grads, metrics = gradients(frozen_run, batch, params, frozen)
    stored = reference_log_probs(stored_run, on_device(frozen), [batch], LOOP)
    same, same_metrics = gradients(stored_run, batch | {"reference": stored}, params, {})
    assert_close(
        {k: relative_error(same_metrics[k], metrics[k]) for k in metrics}, tolerance("f64"), "metrics"
    )
    assert_close(tree_errors(same, grads), tolerance("f64_state"), "gradients")


def test_an_adapter_switched_off_is_its_base(x64: None) -> None:
    """The adapter's rewards are those of the merged model against the base, computed as full training does."""
    run = dpo_run(MODEL, "adapter_off")
    (factors, frozen), batch = parts(run), hard_pairs()
    adapter = run.tune.adapter
    assert adapter is not None
    merged = dict(frozen)
    for path in {name.rpartition(".")[0] for name in factors}:
        delta = factors[f"{path}.lora_a"] @ factors[f"{path}.lora_b"]
        merged[path] = np.asarray(frozen[path]) + adapter.scale(path) * delta
    _, metrics = gradients(run, batch, factors, frozen)
    _, wanted = gradients(dpo_run(MODEL, "frozen"), batch, merged, frozen)
    assert_close(
        {k: relative_error(metrics[k], wanted[k]) for k in wanted}, tolerance("f64_score"), "metrics"
    )


@pytest.mark.parametrize("dpo", [{"label_smoothing": 0.1}, {"loss": "ipo"}], ids=["sigmoid", "ipo"])
def test_gradients_are_those_of_finite_differences(dpo: dict[str, Any], x64: None) -> None:
    """Along a direction of all weights, of a dense model."""
    run = dpo_run(DENSE, "stored", dpo)
    (params, _), batch = parts(run), hard_pairs()
    rng, step = np.random.default_rng(5), 1e-5
    way = {k: rng.standard_normal(p.shape) / math.sqrt(p.size) for k, p in params.items()}
    grads, _ = gradients(run, batch, params, {})
    slope = sum(float(np.sum(np.asarray(grads[k]) * way[k])) for k in way)
    ahead, behind = (
        float(gradients(run, batch, {k: p + sign * way[k] for k, p in params.items()}, {})[1]["total_loss"])
        for sign in (step, -step)
    )
    assert relative_error(slope, (ahead - behind) / (2 * step)) <= tolerance("f64_differences")


def test_micro_batches_equal_the_full_batch(x64: None) -> None:
    """All metrics and gradients; an empty pair makes micro-batches unequal, so that a mean of means would be wrong."""
    run, batch = dpo_run(MODEL, "adapter_off"), filled_up(hard_pairs(3), 1)
    params, frozen = parts(run)
    full, metrics = gradients(run, batch, params, frozen)
    several, several_metrics = gradients(dpo_run(MODEL, "adapter_off", accumulation=2), batch, params, frozen)
    limit = tolerance("f64_accumulation")
    errors = {k: relative_error(several_metrics[k], metrics[k]) for k in metrics if k != "balance"}
    assert len(errors) >= 10
    assert_close(errors, limit, "metrics")
    assert_close(tree_errors(several, full), limit, "gradients")


def test_what_fills_a_batch_up_counts_nothing(x64: None) -> None:
    """Empty pairs and longer padding change no metric and no gradient; evaluation sums the pairs that are there."""
    run = dpo_run(MODEL, "stored")
    (params, _), batch = parts(run), hard_pairs() | {"reference": np.full((PAIRS, 2), -30.0)}
    grads, metrics = gradients(run, batch, params, {})
    longer = {
        k: x if k == "reference" else np.pad(x, ((0, 0), (0, 0), (0, 3)))
        for k, x in filled_up(batch, 2).items()
    }
    same, same_metrics = gradients(run, longer, params, {})
    limit = tolerance("f64_accumulation")
    assert_close({k: relative_error(same_metrics[k], metrics[k]) for k in metrics}, limit, "metrics")
    assert_close(tree_errors(same, grads), limit, "gradients")
    sums = quick_jit(dpo_task(run, LOOP).evaluate)(params, {}, longer)
    assert float(sums["tokens"]) == PAIRS
    assert relative_error(sums["loss_sum"], PAIRS * metrics["loss"]) <= limit
    names = [name for name in metrics if name.startswith(("rewards/", "logps/"))]
    assert len(names) == 6
    assert_close({k: relative_error(sums[k], PAIRS * metrics[k]) for k in names}, limit, "sums")


def test_rewards_and_log_probabilities_are_means_over_pairs(x64: None) -> None:
    """Of references that differ from the policy by known amounts."""
    run = dpo_run(DENSE, "stored", {"label_smoothing": 0.1})  # of which they know nothing
    (params, _), batch = parts(run), hard_pairs()
    mine = reference_log_probs(run, on_device(params), [batch], LOOP)
    batch["reference"] = mine - np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 0.0], [2.0, -2.0]])
    _, metrics = gradients(run, batch, params, {})
    wanted = {"chosen": 1.5, "rejected": 0.25, "margin": 1.25}
    for name, value in wanted.items():
        assert relative_error(metrics[f"rewards/{name}"], run.tune.dpo.beta * value) <= tolerance("f64_score")
    assert float(metrics["rewards/accuracy"]) == 0.5  # a tie is no success
    for j, name in enumerate(("chosen", "rejected")):
        assert relative_error(metrics[f"logps/{name}"], mine[:, j].mean()) <= tolerance("f64")


@pytest.mark.parametrize("mesh", ["", "fsdp=2,tensor=2"])
def test_stored_references_come_in_order_and_without_what_fills_up(mesh: str, x64: None) -> None:
    """Batches of several sizes, the last one filled up: the summed log-probabilities of the decoder's own logits."""
    run = dpo_run(DENSE, "stored", mesh=MeshConfig.parse(mesh))
    base, batch = random_params(DENSE, init="fan_in"), hard_pairs(6)
    devices = make_mesh(run.mesh) if mesh else None
    layout = None if devices is None else state_shardings(run, devices, dpo_task(run)).params
    seen: list[int] = []
    halves = [{k: x[:4] for k, x in batch.items()}, filled_up({k: x[4:] for k, x in batch.items()}, 2)]
    values = reference_log_probs(
        run, jax.device_put(base, layout), halves, mesh=devices, progress=seen.append
    )
    assert (values.shape, values.dtype, seen) == ((6, 2), np.float64, [4, 6])
    rows = {k: x.reshape(-1, T) for k, x in batch.items()}
    decoder = merge_model(abstract_model(DENSE).graphdef, on_device(base))
    logits = quick_jit(lambda ids, segments: decoder(ids, None, segments)[0])(
        rows["inputs"], rows["segments"]
    )
    picked = np.take_along_axis(log_softmax(np.asarray(logits), -1), rows["targets"][..., None], -1)[..., 0]
    wanted = (picked * rows["loss_mask"]).sum(1).reshape(6, 2)
    assert relative_error(values, wanted) <= tolerance("f64_mesh")


MESHES = {"fsdp=2,tensor=2,expert=2": "adapter_off", "data=2,fsdp=2,tensor=2": "frozen"}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(mesh: str, x64: None) -> None:
    """Both rows of a pair stay on the device of the pair; the sequence is split where the vocabulary would be."""
    reference = MESHES[mesh]
    batch, run = hard_pairs(), dpo_run(MODEL, reference)
    params, frozen = parts(run)
    wanted, metrics = gradients(run, batch, params, frozen)
    run = dpo_run(MODEL, reference, mesh=MeshConfig.parse(mesh))
    task, devices = dpo_task(run, LOOP), make_mesh(run.mesh)
    layout = state_shardings(run, devices, task).params
    with jax.set_mesh(devices):
        placed = jax.device_put(params, layout)
        kept = jax.device_put(dict(frozen), frozen_shardings(devices, task))
        function = quick_jit(make_gradient_fn(run, LOOP, task), out_shardings=(layout, None))
        grads, found = function(placed, place_batch(batch, devices), None, None, kept)
    limit = tolerance("f64_mesh")
    assert_close({k: relative_error(found[k], metrics[k]) for k in metrics}, limit, "metrics")
    assert_close(tree_errors(grads, wanted), limit, "gradients")
