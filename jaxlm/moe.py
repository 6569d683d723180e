"""Mixture of experts: router, experts, balance losses. Twin: torchref/moe.py.

    y = sum over the A chosen experts e of  weight_e * MLP_e(x)   (+ shared expert)

Dropless by default. The router computes upcast; ties go to the lowest expert index in both frameworks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxlm.config import ModelConfig
from jaxlm.grouped import Activation, Backend, ExpertWeights, expert_mlp
from jaxlm.layers import MLP, Backends, Linear, init_std, make_param, split_key, upcast
from jaxlm.shapes import Bool, Float, Int
from jaxlm.sharding import BATCH_AXES, by_rows, constrain, current_mesh_shape

ROUTING = "routing"  # name of the chosen experts, for remat policies
PASSES = 8  # experts of a token that are found one after the other
UP_AXES = ("experts", None, "ffn")
DOWN_AXES = ("experts", "ffn", None)


class Routing(NamedTuple):
    """Where each token goes. `kept` is False where a capacity limit dropped the assignment."""

    logits: Float[Array, "B T E"]
    ids: Int[Array, "B T A"]
    weights: Float[Array, "B T A"]
    kept: Bool[Array, "B T A"]


def route(
    logits: Float[Array, "*B E"], n_active: int, renormalize: bool, ids: Int[Array, "*B A"] | None = None
) -> tuple[Array, Array]:
    """Ids [*B, A] of the largest logits, best first, lowest index on ties, and their softmax probabilities [*B, A].

    ids: the experts of a recorded routing, taken instead of the largest logits.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    if ids is None:
        named: Array = checkpoint_name(_largest(jax.lax.stop_gradient(logits), n_active), ROUTING)
        ids = named
    # A one-hot product instead of a gather: its gradient needs no scatter.
    weights = jnp.sum(probs[..., None, :] * jax.nn.one_hot(ids, logits.shape[-1], dtype=probs.dtype), axis=-1)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return ids, weights


def _largest(logits: Array, count: int) -> Array:
    """Indices [*B, count] of the largest logits, best first, the lowest of equals first."""
    if count > PASSES:
        # The partitioner would gather all tokens for it.
        return by_rows(lambda x: jax.lax.top_k(x, count)[1], logits)
    # A GPU sorts whole rows for top_k; this reads them `count` times, and is split over tokens as they are.
    rest, found = jnp.maximum(logits, jnp.finfo(logits.dtype).min), []
    for _ in range(count):
        best = jnp.argmax(rest, axis=-1)
        found.append(best)
        rest = jnp.where(jax.nn.one_hot(best, logits.shape[-1], dtype=bool), -jnp.inf, rest)
    return jnp.stack(found, axis=-1).astype(jnp.int32)


def within_capacity(
    ids: Int[Array, "B T A"], valid: Bool[Array, "B T"], n_experts: int, factor: float
) -> Bool[Array, "B T A"]:
    """True for the first int(factor * B*T / E) tokens of each expert in token order; padding takes no place."""
    B, T, A = ids.shape
    capacity = int(factor * B * T / n_experts)
    chosen_PE = jax.nn.one_hot(ids, n_experts, dtype=jnp.int32).sum(2) * valid[..., None]
    # Row by row, then what the rows before took: on a mesh only these totals, [B, E], leave their device.
    taken_BE = chosen_PE.sum(1)
    position_PE = jnp.cumsum(chosen_PE, axis=1) + (jnp.cumsum(taken_BE, axis=0) - taken_BE)[:, None]
    fits_PE = position_PE <= capacity
    return jnp.any(jax.nn.one_hot(ids, n_experts, dtype=bool) & fits_PE[:, :, None], axis=-1)


