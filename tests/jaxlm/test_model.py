"""The decoder itself: every option matters, attention sees what it may, memory and time are not wasted."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    T,
    assert_close,
    float64,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
)
from scipy import stats
from tolerances import tolerance

from jaxlm.attention import Visibility, allowed, fast_attention, readable_attention
from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.layers import MLP, Backends, Embed, apply_rope, dropout
from jaxlm.loss import Counts, token_loss, total_loss
from jaxlm.model import abstract_model, init_params, merge_model
from jaxlm.moe import MoE, within_capacity
from jaxlm.presets import PRESETS

LOOP = Backends(experts="loop")


class Change(NamedTuple):
    """A config, one field of it changed, and what must differ: parameter shapes, logits, loss or initial values."""

    base: ModelConfig
    value: Any
    effect: str


def one(moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return tiny(moe, **({"n_layers": 1} | changes))


LINEAR = one(head_dim=16, rope_scaling=RopeScaling("linear", 2.0, 64))
LLAMA3 = one(head_dim=16, rope_scaling=RopeScaling("llama3", 8.0, 64))
YARN = one(head_dim=16, rope_scaling=RopeScaling("yarn", 4.0, 64, beta_fast=8.0, beta_slow=0.5))
CHANGES: dict[str, Change] = {
    "vocab_size": Change(one(), 62, "shapes"),
    "d_model": Change(one(), 26, "shapes"),
    "n_layers": Change(one(), 2, "shapes"),
    "n_heads": Change(one(), 8, "shapes"),
    "n_kv_heads": Change(one(), 3, "shapes"),
    "head_dim": Change(one(), 8, "shapes"),
    "d_ff": Change(one(), 44, "shapes"),
    "context": Change(one(position="learned"), 40, "shapes"),
    "rope_theta": Change(one(), 1e4, "logits"),
    "norm_eps": Change(one(), 1e-2, "logits"),
    "position": Change(one(), "learned", "shapes"),
    "rope_scaling.kind": Change(LINEAR, "yarn", "logits"),
    "rope_scaling.factor": Change(LINEAR, 3.0, "logits"),
    "rope_scaling.original_context": Change(YARN, 1024, "logits"),
    "rope_scaling.low_freq_factor": Change(LLAMA3, 2.0, "logits"),
    "rope_scaling.high_freq_factor": Change(LLAMA3, 8.0, "logits"),
    "rope_scaling.beta_fast": Change(YARN, 0.6, "logits"),
    "rope_scaling.beta_slow": Change(YARN, 0.01, "logits"),
    "rope_scaling.attention_factor": Change(YARN, 1.5, "logits"),
    "mlp": Change(one(mlp="gelu_erf"), "gelu_tanh", "logits"),
    "qkv_bias": Change(one(), True, "shapes"),
    "attn_out_bias": Change(one(), True, "shapes"),
    "mlp_bias": Change(one(), True, "shapes"),
    "head_bias": Change(one(), True, "shapes"),
    "attn_bias_table": Change(one(), True, "shapes"),
    "qk_norm": Change(one(), True, "shapes"),
    "tied": Change(one(), True, "shapes"),
    "windows": Change(one(), (3,), "logits"),
    "dropout": Change(one(), 0.5, "logits"),
    "init": Change(one(), "fan_in", "init"),
    "init_std": Change(one(), 0.1, "init"),
    "moe.n_experts": Change(one({}), 5, "shapes"),
    "moe.n_active": Change(one({}), 3, "logits"),
    "moe.d_ff": Change(one({}), 24, "shapes"),
    "moe.pattern": Change(one({}), (False, True), "shapes"),
    "moe.renormalize": Change(one({}), False, "logits"),
    "moe.capacity_factor": Change(one({}), 0.5, "logits"),
    "moe.balance": Change(one({}), "levanter", "loss"),
    "moe.balance_coef": Change(one({}), 0.5, "loss"),
    "moe.router_z_coef": Change(one({}), 0.5, "loss"),
    "moe.expert_bias": Change(one({}), True, "shapes"),
    "moe.shared_d_ff": Change(one({}), 12, "shapes"),
    "moe.shared_gate": Change(one({"shared_d_ff": 12}), True, "shapes"),
}


def paths(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields, nested dataclasses included."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        found += paths(value, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return found


def with_change(config: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return dataclasses.replace(
        config, **{name: with_change(getattr(config, name), rest, value) if rest else value}
    )


def observe(config: ModelConfig, params: Any, effect: str) -> np.ndarray:
    """Logits or loss of one training-mode forward pass, dropout drawn from one key; or all initial values."""
    if effect == "init":
        values = init_params(config, 0)
        return np.concatenate([np.ravel(values[k]) for k in sorted(values)])
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, config.vocab_size, (2, 9)), jnp.int32)
    model = merge_model(abstract_model(config, LOOP).graphdef, params)
    logits, acts, _ = model(ids, train=True, key=jax.random.key(0))
    if effect == "logits":
        return np.asarray(logits)
    tokens = token_loss(acts["final_norm"], *model.head(), ids, jnp.ones(ids.shape))
    valid = jnp.ones(ids.shape, bool)
    return np.asarray(
        total_loss(config, tokens, acts, valid, Counts(jnp.float32(18), jnp.float32(18), 1)).total
    )


def test_every_field_has_a_perturbation() -> None:
    """A new field of the config needs a line here that shows what it does."""
    assert sorted(paths(tiny({}))) == sorted(CHANGES)


@pytest.mark.parametrize("path", CHANGES)
def test_changing_a_field_changes_the_model(path: str) -> None:
    """No option is read and dropped: the change shows in parameter shapes, logits, loss or initial values."""
    base, value, effect = CHANGES[path]
    other = with_change(base, path, value)
    shapes = [{k: s.shape for k, s in abstract_model(config).shapes.items()} for config in (base, other)]
    if effect == "shapes":
        assert shapes[0] != shapes[1]
        return
    assert shapes[0] == shapes[1]
    params = {k: jnp.asarray(v) for k, v in random_params(base, init="fan_in", dtype=np.float32).items()}
    before, after = (observe(config, params, effect) for config in (base, other))
    assert np.isfinite(after).all()
    assert np.abs(before - after).max() > 1e-4, f"{path}={value} changed nothing"


def attention_inputs(seed: int = 0) -> tuple[Any, ...]:
    """q, k, v, a score bias and hard_batch's segments, in float64; 6 query heads over 2 kv heads."""
    rng, segments = np.random.default_rng(seed), hard_batch()["segments"]
    B, N, K, H = len(segments), 6, 2, 6
    q, k, v = (rng.standard_normal((B, T, heads, H)) for heads in (N, K, K))
    return q, k, v, rng.standard_normal((N, T, T)), segments


