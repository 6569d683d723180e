"""The grouped expert products against a loop over experts, in float64, with every gradient."""

import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import bytes_read
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm.grouped import ExpertWeights, expert_mlp, sort_by_expert

FAST = ("blocks", "pallas", "batched")  # kernels for CUDA are interpreted here
# 42 assignments in tiles of 2 rows are more than one chunk of the batched backend.
UNIFORM = dict(p=21, e=4, a=2, d=6, f=4, activation="swiglu", bias=True)
CASES = {
    "uniform": (UNIFORM, {"tiles": (4, 2)}),
    "gelu_erf_one_choice_without_bias": (UNIFORM | {"activation": "gelu_erf", "a": 1, "bias": False}, {}),
    "gelu_tanh_one_expert": (
        UNIFORM | {"activation": "gelu_tanh", "e": 1, "a": 1, "p": 13},
        {"dropout": 0.4},
    ),
    "one_token_dropout": (UNIFORM | {"p": 1}, {"dropout": 0.4}),
}
ROUTINGS = {
    "empty_groups": lambda ids, e: np.where(ids % 2 == 1, 0, ids),
    "all_to_the_last_expert": lambda ids, e: np.full_like(ids, e - 1),
    "some_not_local": lambda ids, e: ids * 3 - 4,
    "none_local": lambda ids, e: np.where(ids % 2 == 0, e, -1),
}
# Unoptimized code compiles faster, and these problems are tiny.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _problem(p, e, a, d, f, activation, bias, dtype=np.float64, seed=0):
    """Random x, weights, ids, combine."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    u = 2 * f if activation == "swiglu" else f
    weights = ExpertWeights(normal(e, d, u), normal(e, u), normal(e, f, d), normal(e, d))
    if not bias:
        weights = weights._replace(up_bias=None, down_bias=None)
    ids = np.stack([rng.permutation(e)[:a] for _ in range(p)]).astype(np.int32)
    return normal(p, d), weights, jnp.asarray(ids), normal(p, a)


@functools.partial(
    jax.jit,
    static_argnames=("activation", "backend", "tiles", "dropout"),
    compiler_options=QUICK,
)
def _results(x, weights, ids, combine, *, activation, backend, tiles=None, dropout=0.0):
    """Value and the gradients of x, weights and combine under a fixed cotangent."""
    options = {"activation": activation, "backend": backend, "tiles": tiles}
    if dropout:
        options["hidden_dropout"] = (jax.random.key(3), dropout)
    y, pull = jax.vjp(
        lambda x, weights, combine: expert_mlp(x, weights, ids, combine, **options), x, weights, combine
    )
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def _assert_equal(got, want, rtol):
    """Every leaf within rtol of the largest entry of its counterpart."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(g, w, rtol=0, atol=rtol * np.abs(w).max())


def _compare(backend, case, ids=None, tiles=None, dropout=0.0):
    """Asserts that the backend equals the loop within 1e-13; returns its results."""
    with jax.enable_x64(True):
        x, weights, default_ids, combine = _problem(**case)
        inputs = (x, weights, default_ids if ids is None else jnp.asarray(ids), combine)
        options = {"activation": case["activation"], "dropout": dropout}
        tiles = tiles[-1:] if tiles and backend != "blocks" else tiles
        got = _results(*inputs, backend=backend, tiles=tiles, **options)
        _assert_equal(got, _results(*inputs, backend="loop", **options), rtol=1e-13)
    return got


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_loop(name, backend):
    """1e-13 of the largest entry, over activations, biases, shapes that fill no tile, and dropout."""
    case, options = CASES[name]
    _compare(backend, case, **options)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ROUTINGS)
def test_any_routing_equals_the_loop(name, backend):
    """Empty experts, all tokens at one expert, and experts that live elsewhere."""
    with jax.enable_x64(True):
        ids = ROUTINGS[name](np.asarray(_problem(**UNIFORM)[2]), UNIFORM["e"])
    got = _compare(backend, UNIFORM, ids, **CASES["uniform"][1])
    if name == "none_local":
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("name", ["uniform", "gelu_erf_one_choice_without_bias", "one_token_dropout"])
def test_two_tokens_on_slices_equal_the_loop(name):
    """Values and gradients of the decoding backend; experts that live elsewhere add nothing."""
    case, options = CASES[name]
    _compare("sliced", case | {"p": 2}, **{k: v for k, v in options.items() if k != "tiles"})
    for routing in ("some_not_local", "none_local"):
        with jax.enable_x64(True):
            ids = ROUTINGS[routing](np.asarray(_problem(**UNIFORM | {"p": 2})[2]), UNIFORM["e"])
        _compare("sliced", UNIFORM | {"p": 2}, ids)