def balance_loss(
    reduction: str, logits: list[Array], ids: list[Array], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Load-balancing loss over the valid tokens of all MoE layers, uncoefficiented; 0 for reduction 'none'.

    With f_e the share of tokens that chose e (summing to A) and P_e the mean router probability, per layer:

    mixtral     E sum_e f_e P_e over the tokens of all layers pooled; A at balance. Source: transformers' Mixtral.
    layer_mean  mean over layers of E sum_e f_e P_e; A at balance.
    layer_sum   sum over layers of E sum_e f_e P_e; A L at balance. Source: gptoss.
    megatron    sum over layers of (E/A) sum_e f_e P_e; L at balance. Source: Megatron-Core, arXiv:2101.03961 eq. 4.
    levanter    sum over layers of (E/A) sum_e (f_e/A) P_e; L/A at balance. Source: Levanter's Mixtral.
    maxtext     mean over layers and sequences of E sum_e f_e P_e per sequence; A at balance. Source: MaxText.
    """
    if reduction == "none" or not logits:
        return jnp.zeros((), logits[0].dtype if logits else jnp.float32)
    n_experts, n_active = logits[0].shape[-1], ids[0].shape[-1]
    probs_LBTE = jax.nn.softmax(jnp.stack(logits), axis=-1)
    chosen_LBTE = jax.nn.one_hot(jnp.stack(ids), n_experts, dtype=probs_LBTE.dtype).sum(-2)
    weight_BT1 = valid[..., None].astype(probs_LBTE.dtype)
    per_sequence = reduction == "maxtext"
    axes = (2,) if per_sequence else (1, 2)
    count = jnp.maximum(jnp.sum(weight_BT1, axis=tuple(a - 1 for a in axes)), 1)
    f = jnp.sum(chosen_LBTE * weight_BT1, axis=axes) / count
    p = jnp.sum(probs_LBTE * weight_BT1, axis=axes) / count
    if reduction == "mixtral":
        return n_experts * jnp.sum(jnp.mean(f, axis=0) * jnp.mean(p, axis=0))
    loss = n_experts * jnp.sum(f * p, axis=-1)
    if per_sequence:
        filled = jnp.any(valid, axis=1).astype(loss.dtype)
        return jnp.mean(jnp.sum(loss * filled, axis=1) / jnp.maximum(jnp.sum(filled), 1))
    if reduction == "layer_mean":
        return jnp.mean(loss)
    divisor = {"layer_sum": 1, "megatron": n_active, "levanter": n_active**2}[reduction]
    return jnp.sum(loss) / divisor


def router_z_sum(logits: list[Array], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Sum over layers and valid tokens of logsumexp(router logits)^2. Source: ST-MoE, arXiv:2202.08906, eq. 5."""
    total = jnp.zeros((), logits[0].dtype if logits else jnp.float32)
    for layer in logits:
        total += jnp.sum(jax.nn.logsumexp(layer, axis=-1) ** 2 * valid)
    return total


class Experts(nnx.Module):
    """E expert MLPs, weights stacked over E: gate_up [E, D, 2F] ([gate | up]) or up [E, D, F], down [E, F, D]."""

    def __init__(self, config: ModelConfig, backends: Backends, *, rngs: nnx.Rngs, dtype: DTypeLike):
        E, D, F, bias = config.moe.n_experts, config.d_model, config.expert_d_ff, config.moe.expert_bias
        gated = config.mlp == "swiglu"
        up_std, down_std = init_std(config, D), init_std(config, F, residual=True)
        width = 2 * F if gated else F
        up = make_param((E, D, width), UP_AXES, up_std, rngs, dtype)
        up_bias = make_param((E, width), ("experts", "ffn"), 0.0, rngs, dtype) if bias else None
        self.gate_up, self.up = (up, None) if gated else (None, up)
        self.gate_up_bias, self.up_bias = (up_bias, None) if gated else (None, up_bias)
        self.down = make_param((E, F, D), DOWN_AXES, down_std, rngs, dtype)
        self.down_bias = make_param((E, D), ("experts", None), 0.0, rngs, dtype) if bias else None
        self.kind: Activation = config.mlp
        self.rate = config.dropout
        self.backend: Backend = backends.experts

    def weights(self, dtype: DTypeLike) -> ExpertWeights:
        """The stacked weights in the dtype of the computation."""
        up = self.gate_up if self.up is None else self.up
        up_bias = self.gate_up_bias if self.up is None else self.up_bias
        assert up is not None

        def cast(bias: nnx.Param | None) -> Array | None:
            return None if bias is None else bias[...].astype(dtype)

        # Pinned to where the masters lie, so that what is gathered for use is the cast copy, not the masters.
        up, down = (
            constrain(up[...].astype(dtype), UP_AXES),
            constrain(self.down[...].astype(dtype), DOWN_AXES),
        )
        return ExpertWeights(up, cast(up_bias), down, cast(self.down_bias))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ids: Int[Array, "B T A"],
        weights: Float[Array, "B T A"],
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """sum_a weights[a] * MLP_{ids[a]}(x), each device with its own experts under a mesh."""
        stacked = self.weights(x.dtype)
        if not current_mesh_shape():
            return self.local(x, ids, weights, stacked, key)
        return _over_mesh(self.local, x, ids, weights, stacked, key)

    def local(
        self, x: Array, ids: Array, weights: Array, stacked: ExpertWeights, key: Array | None = None
    ) -> Array:
        """The tokens and experts of one device; an id outside its experts contributes nothing."""
        return apply_experts(self, x, ids, weights, stacked, key)


def apply_experts(
    experts: Any,
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T A"],
    weights: Float[Array, "B T A"],
    stacked: ExpertWeights,
    key: Array | None = None,
) -> Float[Array, "B T D"]:
    """sum_a weights[a] * MLP_{ids[a]}(x) on weights that lie ready.

    experts: in whatever form it keeps them; its kind, backend and rate of dropout count.
    """
    out = expert_mlp(
        x.reshape(-1, x.shape[-1]),
        stacked,
        ids.reshape(-1, ids.shape[-1]),
        weights.reshape(-1, ids.shape[-1]),
        activation=experts.kind,
        backend=experts.backend,
        hidden_dropout=None if key is None or experts.rate == 0 else (key, experts.rate),
    )
    return out.reshape(x.shape)


def _over_mesh(
    local, x: Array, ids: Array, weights: Array, stacked: ExpertWeights, key: Array | None
) -> Array:
    """Expert parallelism: gather tokens along `expert`, compute the local experts, sum and scatter back.

    Along `tensor` each device computes its columns of every expert's hidden layer, and the outputs are summed. The
    weights are gathered over `fsdp` on entry. A hidden layer that `tensor` does not divide is computed whole.
    """
    shape, n_experts, hidden = current_mesh_shape(), *stacked.down.shape[:2]
    per_device, tensor = n_experts // shape["expert"], shape["tensor"]
    split = "tensor" if tensor > 1 and hidden % tensor == 0 else None

    def island(x: Array, ids: Array, weights: Array, halves: ExpertWeights, key: Array | None) -> Array:
        first = jax.lax.axis_index("expert") * per_device
        x, ids, weights = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, ids, weights))
        ids = jnp.where((ids >= first) & (ids < first + per_device), ids - first, per_device)
        if key is not None:
            for axis in (*BATCH_AXES, *([split] if split else [])):
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        if split and halves.down_bias is not None:  # of the sum over `tensor`, one device adds it
            halves = halves._replace(down_bias=jnp.where(jax.lax.axis_index(split) == 0, halves.down_bias, 0))
        out = local(x, ids, weights, _merge_halves(halves), key)
        out = jax.lax.psum(out, split) if split else out
        return jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)

    halves = _split_halves(stacked)
    places: Any = (
        PartitionSpec("expert", None, None, split),
        None if stacked.up_bias is None else PartitionSpec("expert", None, split),
        PartitionSpec("expert", split),
        None if stacked.down_bias is None else PartitionSpec("expert"),
    )
    columns = ExpertWeights(*places)
    rows = PartitionSpec(BATCH_AXES)
    in_specs = (rows, rows, rows, columns, None if key is None else PartitionSpec())
    made = jax.shard_map(island, in_specs=in_specs, out_specs=rows, check_vma=False)
    return made(x, ids, weights, halves, key)