def brute_force_mask(segments: np.ndarray, window: int) -> np.ndarray:
    """Query i may see key j: not later, within the window, same document, not padding."""
    B, length = segments.shape
    mask = np.zeros((B, length, length), bool)
    for b in range(B):
        for i in range(length):
            for j in range(max(0, i - window + 1 if window else 0), i + 1):
                mask[b, i, j] = segments[b, i] == segments[b, j] > 0
    return mask


@pytest.mark.parametrize("window", [0, 1, 2, T - 1, T, T + 1])
def test_the_mask_is_causal_windowed_and_segmented(window: int) -> None:
    """A window of W includes the query's own position; W >= T is full attention."""
    segments, index = jnp.asarray(hard_batch()["segments"]), jnp.arange(T)
    mask = allowed(Visibility(index, index, segments, segments), window)
    np.testing.assert_array_equal(mask, brute_force_mask(np.asarray(segments), window))
    unsegmented = allowed(Visibility(index, index, None, None), window)
    np.testing.assert_array_equal(unsegmented, brute_force_mask(np.ones((1, T), int), window))


@quick_jit
def both_forms(q, k, v, bias, mask):
    """Outputs and gradients of a random projection of the readable and the fast form."""
    direction = jnp.cos(jnp.arange(q.size, dtype=q.dtype)).reshape(q.shape)

    def run(form):
        def loss(q, k, v, bias):
            out, _ = form(q, k, v, mask, bias, 0.0, None)
            return jnp.sum(out * direction), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)
        return dict(zip(("out", "q", "k", "v", "bias"), (out, *grads), strict=True))

    return run(readable_attention), run(fast_attention)


