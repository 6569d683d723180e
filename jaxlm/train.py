"""The training step: pure, jitted once, state donated. Same public names: torchref/train.py.

    state, metrics = step(state, batch, scalars)

A batch is a dict of arrays [B, T]: inputs, targets, loss_mask, and optionally segments, positions and
expert_ids [B, T, L, A] (a routing to replay). Micro-batch m of
M holds rows m, m+M, m+2M, ... so that every device keeps its own rows when the batch is split.
"""

import functools
from collections.abc import Callable, Mapping
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
from jaxlm.model import Decoder, Params, abstract_model, init_params, merge_model
from jaxlm.optim import Scalars, clip_scale, global_norm, make_optimizer, opt_state_shardings
from jaxlm.sharding import Axes, batch_sharding, replicated, sharding
from jaxlm.vitals import expert_metrics, norms, router_entropy

Batch = dict[str, Array]
# Where weights are frozen: XLA would join x W and x a into one product, and keep a copy of W beside a for it, of every
# weight from the forward to the backward pass: 4 GB more of a 6-billion-parameter model, compiled for an H200.
FROZEN = {"xla_gpu_dot_merger_threshold_mb": 0}
# Parameters that half-precision runs compute with in master precision.
KEPT_WIDE = ("norm.weight", "router.weight", "router.weight.lora_a", "router.weight.lora_b")


class TrainState(NamedTuple):
    """Everything a step changes."""

    step: Array  # int32, optimizer steps done, skipped updates among them
    params: Params  # master weights by dotted path
    opt_state: Any  # the optax chain's state
    seed: Array  # uint32, dropout's; the key of a step is folded from it
    guard: Guard  # what was skipped, and what spikes are judged by


