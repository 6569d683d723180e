"""How the router chooses: the largest logits, best first, without sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.moe import PASSES, route


@pytest.mark.parametrize(("n_experts", "n_active"), [(4, 1), (4, 4), (32, 2), (16, PASSES), (16, PASSES + 1)])
def test_the_largest_are_chosen_lowest_index_first(n_experts, n_active):
    """Rows with ties, against a stable sort."""
    logits = np.random.default_rng(0).integers(-2, 3, (50, n_experts)).astype(np.float32)
    ids, weights = route(jnp.asarray(logits), n_active, renormalize=False)
    want = np.argsort(-logits, axis=-1, kind="stable")[:, :n_active]
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(weights, np.take_along_axis(np.asarray(jax.nn.softmax(logits)), want, axis=-1))


def test_an_expert_that_is_ruled_out_is_chosen_last_and_once():
    """Logits of minus infinity are less than all others and still differ from what was already taken."""
    logits = jnp.asarray([[-jnp.inf, 1.0, -jnp.inf, 0.0]])
    assert route(logits, 4, renormalize=False)[0].tolist() == [[1, 3, 0, 2]]


def test_choice_sorts_nothing():
    """On a GPU top_k is a sort of whole rows: up to PASSES experts are found by maxima, gradients included."""

    def program(n_active):
        def loss(logits):
            return (route(logits, n_active, renormalize=True)[1] ** 2).sum()

        return jax.jit(jax.grad(loss)).lower(jnp.zeros((64, 32))).as_text()

    few, many = program(2), program(PASSES + 1)
    assert not any(word in few for word in ("top_k", "sort", "scatter", "gather"))
    assert "top_k" in many, "the measure sees it"
