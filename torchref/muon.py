"""Muon's direction: the momentum of a matrix with its singular values driven towards one. Twin: jaxlm/muon.py.

    B <- mu B + (1 - mu) G                       momentum
    M  = mu B + (1 - mu) G  (Nesterov), or B
    X  = M / max(|M|_F, 1e-7), then `steps` times  X <- a X + (b S + c S^2) X  with  S = X X^T
    W <- W - lr (scale X + weight_decay W)

Sources: K. Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); scale `match_rms`:
arXiv:2502.16982, section 2.2. torch.optim.Muon is the same with the iteration in bfloat16, two-dimensional weights and
one matrix for each; here the iteration runs in promote_types(dtype, float32).
"""

import math

import torch
from torch import Tensor

from jaxlm.config import OptimConfig
from torchref.shapes import Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c
LEAST_NORM = 1e-7  # torch.optim.Muon's eps


def orthogonalize(matrix: Float[Tensor, "*B O I"], steps: int) -> Float[Tensor, "*B O I"]:
    """About U V^T for every matrix = U S V^T, by Newton-Schulz; upcast to float32 at least."""
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + b * (gram @ x) + c * (gram @ (gram @ x))
    return x.mT if tall else x


def update_scale(kind: str, n_in: int, n_out: int) -> float:
    """The factor on the orthogonalised momentum of a matrix from n_in to n_out: match_rms or original."""
    if kind == "match_rms":
        return 0.2 * math.sqrt(max(n_in, n_out))
    return max(1.0, math.sqrt(n_out / n_in))


def direction(
    config: OptimConfig, gradient: Float[Tensor, "*B O I"], momentum: Float[Tensor, "*B O I"], halves: int
) -> tuple[Float[Tensor, "*B O I"], Float[Tensor, "*B O I"]]:
    """(the scaled direction, the momentum after this gradient) of one weight, upcast.

    halves: how many matrices lie one below the other over the outputs: two in a fused gate_up, else one.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    g, mu = gradient.to(wide), config.muon_momentum
    after = mu * momentum.to(wide) + (1 - mu) * g
    ahead = mu * after + (1 - mu) * g if config.muon_nesterov else after
    parts = ahead.chunk(halves, dim=-2)
    n_out, n_in = parts[0].shape[-2:]
    scale = update_scale(config.muon_scale, n_in, n_out)
    return torch.cat([scale * orthogonalize(p, config.muon_steps) for p in parts], dim=-2), after