class Task(NamedTuple):
    """What is trained, and towards what: pretraining, fine-tuning, adapters and preferences differ in this alone.

    Parameters are flat dicts by dotted path; those that are trained come to `loss` and `evaluate` in the dtype of the
    computation, frozen ones as they lie.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]  # of what is trained, in the masters' dtype
    axes: Mapping[str, Axes]  # logical
    fresh: Callable[[], Params]  # what is trained, before the first step; traced
    # (params, frozen, batch, counts, train, key) -> loss and metrics of one micro-batch, which add up to the batch's
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    evaluate: Callable[
        [Params, Params, Batch], dict[str, Array]
    ]  # sums over a batch: loss_sum, tokens, others
    draws: bool  # whether training drops out anything
    frozen_shapes: Mapping[str, jax.ShapeDtypeStruct] = {}  # of what is used and not trained
    frozen_axes: Mapping[str, Axes] = {}
    # (batch, micro-batches) -> what the loss of the whole batch divides by; None = batch_counts
    count: Callable[[Batch, int], Counts] | None = None


def cast_params(params: Params, dtype: Any) -> Params:
    """One copy in the dtype of the computation; norms and the router stay in master precision."""
    return {k: v if k.endswith(KEPT_WIDE) else v.astype(dtype) for k, v in params.items()}


def pretraining(run: RunConfig, backends: Backends = Backends()) -> Task:
    """All weights of a decoder, towards the next token; the tokens that carry loss say of what."""
    abstract = abstract_model(run.model, backends, jnp.dtype(run.train.param_dtype), run.train.remat)

    def loss(
        params: Params, frozen: Params, batch: Batch, counts: Counts, train: bool, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        return loss_and_metrics(run, merge_model(abstract.graphdef, params), batch, counts, train, key)

    def evaluate(params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
        return evaluation(merge_model(abstract.graphdef, params), batch)

    fresh = functools.partial(init_params, run.model, run.train.seed, jnp.dtype(run.train.param_dtype))
    return Task(abstract.shapes, abstract.axes, fresh, loss, evaluate, bool(run.model.dropout))


def state_shardings(run: RunConfig, mesh: Mesh, task: Task | None = None) -> TrainState:
    """Where each part of the state lives: parameters and moments by their logical axes, the rest everywhere."""
    task = pretraining(run) if task is None else task
    params = {k: sharding(mesh, s.shape, task.axes[k]) for k, s in task.shapes.items()}
    whole = replicated(mesh)
    opt = opt_state_shardings(run.optim, task.shapes, task.axes, mesh)
    guard = jax.tree.map(lambda _: whole, jax.eval_shape(lambda: init_guard(run)))
    places: Any = (whole, params, opt, whole, guard)
    return TrainState(*places)


def frozen_shardings(mesh: Mesh, task: Task) -> dict[str, Any]:
    """Where each frozen parameter lives."""
    return {k: sharding(mesh, s.shape, task.frozen_axes[k]) for k, s in task.frozen_shapes.items()}


def state_shapes(run: RunConfig, task: Task | None = None) -> TrainState:
    """Shapes and dtypes of the state, without memory."""
    task = pretraining(run) if task is None else task
    return jax.eval_shape(lambda: _state_of(run, task.fresh()))


def _state_of(run: RunConfig, params: Params) -> TrainState:
    seed = jnp.asarray(run.train.seed, jnp.uint32)
    opt_state = make_optimizer(run.optim).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, seed, init_guard(run))


def init_state(
    run: RunConfig, mesh: Mesh | None = None, task: Task | None = None, params: Params | None = None
) -> TrainState:
    """A fresh state, created in place on the mesh; the same values on every mesh.

    params: what is trained, to start from; None = the task's own beginning. Their memory is taken over.
    """
    task = pretraining(run) if task is None else task
    places: dict[str, Any] = {} if mesh is None else {"out_shardings": state_shardings(run, mesh, task)}
    if params is None:
        return jax.jit(lambda: _state_of(run, task.fresh()), **places)()
    wide = {k: v.astype(task.shapes[k].dtype) for k, v in params.items()}
    if mesh is not None:
        wide = jax.device_put(wide, places["out_shardings"].params)
    return jax.jit(functools.partial(_state_of, run), donate_argnums=0, **places)(wide)


def loss_and_metrics(
    run: RunConfig,
    decoder: Decoder,
    batch: Batch,
    counts: Counts,
    train: bool,
    key: Array | None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one micro-batch and what a run wants to know about it; metrics add up to those of the batch."""
    model, details = run.model, run.log.details
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
    run: RunConfig, backends: Backends = Backends(), task: Task | None = None
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    """(params, batch, key, loss_scale, frozen) -> gradients and metrics of the whole batch.

    Accumulated over micro-batches. task: what the loss is; None = pretraining.

    With a loss scale, the loss is multiplied and the gradients are divided by it; the metrics are as without.
    """
    task = pretraining(run, backends) if task is None else task
    loss, dtype, M = task.loss, jnp.dtype(run.train.dtype), run.train.accumulation

    def micro(
        copies: Params, frozen: Params, batch: Batch, counts: Counts, key: Array | None, scale: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        total, metrics = loss(copies, frozen, batch, counts, True, key)
        return total if scale is None else total * scale.astype(total.dtype), metrics

    def accumulated(
        params: Params, frozen: Params, batch: Batch, counts: Counts, key: Array | None, scale: Array | None
    ) -> tuple[Params, dict[str, Array]]:
        # Differentiated by the copies, which are made once a step; sums are kept in the masters' dtype.
        copies = cast_params(params, dtype)

        def part_of(rows: Batch, key: Array | None) -> tuple[Params, dict[str, Array]]:
            grads, metrics = jax.grad(micro, has_aux=True)(copies, frozen, rows, counts, key, scale)
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
        params: Params,
        batch: Batch,
        key: Array | None = None,
        loss_scale: Array | None = None,
        frozen: Params | None = None,
    ) -> tuple[Params, dict[str, Array]]:
        wide = jnp.promote_types(dtype, jnp.float32)
        batch = batch | {"loss_mask": batch["loss_mask"].astype(wide)}
        counts = (task.count or batch_counts)(batch, M)
        grads, metrics = accumulated(params, frozen or {}, batch, counts, key, loss_scale)
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
    task: Task | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The jitted step: (state, batch, scalars, frozen) -> state, metrics.

    With a mesh, call it under `jax.set_mesh(mesh)`, the batch placed by `place_batch`. task: what is trained; None =
    pretraining, which has nothing frozen.

    Where `judge` does not accept the batch, parameters and optimizer state stay as they are, bit for bit. A batch may
    hold `stop` int32 [devices], in which each of several processes says whether it was asked to stop: the metric `stop`
    then tells them all.
    """
    task = pretraining(run, backends) if task is None else task
    gradients, optimizer, draws = make_gradient_fn(run, backends, task), make_optimizer(run.optim), task.draws

    def step(
        state: TrainState, batch: Batch, scalars: Scalars, frozen: Params | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        stop = {"stop": jnp.max(batch["stop"])} if "stop" in batch else {}
        batch = {name: rows for name, rows in batch.items() if name != "stop"}
        key = jax.random.fold_in(jax.random.key(state.seed), state.step) if draws else None
        scale = state.guard.loss_scale if run.train.dtype == "float16" else None
        grads, metrics = gradients(state.params, batch, key, scale, frozen)
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

    jitted = functools.partial(
        jax.jit, donate_argnums=0, compiler_options=FROZEN if task.frozen_shapes else None
    )
    if mesh is None:
        return jitted(step)
    return jitted(step, out_shardings=(state_shardings(run, mesh, task), replicated(mesh)))


def evaluation(decoder: Decoder, batch: Batch) -> dict[str, Array]:
    """Summed cross-entropy and loss-carrying tokens of one batch, nothing dropped, no dropout."""
    hidden, _, _ = decoder.hidden(batch["inputs"], batch.get("positions"), batch.get("segments"))
    weight, bias = decoder.head()
    tokens = chunked_token_loss(hidden, weight, bias, batch["targets"], batch["loss_mask"])
    return {"loss_sum": tokens.cross_entropy, "tokens": jnp.sum(batch["loss_mask"])}


def make_eval_step(
    run: RunConfig, backends: Backends = Backends(), task: Task | None = None
) -> Callable[..., dict[str, Array]]:
    """(params, batch, frozen) -> the task's sums over one batch, nothing dropped, no dropout."""
    task = pretraining(run, backends) if task is None else task
    own = task.evaluate

    def evaluate(params: Params, batch: Batch, frozen: Params | None = None) -> dict[str, Array]:
        return own(cast_params(params, jnp.dtype(run.train.dtype)), frozen or {}, batch)

    return jax.jit(evaluate, compiler_options=FROZEN if task.frozen_shapes else None)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh | None = None) -> Batch:
    """Puts a host batch on the device, or on the mesh with its rows split."""
    return jax.device_put(batch, None if mesh is None else batch_sharding(mesh))
