"""Faults of attention: layout of the heads, scale, masks."""

import math
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import torch

from convert.parity.faults.fault import Fault


def _tiled_groups(original: Any) -> Any:
    """Query head n reads kv head n mod K: the kv heads tiled instead of repeated."""

    def attention(q, k, v, mask, bias, rate, key):
        heads, kv_heads = q.shape[2], k.shape[2]
        order = (
            torch.arange(heads).view(-1, kv_heads).T.flatten()
        )  # tiled place of each head in grouped order
        out, scores = original(q[:, :, order], k, v, mask, bias, rate, key)
        back = order.argsort()
        return out[:, :, back], scores[:, back]

    return attention


def _merged_group_first(original: Any) -> Any:
    """The output's heads are laid side by side group by group, although queries came kv head by kv head."""

    def attention(q, k, v, mask, bias, rate, key):
        out, scores = original(q, k, v, mask, bias, rate, key)
        B, T, N, H = out.shape
        K = k.shape[2]
        return out.reshape(B, T, K, N // K, H).swapaxes(2, 3).reshape(B, T, N, H), scores

    return attention


def _heads_not_moved_back(original: Any) -> Any:
    """The fused kernel's [B, N, T, H] is reshaped to [B, T, N, H] without the transpose."""

    def attention(q, k, v, mask):
        out = original(q, k, v, mask)
        return out.transpose(1, 2).reshape(out.shape)

    return attention


def _scaled(factor: Any) -> Any:
    """The fault that multiplies the scores by factor(H)."""

    def change(original: Any) -> Any:
        return lambda q, *rest: original(q * factor(q.shape[-1]), *rest)

    return change


def _not_shrunk_with_depth(original: Any) -> Any:
    """Projections into the residual stream start as wide as all others."""
    return lambda config, fan_in, residual=False: original(config, fan_in)


def _window_of(change_window: Any) -> Any:
    def change(original: Any) -> Any:
        return lambda visibility, window: original(visibility, change_window(window))

    return change


def _documents_see_each_other(original: Any) -> Any:
    """Only padding is masked; the documents of a packed row are one."""

    def allowed(visibility, window):
        if visibility.query_segment is None:
            return original(visibility, window)
        query, key = (jnp.minimum(s, 1) for s in (visibility.query_segment, visibility.key_segment))
        return original(visibility._replace(query_segment=query, key_segment=key), window)

    return allowed


def _padding_is_seen(original: Any) -> Any:
    """Keys of the padding are visible to every later token of their row."""

    def allowed(visibility, window):
        mask = original(visibility._replace(query_segment=None, key_segment=None), window)
        if visibility.query_segment is None:
            return mask
        padding = (visibility.key_segment == 0)[:, None, :]
        return original(visibility, window) | (mask & padding & (visibility.query_segment > 0)[:, :, None])

    return allowed


def _strictly_causal(original: Any) -> Any:
    """A token does not see itself."""

    def allowed(visibility, window):
        distance = visibility.query_index[:, None] - visibility.key_index[None, :]
        return original(visibility, window) & (distance > 0)

    return allowed


def _uniform_when_masked(original: Any) -> Any:
    """The smallest finite number instead of -inf: a row that may see nothing becomes the mean of all values."""

    def masked_softmax(scores, mask):
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        return original(scores, jnp.ones_like(mask))

    return masked_softmax


FAULTS = (
    Fault(
        "kv heads tiled instead of repeated",
        "layout",
        "torchref.attention.fast_attention",
        _tiled_groups,
        "activations",
        "attn.scores",
    ),
    Fault(
        "heads merged group first",
        "layout",
        "jaxlm.attention.fast_attention",
        _merged_group_first,
        "activations",
        "attn.heads",
    ),
    Fault(
        # Activations are those of the explicit form, which has scores; the kernel shows in the last logits only.
        "fused kernel's heads not moved back",
        "layout",
        "torchref.attention.sdpa_attention",
        _heads_not_moved_back,
        "activations",
        "logits of the fused attention",
    ),
    Fault(
        "scores over sqrt(d_model)",
        "scale",
        "torchref.attention.fast_attention",
        _scaled(lambda H: math.sqrt(H / 24)),
        "activations",
        "attn.scores",
    ),
    Fault(
        "scores over head_dim, not its root",
        "scale",
        "jaxlm.attention.fast_attention",
        _scaled(lambda H: 1 / math.sqrt(H)),
        "activations",
        "attn.scores",
    ),
    Fault(
        "scores not scaled in the fused kernel",
        "scale",
        "torchref.attention.sdpa_attention",
        _scaled(math.sqrt),
        "activations",
        "logits of the fused attention",
    ),
    Fault(
        "scale rounded to bfloat16",
        "scale",
        "jaxlm.attention.fast_attention",
        _scaled(lambda H: float(ml_dtypes.bfloat16(1 / math.sqrt(H))) * math.sqrt(H)),
        "activations",
        "attn.scores",
    ),
    Fault(
        "initial spread not shrunk with depth",
        "scale",
        "torchref.attention.init_std",
        _not_shrunk_with_depth,
        "init",
        "attn.o_proj.weight",
    ),
    Fault(
        "window one key too wide",
        "masks",
        "torchref.attention.allowed",
        _window_of(lambda window: window + 1 if window else 0),
        "activations",
        "attn.scores",
    ),
    Fault(
        "window of one layer given to all",
        "masks",
        "jaxlm.attention.allowed",
        _window_of(lambda window: 7),
        "activations",
        "attn.scores",
    ),
    Fault(
        "packed documents see each other",
        "masks",
        "jaxlm.attention.allowed",
        _documents_see_each_other,
        "activations",
        "attn.scores",
    ),
    Fault(
        "padding is seen by the tokens after it",
        "masks",
        "torchref.attention.allowed",
        _padding_is_seen,
        "activations",
        "attn.scores",
    ),
    Fault(
        "a token does not see itself",
        "masks",
        "torchref.attention.allowed",
        _strictly_causal,
        "activations",
        "attn.scores",
    ),
    Fault(
        "a row that may see nothing is the mean of all values",
        "masks",
        "jaxlm.attention.masked_softmax",
        _uniform_when_masked,
        "activations",
        "attn.heads",
    ),
)
