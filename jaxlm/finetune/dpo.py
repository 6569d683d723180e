"""Direct preference optimisation: a policy learns which of two answers is better. Twin: torchref/finetune/dpo.py.

    l = log p(answer | prompt), summed over the answer's tokens;  d = l - l of the reference
    sigmoid   -(1 - s) log sigmoid(beta (d_c - d_r)) - s log sigmoid(beta (d_r - d_c))
    ipo       (d_c / n_c - d_r / n_r - 1 / (2 beta))^2

c is the chosen answer, r the rejected one, n the number of an answer's tokens. Sources: sigmoid arXiv:2305.18290, eq.
7, with label smoothing s as conservative DPO has it (Mitchell 2023); ipo arXiv:2310.12036, eq. 17, of log-probabilities
per token as TRL takes them, which its authors confirmed. A batch is that of jaxlm/train.py with two sequences a row:
arrays are [B, 2, T], the chosen answer first, and `reference` [B, 2] holds l of the reference where it is stored.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxlm.distributed import own_rows, place_rows
from jaxlm.finetune.lora import adapted, adapted_decoder, init_factors
from jaxlm.head_loss import head_log_probs
from jaxlm.layers import Backends
from jaxlm.loss import Counts, Terms, TokenLoss, total_loss
from jaxlm.model import Abstract, Decoder, Params, abstract_model, init_params, merge_model
from jaxlm.quant import abstract_quantized
from jaxlm.shapes import Float, Int
from jaxlm.sharding import BATCH_AXES, constrain, current_mesh_shape, replicated
from jaxlm.train import Batch, Task, batch_counts, cast_params, place_batch
from jaxlm.tune_config import DpoConfig, TuneRun
from jaxlm.vitals import expert_metrics, router_entropy


def answer_log_probs(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    chunk_logits: int | None = None,
) -> Float[Array, " B"]:
    """Log-probabilities in nats, upcast, summed over each row's tokens with weight `mask`.

    The head is applied chunk by chunk, in the backward pass again: the logits of all tokens never exist at once. Under
    a mesh each device takes its own rows and, along `tensor`, its own part of T with the whole vocabulary; chunk_logits
    is per device, None chooses by the platform.
    """
    shape = current_mesh_shape()
    if not shape or hidden.shape[0] % math.prod(shape[axis] for axis in BATCH_AXES):
        log_probs = _of_tokens(chunk_logits, hidden, weight, bias, targets)
    else:
        # Pinned to where the master lies, so that what is gathered is the copy in the computation's dtype.
        weight, tail = constrain(weight, ("embed", "vocab")), -hidden.shape[1] % shape["tensor"]
        hidden, targets = (
            jnp.pad(x, ((0, 0), (0, tail), *((0, 0),) * (x.ndim - 2))) for x in (hidden, targets)
        )
        tokens, whole = PartitionSpec(BATCH_AXES, "tensor"), PartitionSpec()
        log_probs = jax.shard_map(
            functools.partial(_of_tokens, chunk_logits),
            in_specs=(tokens, whole, None if bias is None else whole, tokens),
            out_specs=tokens,
            check_vma=False,
        )(hidden, weight, bias, targets)[:, : mask.shape[1]]
    return jnp.sum(log_probs * mask.astype(log_probs.dtype), axis=1)


def _of_tokens(
    chunk_logits: int | None, hidden: Array, weight: Array, bias: Array | None, targets: Array
) -> Array:
    """Of each token [B, T]; rows are laid end to end, so a chunk may hold parts of several."""
    dtype = hidden.dtype
    bias = None if bias is None else bias.astype(dtype)
    x = hidden.reshape(-1, hidden.shape[-1])
    return head_log_probs(chunk_logits, x, weight.astype(dtype), bias, targets.reshape(-1)).reshape(
        targets.shape
    )


def preference_loss(
    config: DpoConfig,
    policy: Float[Array, "B 2"],
    reference: Float[Array, "B 2"],
    lengths: Float[Array, "B 2"],
) -> tuple[Float[Array, " B"], Float[Array, "B 2"]]:
    """Loss of each pair, and the rewards beta (l - l of the reference), which carry no gradient.

    policy, reference: summed log-probabilities of the answers, chosen first; lengths: tokens of the answers, of which
    only ipo knows.
    """
    ratios = policy - reference
    rewards = jax.lax.stop_gradient(config.beta * ratios)
    if config.loss == "ipo":
        means = ratios / jnp.maximum(lengths, 1)
        return (means[:, 0] - means[:, 1] - 1 / (2 * config.beta)) ** 2, rewards
    logits, flipped = config.beta * (ratios[:, 0] - ratios[:, 1]), config.label_smoothing
    loss = -(1 - flipped) * jax.nn.log_sigmoid(logits)
    return loss - flipped * jax.nn.log_sigmoid(-logits) if flipped else loss, rewards


def pair_counts(batch: Batch, microbatches: int) -> Counts:
    """What the loss of a batch of pairs divides by: `loss_tokens` is the number of pairs that carry loss."""
    counts = batch_counts(batch, microbatches)
    return counts._replace(loss_tokens=jnp.maximum(jnp.sum(_real(batch["loss_mask"])), 1))


def _real(mask: Array) -> Array:
    """[B]: 1 for a pair, 0 for what fills a batch up."""
    return jnp.any(mask > 0, axis=(1, 2)).astype(mask.dtype)


def dpo_task(run: TuneRun, backends: Backends = Backends()) -> Task:
    """All weights where the run has no adapter, else the factors; the loss is the mean over the pairs of a batch.

    The reference is the frozen base without its adapter (adapter_off, and frozen with an adapter), weights of its own
    that stay as they were at the start (frozen, without an adapter: they are then what is `frozen`, in train.dtype), or
    what the batch stores. It is computed without dropout, gradient or capacity limit; the policy as in any training.

    Balance and router z terms of MoE models are those of the policy's tokens with the model's own coefficients, as in
    any training; there is no z-loss of the head. The accuracy is the share of pairs whose chosen answer has the larger
    reward, which a tie has not. Evaluation sums the preference loss alone, and its `tokens` are pairs.
    """
    adapter, stored = run.tune.adapter, run.tune.reference == "stored"
    reference = None if stored else _reference(run, backends)
    form = None if adapter is None else adapted(run, backends)
    dtype = jnp.dtype(run.train.param_dtype)
    whole = abstract_model(run.model, backends, dtype, run.train.remat)

    def policy_of(params: Params, frozen: Params, key: Array | None) -> Decoder:
        if form is None:
            return merge_model(whole.graphdef, params)
        return adapted_decoder(form.graphdef, frozen, params, key)

    def references(frozen: Params, batch: Batch) -> Array:
        given = batch["reference"] if reference is None else _answers(reference(frozen), batch)[0]
        return jax.lax.stop_gradient(given)

    def loss(
        params: Params, frozen: Params, batch: Batch, counts: Counts, train: bool, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        policy, acts = _answers(policy_of(params, frozen, key), batch, train, key)
        sums = _sums(run.tune.dpo, policy, references(frozen, batch), batch["loss_mask"])
        return _total(run, sums, acts, _valid(batch), counts)

    def evaluate(params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
        policy, _ = _answers(policy_of(params, frozen, None), batch)
        sums = _sums(run.tune.dpo, policy, references(frozen, batch), batch["loss_mask"])
        return {"loss_sum": sums.pop("loss"), "tokens": jnp.sum(_real(batch["loss_mask"])), **sums}

    if form is not None:
        shapes, axes = form.shapes, form.axes
        fresh = functools.partial(init_factors, run)
        kept: Any = (form.frozen_shapes, form.frozen_axes)
    else:
        shapes, axes = whole.shapes, whole.axes
        fresh = functools.partial(init_params, run.model, run.train.seed, dtype)
        cast = functools.partial(cast_params, dtype=jnp.dtype(run.train.dtype))
        kept = ({}, {}) if stored else (jax.eval_shape(cast, shapes), axes)
    draws = bool(run.model.dropout or (adapter and adapter.dropout))
    frozen_shapes, frozen_axes = kept
    return Task(shapes, axes, fresh, loss, evaluate, draws, frozen_shapes, frozen_axes, pair_counts)


def _reference(run: TuneRun, backends: Backends) -> Callable[[Params], Decoder]:
    """The decoder of the reference from its weights: those of the run's base, quantised if that is."""
    abstract: Abstract = (
        abstract_model(run.model, backends)
        if run.tune.quant == "none"
        else abstract_quantized(run.model, run.tune.quant, backends)
    )
    return functools.partial(merge_model, abstract.graphdef)


