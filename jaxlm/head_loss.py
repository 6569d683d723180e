"""The loss of a linear head, its gradients formed in the forward pass, chunk by chunk over the tokens.

    logits = x W + b,  log Z = logsumexp(logits),  loss = sum_t m_t (log Z_t - logits_t[y_t] + c log Z_t^2)
    d loss / d logits_t = m_t (softmax(logits_t) (1 + 2 c log Z_t) - onehot(y_t))

The loss is a number, so its gradient is known but for a factor as soon as a chunk's logits are: dx and dW are formed
while the logits are there, and scaled by the cotangent later. That takes 6 floating-point operations per weight and
token, as many as without chunks, and nothing of size tokens x vocabulary outlives its chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.layers import upcast
from jaxlm.shapes import Float, Int

CPU_TOKENS = (
    512  # of a chunk: the sum of weight gradients is then seldom read, the logits are seldom far away
)
GPU_TOKENS, GPU_BYTES = 2**14, 2**32  # of a chunk at most; its logits in the dtype of the computation
LANES = (
    128  # a vocabulary in chunks is padded to a multiple, so that every row of its matrices starts aligned
)


class Options(NamedTuple):
    """What is fixed when the program is traced."""

    z_coef: float
    chunk_logits: int | None  # logits of one chunk; None: as the platform likes it
    entropy: bool


class Sums(NamedTuple):
    """Sums over tokens, weighted by the mask."""

    loss: Float[Array, ""]  # cross_entropy + z_coef * z
    cross_entropy: Float[Array, ""]
    z: Float[Array, ""]
    entropy: Float[Array, ""]  # zero unless asked for


class _Tokens(NamedTuple):
    """Of each token, unweighted [P]."""

    cross_entropy: Array
    log_z: Array
    entropy: Array


class _Gradients(NamedTuple):
    """For a cotangent of one: hidden states' in their own dtype, the sums over tokens in at least float32."""

    hidden: Array
    weight: Array
    bias: Array | None


class _Form(NamedTuple):
    """How a platform likes it."""

    chunk: int  # tokens
    upright: bool  # products of matrices that lie as they are read, yielding at least float32


