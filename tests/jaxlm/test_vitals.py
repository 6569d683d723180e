"""What a step says of itself: entropies, norms and ratios against numpy in float64, and which names there are."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit, random_params, relative_error, tiny, tiny_run
from tolerances import tolerance

from jaxlm.config import RunConfig
from jaxlm.loss import Counts, chunked_token_loss, token_loss
from jaxlm.model import abstract_model
from jaxlm.optim import GROUPS, as_arrays, group_of, scalars
from jaxlm.train import make_train_step, state_shapes
from jaxlm.vitals import expert_metrics, norms, router_entropy

B, T, D, V = 3, 11, 7, 23


def entropy_of(logits: np.ndarray) -> np.ndarray:
    """-sum p ln p over the last axis, in nats."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)


def head(scale: float = 1.0) -> dict[str, Any]:
    """Arguments of the loss, from nearly even to nearly certain logits, with weights in the mask."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(D, V)) * scale, rng.normal(size=V)
    hidden = rng.normal(size=(B, T, D)) * np.linspace(0.01, 8, T)[:, None]
    mask = rng.choice([0.0, 0.5, 1.0], (B, T))
    return {
        "hidden": jnp.asarray(hidden),
        "weight": jnp.asarray(weight),
        "bias": jnp.asarray(bias),
        "targets": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "mask": jnp.asarray(mask),
    }


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_logit_entropy_is_minus_sum_p_log_p(scale: float, x64: None) -> None:
    """Whole and in chunks that do not divide T; certain logits give zero, not NaN."""
    call = head(scale)
    logits = np.asarray(call["hidden"]) @ np.asarray(call["weight"]) + np.asarray(call["bias"])
    want = float(np.sum(entropy_of(logits) * np.asarray(call["mask"])))
    assert want < 1e-9 if scale > 1 else want > 1
    found = [token_loss(**call, entropy=True)]
    found.append(chunked_token_loss(**call, chunk_logits=4 * B * V, entropy=True))
    for tokens in found:
        # log Z - sum p x cancels where logits are large.
        assert relative_error(tokens.entropy, want, floor=np.abs(logits).max()) <= tolerance("f64")
    assert float(token_loss(**call).entropy) == 0.0


def test_entropy_changes_neither_loss_nor_gradient(x64: None) -> None:
    """It has no gradient of its own, and the terms beside it keep every bit."""
    call = head()

    def terms(weight: Any, entropy: bool) -> tuple[Any, Any]:
        given = call | {"weight": weight, "z_coef": 0.1, "entropy": entropy}
        tokens = chunked_token_loss(**given, chunk_logits=3 * B * V)
        return tokens.loss + tokens.entropy, tokens

    (_, plain), grad = jax.value_and_grad(terms, has_aux=True)(call["weight"], False)
    (_, told), same = jax.value_and_grad(terms, has_aux=True)(call["weight"], True)
    assert np.array_equal(grad, same)
    assert float(told.cross_entropy) == float(plain.cross_entropy) and float(told.z) == float(plain.z)


MOE = tiny({"pattern": (False, True, True)}, n_layers=3)


def routed() -> tuple[dict[str, jax.Array], jax.Array]:
    """Router activations of MOE, the last tokens of a row not real."""
    rng, E, A = np.random.default_rng(1), MOE.moe.n_experts, MOE.moe.n_active
    valid = np.ones((B, T), bool)
    valid[1, -4:] = False
    acts = {}
    for i in (1, 2):
        logits = rng.normal(size=(B, T, E)) * i
        logits[1, -4:] = 0  # the largest entropy there is
        acts[f"blocks.{i}.moe.router_logits"] = jnp.asarray(logits)
        acts[f"blocks.{i}.moe.expert_ids"] = jnp.asarray(np.argsort(-logits, -1)[..., :A].astype(np.int32))
        acts[f"blocks.{i}.moe.kept"] = jnp.asarray(rng.random((B, T, A)) < 0.8)
    return acts, jnp.asarray(valid)


def test_router_metrics_are_means_over_real_tokens_and_layers(x64: None) -> None:
    """Entropy, load and dropped share, counted one token at a time; a dense model has none of them."""
    acts, valid = routed()
    real = np.asarray(valid)
    counts = Counts(jnp.float64(1), jnp.float64(real.sum()), 1)
    named = {name.split(".")[1] + name.split(".")[-1]: np.asarray(x)[real] for name, x in acts.items()}
    entropy = np.mean([entropy_of(named[f"{i}router_logits"]).mean() for i in (1, 2)])
    found = router_entropy(MOE, acts, valid, counts)
    assert found.keys() == {"router_entropy"}
    assert relative_error(found["router_entropy"], entropy) <= tolerance("f64")
    assert 0 < entropy < math.log(MOE.moe.n_experts)
    found = expert_metrics(MOE, acts, valid, counts)
    load = [[np.mean(named[f"{i}expert_ids"] == e) for e in range(MOE.moe.n_experts)] for i in (1, 2)]
    assert np.allclose(found["expert_load"], load, rtol=tolerance("f64"))
    dropped = np.mean([1 - named[f"{i}kept"].mean() for i in (1, 2)])
    assert relative_error(found["dropped"], dropped) <= tolerance("f64")
    assert router_entropy(tiny(), {}, valid, counts) == {} == expert_metrics(tiny(), {}, valid, counts)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_norms_are_those_of_numpy(dtype: str, x64: None) -> None:
    """Whole and by group, sums in float32 at least; update = what the parameters moved by, ratio = moved / before."""
    config = tiny({"pattern": (False, True), "expert_bias": True}, qkv_bias=True)
    trees = [random_params(config, seed=s, init="fan_in", dtype=np.float64) for s in range(3)]
    grads, before, after = ({k: jnp.asarray(x, dtype) for k, x in tree.items()} for tree in trees)
    zero = [k for k in before if k.endswith("o_proj.bias") or k.endswith("q_proj.bias")]
    before |= {k: jnp.zeros_like(before[k]) for k in zero}
    found = quick_jit(norms)(grads, before, after)
    wide = [{k: np.asarray(x, np.float64) for k, x in tree.items()} for tree in (grads, before, after)]
    moved = {k: wide[2][k] - wide[1][k] for k in before}
    paths = {"": list(before)} | {f"/{g}": [k for k in before if group_of(k) == g] for g in GROUPS}
    names = set()
    limit = tolerance("f64" if dtype == "float64" else "f32_grad_norm")
    for suffix, chosen in paths.items():
        if not chosen:
            continue
        norm = [math.sqrt(sum(np.sum(t[k] ** 2) for k in chosen)) for t in (wide[0], wide[1], moved)]
        want: dict[str, float] = dict(zip(("grad_norm", "param_norm", "update_norm"), norm, strict=True))
        want["update_ratio"] = norm[2] / norm[1]
        if not suffix:
            del want["grad_norm"]
        for name, value in want.items():
            assert relative_error(found[name + suffix], value) <= limit, name + suffix
            names.add(name + suffix)
    assert set(found) == names and len(names) > 20


def test_parameters_that_are_all_zero_have_ratio_zero() -> None:
    """Biases begin at zero: no ratio to them, and no NaN in the log."""
    zero, one = {"final_norm.weight": jnp.zeros(3)}, {"final_norm.weight": jnp.ones(3)}
    found = norms(one, zero, one)
    assert float(found["update_ratio"]) == float(found["update_ratio/norm"]) == 0
    assert float(found["update_norm/norm"]) == pytest.approx(math.sqrt(3))


ALWAYS = {"loss", "z", "balance", "router_z", "total_loss", "grad_norm", "clip_scale", "lr"} | {
    "skipped",
    "skips",
    "skips_in_a_row",
}
DETAILS = {"param_norm", "update_norm", "update_ratio", "logit_entropy"}


def names_of(run: RunConfig) -> set[str]:
    """The metrics of a step, without compiling it."""
    tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens, "loss_mask": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    numbers = as_arrays(scalars(run.optim, 0), np.float32)
    return set(jax.eval_shape(make_train_step(run), state_shapes(run), batch, numbers)[1])


def test_a_step_says_what_is_documented_and_no_more() -> None:
    """Names with and without experts, details and float16."""
    dense = tiny_run(tiny(n_layers=1), dtype="float32", param_dtype="float32", seq_len=8)
    quiet = dataclasses.replace(dense, log=dataclasses.replace(dense.log, details=False))
    assert names_of(quiet) == ALWAYS
    groups = {group_of(path) for path in abstract_model(dense.model).shapes}
    by_group = {
        f"{name}/{group}"
        for group in groups
        for name in ("grad_norm", "param_norm", "update_norm", "update_ratio")
    }
    assert groups == {"embed", "attention", "mlp", "norm", "head"}
    assert names_of(dense) == ALWAYS | DETAILS | by_group
    half = dataclasses.replace(quiet, train=dataclasses.replace(quiet.train, dtype="float16"))
    assert names_of(half) == ALWAYS | {"loss_scale"}
    moe = tiny_run(tiny({}, n_layers=1), dtype="float32", param_dtype="float32", seq_len=8)
    more = names_of(moe) - names_of(dense)
    assert {name for name in more if "/" not in name} == {"expert_load", "dropped", "router_entropy"}
    assert {name.partition("/")[2] for name in more if "/" in name} == {"experts", "router"}