def test_one_token_reads_its_experts_only():
    """Compiled, the slices of expert weights are what A of E experts hold, and nothing else reads the stacks."""
    p, e, a, d, f = 1, 16, 2, 12, 20
    x, weights, ids, combine = _problem(p, e, a, d, f, "swiglu", False, dtype=np.float32)

    def read(backend):
        def run(x, weights, ids, combine):
            return expert_mlp(x, weights, ids, combine, activation="swiglu", backend=backend)

        text = jax.jit(run).lower(x, weights, ids, combine).compile().as_text()
        return bytes_read(text, [weights.up.shape, weights.down.shape])

    every = 4 * (weights.up.size + weights.down.size)
    assert a / e * every <= read("auto") <= 1.1 * a / e * every
    assert read("loop") >= every, "the measure sees what reads them all"


def test_many_assignments_are_grouped_however_many_experts_there_are():
    """A product of its own for each of 64 assignments would take ten times as long to compile."""
    inputs = _problem(8, 128, 8, 6, 4, "swiglu", False, dtype=np.float32)

    def program(backend):
        return (
            jax.jit(functools.partial(expert_mlp, activation="swiglu", backend=backend))
            .lower(*inputs)
            .as_text()
        )

    assert program("auto") == program("blocks")


@pytest.mark.parametrize("name", ["uniform", "gelu_erf_one_choice_without_bias"])
def test_the_loop_is_the_formula(name):
    """The oracle itself, token by token in numpy: silu(first half) * second half, and x Phi(x)."""
    case, _ = CASES[name]
    with jax.enable_x64(True):
        inputs = _problem(**case)
        got = _results(*inputs, backend="loop", activation=case["activation"], dropout=0.0)[0]
    x, w, ids, combine = jax.tree.map(np.asarray, inputs)
    want = np.zeros_like(x)
    for p, a in np.ndindex(*ids.shape):
        e = ids[p, a]
        h = x[p] @ w.up[e] + (w.up_bias[e] if case["bias"] else 0)
        if case["activation"] == "swiglu":
            h = h[: case["f"]] / (1 + np.exp(-h[: case["f"]])) * h[case["f"] :]
        else:
            h = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in h])
        want[p] += combine[p, a] * (h @ w.down[e] + (w.down_bias[e] if case["bias"] else 0))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


@pytest.mark.parametrize("backend", [*FAST, "sliced"])
def test_bfloat16_is_close_to_float64(backend):
    """Results keep the inputs' dtype and are a few roundings away."""
    case = UNIFORM | {"p": 2} if backend == "sliced" else UNIFORM
    x, weights, ids, combine = _problem(**case, dtype=jnp.bfloat16)
    got = _results(x, weights, ids, combine, backend=backend, activation="swiglu", tiles=(2,))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(got))
    with jax.enable_x64(True):
        high = jax.tree.map(lambda v: v.astype(jnp.float64), (x, weights, combine))
        want = _results(*high[:2], ids, high[2], backend="loop", activation="swiglu", dropout=0.0)
        _assert_equal(jax.tree.map(lambda v: v.astype(jnp.float64), got), want, rtol=2e-2)


_layout = jax.jit(sort_by_expert, static_argnums=(1, 2, 3), compiler_options=QUICK)


