"""Causal attention over a whole sequence, block of queries by block of queries, with a gradient written by hand.

    P = exp(q k^T / sqrt(H) - max);    out = P v / sum(P)

A block of queries meets only the keys that causality and the window leave it: of half the products none is made. Kept
for the gradient are P, in the dtype of the values, the sums, and the output. With dP = (dout / sum) v^T and
D = rows' sums of dout * out,

    dS = P (dP - D / sum) / sqrt(H);    dq = dS k;    dk = dS^T q;    dv = P^T (dout / sum)

Source of the formulas: FlashAttention, arXiv:2205.14135, appendix B.2, with P left unnormalised.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.shapes import Bool, Float

LEAST_BLOCK, MOST_BLOCKS = (
    128,
    4,
)  # queries of a block; blocks of a sequence: more are less work and longer programs


class Span(NamedTuple):
    """A block of queries, and the keys that it may see at most."""

    start: int
    stop: int
    first_key: int
    last_key: int


def spans(length: int, window: int) -> tuple[Span, ...]:
    """The blocks of a causal sequence; window: positions that a query sees, 0 = all."""
    block = max(LEAST_BLOCK, -(-length // MOST_BLOCKS))
    ends = [*range(block, length, block), length]
    starts = [0, *ends[:-1]]
    return tuple(
        Span(a, b, max(0, a - window + 1) if window else 0, b) for a, b in zip(starts, ends, strict=True)
    )


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "#B T T"],
    window: int,
) -> Float[Array, "B T N H"]:
    """Attention under a mask that lets no query see a later key, nor one `window` or more before it (0 = any).

    Softmax upcast; a query that may see no key gives zeros. float16 is computed in float32: gradients divided by the
    sums, and those of the scores, are smaller than it can say.
    """
    if q.dtype != jnp.float16:
        return _by_blocks(q, k, v, mask, window)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    return _by_blocks(*wide, mask, window).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_blocks(q: Array, k: Array, v: Array, mask: Array, window: int) -> Array:
    return _forward(q, k, v, mask, window)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array, window: int) -> tuple[Array, Any]:
    queries, keys, values = _by_head(q, k.shape[2]), _by_head(k, k.shape[2]), _by_head(v, k.shape[2])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    outs, kept = [], []
    for span in spans(q.shape[1], window):
        rows, columns = slice(span.start, span.stop), slice(span.first_key, span.last_key)
        scores = _product(queries[:, :, :, rows], keys[:, :, 0, columns], "nt").astype(wide) * _scale(q)
        weights, total = _exponentials(scores, mask[:, None, None, rows, columns])
        weights = weights.astype(v.dtype)
        outs.append((_product(weights, values[:, :, 0, columns], "nn") / total).astype(v.dtype))
        kept.append((weights, total))
    out = _by_token(jnp.concatenate(outs, axis=3))
    return out, (q, k, v, out, tuple(kept))


def _backward(window: int, saved: Any, dout: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, out, kept = saved
    K, dtype = k.shape[2], q.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    queries, keys, values, douts = (_by_head(x, K) for x in (q, k, v, dout))
    shift = _by_head(_row_products(dout.astype(wide), out.astype(wide)), K)
    dq: list[Array] = []
    dk = dv = jnp.zeros((), wide)
    for span, (weights, total) in zip(spans(q.shape[1], window), kept, strict=True):
        rows, columns = slice(span.start, span.stop), slice(span.first_key, span.last_key)
        dout_rows = (douts[:, :, :, rows] / total).astype(v.dtype)
        dweights = _product(dout_rows, values[:, :, 0, columns], "nt")
        inner = shift[:, :, :, rows]
        if dtype.itemsize == 2:  # the output is rounded: with its sums, those of dS would not be zero
            inner = jnp.sum(weights.astype(wide) * dweights, axis=-1, keepdims=True)
        dscores = (weights * (dweights - inner / total) * _scale(q)).astype(dtype)
        dq.append(_product(dscores, keys[:, :, 0, columns], "nn").astype(dtype))
        outside = ((0, 0), (0, 0), (0, 0), (span.first_key, q.shape[1] - span.last_key))
        dk += jnp.pad(_product(queries[:, :, :, rows], dscores, "tn"), outside)
        dv += jnp.pad(_product(dout_rows, weights, "tn"), outside)
    dk, dv = (jnp.moveaxis(x, (0, 1, 2, 3), (0, 2, 3, 1)).astype(dtype) for x in (dk, dv))
    return _by_token(jnp.concatenate(dq, axis=3)), dk, dv, None


_by_blocks.defvjp(_forward, _backward)


def _exponentials(
    scores: Float[Array, "B K G T S"], mask: Bool[Array, "#B 1 1 T S"]
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T 1"]]:
    """The softmax's numerators and their sums; a row without any key has zeros and the sum 1."""
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights, jnp.where(total == 0, 1, total)


def _row_products(a: Float[Array, "B T N H"], b: Float[Array, "B T N H"]) -> Float[Array, "B T N 1"]:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _scale(q: Array) -> float:
    return q.shape[-1] ** -0.5


def _by_head(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T H"]:
    B, T, N, H = x.shape
    return _row_major(x.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4))


def _by_token(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _row_major(x: Array) -> Array:
    """x, said to lie row by row: without it XLA's CPU compiler takes half-precision products apart."""
    return x.reshape(*x.shape[:-2], -1).reshape(x.shape)


def _product(a: Array, b: Array, form: str) -> Array:
    """Products of all heads, in float32 at least; the G query heads of a kv head are rows of one product.

    nn: [B, K, G, T, S] x [B, K, S, H] -> [B, K, G, T, H]; nt: [B, K, G, T, H] x [B, K, S, H] -> [B, K, G, T, S];
    tn: [B, K, G, T, H] x [B, K, G, T, S] -> [B, K, H, S], turning only the narrow factor.
    """
    wide, barred = jnp.promote_types(a.dtype, jnp.float32), jax.lax.optimization_barrier
    B, K, G, T, _ = a.shape
    if form == "tn":
        a, b = a.transpose(0, 1, 4, 2, 3).reshape(B, K, -1, G * T), b.reshape(B, K, G * T, -1)
    else:
        a = a.reshape(B, K, G * T, -1)
    contract = ((3,), (3,)) if form == "nt" else ((3,), (2,))
    # Barred: a transpose merged into such a product is one that the CPU has no kernel for.
    a, b = barred((_row_major(a), b))
    out = barred(jax.lax.dot_general(a, b, (contract, ((0, 1), (0, 1))), preferred_element_type=wide))
    return out if form == "tn" else out.reshape(B, K, G, T, -1)
