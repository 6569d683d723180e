"""The kernels for CUDA: interpreted against the loop, and as they are lowered and compiled for an H200."""

import functools
import importlib.metadata
import math
import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.dispatch import Blocks, ExpertWeights, Kernels
from jaxlm.grouped import expert_mlp
from jaxlm.grouped_kernels import erf

GPTOSS = {"p": 65536, "e": 32, "a": 2, "d": 1024, "f": 2048}
SMALL = Kernels(*(Blocks(16, 16, 4, 2, rows=16),) * 5, Blocks(16, 1, 4, 1, rows=4))
KERNELS = {"experts_up": 1, "experts_rows": 3, "experts_d_activation": 1, "experts_d_weights": 2}


def _shapes(p, e, a, d, f, place=None):
    """x, weights, ids, combine in bfloat16, without data."""

    def struct(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    weights = ExpertWeights(struct((e, d, 2 * f)), None, struct((e, f, d)), None)
    return struct((p, d)), weights, struct((p, a), jnp.int32), struct((p, a))


def _layer(x, weights, ids, combine, **options):
    """One layer of experts on the kernels: y, and the gradients of |y|^2 / 2."""
    options = {"activation": "swiglu", "backend": "pallas"} | options

    def run(x, weights, combine):
        return expert_mlp(x, weights, ids, combine, **options)

    y, pull = jax.vjp(run, x, weights, combine)
    return y, pull(y)


def _active_flops(p, e, a, d, f):
    """Forward, and twice as much for the gradients of rows and weights."""
    return 3 * 2 * p * a * (d * 2 * f + f * d)


@functools.cache
def _lowered(**options):
    """The layer of `gptoss` as jax hands it to the compiler of a GPU that is not there."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("one",), abstract_device=device)):
        made = jax.jit(functools.partial(_layer, **options)).trace(*_shapes(**GPTOSS))
        return made.lower(lowering_platforms=("cuda",)).as_text()


def test_sizes_that_no_block_divides_equal_the_loop():
    """Several blocks along every dimension, the last of them in part; in float64, with every gradient."""
    p, e, a, d, f = 21, 2, 2, 24, 20
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), jnp.float64)

        weights = ExpertWeights(normal(e, d, 2 * f), normal(e, 2 * f), normal(e, f, d), normal(e, d))
        ids = jnp.asarray(rng.integers(-1, e + 1, (p, a)), jnp.int32)  # some nobody's, some twice the same
        inputs = normal(p, d), weights, ids, normal(p, a)
        run = jax.jit(_layer, static_argnames=("backend", "tiles", "kernels"))
        got = run(*inputs, tiles=(16,), kernels=SMALL)
        want = run(*inputs, backend="loop")
        forward = jax.jit(
            lambda *v: expert_mlp(*v, activation="swiglu", backend="pallas", tiles=(16,), kernels=SMALL)
        )
        np.testing.assert_array_equal(forward(*inputs), got[0], err_msg="keeping nothing for a gradient")
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * np.abs(other).max())


def test_the_error_function_is_good_to_float32():
    """Triton has none: 1.5e-7 of the exact one, and some roundings of float32."""
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    got = np.asarray(erf(jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(got, [math.erf(v) for v in x], rtol=0, atol=5e-7)


def test_products_are_the_active_ones():
    """64k tokens of `gptoss`: the programs of all kernels compute at most 5 % more than what is active."""
    active = _active_flops(**GPTOSS)
    text = _lowered()
    assert {name: text.count(f'name = "{name}"') for name in KERNELS} == KERNELS
    assert "stablehlo.dot_general" not in text, "the products are all in kernels"
    assert active <= sum(hlo.kernel_flops(text).values()) <= 1.05 * active
    wide = sum(hlo.kernel_flops(_lowered(tiles=(1024,))).values())
    assert wide > 1.2 * active, "the measure sees padding"


def test_lowered_layer_scatters_nothing_and_holds_no_row_per_expert():
    """Dispatch, combine and their gradients are gathers; no array is as large as tokens x experts x D."""
    text = _lowered()
    assert "stablehlo.gather" in text and "stablehlo.scatter" not in text
    largest = GPTOSS["p"] * GPTOSS["a"] * 2 * GPTOSS["f"] * 1.05  # the pre-activations of all slots
    sizes = [math.prod(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<((?:\d+x)+)", text)]
    assert max(sizes) <= largest < GPTOSS["p"] * GPTOSS["e"] * GPTOSS["d"]


def test_kernels_lower_inside_a_checked_shard_map():
    """Experts split over devices, axes checked, sizes that no block divides; results vary as their operands do."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((2,), ("expert",), axis_types=(AxisType.Auto,), abstract_device=device)

    specs = (P(), P("expert"), P(), P())
    grads = (P(), (P(), ExpertWeights(P("expert"), None, P("expert"), None), P()))

    def island_with_gradients(x, weights, ids, combine):
        ids = ids - jax.lax.axis_index("expert") * len(weights.up)
        y, (dx, d_weights, d_combine) = _layer(x, weights, ids, combine)
        add = functools.partial(jax.lax.psum, axis_name="expert")
        return add(y), (dx, d_weights, d_combine)

    split = jax.shard_map(island_with_gradients, mesh=mesh, in_specs=specs, out_specs=grads)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(split).trace(*_shapes(64, 4, 2, 40, 72)).lower(lowering_platforms=("cuda",)).as_text()
    assert {name: text.count(f'name = "{name}"') for name in KERNELS} == KERNELS


def _plugin():
    """Why nothing can be compiled here; empty where it can."""
    try:
        found = {importlib.metadata.version(f"jax-cuda13-{part}") for part in ("plugin", "pjrt")}
    except importlib.metadata.PackageNotFoundError:
        return "needs jax's CUDA compiler plugin (see docs/planning.md)"
    return "" if found == {jax.__version__} else f"jax-cuda13-plugin is {found}, not {jax.__version__}"


@pytest.mark.h200
@pytest.mark.skipif(_plugin() != "", reason=_plugin())
def test_compiled_layer_keeps_what_the_lowered_one_promises():
    """One layer of `gptoss` on an H200: 7 kernels, products within 5 % of the active, no scatter, under 4.5 GB."""
    from jaxlm.config import MeshConfig
    from jaxlm.plan import absent_mesh

    mesh = absent_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        compiled = jax.jit(_layer).lower(*_shapes(**GPTOSS, place=NamedSharding(mesh, P()))).compile()
    text, active = compiled.as_text(), _active_flops(**GPTOSS)
    assert text.count(f'custom_call_target="{hlo.KERNEL}"') == sum(KERNELS.values())
    assert sum(hlo.kernel_flops(text).values()) + hlo.dot_flops(text) <= 1.05 * active
    assert " scatter(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 4.5e9