@pytest.mark.parametrize(("e", "tile", "chunk"), [(4, 3, 1), (3, 2, 4), (5, 1, 16)])
@settings(max_examples=20, deadline=None)
@given(flat=st.lists(st.integers(-2, 6), min_size=12, max_size=12))
def test_layout_is_a_bijection_of_local_assignments(e, tile, chunk, flat):
    """Every local assignment owns one filled slot, inside its expert's group and in order."""
    layout = jax.tree.map(np.asarray, _layout(jnp.asarray(flat, jnp.int32).reshape(4, 3), e, tile, chunk))
    local = np.flatnonzero([0 <= i < e for i in flat])
    assert (np.flatnonzero(layout.local) == local).all()
    slots = layout.slot.ravel()[local]
    assert layout.filled[slots].all() and layout.filled.sum() == len(local)
    assert (layout.assignment[slots] == local).all()
    assert (layout.rows % tile == 0).all() and layout.owner.size * tile == layout.filled.size
    assert layout.owner.size <= chunk or layout.owner.size % chunk == 0
    want = sorted(local, key=lambda i: (flat[i], i))
    assert layout.assignment[layout.filled].tolist() == want
    assert [layout.owner[s // tile] for s in np.flatnonzero(layout.filled)] == [flat[i] for i in want]


def _gradients(f, x, weights, ids, combine):
    def gradients(x, weights, combine, ids):
        return jax.grad(lambda *v: (f(v[0], v[1], ids, v[2]) ** 2).sum(), (0, 1, 2))(x, weights, combine)

    return jax.jit(gradients, compiler_options=QUICK).lower(x, weights, combine, ids)


@pytest.mark.parametrize("backend", FAST)
def test_compiled_gradient_scatters_nothing(backend):
    """Dispatch, combine and the sums of weight gradients compile to gathers and products."""
    f = functools.partial(expert_mlp, activation="swiglu", backend=backend, tiles=(2,))
    lowered = _gradients(f, *_problem(**UNIFORM, dtype="float32"))
    text = lowered.compile().as_text()
    assert " gather(" in text and "stablehlo.scatter" not in lowered.as_text() and " scatter(" not in text


@pytest.mark.parametrize("backend", FAST)
def test_experts_split_over_devices_sum_to_the_whole(backend):
    """shard_map with checked axes: x replicated, ids shifted to each device's experts, outputs summed."""
    inputs = x, weights, ids, combine = _problem(**UNIFORM, dtype="float32")
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))

    def island(x, weights, ids, combine):
        ids = ids - jax.lax.axis_index("expert") * weights.up.shape[0]
        y = expert_mlp(x, weights, ids, combine, activation="swiglu", backend=backend, tiles=(2,))
        return jax.lax.psum(y, "expert")

    check = backend != "pallas"  # the interpreter of kernels knows no axes; compiled kernels do
    specs = (P(), P("expert"), P(), P())
    split = jax.shard_map(island, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
    got = _gradients(split, *inputs).compile()(x, weights, combine, ids)
    loop = functools.partial(expert_mlp, activation="swiglu", backend="loop")
    _assert_equal(got, _gradients(loop, *inputs).compile()(x, weights, combine, ids), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu_erf"}, "up is 8 wide, which does not suit F=4 of down"),
        ({"x": jnp.zeros((21, 6), jnp.bfloat16)}, "expert weights are float32 but x is bfloat16"),
        ({"tiles": (8, 3)}, r"tiles=\(8, 3\) must be descending"),
        ({"tiles": (48,), "backend": "pallas"}, r"tiles=\(48,\): for pallas a power of two"),
        ({"tiles": (8, 4), "backend": "batched"}, "one for pallas and batched"),
        ({"tiles": (8, 4), "backend": "pallas"}, "one for pallas and batched"),
    ],
)
def test_misfits_are_refused_in_one_line(change, message):
    """Widths, dtypes and tiles that cannot work say what is wrong."""
    x, weights, ids, combine = _problem(**UNIFORM, dtype=np.float32)
    call = {"x": x, "weights": weights, "ids": ids, "combine": combine, "activation": "swiglu"} | change
    with pytest.raises(ValueError, match=message) as error:
        expert_mlp(**call)
    assert "\n" not in str(error.value)


@pytest.mark.bench
@pytest.mark.parametrize(
    ("p", "d", "f", "limit"),
    [(4096, 256, 512, 1.5), (2048, 192, 256, None), (8192, 192, 256, None)],  # None: shown, not judged
)
def test_blocks_cost_little_more_than_a_dense_mlp(p, d, f, limit):
    """Forward and all gradients against a dense SwiGLU of the same active size: median of interleaved ratios."""
    e, a = 8, 2
    x, weights, ids, combine = _problem(p, e, a, d, f, "swiglu", False, dtype="float32")
    dense = ExpertWeights(*_problem(p, 1, 1, d, a * f, "swiglu", False, dtype="float32")[1])

    @jax.jit
    def run_blocks(x, weights, combine, ids):
        def loss(x, weights, combine):
            return expert_mlp(x, weights, ids, combine, activation="swiglu", backend="blocks").sum()

        return jax.grad(loss, (0, 1, 2))(x, weights, combine)

    @jax.jit
    def run_dense(x, up, down):
        def loss(x, up, down):
            gate, linear = jnp.split(x @ up, 2, axis=-1)
            return ((jax.nn.silu(gate) * linear) @ down).sum()

        return jax.grad(loss, (0, 1, 2))(x, up, down)

    def seconds(f, *args):
        begin = time.perf_counter()
        jax.block_until_ready(f(*args))
        return time.perf_counter() - begin

    pair = (run_blocks, x, weights, combine, ids), (run_dense, x, dense.up[0], dense.down[0])
    times = [[seconds(*call) for call in pair] for _ in range(16)][2:]
    ratio = statistics.median(blocks / plain for blocks, plain in times)
    best = [min(column) * 1e3 for column in zip(*times, strict=True)]
    print(f"P={p} D={d} F={f}: at best {best[0]:.1f} ms, dense {best[1]:.1f} ms; median ratio {ratio:.2f}")
    assert limit is None or ratio <= limit