def _answers(
    decoder: Decoder, batch: Batch, train: bool = False, key: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Summed log-probabilities [B, 2] of the answers and the activations of the 2B sequences."""
    rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items() if name != "reference"}
    positions, segments = rows.get("positions"), rows.get("segments")
    routing = rows.get("expert_ids")
    hidden, acts, _ = decoder.hidden(
        rows["inputs"], positions, segments, train=train, key=key, expert_ids=routing
    )
    weight, bias = decoder.head()
    sums = answer_log_probs(hidden, weight, bias, rows["targets"], rows["loss_mask"])
    return sums.reshape(-1, 2), acts


def _valid(batch: Batch) -> Array:
    """Tokens of the 2B sequences that are no padding."""
    inputs = batch["inputs"]
    valid = batch["segments"] > 0 if "segments" in batch else jnp.ones(inputs.shape, bool)
    return valid.reshape(-1, inputs.shape[-1])


def _sums(config: DpoConfig, policy: Array, reference: Array, mask: Array) -> dict[str, Array]:
    """Loss and what goes with it, summed over the pairs of a batch."""
    mask = mask.astype(policy.dtype)
    loss, rewards = preference_loss(config, policy, reference.astype(policy.dtype), jnp.sum(mask, -1))
    margin, log_probs = rewards[:, 0] - rewards[:, 1], jax.lax.stop_gradient(policy)
    values = {
        "loss": loss,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margin": margin,
        "rewards/accuracy": (margin > 0).astype(margin.dtype),
        "logps/chosen": log_probs[:, 0],
        "logps/rejected": log_probs[:, 1],
    }
    return {name: jnp.sum(value * _real(mask)) for name, value in values.items()}


def _total(
    run: TuneRun, sums: dict[str, Array], acts: dict[str, Array], valid: Array, counts: Counts
) -> tuple[Array, dict[str, Array]]:
    """The loss of one micro-batch and its metrics, which add up to those of the batch."""
    loss, zero = sums["loss"], jnp.zeros_like(sums["loss"])
    terms: Terms = total_loss(run.model, TokenLoss(loss, loss, zero, zero), acts, valid, counts)
    metrics = {name: jax.lax.stop_gradient(value) / counts.loss_tokens for name, value in sums.items()}
    metrics |= {"balance": terms.balance, "router_z": terms.router_z, "total_loss": terms.total}
    metrics |= expert_metrics(run.model, acts, valid, counts)
    if run.log.details:
        metrics |= router_entropy(run.model, acts, valid, counts)
    return terms.total, metrics


def reference_log_probs(
    run: TuneRun,
    reference: Params,
    batches: Iterable[dict[str, np.ndarray]],
    backends: Backends = Backends(),
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n 2"]:
    """What a batch stores as `reference`, of the pairs of all batches in their order; no rows for what fills one up.

    reference: weights of the run's base by path, on the mesh, quantised if it is; they are used in train.dtype.
    progress: is told the number of pairs after every batch. Among several processes each is given whole batches.
    """
    decoder, dtype = _reference(run, backends), jnp.dtype(run.train.dtype)
    quantised = run.tune.quant != "none"

    def answers(weights: Params, batch: Batch) -> Array:
        return _answers(decoder(weights if quantised else cast_params(weights, dtype)), batch)[0]

    def placed(batch: dict[str, np.ndarray]) -> Batch:
        size = len(batch["inputs"])
        rows = own_rows(mesh, size)
        if rows is None or mesh is None:
            return place_batch(batch, mesh)
        return place_rows({name: x[rows] for name, x in batch.items()}, mesh, rows, size)

    compiled = jax.jit(answers) if mesh is None else jax.jit(answers, out_shardings=replicated(mesh))
    found: list[np.ndarray] = []
    pairs = 0
    for batch in batches:
        batch = {name: x for name, x in batch.items() if name != "reference"}
        if mesh is None:
            values = compiled(reference, placed(batch))
        else:
            with jax.set_mesh(mesh):
                values = compiled(reference, placed(batch))
        found.append(np.asarray(values)[(batch["loss_mask"] > 0).any((1, 2))])
        pairs += len(found[-1])
        if progress is not None:
            progress(pairs)
    return np.concatenate(found)