def _split_halves(stacked: ExpertWeights) -> ExpertWeights:
    """Gate and up on an axis of their own, [E, D, 2 or 1, F], so that a split of F keeps their columns paired."""
    n_experts, hidden, _ = stacked.down.shape
    up, bias = stacked.up, stacked.up_bias
    return stacked._replace(
        up=up.reshape(n_experts, up.shape[1], -1, hidden),
        up_bias=None if bias is None else bias.reshape(n_experts, -1, hidden),
    )


def _merge_halves(halves: ExpertWeights) -> ExpertWeights:
    """The inverse of `_split_halves`."""
    up, bias = halves.up, halves.up_bias
    return halves._replace(
        up=up.reshape(*up.shape[:2], -1), up_bias=None if bias is None else bias.reshape(len(bias), -1)
    )


class MoE(nnx.Module):
    """Router, experts and an optional shared expert that every token passes through."""

    def __init__(self, config: ModelConfig, backends: Backends, *, rngs: nnx.Rngs, dtype: DTypeLike):
        D, moe = config.d_model, config.moe
        std = init_std(config, D)
        self.router = Linear(
            D, moe.n_experts, bias=False, std=std, axes=("embed", None), rngs=rngs, dtype=dtype
        )
        self.experts = Experts(config, backends, rngs=rngs, dtype=dtype)
        self.shared = MLP(config, moe.shared_d_ff, rngs=rngs, dtype=dtype) if moe.shared_d_ff else None
        gate_axes = ("embed", None)
        self.shared_gate = (
            Linear(D, 1, bias=False, std=std, axes=gate_axes, rngs=rngs, dtype=dtype)
            if moe.shared_gate
            else None
        )
        self.config = moe

    def __call__(
        self,
        x: Float[Array, "B T D"],
        valid: Bool[Array, "B T"],
        train: bool,
        key: Array | None = None,
        expert_ids: Int[Array, "B T A"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """The layer's output and its activations; a capacity limit holds in training only."""
        routing = self.routing(x, valid, train, expert_ids)
        expert_key, shared_key = split_key(key, 2)
        combine = jnp.where(routing.kept, routing.weights, 0).astype(x.dtype)
        combined = self.experts(x, routing.ids, combine, expert_key)
        acts = {"router_logits": routing.logits, "expert_ids": routing.ids, "weights": routing.weights}
        acts |= {"kept": routing.kept, "combined": combined}
        if self.shared is not None:
            shared = self.shared(x, shared_key)
            if self.shared_gate is not None:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x))
            combined = combined + shared
        return combined, acts

    def routing(
        self,
        x: Float[Array, "B T D"],
        valid: Bool[Array, "B T"],
        train: bool,
        expert_ids: Int[Array, "B T A"] | None = None,
    ) -> Routing:
        """Upcast router logits, chosen (or replayed) experts, their weights, and what a capacity limit keeps."""
        logits = self.router(upcast(x))
        ids, weights = route(logits, self.config.n_active, self.config.renormalize, expert_ids)
        kept = jnp.ones(ids.shape, bool)
        if train and self.config.capacity_factor:
            kept = within_capacity(ids, valid, self.config.n_experts, self.config.capacity_factor)
        return Routing(logits, ids, weights, kept)
