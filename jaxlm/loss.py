"""The training loss. Twin: torchref/loss.py.

    total = CE + z_loss_coef * Z + balance_coef * balance + router_z_coef * router_z

CE and Z are means over the tokens that carry loss; the head is applied chunk by chunk, so that the logits of all
tokens never exist at once. Under accumulation CE, Z and router_z are sums over the global count, which makes them
equal to the full batch; the balance loss is a product of means, taken per micro-batch and averaged.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxlm.config import ModelConfig
from jaxlm.head_loss import Options, head_loss
from jaxlm.layers import add_bias, upcast
from jaxlm.moe import balance_loss, router_z_sum
from jaxlm.shapes import Bool, Float, Int
from jaxlm.sharding import BATCH_AXES, constrain, current_mesh_shape


class TokenLoss(NamedTuple):
    """Sums over tokens, weighted by the loss mask. Only `loss` carries a gradient."""

    loss: Float[Array, ""]  # cross_entropy + z_coef * z
    cross_entropy: Float[Array, ""]
    z: Float[Array, ""]
    entropy: Float[Array, ""]  # of the softmax, in nats; zero unless asked for


class Terms(NamedTuple):
    """The parts of the loss, uncoefficiented, and their weighted total."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    z: Float[Array, ""]
    balance: Float[Array, ""]
    router_z: Float[Array, ""]


class Counts(NamedTuple):
    """What the sums are divided by: loss-carrying tokens and valid tokens of the whole batch, and micro-batches."""

    loss_tokens: Float[Array, ""]
    valid_tokens: Float[Array, ""]
    microbatches: int


def token_loss(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    z_coef: float = 0.0,
    entropy: bool = False,
) -> TokenLoss:
    """Cross-entropy in nats, logsumexp^2 and, if asked, entropy, summed over tokens with weight `mask`; logits upcast.

    Source of the z term: PaLM, arXiv:2204.02311, section 5.
    """
    B, T, _ = hidden.shape
    logits = hidden @ weight.astype(hidden.dtype)
    wide = upcast(logits if bias is None else add_bias(logits, bias))
    log_z = jax.nn.logsumexp(wide, axis=-1)
    # A product instead of a gather: its gradient needs no scatter, and no constant is as large as the logits.
    hit = jnp.arange(wide.shape[-1], dtype=jnp.int32) == targets[..., None]
    target_logit = jnp.sum(wide * hit.astype(wide.dtype), axis=-1)
    mask = mask.astype(wide.dtype)
    spread = _entropy(wide, log_z) if entropy else jnp.zeros_like(mask)
    cross_entropy, z = jnp.sum((log_z - target_logit) * mask), jnp.sum(log_z**2 * mask)
    told = jax.lax.stop_gradient((cross_entropy, z, jnp.sum(spread * mask)))
    return TokenLoss(cross_entropy + z_coef * z, *told)


def _entropy(logits: Float[Array, "B T V"], log_z: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """H = log Z - sum p x, in nats."""
    x, log_z = jax.lax.stop_gradient((logits, log_z))
    return log_z - jnp.sum(jnp.exp(x - log_z[..., None]) * x, axis=-1)


def chunked_token_loss(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    z_coef: float = 0.0,
    chunk_logits: int | None = None,
    entropy: bool = False,
) -> TokenLoss:
    """`token_loss` over chunks of tokens, the gradients formed in the forward pass: see jaxlm/head_loss.py.

    Under a mesh each device takes its own rows and, along `tensor`, its own part of T with the whole vocabulary:
    whatever its size, no logit is made twice. `chunk_logits` is per device, None chooses by the platform; the head's
    gradient is summed over devices once, after the last chunk.
    """
    options = Options(z_coef, chunk_logits, entropy)
    shape = current_mesh_shape()
    if not shape or hidden.shape[0] % math.prod(shape[axis] for axis in BATCH_AXES):
        return _of_tokens(options, hidden, weight, bias, targets, mask)
    # Pinned to where the master lies, so that what is gathered is the copy in the computation's dtype.
    weight = constrain(weight, ("embed", "vocab"))
    tail = -hidden.shape[1] % shape["tensor"]
    hidden, targets, mask = (
        jnp.pad(x, ((0, 0), (0, tail), *((0, 0),) * (x.ndim - 2))) for x in (hidden, targets, mask)
    )

    def island(x: Array, weight: Array, bias: Array | None, targets: Array, mask: Array) -> TokenLoss:
        own = _of_tokens(options, x, weight, bias, targets, mask)
        return jax.lax.psum(own, (*BATCH_AXES, "tensor"))

    tokens, whole = PartitionSpec(BATCH_AXES, "tensor"), PartitionSpec()
    in_specs = (tokens, whole, None if bias is None else whole, tokens, tokens)
    made = jax.shard_map(island, in_specs=in_specs, out_specs=whole, check_vma=False)
    return made(hidden, weight, bias, targets, mask)


def _of_tokens(
    options: Options, hidden: Array, weight: Array, bias: Array | None, targets: Array, mask: Array
) -> TokenLoss:
    """Rows laid end to end: a chunk of tokens may hold parts of several."""
    dtype = hidden.dtype
    x, y, m = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), mask.reshape(-1)
    bias = None if bias is None else bias.astype(dtype)
    sums: Any = head_loss(options, x, weight.astype(dtype), bias, y, m)
    return TokenLoss(*sums)


def total_loss(
    config: ModelConfig,
    tokens: TokenLoss,
    acts: dict[str, Array],
    valid: Bool[Array, "B T"],
    counts: Counts,
) -> Terms:
    """All terms of one micro-batch, such that their sums over the micro-batches are the batch's."""
    moe, layers = config.moe, [i for i in range(config.n_layers) if config.is_moe(i)]
    cross_entropy, z = tokens.cross_entropy / counts.loss_tokens, tokens.z / counts.loss_tokens
    total = tokens.loss / counts.loss_tokens
    balance = router_z = jnp.zeros_like(total)
    if layers:
        logits = [acts[f"blocks.{i}.moe.router_logits"] for i in layers]
        ids = [acts[f"blocks.{i}.moe.expert_ids"] for i in layers]
        balance = balance_loss(moe.balance, logits, ids, valid) / counts.microbatches
        router_z = router_z_sum(logits, valid) / counts.valid_tokens
        total = total + moe.balance_coef * balance + moe.router_z_coef * router_z
    return Terms(total, cross_entropy, z, balance, router_z)
