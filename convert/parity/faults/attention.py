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

    def attention(q, k, v, mask, window):
        out = original(q, k, v, mask, window)
        B, T, N, H = out.shape
        K = k.shape[2]
        return out.reshape(B, T, K, N // K, H).swapaxes(2, 3).reshape(B, T, N, H)

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

    def exponentials(scores, mask):
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        return original(scores, jnp.ones_like(mask))

    return exponentials


def _sums_left_out(original: Any) -> Any:
    """The gradient of the scores without what the softmax's sum takes from it."""
    return lambda a, b: 0 * original(a, b)


def _turned_twice(original: Any) -> Any:
    """The heads' narrow factor of a key's or value's gradient is laid out token by token, not head dim by head dim."""

    def product(a, b, form):
        if form != "tn":
            return original(a, b, form)
        B, K, G, T, H = a.shape
        shuffled = a.reshape(B, K, G, H, T).swapaxes(3, 4)
        return original(shuffled, b, form)

    return product


def _last_row_left_out(original: Any) -> Any:
    """A weight's gradient is summed over all tokens of a row but the last."""

    def gradients(x, weight, dy):
        return original(x, weight, dy)[0], original(x, weight, dy.at[..., -1, :].set(0))[1]

    return gradients


def _by_the_input(original: Any) -> Any:
    """An activation's gradient is multiplied by the weight's last column once too often."""
    return lambda x, weight, dy: (
        original(x, weight, dy)[0] + dy[..., -1:] * weight[:, -1],
        original(x, weight, dy)[1],
    )


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
        "jaxlm.attention.causal_attention",
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
        "jaxlm.attention.causal_attention",
        _scaled(lambda H: 1 / math.sqrt(H)),
        "activations",
        "attn.heads",
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
        "jaxlm.attention.causal_attention",
        _scaled(lambda H: float(ml_dtypes.bfloat16(1 / math.sqrt(H))) * math.sqrt(H)),
        "activations",
        "attn.heads",
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
        "jaxlm.causal_attention._exponentials",
        _uniform_when_masked,
        "activations",
        "attn.heads",
    ),
    Fault(
        "softmax's sum not in the gradient",
        "scale",
        "jaxlm.causal_attention._row_products",
        _sums_left_out,
        "gradients",
        "attn.q_norm.weight",
    ),
    Fault(
        "keys' and values' gradients turned twice",
        "layout",
        "jaxlm.causal_attention._product",
        _turned_twice,
        "gradients",
        "attn.v_proj.bias",
    ),
    Fault(
        "last token not in a weight's gradient",
        "masks",
        "jaxlm.matmul._gradients_on_cpu",
        _last_row_left_out,
        "gradients",
        "mlp.down_proj.weight",
    ),
    Fault(
        "last output counted twice in an activation's gradient",
        "scale",
        "jaxlm.matmul._gradients_on_cpu",
        _by_the_input,
        "gradients",
        "mlp.up_proj.weight",
    ),
)