@pytest.mark.parametrize("window", [0, 1, 5])
def test_readable_and_fast_attention_are_equal(window: int, x64: None) -> None:
    """Outputs and all gradients in float64; rows that may see nothing are zero and their gradients finite."""
    q, k, v, bias, segments = attention_inputs()
    readable, fast = both_forms(q, k, v, bias, brute_force_mask(segments, window))
    floor = max(float(np.linalg.norm(x)) for x in readable.values())
    assert_close({n: relative_error(fast[n], readable[n], 1e-3 * floor) for n in fast}, tolerance("f64"))
    padding = segments == 0
    assert padding.any()
    assert not np.asarray(fast["out"])[padding].any() and not np.asarray(fast["q"])[padding].any()
    assert not np.asarray(fast["v"])[padding].any(), "padding was attended to"
    assert all(np.isfinite(x).all() for x in fast.values())


def test_gradients_reach_exactly_the_visible_keys(x64: None) -> None:
    """d out[i] / d v[j] is non-zero if and only if query i may see key j."""
    *arrays, _, segments = attention_inputs()
    q, k, v = (jnp.asarray(x) for x in arrays)

    @quick_jit
    def reach(mask):
        """|d out[b, i] / d v[c, j]|, as [b, c, i, j]."""
        jacobian = jax.jacrev(lambda v: fast_attention(q, k, v, mask, None, 0.0, None)[0].sum((2, 3)))(v)
        return jnp.moveaxis(jnp.abs(jacobian).sum((-1, -2)), 2, 1)

    for window in (0, 1, 2, 5):
        mask = brute_force_mask(segments, window)
        support = np.asarray(reach(mask))
        for b, c in np.ndindex(support.shape[:2]):
            np.testing.assert_array_equal(support[b, c] > 0, mask[b] if b == c else np.zeros_like(mask[b]))


@pytest.fixture(scope="module")
def forward() -> Any:
    """(config, params, jitted logits) of a float64 model with a MoE and a dense layer; shared, since it compiles."""
    config = tiny({"pattern": (True, False)}, windows=(0, 7))
    graphdef = abstract_model(config, LOOP).graphdef
    return random_params(config, init="fan_in"), quick_jit(
        lambda p, *args: merge_model(graphdef, p)(*args)[0]
    )


def test_a_later_token_changes_no_earlier_logit(forward: Any, x64: None) -> None:
    """Causality of the whole model: everything before the changed token is equal, everything after may differ."""
    params, logits = forward
    batch = hard_batch()
    ids, segments, positions = (
        batch["inputs"][:3],
        np.ones((3, T), np.int32),
        np.tile(np.arange(T, dtype=np.int32), (3, 1)),
    )
    changed = ids.copy()
    at = 11
    changed[:, at] = (ids[:, at] + 1) % 61
    a, b = (np.asarray(logits(params, x, positions, segments)) for x in (ids, changed))
    assert relative_error(b[:, :at], a[:, :at]) <= tolerance("f64")
    assert all(np.abs(a[:, t] - b[:, t]).max() > 1e-6 for t in range(at, T))


def test_packed_documents_equal_separate_rows(forward: Any, x64: None) -> None:
    """Documents in one row compute what each computes alone in a padded row of its own."""
    params, logits = forward
    batch = hard_batch()
    ids, segments, positions = (batch[k][2] for k in ("inputs", "segments", "positions"))
    alone = {k: np.zeros((3, T), np.int32) for k in ("ids", "segments", "positions")}
    for document in (1, 2, 3):
        where, row = segments == document, document - 1
        alone["ids"][row, : where.sum()] = ids[where]
        alone["positions"][row, : where.sum()] = positions[where]
        alone["segments"][row, : where.sum()] = 1
    packed = np.asarray(logits(params, *(np.tile(x, (3, 1)) for x in (ids, positions, segments))))[0]
    separate = np.asarray(logits(params, alone["ids"], alone["positions"], alone["segments"]))
    for document in (1, 2, 3):
        where = segments == document
        assert relative_error(packed[where], separate[document - 1, : where.sum()]) <= tolerance("f64")


