"""On a CUDA device: the kernels of the experts against the loop, with every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.dispatch import Blocks, ExpertWeights, Kernels
from jaxlm.grouped import expert_mlp

pytestmark = pytest.mark.gpu

SMALL = Kernels(*(Blocks(64, 32, 4, 3, rows=64),) * 5)  # the elementwise kernel keeps its own
CASES = {
    "as trained": ("swiglu", 128, 256, {}),
    "sizes that no block divides": ("swiglu", 136, 200, {"tiles": (64,)}),
    "other blocks": ("swiglu", 128, 256, {"kernels": SMALL}),
    "gelu_erf": ("gelu_erf", 128, 256, {}),
    "gelu_tanh": ("gelu_tanh", 128, 256, {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("routing", ["uniform", "one expert", "some elsewhere"])
def test_kernels_equal_the_loop(name, routing):
    """bfloat16 within 2e-2 of the largest entry of the loop's float32 result, over skewed and empty experts."""
    activation, d, f, options = CASES[name]
    p, e, a = 1000, 8, 2
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3, jnp.bfloat16)

    u = 2 * f if activation == "swiglu" else f
    weights = ExpertWeights(normal(e, d, u), normal(e, u), normal(e, f, d), normal(e, d))
    ids = np.stack([rng.permutation(e)[:a] for _ in range(p)]).astype(np.int32)
    ids = {"uniform": ids, "one expert": np.full_like(ids, 3), "some elsewhere": ids * 2 - 3}[routing]
    inputs, ids = (normal(p, d), weights, normal(p, a)), jnp.asarray(ids)

    def results(inputs, **options):
        def run(x, weights, combine):
            return expert_mlp(x, weights, ids, combine, activation=activation, **options)

        y, pull = jax.vjp(run, *inputs)
        return y, pull(jnp.ones_like(y))

    got = jax.jit(lambda inputs: results(inputs, backend="pallas", **options))(inputs)
    with jax.default_matmul_precision("highest"):
        high = jax.tree.map(lambda v: v.astype(jnp.float32), inputs)
        want = jax.jit(lambda inputs: results(inputs, backend="loop"))(high)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        other = np.asarray(other)
        np.testing.assert_allclose(
            np.asarray(one, np.float32), other, rtol=0, atol=2e-2 * np.abs(other).max()
        )