class _Head(NamedTuple):
    """What every chunk is multiplied by; columns beyond the vocabulary are padding."""

    weight: Array
    turned: Array  # its transpose
    bias: Array | None
    vocabulary: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(
    options: Options,
    hidden: Float[Array, "P D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, " P"],
    mask: Float[Array, " P"],
) -> Sums:
    """The sums, of which only `loss` carries a gradient; without differentiation no gradient is formed."""
    tokens, _ = _by_platform(options, False, hidden, weight, bias, targets, mask)
    return _sums(options, tokens, mask)


def _forward(
    options: Options, hidden: Array, weight: Array, bias: Array | None, targets: Array, mask: Array
) -> tuple[Sums, tuple[Any, Any]]:
    tokens, gradients = _by_platform(options, True, hidden, weight, bias, targets, mask)
    losses = tokens.cross_entropy + options.z_coef * tokens.log_z**2
    # A rule can save arrays only; of these nothing but the dtype is wanted.
    likes = [None if x is None else jnp.zeros((), x.dtype) for x in (hidden, weight, bias, mask)]
    return _sums(options, tokens, mask), ((*gradients, losses), likes)


def _backward(options: Options, saved: tuple[Any, Any], cotangent: Sums) -> tuple[Any, ...]:
    hidden, weight, bias, mask = (
        None if like is None else (upcast(gradient) * cotangent.loss).astype(like.dtype)
        for gradient, like in zip(*saved, strict=True)
    )
    return hidden, weight, bias, None, mask


head_loss.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_log_probs(
    chunk_logits: int | None,
    hidden: Float[Array, "P D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, " P"],
) -> Float[Array, " P"]:
    """Log-probability of each target, in nats. Its cotangents are many, so the backward pass makes the logits again."""
    options, none = Options(0.0, chunk_logits, False), jnp.zeros(targets.shape, hidden.dtype)
    return -_by_platform(options, False, hidden, weight, bias, targets, none)[0].cross_entropy


def _log_probs_forward(chunk_logits: int | None, *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    return head_log_probs(chunk_logits, *inputs), inputs


def _log_probs_backward(
    chunk_logits: int | None, inputs: tuple[Any, ...], cotangent: Array
) -> tuple[Any, ...]:
    # The gradient of sum_t c_t log p_t is the loss's, with the mask -c.
    _, gradients = _by_platform(Options(0.0, chunk_logits, False), True, *inputs, -cotangent)
    of_parameters = (
        None if like is None else gradient.astype(like.dtype)
        for gradient, like in zip(gradients, inputs[:3], strict=True)
    )
    return (*of_parameters, None)


head_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _sums(options: Options, tokens: _Tokens, mask: Array) -> Sums:
    cross_entropy, z, entropy = (
        jnp.sum(x * mask.astype(x.dtype)) for x in (tokens.cross_entropy, tokens.log_z**2, tokens.entropy)
    )
    return Sums(cross_entropy + options.z_coef * z, cross_entropy, z, entropy)


def _by_platform(options: Options, gradients: bool, hidden: Array, weight: Array, *rest: Array | None) -> Any:
    """Chosen when the program is lowered: what is compiled for a GPU that is absent is the GPU's."""
    V, fitting = weight.shape[1], GPU_BYTES // (hidden.dtype.itemsize * weight.shape[1])
    told = options.chunk_logits and max(1, options.chunk_logits // V)
    fast = _Form(told or min(GPU_TOKENS, 2 ** max(0, fitting.bit_length() - 1)), False)
    run = functools.partial(_over_chunks, options, gradients)
    cpu, other = functools.partial(run, _Form(told or CPU_TOKENS, True)), functools.partial(run, fast)
    return jax.lax.platform_dependent(hidden, weight, *rest, cpu=cpu, default=other)


def _over_chunks(
    options: Options,
    gradients: bool,
    form: _Form,
    hidden: Array,
    weight: Array,
    bias: Array | None,
    targets: Array,
    mask: Array,
) -> tuple[_Tokens, _Gradients | None]:
    """Every token's terms and, if asked for, the gradients: summed over chunks in at least float32."""
    (P, _), V, chunks = hidden.shape, weight.shape[1], -(-hidden.shape[0] // form.chunk)
    if chunks <= 1:
        head = _Head(weight, weight.T, bias, V)
        return _chunk(options, gradients, form.upright, head, hidden, hidden.T, targets, mask)
    weight = jnp.pad(weight, ((0, 0), (0, -V % LANES)))
    bias = None if bias is None else jnp.pad(bias, (0, -V % LANES))
    head, length = _Head(weight, weight.T, bias, V), -(-P // chunks)

    def split(x: Array) -> Array:
        """[P, ...] -> [chunks, length, ...]; the tail is filled with zeros, whose mask is zero too."""
        x = jnp.pad(x, ((0, chunks * length - P), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, length, *x.shape[1:])

    def body(total: Any, chunk: tuple[Array, ...]) -> tuple[Any, Any]:
        tokens, found = _chunk(options, gradients, form.upright, head, *chunk)
        if found is None:
            return total, (tokens, None)
        return jax.tree.map(jnp.add, total, (found.weight, found.bias)), (tokens, found.hidden)

    x, wide = split(hidden), jnp.promote_types(hidden.dtype, jnp.float32)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide), (weight, bias)) if gradients else None
    total, found = jax.lax.scan(body, zeros, (x, x.swapaxes(1, 2), split(targets), split(mask)))
    tokens, by_hidden = jax.tree.map(lambda y: y.reshape(chunks * length, *y.shape[2:])[:P], found)
    if not gradients:
        return tokens, None
    return tokens, _Gradients(by_hidden, total[0][:, :V], None if bias is None else total[1][:V])


def _chunk(
    options: Options,
    gradients: bool,
    upright: bool,
    head: _Head,
    x: Float[Array, "P D"],
    turned: Float[Array, "D P"],
    targets: Int[Array, " P"],
    mask: Float[Array, " P"],
) -> tuple[_Tokens, _Gradients | None]:
    """Terms and gradients of one chunk, whose logits end here."""
    dtype, wide, V = x.dtype, jnp.promote_types(x.dtype, jnp.float32), head.vocabulary
    dot = functools.partial(jnp.dot, preferred_element_type=wide if upright else dtype)
    logits = upcast(dot(x, head.weight))
    logits = logits if head.bias is None else logits + upcast(head.bias)
    column = jnp.arange(logits.shape[1], dtype=jnp.int32)
    if logits.shape[1] > V:  # the least finite number has probability zero, and zero times it is zero
        logits = jnp.where(column < V, logits, jnp.finfo(wide).min)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1)
    log_z = jnp.log(total) + top[:, 0]
    # Nothing differentiates this, so a lookup may be one. A target outside of the vocabulary has no logit.
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    picked = jnp.where((targets >= 0) & (targets < V), picked, 0)
    entropy = log_z - jnp.sum(exp * logits, axis=-1) / total if options.entropy else jnp.zeros_like(log_z)
    tokens = _Tokens(log_z - picked, log_z, entropy)
    if not gradients:
        return tokens, None
    mask = mask.astype(wide)
    share, hit = mask * (1 + 2 * options.z_coef * log_z) / total, column == targets[:, None]
    grad = (exp * share[:, None] - jnp.where(hit, mask[:, None], 0)).astype(dtype)
    by_weight = jnp.dot(turned if upright else x.T, grad, preferred_element_type=wide)
    half = upright and wide != dtype
    by_hidden = dot(grad, head.turned if half else head.weight.T).astype(dtype)
    by_bias = None if head.bias is None else jnp.sum(upcast(grad), axis=0)
    return tokens, _Gradients(by_hidden, by_weight, by_bias)