def without_activations(config: ModelConfig, model: Any, ids: Any, positions: Any) -> Any:
    """The decoder's arithmetic written down once more, keeping nothing but the residual stream."""
    x = model.embed(ids)
    rope = model._rope(positions, x.dtype)
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)
    visibility = Visibility(index, index, None, None)
    for block in model.blocks:
        attn, h = block.attn, block.attn_norm(x)
        q, k, v = (
            p(h).reshape(*ids.shape, -1, config.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        heads, _ = attn.attend(apply_rope(q, *rope), apply_rope(k, *rope), v, visibility, cached=False)
        x = x + attn.o_proj(heads.reshape(*ids.shape, -1))
        x = x + block.mlp(block.mlp_norm(x))
    return model.final_norm(x) @ model.head()[0]


def test_unused_activations_cost_nothing() -> None:
    """A compiled gradient that drops the activations does the work and takes the memory of one that never had them."""
    config, ids = tiny(), jnp.asarray(hard_batch()["inputs"])
    graphdef, positions = abstract_model(config).graphdef, jnp.arange(T, dtype=jnp.int32)[None]
    params = random_params(config, dtype=np.float32)

    def cost(forward) -> tuple[float, float, int]:
        compiled = (
            jax.jit(jax.grad(lambda p: jnp.sum(forward(merge_model(graphdef, p)) ** 2)))
            .lower(params)
            .compile()
        )
        analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
        return analysis["flops"], analysis["bytes accessed"], memory.temp_size_in_bytes

    dropped = cost(lambda model: model(ids, positions)[0])
    never = cost(lambda model: without_activations(config, model, ids, positions))
    used = cost(
        lambda model: model(ids, positions)[0] + sum(a.mean() for a in model(ids, positions)[1].values())
    )
    assert dropped == never
    assert used[0] > never[0], "the measure does not see activations that are used"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_modules_have_as_many_parameters_as_the_preset_says(preset: str) -> None:
    """Counted on the real module tree with one and two blocks; all blocks of a preset are alike."""
    config = PRESETS[preset].config.model
    assert len(config.moe.pattern) == 1, "blocks differ: count them all"
    counts = [
        sum(
            math.prod(s.shape)
            for s in abstract_model(dataclasses.replace(config, n_layers=n)).shapes.values()
        )
        for n in (1, 2)
    ]
    assert counts[0] + (config.n_layers - 1) * (counts[1] - counts[0]) == PRESETS[preset].params


def test_a_frequent_tokens_embedding_gets_the_whole_sum_in_half_precision() -> None:
    """1,000 times one: in bfloat16 a running sum stands still at 256."""
    table = Embed(4, 2, std=1.0, axes=(None, None), rngs=nnx.Rngs(params=0), dtype=jnp.bfloat16)
    graph, weights = nnx.split(table)
    ids = jnp.full((1, 1000), 3)
    grads = jax.grad(lambda weights: nnx.merge(graph, weights)(ids).astype(jnp.float32).sum())(weights)
    np.testing.assert_array_equal(grads.weight[...], [[0, 0], [0, 0], [0, 0], [1000, 1000]])


def test_dropout_keeps_the_stated_share_and_scales_it() -> None:
    """Kept entries are x/(1-rate), their share is 1-rate; keys decide; no key or no rate changes nothing."""
    x, rate, n = jnp.full((400, 250), 3.0), 0.3, 100_000
    out = np.asarray(dropout(x, rate, jax.random.key(1)))
    kept = out != 0
    np.testing.assert_allclose(out[kept], np.float32(3 / 0.7), rtol=1e-6)
    assert abs(kept.mean() - 0.7) < tolerance("sigmas") * math.sqrt(rate * (1 - rate) / n)
    columns = stats.chisquare(kept.sum(0), np.full(250, kept.sum() / 250))
    assert columns.pvalue > tolerance("p_value"), "dropped entries cluster"
    np.testing.assert_array_equal(out, dropout(x, rate, jax.random.key(1)))
    assert (out != np.asarray(dropout(x, rate, jax.random.key(2)))).any()
    np.testing.assert_array_equal(dropout(x, rate, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(1)), x)


def test_dropout_reaches_embeddings_attention_and_mlp_with_different_masks() -> None:
    """With a key every kind of layer drops something else; without one the model equals its dropout-free twin."""
    config = one(dropout=0.5)
    params = {k: jnp.asarray(v) for k, v in random_params(config, init="fan_in", dtype=np.float32).items()}
    ids = jnp.asarray(hard_batch()["inputs"])
    model = merge_model(abstract_model(config).graphdef, params)
    plain = merge_model(abstract_model(one()).graphdef, params)
    np.testing.assert_array_equal(model(ids)[0], plain(ids)[0])
    _, acts, _ = model(ids, key=jax.random.key(0))
    embedded = np.asarray(acts["embed"])
    assert 0.4 < (embedded == 0).mean() < 0.6
    # A first position attends to itself alone: with its probability dropped, the head gives exactly zero.
    first = np.asarray(acts["blocks.0.attn.heads"])[:, 0]
    silent = (first == 0).all(-1)
    assert silent.any() and not silent.all()
    dry = np.asarray(model.blocks[0].mlp(acts["blocks.0.mlp_norm"]))
    assert not np.allclose(dry, acts["blocks.0.mlp"])
    a, b = (np.asarray(model(ids, key=jax.random.key(s))[0]) for s in (0, 1))
    assert (a != b).any()


@pytest.mark.parametrize("mlp", ["swiglu", "gelu_erf"])
def test_one_expert_equals_a_dense_mlp(mlp: str, x64: None) -> None:
    """E = 1 routes everything with weight one: the experts must compute the MLP, gate half first."""
    config = tiny({"n_experts": 1, "n_active": 1, "d_ff": 40, "expert_bias": True}, mlp=mlp, mlp_bias=True)
    options = {"rngs": nnx.Rngs(params=0), "dtype": jnp.float64}
    moe, dense = MoE(config, LOOP, **options), MLP(config, 40, **options)
    rng = np.random.default_rng(0)
    for linear in filter(None, (dense.gate_proj, dense.up_proj, dense.down_proj)):
        linear.bias[...] = jnp.asarray(rng.standard_normal(linear.bias.shape))
    ups = [p for p in (dense.gate_proj, dense.up_proj) if p is not None]
    up, up_bias = (
        (moe.experts.gate_up, moe.experts.gate_up_bias)
        if len(ups) == 2
        else (moe.experts.up, moe.experts.up_bias)
    )
    up[...] = jnp.concatenate([p.weight[...] for p in ups], -1)[None]
    up_bias[...] = jnp.concatenate([p.bias[...] for p in ups], -1)[None]
    moe.experts.down[...], moe.experts.down_bias[...] = (
        dense.down_proj.weight[...][None],
        dense.down_proj.bias[...][None],
    )
    x = jnp.asarray(rng.standard_normal((2, T, 24)))
    out, _ = moe(x, jnp.ones((2, T), bool), train=True)
    assert relative_error(out, dense(x)) <= tolerance("f64")


def test_capacity_drops_exactly_the_late_tokens() -> None:
    """Against a loop over tokens: an expert keeps its first int(c P/E) tokens; padding takes no place."""
    rng = np.random.default_rng(0)
    E, A, factor = 4, 2, 0.8
    valid = hard_batch()["segments"] > 0
    ids = np.stack([rng.permutation(E)[:A] for _ in range(valid.size)]).reshape(*valid.shape, A)
    room = dict.fromkeys(range(E), int(factor * valid.size / E))
    expected = np.zeros(ids.shape, bool)
    for b, t in np.ndindex(valid.shape):
        for a in range(A):
            # What is kept of a padding token does not matter: its output is never used.
            expected[b, t, a] = room[ids[b, t, a]] > 0
            room[ids[b, t, a]] -= int(valid[b, t])
    kept = np.asarray(within_capacity(jnp.asarray(ids), jnp.asarray(valid), E, factor))
    np.testing.assert_array_equal(kept[valid], expected[valid])
    assert 0 < kept[valid].mean() < 1


def test_dropped_tokens_get_nothing_and_evaluation_drops_nothing() -> None:
    """A token whose experts are full gets a zero MoE output in training; elsewhere the limit does not hold."""
    config = one({"capacity_factor": 0.5, "n_active": 1})
    layer = MoE(config, LOOP, rngs=nnx.Rngs(params=0), dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, T, 24)), jnp.float32)
    valid = jnp.ones((2, T), bool)
    out, acts = layer(x, valid, train=True)
    lost = ~np.asarray(acts["kept"])[..., 0]
    assert lost.any() and not lost.all()
    assert not np.asarray(out)[lost].any() and np.asarray(out)[~lost].any(-1).all()
    assert np.asarray(layer(x, valid, train=False)[1]["kept"]).all()


