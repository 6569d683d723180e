"""The training step: pure, jitted once, state donated. Same public names: torchref/train.py.

    state, metrics = step(state, batch, scalars)

A batch is a dict of arrays [B, T]: inputs, targets, loss_mask, and optionally segments, positions and
expert_ids [B, T, L, A] (a routing to replay). Micro-batch m of
M holds rows m, m+M, m+2M, ... so that every device keeps its own rows when the batch is split.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxlm.config import RunConfig
from jaxlm.guard import Guard, corrected, guard_metrics, init_guard, judge, keep, next_guard
from jaxlm.layers import Backends
from jaxlm.loss import Counts, Terms, chunked_token_loss, total_loss
from jaxlm.model import Abstract, Params, abstract_model, init_params, merge_model
from jaxlm.optim import Scalars, clip_scale, global_norm, make_optimizer, opt_state_shardings
from jaxlm.sharding import batch_sharding, replicated, sharding
from jaxlm.vitals import expert_metrics, norms, router_entropy

Batch = dict[str, Array]
KEPT_WIDE = (
    "norm.weight",
    "router.weight",
)  # parameters that half-precision runs compute with in master precision


class TrainState(NamedTuple):
    """Everything a step changes."""

    step: Array  # int32, optimizer steps done, skipped updates among them
    params: Params  # master weights by dotted path
    opt_state: Any  # the optax chain's state
    seed: Array  # uint32, dropout's; the key of a step is folded from it
    guard: Guard  # what was skipped, and what spikes are judged by


def cast_params(params: Params, dtype: Any) -> Params:
    """One copy in the dtype of the computation; norms and the router stay in master precision."""
    return {k: v if k.endswith(KEPT_WIDE) else v.astype(dtype) for k, v in params.items()}


def state_shardings(run: RunConfig, mesh: Mesh, abstract: Abstract) -> TrainState:
    """Where each part of the state lives: parameters and moments by their logical axes, the rest everywhere."""
    params = {k: sharding(mesh, s.shape, abstract.axes[k]) for k, s in abstract.shapes.items()}
    whole = replicated(mesh)
    opt = opt_state_shardings(run.optim, abstract.shapes, abstract.axes, mesh)
    guard = jax.tree.map(lambda _: whole, jax.eval_shape(lambda: init_guard(run)))
    places: Any = (whole, params, opt, whole, guard)
    return TrainState(*places)


def state_shapes(run: RunConfig) -> TrainState:
    """Shapes and dtypes of the state, without memory."""
    return jax.eval_shape(lambda: _fresh_state(run))


def _fresh_state(run: RunConfig) -> TrainState:
    params = init_params(run.model, run.train.seed, jnp.dtype(run.train.param_dtype))
    opt_state = make_optimizer(run.optim).init(params)
    seed = jnp.asarray(run.train.seed, jnp.uint32)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, seed, init_guard(run))


def init_state(run: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """A fresh state, created in place on the mesh; the same values on every mesh."""
    if mesh is None:
        return jax.jit(lambda: _fresh_state(run))()
    shardings = state_shardings(run, mesh, abstract_model(run.model))
    return jax.jit(lambda: _fresh_state(run), out_shardings=shardings)()


def loss_and_metrics(
    run: RunConfig,
    graphdef: Any,
    params: Params,
    batch: Batch,
    counts: Counts,
    train: bool,
    key: Array | None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one micro-batch and what a run wants to know about it; metrics add up to those of the batch."""
    model, details = run.model, run.log.details
    decoder = merge_model(graphdef, params)
    segments = batch.get("segments")
    routing = batch.get("expert_ids")
    hidden, acts, _ = decoder.hidden(
        batch["inputs"], batch.get("positions"), segments, train=train, key=key, expert_ids=routing
    )
    weight, bias = decoder.head()
    targets, mask, z_coef = batch["targets"], batch["loss_mask"], run.optim.z_loss_coef
    tokens = chunked_token_loss(hidden, weight, bias, targets, mask, z_coef=z_coef, entropy=details)
    valid = jnp.ones(batch["inputs"].shape, bool) if segments is None else segments > 0
    terms: Terms = total_loss(model, tokens, acts, valid, counts)
    metrics = {
        "loss": terms.cross_entropy,
        "z": terms.z,
        "balance": terms.balance,
        "router_z": terms.router_z,
        "total_loss": terms.total,
    }
    metrics |= expert_metrics(model, acts, valid, counts)
    if details:
        metrics |= {"logit_entropy": tokens.entropy / counts.loss_tokens}
        metrics |= router_entropy(model, acts, valid, counts)
    return terms.total, metrics


def batch_counts(batch: Batch, microbatches: int) -> Counts:
    """What the loss divides by, over the whole batch; at least one, so that an all-masked batch gives zero."""
    mask = batch["loss_mask"]
    valid = batch["inputs"].size if "segments" not in batch else jnp.sum(batch["segments"] > 0)
    valid = jnp.maximum(jnp.asarray(valid), 1).astype(mask.dtype)
    return Counts(jnp.maximum(jnp.sum(mask), 1), valid, microbatches)


