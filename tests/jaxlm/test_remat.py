"""Remat policies: the same loss and gradients whatever is recomputed, and the more memory the more is kept."""

from typing import Any

import jax
import numpy as np
import pytest
from helpers import (
    assert_close,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from jax._src.ad_checkpoint import saved_residuals
from tolerances import tolerance

from jaxlm.config import ModelConfig
from jaxlm.layers import Backends
from jaxlm.model import abstract_model, merge_model
from jaxlm.train import make_gradient_fn

POLICIES = ("none", "dots", "block")
MODEL = tiny({"pattern": (False, True), "shared_d_ff": 12}, n_layers=2)


@pytest.mark.parametrize("experts", ["blocks", pytest.param("loop", marks=pytest.mark.slow)])
def test_every_policy_gives_the_same_gradients(experts: Any, x64: None) -> None:
    """Recomputing changes memory, not values: with the oracle's experts and with those that run by default."""
    params, batch = random_params(MODEL), hard_batch()
    backends = Backends(experts=experts)
    results = [
        quick_jit(make_gradient_fn(tiny_run(MODEL, remat=remat), backends))(params, batch)
        for remat in POLICIES
    ]
    for grads, metrics in results[1:]:
        assert_close(tree_errors(grads, results[0][0]), tolerance("f64"), "gradients")
        assert relative_error(metrics["total_loss"], results[0][1]["total_loss"]) <= tolerance("f64")


def kept_bytes(config: ModelConfig, remat: str, backends: Backends) -> int:
    """Bytes that the forward pass hands to the backward pass, parameters and inputs aside."""
    abstract = abstract_model(config, backends, remat=remat)
    ids = jax.ShapeDtypeStruct((4, 19), np.int32)

    def loss(params: Any, ids: Any) -> Any:
        return (merge_model(abstract.graphdef, params).hidden(ids)[0] ** 2).sum()

    kept = saved_residuals(loss, abstract.shapes, ids)
    return sum(x.size * x.dtype.itemsize for x, where in kept if "argument" not in where and x.size)


@pytest.mark.parametrize("experts", ["loop", "blocks"])
def test_the_more_is_recomputed_the_less_is_kept(experts: Any) -> None:
    """none > dots > block in bytes between the passes, by clear steps."""
    sizes = [kept_bytes(MODEL, remat, Backends(experts=experts)) for remat in POLICIES]
    assert sizes[0] > 1.3 * sizes[1] > 1.3 * 2 * sizes[2], sizes


def test_dots_keep_the_hidden_layer_of_the_experts() -> None:
    """What the hand-written gradient reads is kept by name: the products of the forward pass are not run again."""
    config = tiny({}, n_layers=1)
    run = tiny_run(config, dtype="float32", param_dtype="float32")
    loops = {}
    for remat in POLICIES:
        abstract = abstract_model(config, Backends(experts="batched"), remat=remat)

        def loss(params: Any, ids: Any, graphdef: Any = abstract.graphdef) -> Any:
            return (merge_model(graphdef, params).hidden(ids)[0] ** 2).sum()

        ids = jax.ShapeDtypeStruct((4, run.train.seq_len), np.int32)
        loops[remat] = str(jax.make_jaxpr(jax.grad(loss))(abstract.shapes, ids)).count("while[")
    assert loops["dots"] == loops["none"] < loops["block"], loops
