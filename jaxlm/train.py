"""The training step: pure, jitted once, state donated. Same public names: torchref/train.py.

    state, metrics = step(state, batch, scalars)

A batch is a dict of arrays [B, T]: inputs, targets, loss_mask, and optionally segments, positions and
expert_ids [B, T, L, A] (a routing to replay). Micro-batch m of
M holds rows m, m+M, m+2M, ... so that every device keeps its own rows when the batch is split.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxlm.config import ModelConfig, RunConfig
from jaxlm.layers import Backends
from jaxlm.loss import Counts, Terms, chunked_token_loss, total_loss
from jaxlm.model import Abstract, Params, abstract_model, init_params, merge_model
from jaxlm.optim import Scalars, clip_scale, global_norm, make_optimizer
from jaxlm.sharding import batch_sharding, replicated, sharding

Batch = dict[str, Array]
KEPT_WIDE = (
    "norm.weight",
    "router.weight",
)  # parameters that half-precision runs compute with in master precision


class TrainState(NamedTuple):
    """Everything a step changes."""

    step: Array  # int32, optimizer steps done
    params: Params  # master weights by dotted path
    opt_state: Any  # the optax chain's state
    seed: Array  # uint32, dropout's; the key of a step is folded from it


def cast_params(params: Params, dtype: Any) -> Params:
    """One copy in the dtype of the computation; norms and the router stay in master precision."""
    return {k: v if k.endswith(KEPT_WIDE) else v.astype(dtype) for k, v in params.items()}


def state_shardings(run: RunConfig, mesh: Mesh, abstract: Abstract) -> TrainState:
    """Where each part of the state lives: parameters and moments by their logical axes, the rest everywhere."""
    params = {k: sharding(mesh, s.shape, abstract.axes[k]) for k, s in abstract.shapes.items()}
    whole = replicated(mesh)
    opt_shapes = jax.eval_shape(make_optimizer(run.optim).init, abstract.shapes)
    is_params = partial(_is_params, keys=frozenset(params))
    opt = jax.tree.map(lambda x: params if is_params(x) else whole, opt_shapes, is_leaf=is_params)
    places: Any = (whole, params, opt, whole)
    return TrainState(*places)


def _is_params(x: Any, keys: frozenset[str]) -> bool:
    return isinstance(x, dict) and frozenset(x) == keys


def state_shapes(run: RunConfig) -> TrainState:
    """Shapes and dtypes of the state, without memory."""
    return jax.eval_shape(lambda: _fresh_state(run))


def _fresh_state(run: RunConfig) -> TrainState:
    params = init_params(run.model, run.train.seed, jnp.dtype(run.train.param_dtype))
    opt_state = make_optimizer(run.optim).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jnp.asarray(run.train.seed, jnp.uint32))


def init_state(run: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """A fresh state, created in place on the mesh; the same values on every mesh."""
    if mesh is None:
        return jax.jit(lambda: _fresh_state(run))()
    shardings = state_shardings(run, mesh, abstract_model(run.model))
    return jax.jit(lambda: _fresh_state(run), out_shardings=shardings)()


def loss_and_metrics(
    model: ModelConfig,
    z_loss_coef: float,
    graphdef: Any,
    params: Params,
    batch: Batch,
    counts: Counts,
    train: bool,
    key: Array | None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one micro-batch and what a run wants to know about it."""
    decoder = merge_model(graphdef, params)
    segments = batch.get("segments")
    routing = batch.get("expert_ids")
    hidden, acts, _ = decoder.hidden(
        batch["inputs"], batch.get("positions"), segments, train=train, key=key, expert_ids=routing
    )
    weight, bias = decoder.head()
    tokens = chunked_token_loss(hidden, weight, bias, batch["targets"], batch["loss_mask"])
    valid = jnp.ones(batch["inputs"].shape, bool) if segments is None else segments > 0
    terms: Terms = total_loss(model, z_loss_coef, tokens, acts, valid, counts)
    metrics = {
        "loss": terms.cross_entropy,
        "z": terms.z,
        "balance": terms.balance,
        "router_z": terms.router_z,
    }
    return terms.total, metrics | expert_metrics(model, acts, valid, counts)


def expert_metrics(
    model: ModelConfig, acts: dict[str, Array], valid: Array, counts: Counts
) -> dict[str, Array]:
    """Share of the valid tokens' assignments that each expert of each MoE layer got, and the share dropped."""
    layers = [i for i in range(model.n_layers) if model.is_moe(i)]
    if not layers:
        return {}
    E, A = model.moe.n_experts, model.moe.n_active
    chosen = [jax.nn.one_hot(acts[f"blocks.{i}.moe.expert_ids"], E) for i in layers]
    load = [jnp.sum(ids * valid[..., None, None], (0, 1, 2)) for ids in chosen]
    lost = [jnp.sum(~acts[f"blocks.{i}.moe.kept"] & valid[..., None]) for i in layers]
    total = A * counts.valid_tokens
    return {"expert_load": jnp.stack(load) / total, "dropped": sum(lost) / (len(layers) * total)}