def make_gradient_fn(
    run: RunConfig, backends: Backends = Backends()
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    """(params, batch, key, loss_scale) -> gradients and metrics of the whole batch, accumulated over micro-batches.

    With a loss scale, the loss is multiplied and the gradients are divided by it; the metrics are as without.
    """
    graphdef = abstract_model(run.model, backends, remat=run.train.remat).graphdef
    dtype, M = jnp.dtype(run.train.dtype), run.train.accumulation

    def micro(
        copies: Params, batch: Batch, counts: Counts, key: Array | None, scale: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        total, metrics = loss_and_metrics(run, graphdef, copies, batch, counts, True, key)
        return total if scale is None else total * scale.astype(total.dtype), metrics

    def accumulated(
        params: Params, batch: Batch, counts: Counts, key: Array | None, scale: Array | None
    ) -> tuple[Params, dict[str, Array]]:
        # Differentiated by the copies, which are made once a step; sums are kept in the masters' dtype.
        copies = cast_params(params, dtype)

        def part_of(rows: Batch, key: Array | None) -> tuple[Params, dict[str, Array]]:
            grads, metrics = jax.grad(micro, has_aux=True)(copies, rows, counts, key, scale)
            return {k: g.astype(params[k].dtype) for k, g in grads.items()}, metrics

        if M == 1:
            return part_of(batch, key)
        parts = {k: jnp.moveaxis(v.reshape(-1, M, *v.shape[1:]), 1, 0) for k, v in batch.items()}

        def body(carry: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            rows, m = part
            micro_key = None if key is None else jax.random.fold_in(key, m)
            return jax.tree.map(jnp.add, carry, part_of(rows, micro_key)), None

        first = jax.eval_shape(part_of, {k: v[0] for k, v in parts.items()}, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
        return jax.lax.scan(body, zeros, (parts, jnp.arange(M)))[0]

    def gradients(
        params: Params, batch: Batch, key: Array | None = None, loss_scale: Array | None = None
    ) -> tuple[Params, dict[str, Array]]:
        wide = jnp.promote_types(dtype, jnp.float32)
        batch = batch | {"loss_mask": batch["loss_mask"].astype(wide)}
        grads, metrics = accumulated(params, batch, batch_counts(batch, M), key, loss_scale)
        if loss_scale is not None:
            grads = {k: _unscaled(g, loss_scale) for k, g in grads.items()}
        return grads, metrics

    return gradients


def _unscaled(grad: Array, scale: Array) -> Array:
    return (grad.astype(jnp.promote_types(grad.dtype, jnp.float32)) / scale).astype(grad.dtype)


def make_train_step(
    run: RunConfig,
    mesh: Mesh | None = None,
    backends: Backends = Backends(),
) -> Callable[[TrainState, Batch, Scalars], tuple[TrainState, dict[str, Array]]]:
    """The jitted step. With a mesh, call it under `jax.set_mesh(mesh)`, the batch placed by `place_batch`.

    Where `judge` does not accept the batch, parameters and optimizer state stay as they are, bit for bit. A batch may
    hold `stop` int32 [devices], in which each of several processes says whether it was asked to stop: the metric `stop`
    then tells them all.
    """
    gradients, optimizer = make_gradient_fn(run, backends), make_optimizer(run.optim)

    def step(state: TrainState, batch: Batch, scalars: Scalars) -> tuple[TrainState, dict[str, Array]]:
        stop = {"stop": jnp.max(batch["stop"])} if "stop" in batch else {}
        batch = {name: rows for name, rows in batch.items() if name != "stop"}
        key = jax.random.fold_in(jax.random.key(state.seed), state.step) if run.model.dropout else None
        scale = (state.guard.loss_scale,) if run.train.dtype == "float16" else ()
        grads, metrics = gradients(state.params, batch, key, *scale)
        norm, loss = global_norm(grads), metrics["total_loss"]
        verdict = judge(run.train, state.guard, loss, norm)
        exact = corrected(run.optim, scalars, state.step, state.guard.skipped)
        updates: Any
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, scalars=exact)
        params = {k: p + updates[k] for k, p in state.params.items()}
        params, opt_state = keep(verdict.accepted, (params, opt_state), (state.params, state.opt_state))
        guard = next_guard(run.train, state.guard, verdict, loss, norm)
        metrics |= {"grad_norm": norm, "clip_scale": clip_scale(norm, run.optim.clip_norm), "lr": scalars.lr}
        metrics |= guard_metrics(run.train, guard, verdict) | stop
        if run.log.details:
            metrics |= norms(grads, state.params, params)
        return TrainState(state.step + 1, params, opt_state, state.seed, guard), metrics

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
