"""Faults of the rest of the forward pass: embedding, MLPs, rotary positions, norms, and the tokens that carry loss."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.parity.faults.fault import Fault

KV_HEADS = 2  # of the self-test's model


def _gate_and_up_exchanged(original: Any) -> Any:
    return lambda kind, gate, up: original(kind, up, gate)


def _gate_and_up_alternate(original: Any) -> Any:
    """The experts' hidden layer read as gate, up, gate, up, ... instead of two halves."""

    def activate(kind, gate, up):
        hidden = torch.cat([gate, up], dim=-1)
        return original(kind, hidden[..., ::2], hidden[..., 1::2])

    return activate


def _up_half_first(original: Any) -> Any:
    """The experts' stacked weights as [up | gate]."""

    def weights(self, dtype):
        found = original(self, dtype)
        return found._replace(up=jnp.roll(found.up, found.up.shape[-1] // 2, axis=-1))

    return weights


def _embedding_times_root(original: Any) -> Any:
    """The embedding times sqrt(D), as Gemma's."""
    return lambda self, ids: original(self, ids) * math.sqrt(self.weight.shape[1])


def _logits_over_root(original: Any) -> Any:
    """The head's weight over sqrt(D), as T5's tied head."""

    def head(self):
        weight, bias = original(self)
        return weight / math.sqrt(weight.shape[0]), bias

    return head


def _interleaved_pairs(original: Any) -> Any:
    """Pairs (2i, 2i + 1) turn instead of (i, i + H/2)."""

    def apply_rope(x, cos, sin):
        halves = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
        a, b = original(halves, cos, sin).chunk(2, dim=-1)
        return torch.stack([a, b], dim=-1).flatten(-2)

    return apply_rope


def _turned_backwards(original: Any) -> Any:
    return lambda x, cos, sin: original(x, cos, -sin)


def _keys_not_turned(original: Any) -> Any:
    return lambda x, cos, sin: x if x.shape[2] == KV_HEADS else original(x, cos, sin)


def _theta_lost(original: Any) -> Any:
    return lambda config: original(dataclasses.replace(config, rope_theta=10_000.0))


def _float32_angles(original: Any) -> Any:
    """Angles made and turned into cos and sin in float32."""

    def rope_table(config):
        cos, _ = original(config)
        steps = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        angles = np.arange(len(cos), dtype=np.float32)[:, None] / np.float32(config.rope_theta) ** steps
        return np.cos(angles), np.sin(angles)

    return rope_table


def _half_the_frequencies(original: Any) -> Any:
    """Frequencies theta^(-i/H) instead of theta^(-2i/H)."""
    return lambda config: original(dataclasses.replace(config, rope_theta=math.sqrt(config.rope_theta)))


def _positions_run_on(original: Any) -> Any:
    """Positions count through a packed row instead of restarting with each document."""

    def rope(self, positions, dtype):
        if positions.shape[1] > 1:
            positions = jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape)
        return original(self, positions, dtype)

    return rope


def _eps_lost(original: Any) -> Any:
    """The config's eps is not passed on: 1e-6, the default of many libraries."""

    def forward(self, x):
        kept, self.eps = self.eps, 1e-6
        try:
            return original(self, x)
        finally:
            self.eps = kept

    return forward


def _eps_outside_root(original: Any) -> Any:
    def call(self, x):
        root = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
        return x / (root + self.eps) * self.weight[...]

    return call


def _layer_norm(original: Any) -> Any:
    return lambda self, x: original(self, x - x.mean(-1, keepdim=True))


def _one_plus_weight(original: Any) -> Any:
    """Weights stored around zero, as Gemma's."""

    def call(self, x):
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return normed * (1 + self.weight[...])

    return call


def _in_float32(original: Any) -> Any:
    """`x.float()` where the wider of both dtypes is meant: a float64 run goes through float32."""
    return lambda self, x: original(self, x.float()).to(x.dtype)


def _all_heads_at_once(original: Any) -> Any:
    """The norm of queries and keys over all heads together, as OLMo 2's."""

    def call(self, x):
        if x.ndim < 4:
            return original(self, x)
        mean = jnp.mean(x * x, axis=(-1, -2), keepdims=True)
        return x * jax.lax.rsqrt(mean + self.eps) * self.weight[...]

    return call


def _keys_not_normed(original: Any) -> Any:
    return lambda self, x: x if x.ndim == 4 and x.shape[2] == KV_HEADS else original(self, x)


def _loss_of_all_tokens(original: Any) -> Any:
    """The loss mask is not looked at."""
    return lambda hidden, weight, bias, targets, mask, **options: original(
        hidden, weight, bias, targets, jnp.ones_like(mask), **options
    )


def _mean_over_all_tokens(original: Any) -> Any:
    """The masked sum is divided by all tokens."""

    def batch_counts(batch, microbatches):
        counts = original(batch, microbatches)
        return counts._replace(loss_tokens=torch.tensor(float(batch["inputs"].numel())))

    return batch_counts


TORCH_NORM, JAX_NORM = "torchref.layers.RMSNorm.forward", "jaxlm.layers.RMSNorm.__call__"
TORCH_ROPE, JAX_ROPE = "torchref.attention.apply_rope", "jaxlm.attention.apply_rope"
TORCH_TABLE, JAX_TABLE = "torchref.model.rope_table", "jaxlm.model.rope_table"

# name, kind, target, change, rung, operation
_TABLE = (
    # layer 0 has the experts, layer 1 the dense MLP
    (
        "gate and up exchanged",
        "layout",
        "torchref.layers.activate",
        _gate_and_up_exchanged,
        "activations",
        "mlp",
    ),
    (
        "experts' gate and up alternate",
        "layout",
        "torchref.moe.activate",
        _gate_and_up_alternate,
        "activations",
        "moe.combined",
    ),
    (
        "experts' up half first",
        "layout",
        "jaxlm.moe.Experts.weights",
        _up_half_first,
        "activations",
        "moe.combined",
    ),
    (
        "embedding times sqrt(d_model)",
        "scale",
        "torchref.layers.Embed.forward",
        _embedding_times_root,
        "activations",
        "embed",
    ),
    (
        "logits over sqrt(d_model)",
        "scale",
        "jaxlm.model.Decoder.head",
        _logits_over_root,
        "activations",
        "logits",
    ),
    ("interleaved pairs", "RoPE", TORCH_ROPE, _interleaved_pairs, "activations", "attn.q"),
    ("turned backwards", "RoPE", TORCH_ROPE, _turned_backwards, "activations", "attn.q"),
    ("keys not turned", "RoPE", JAX_ROPE, _keys_not_turned, "activations", "attn.k"),
    ("theta lost", "RoPE", JAX_TABLE, _theta_lost, "rope", "cos"),
    ("angles in float32", "RoPE", TORCH_TABLE, _float32_angles, "rope", "cos"),
    ("exponent i/H instead of 2i/H", "RoPE", JAX_TABLE, _half_the_frequencies, "rope", "cos"),
    # The table is right, it is read at the wrong places: the first to show it are the turned queries.
    (
        "positions run on through documents",
        "RoPE",
        "jaxlm.model.Decoder._rope",
        _positions_run_on,
        "activations",
        "attn.q",
    ),
    ("eps lost, 1e-6", "norms", TORCH_NORM, _eps_lost, "activations", "attn_norm"),
    ("eps outside the root", "norms", JAX_NORM, _eps_outside_root, "activations", "attn_norm"),
    ("LayerNorm's mean subtracted", "norms", TORCH_NORM, _layer_norm, "activations", "attn_norm"),
    ("1 + weight", "norms", JAX_NORM, _one_plus_weight, "activations", "attn_norm"),
    ("float32 inside a float64 run", "norms", TORCH_NORM, _in_float32, "activations", "attn_norm"),
    (
        "query norm over all heads together",
        "norms",
        JAX_NORM,
        _all_heads_at_once,
        "activations",
        "attn.q",
    ),
    ("keys not normed", "norms", TORCH_NORM, _keys_not_normed, "activations", "attn.k"),
    (
        "loss mask ignored",
        "masks",
        "jaxlm.train.chunked_token_loss",
        _loss_of_all_tokens,
        "loss",
        "cross_entropy",
    ),
    (
        "loss divided by all tokens",
        "masks",
        "torchref.train.batch_counts",
        _mean_over_all_tokens,
        "loss",
        "cross_entropy",
    ),
)
FAULTS = tuple(Fault(*row) for row in _TABLE)
