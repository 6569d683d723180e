"""Parts of the decoder: parameters, norms, projections, rotary positions, MLPs. Twin: jaxlm/layers.py.

dtype is never hard-coded: parameters have the dtype they were made with, activations that of their input, and "upcast"
means float32 at least, so float64 runs through the same code.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxlm.config import ModelConfig
from torchref.shapes import Float


class Backends(NamedTuple):
    """Which of several equal implementations runs."""

    attention: Literal["auto", "readable", "explicit", "sdpa"] = "auto"
    experts: Literal["auto", "loop", "grouped"] = "auto"


def upcast(x: Tensor) -> Tensor:
    """float32 at least: the dtype of norms, softmax, rotations, the router and the loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_param(
    shape: tuple[int, ...], std: float, rngs: torch.Generator | None, dtype: torch.dtype
) -> nn.Parameter:
    """A weight with its initial standard deviation (normal distribution, untruncated)."""
    value = torch.randn(shape, generator=rngs, dtype=dtype) * std if std else torch.zeros(shape, dtype=dtype)
    return nn.Parameter(value)


def init_std(config: ModelConfig, fan_in: int, residual: bool = False) -> float:
    """Initial standard deviation of a projection.

    normal: init_std, and init_std/sqrt(2L) where the output is added to the residual stream (GPT-2, section 2.3);
    fan_in: 1/sqrt(fan_in).
    """
    if config.init == "fan_in":
        return 1 / math.sqrt(fan_in)
    return config.init_std / (math.sqrt(2 * config.n_layers) if residual else 1.0)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean upcast, the product in x's dtype.

    Source: arXiv:1910.07467, eq. 4, in Llama's order of casts.
    """

    def __init__(self, dim: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        wide = upcast(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Linear(nn.Module):
    """x @ weight.T (+ bias), weight [n_out, n_in]."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        bias: bool,
        std: float,
        rngs: torch.Generator | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.weight = make_param((n_out, n_in), std, rngs, dtype)
        self.bias = make_param((n_out,), 0.0, rngs, dtype) if bias else None

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embed(nn.Module):
    """Rows of weight [n, D], looked up by id."""

    def __init__(self, n: int, dim: int, *, std: float, rngs: torch.Generator | None, dtype: torch.dtype):
        super().__init__()
        self.weight = make_param((n, dim), std, rngs, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def apply_rope(
    x: Float[Tensor, "B T N H"], cos: Float[Tensor, "#B T C"], sin: Float[Tensor, "#B T C"]
) -> Float[Tensor, "B T N H"]:
    """Rotates pairs (i, i + H/2) of each head by the angle of its position; cos and sin are [B|1, T, H/2], upcast.

    Source: arXiv:2104.09864, eq. 34, in the half-split layout.
    """
    a, b = upcast(x).chunk(2, dim=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def dropout(x: Tensor, rate: float, key: torch.Generator | None) -> Tensor:
    """Zeroes a share `rate` of x and scales the rest by 1/(1-rate); the identity without a key."""
    if key is None or rate == 0:
        return x
    keep = torch.rand(x.shape, generator=key, device=x.device) < 1 - rate
    return torch.where(keep, x / (1 - rate), torch.zeros((), dtype=x.dtype, device=x.device))


def activate(kind: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """The MLP's non-linearity: silu(gate) * up for swiglu, else GELU of `gate` in its exact (erf) or tanh form.

    Sources: arXiv:2002.05202 (SwiGLU), arXiv:1606.08415 (GELU).
    """
    if kind == "swiglu":
        assert up is not None, "swiglu has two projections"
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


class MLP(nn.Module):
    """Dense feed-forward layer: swiglu has gate, up and down projections, gelu only up and down."""

    def __init__(self, config: ModelConfig, d_ff: int, *, rngs: torch.Generator | None, dtype: torch.dtype):
        super().__init__()
        dim, bias = config.d_model, config.mlp_bias
        std = init_std(config, dim)
        self.kind, self.rate = config.mlp, config.dropout
        gated = config.mlp == "swiglu"
        self.gate_proj = Linear(dim, d_ff, bias=bias, std=std, rngs=rngs, dtype=dtype) if gated else None
        self.up_proj = Linear(dim, d_ff, bias=bias, std=std, rngs=rngs, dtype=dtype)
        std = init_std(config, d_ff, residual=True)
        self.down_proj = Linear(d_ff, dim, bias=bias, std=std, rngs=rngs, dtype=dtype)

    def forward(self, x: Float[Tensor, "*B D"], key: torch.Generator | None = None) -> Float[Tensor, "*B D"]:
        up = self.up_proj(x)
        hidden = (
            activate(self.kind, up, None)
            if self.gate_proj is None
            else activate(self.kind, self.gate_proj(x), up)
        )
        return self.down_proj(dropout(hidden, self.rate, key))
