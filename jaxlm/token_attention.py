"""Attention of one new token over a cache, in few kernels: decoding is bound by their number, not by arithmetic.

Keys and values are multiplied as they lie in the cache [B, K, S, H]: written otherwise, XLA turns a whole layer's keys
around before and after each dispatch. What may not be seen has a score so low that its weight is exactly zero, which
leaves a softmax that XLA's GPU compiler makes one kernel of, where infinities and their exceptions make three.
"""

import jax.numpy as jnp
from jax import Array

from jaxlm.layers import upcast
from jaxlm.shapes import Bool, Float

LOWEST = -1e30  # far below any score; its exponential is zero, and it is finite in float32 and up


def token_attention(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 S"],
    bias: Float[Array, "N 1 S"] | None,
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B N 1 S"]]:
    """`jaxlm.attention.fast_attention` for one query: the output, and the scores, -inf where not allowed."""
    B, _, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    k_BKSH, v_BKSH, q_BKGH = k.swapaxes(1, 2), v.swapaxes(1, 2), q.reshape(B, K, N // K, H)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkgh,bksh->bkgs", q_BKGH, k_BKSH, preferred_element_type=wide) / H**0.5
    if bias is not None:
        scores += upcast(bias[:, 0].reshape(K, N // K, S))
    mask_B11S = mask[:, None]
    scores = jnp.where(mask_B11S, scores, LOWEST)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    # A row that sees nothing has equal scores: its weights are made zero here.
    weights = jnp.where(mask_B11S, weights, 0).astype(v.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, v_BKSH)
    return out.reshape(B, 1, N, H), jnp.where(mask_B11S, scores, -jnp.inf).reshape(B, N, 1, S)