@pytest.mark.parametrize("init", ["normal", "fan_in"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_initial_values_are_normal_with_the_configured_width(init: str, tied: bool) -> None:
    """Every matrix passes a KS test and a chi-square test of its variance; norms are one and biases zero."""
    config = tiny({"shared_d_ff": 48, "shared_gate": True, "expert_bias": True, "d_ff": 32, "pattern": (True, False)},
                  d_model=64, d_ff=96, vocab_size=300, init=init, tied=tied, init_std=0.03, qkv_bias=True)  # fmt: skip
    fan_in = {"o_proj": 36, "mlp.down_proj": 96, "shared.down_proj": 48, "experts.down": 32}
    for path, value in quick_jit(lambda: init_params(config, 3))().items():
        x = np.asarray(value, np.float64).ravel()
        if path.endswith("norm.weight"):
            assert (x == 1).all(), path
            continue
        if "bias" in path:
            assert (x == 0).all(), path
            continue
        residual = next((n for name, n in fan_in.items() if name in path), None)
        if init == "normal":
            std = 0.03 / 2 if residual else 0.03  # sqrt(2 L) = 2
        elif path == "embed.weight":
            std = 1 / 8 if tied else 1.0
        else:
            std = (residual or 64) ** -0.5
        z = x / std
        chi2 = stats.chi2(len(z)).cdf(float(z @ z))
        assert tolerance("p_value") < chi2 < 1 - tolerance("p_value"), (
            f"{path}: std {x.std():.4f}, expected {std:.4f}"
        )
        assert stats.kstest(z, "norm").pvalue > tolerance("p_value"), f"{path} is not normal"


def test_initial_values_depend_on_the_seed_only() -> None:
    """The same seed gives the same bits, another seed other ones, and no two matrices start equal."""
    first, again, other = (init_params(one(), seed) for seed in (0, 0, 1))
    assert all((np.asarray(first[k]) == np.asarray(again[k])).all() for k in first)
    matrices = [k for k in first if not k.endswith("norm.weight")]
    assert all((np.asarray(first[k]) != np.asarray(other[k])).any() for k in matrices)
    same_shape = [k for k in matrices if first[k].shape == first["blocks.0.attn.k_proj.weight"].shape]
    assert (np.asarray(first[same_shape[0]]) != np.asarray(first[same_shape[1]])).any()


def test_parameters_follow_the_dtype_asked_for() -> None:
    """abstract_model and init_params agree on names, shapes and dtype."""
    with float64():
        shapes = abstract_model(tiny({}), dtype=jnp.float64).shapes
        assert {s.dtype for s in shapes.values()} == {np.dtype("float64")}
    params = jax.eval_shape(lambda: init_params(tiny({}), 0, jnp.bfloat16))
    assert {k: p.shape for k, p in params.items()} == {k: s.shape for k, s in shapes.items()}
    assert {p.dtype for p in params.values()} == {jnp.dtype("bfloat16")}