def batch_counts(batch: Batch, microbatches: int) -> Counts:
    """What the loss divides by, over the whole batch; at least one, so that an all-masked batch gives zero."""
    mask = batch["loss_mask"]
    valid = batch["inputs"].size if "segments" not in batch else jnp.sum(batch["segments"] > 0)
    valid = jnp.maximum(jnp.asarray(valid), 1).astype(mask.dtype)
    return Counts(jnp.maximum(jnp.sum(mask), 1), valid, microbatches)


def make_gradient_fn(
    run: RunConfig, backends: Backends = Backends()
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    """(params, batch, key) -> gradients and metrics of the whole batch, accumulated over micro-batches."""
    graphdef = abstract_model(run.model, backends, remat=run.train.remat).graphdef
    dtype, M = jnp.dtype(run.train.dtype), run.train.accumulation

    def micro(
        params: Params, batch: Batch, counts: Counts, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        cast = cast_params(params, dtype)
        return loss_and_metrics(run.model, run.optim.z_loss_coef, graphdef, cast, batch, counts, True, key)

    def gradients(params: Params, batch: Batch, key: Array | None = None) -> tuple[Params, dict[str, Array]]:
        wide = jnp.promote_types(dtype, jnp.float32)
        batch = batch | {"loss_mask": batch["loss_mask"].astype(wide)}
        counts = batch_counts(batch, M)
        value_and_grad = jax.value_and_grad(micro, has_aux=True)
        if M == 1:
            (total, metrics), grads = value_and_grad(params, batch, counts, key)
            return grads, metrics | {"total_loss": total}
        parts = {k: jnp.moveaxis(v.reshape(-1, M, *v.shape[1:]), 1, 0) for k, v in batch.items()}

        def body(carry: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            rows, m = part
            micro_key = None if key is None else jax.random.fold_in(key, m)
            (total, metrics), grads = value_and_grad(params, rows, counts, micro_key)
            return jax.tree.map(jnp.add, carry, (grads, metrics | {"total_loss": total})), None

        first = jax.eval_shape(value_and_grad, params, {k: v[0] for k, v in parts.items()}, counts, key)
        (total, metrics), grads = first
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, metrics | {"total_loss": total}))
        (grads, metrics), _ = jax.lax.scan(body, zeros, (parts, jnp.arange(M)))
        return grads, metrics

    return gradients


def make_train_step(
    run: RunConfig,
    mesh: Mesh | None = None,
    backends: Backends = Backends(),
) -> Callable[[TrainState, Batch, Scalars], tuple[TrainState, dict[str, Array]]]:
    """The jitted step. With a mesh, call it under `jax.set_mesh(mesh)`, the batch placed by `place_batch`."""
    gradients, optimizer = make_gradient_fn(run, backends), make_optimizer(run.optim)

    def step(state: TrainState, batch: Batch, scalars: Scalars) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step) if run.model.dropout else None
        grads, metrics = gradients(state.params, batch, key)
        norm = global_norm(grads)
        updates: Any
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, scalars=scalars)
        params = {k: p + updates[k] for k, p in state.params.items()}
        metrics |= {"grad_norm": norm, "clip_scale": clip_scale(norm, run.optim.clip_norm), "lr": scalars.lr}
        return TrainState(state.step + 1, params, opt_state, state.seed), metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = state_shardings(run, mesh, abstract_model(run.model))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_eval_step(
    run: RunConfig, backends: Backends = Backends()
) -> Callable[[Params, Batch], dict[str, Array]]:
    """(params, batch) -> summed cross-entropy and loss-carrying tokens of one batch, nothing dropped, no dropout."""
    graphdef = abstract_model(run.model, backends).graphdef

    def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
        decoder = merge_model(graphdef, cast_params(params, jnp.dtype(run.train.dtype)))
        hidden, _, _ = decoder.hidden(batch["inputs"], batch.get("positions"), batch.get("segments"))
        weight, bias = decoder.head()
        tokens = chunked_token_loss(hidden, weight, bias, batch["targets"], batch["loss_mask"])
        return {"loss_sum": tokens.cross_entropy, "tokens": jnp.sum(batch["loss_mask"])}

    return jax.jit(evaluate)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh | None = None) -> Batch:
    """Puts a host batch on the device, or on the mesh with its rows split."""
    return jax.device_put(batch, None if mesh is None else batch_sharding(mesh))
