"""Parts of the decoder: parameters, norms, projections, rotary positions, MLPs. Twin: torchref/layers.py.

dtype is never hard-coded: parameters have the dtype they were made with (or cast to), activations that of their
input, and "upcast" means `promote_types(dtype, float32)`, so float64 runs through the same code.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxlm.config import ModelConfig
from jaxlm.matmul import matmul
from jaxlm.shapes import Bool, Float
from jaxlm.sharding import Axes, constrain


class Backends(NamedTuple):
    """Which of several equal implementations runs; `auto` takes the fastest for the platform."""

    attention: Literal["auto", "readable", "xla", "cudnn"] = "auto"
    experts: Literal["auto", "loop", "blocks", "pallas", "batched", "sliced"] = "auto"


def upcast(x: Array) -> Array:
    """float32 at least: the dtype of norms, softmax, rotations, the router and the loss."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def make_param(shape: tuple[int, ...], axes: Axes, std: float, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Param:
    """A weight: shape, logical axes and initial standard deviation (normal distribution, untruncated) in one place."""
    assert len(shape) == len(axes), (shape, axes)
    value = (
        jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(std, dtype)
        if std
        else jnp.zeros(shape, dtype)
    )
    return nnx.Param(value, axes=axes)


def init_std(config: ModelConfig, fan_in: int, residual: bool = False) -> float:
    """Initial standard deviation of a projection.

    normal: init_std, and init_std/sqrt(2L) where the output is added to the residual stream (GPT-2, section 2.3);
    fan_in: 1/sqrt(fan_in).
    """
    if config.init == "fan_in":
        return 1 / math.sqrt(fan_in)
    return config.init_std / (math.sqrt(2 * config.n_layers) if residual else 1.0)


def add_bias(y: Float[Array, "*B O"], bias: Float[Array, " O"]) -> Float[Array, "*B O"]:
    """y + bias in y's dtype, added upcast: so the bias's gradient is summed over all tokens in at least float32."""
    return (upcast(y) + upcast(bias.astype(y.dtype))).astype(y.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean upcast, the product in x's dtype.

    Source: arXiv:1910.07467, eq. 4, in Llama's order of casts.
    """

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((dim,), dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = upcast(x)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # The product of two halves is exact in float32 and rounded once: x's dtype, bit for bit. Said this way, the
        # gradient of the weight is summed over all tokens in float32, which XLA would do in half precision.
        return (upcast(normed.astype(x.dtype)) * upcast(self.weight[...].astype(x.dtype))).astype(x.dtype)


class Linear(nnx.Module):
    """x @ weight (+ bias), weight [n_in, n_out]."""

    def __init__(
        self, n_in: int, n_out: int, *, bias: bool, std: float, axes: Axes, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.weight = make_param((n_in, n_out), axes, std, rngs, dtype)
        self.bias = make_param((n_out,), axes[1:], 0.0, rngs, dtype) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = matmul(x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


class Embed(nnx.Module):
    """Rows of weight [n, D], looked up by id. Ids are checked on the host: a gather would clamp them silently."""

    def __init__(self, n: int, dim: int, *, std: float, axes: Axes, rngs: nnx.Rngs, dtype: DTypeLike):
        self.weight = make_param((n, dim), axes, std, rngs, dtype)
        self.axes = axes

    def __call__(self, ids: Array) -> Array:
        # As its axes say, though it may be stored split further: the partitioner would gather all rows that come out.
        weight = constrain(self.weight[...], self.axes)
        return _lookup(weight.shape, weight.dtype, weight, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(shape: tuple[int, ...], dtype: DTypeLike, weight: Array, ids: Array) -> Array:
    """weight[ids]; its gradient is added up in float32 at least.

    In half precision a frequent token's sum would soon stand still, and GPUs add such numbers slowly.
    """
    return weight[ids]


def _lookup_forward(shape: tuple[int, ...], dtype: DTypeLike, weight: Array, ids: Array) -> Any:
    return weight[ids], ids


def _lookup_backward(shape: tuple[int, ...], dtype: DTypeLike, ids: Array, dy: Array) -> tuple[Array, None]:
    total = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)).at[ids].add(upcast(dy))
    return total.astype(dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T C"], sin: Float[Array, "#B T C"]
) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2) of each head by the angle of its position; cos and sin are [B|1, T, H/2], upcast.

    Source: arXiv:2104.09864, eq. 34, in the half-split layout.
    """
    a, b = jnp.split(upcast(x), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes a share `rate` of x and scales the rest by 1/(1-rate); the identity without a key."""
    if key is None or rate == 0:
        return x
    keep: Bool[Array, "..."] = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def split_key(key: Array | None, n: int) -> list[Array | None]:
    """n independent keys, or n times None: without a key nothing is dropped."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def activate(kind: str, gate: Array, up: Array | None) -> Array:
    """The MLP's non-linearity: silu(gate) * up for swiglu, else GELU of `gate` in its exact (erf) or tanh form.

    Sources: arXiv:2002.05202 (SwiGLU), arXiv:1606.08415 (GELU).
    """
    if kind == "swiglu":
        assert up is not None, "swiglu has two projections"
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=kind == "gelu_tanh")


class MLP(nnx.Module):
    """Dense feed-forward layer: swiglu has gate, up and down projections, gelu only up and down."""

    def __init__(self, config: ModelConfig, d_ff: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, bias = config.d_model, config.mlp_bias
        std, axes = init_std(config, dim), ("embed", "ffn")
        self.kind, self.rate = config.mlp, config.dropout
        gated = config.mlp == "swiglu"
        self.gate_proj = (
            Linear(dim, d_ff, bias=bias, std=std, axes=axes, rngs=rngs, dtype=dtype) if gated else None
        )
        self.up_proj = Linear(dim, d_ff, bias=bias, std=std, axes=axes, rngs=rngs, dtype=dtype)
        std, axes = init_std(config, d_ff, residual=True), ("ffn", "embed")
        self.down_proj = Linear(d_ff, dim, bias=bias, std=std, axes=axes, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "*B D"], key: Array | None = None) -> Float[Array, "*B D"]:
        up = self.up_proj(x)
        hidden = (
            activate(self.kind, up, None)
            if self.gate_proj is None
            else activate(self.kind, self.gate_proj(x), up)
        )
        return self.down_proj(dropout(hidden, self.rate, key))
