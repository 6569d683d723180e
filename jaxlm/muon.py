"""Muon's direction: the momentum of a matrix with its singular values driven towards one. Twin: torchref/muon.py.

    B <- mu B + (1 - mu) G                       momentum
    M  = mu B + (1 - mu) G  (Nesterov), or B
    X  = M / max(|M|_F, 1e-7), then `steps` times  X <- a X + (b S + c S^2) X  with  S = X X^T
    W <- W - lr (scale X + weight_decay W)

Sources: K. Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), for the iteration and its
coefficients, which make small singular values grow fastest and leave them all between about 0.7 and 1.2; the scale
`match_rms` is that of arXiv:2502.16982, section 2.2: an update with the root mean square of AdamW's, so that AdamW's
learning rate and weight decay fit. `original` is Jordan's sqrt(max(1, out/in)).

The iteration runs in promote_types(dtype, float32), where Jordan's runs in bfloat16. With five iterations its products
cost at most 5 m / (tokens of a step) of the model's own, m the smaller side of a matrix: a percent at m = 1,024 and
half a million tokens, so bfloat16 would save little; and in float64 two implementations can be compared to rounding.
"""

import math

import jax.numpy as jnp
from jax import Array

from jaxlm.config import OptimConfig
from jaxlm.shapes import Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c
LEAST_NORM = 1e-7  # an all but zero momentum stays all but zero


def orthogonalize(matrix: Float[Array, "*B I O"], steps: int) -> Float[Array, "*B I O"]:
    """About U V^T for every matrix = U S V^T, by Newton-Schulz; upcast to float32 at least."""
    a, b, c = COEFFICIENTS
    x = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller of the two products of x with itself
    x = x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)), LEAST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def update_scale(kind: str, n_in: int, n_out: int) -> float:
    """The factor on the orthogonalised momentum of a matrix from n_in to n_out: match_rms or original."""
    return 0.2 * math.sqrt(max(n_in, n_out)) if kind == "match_rms" else math.sqrt(max(1.0, n_out / n_in))


def direction(
    config: OptimConfig, gradient: Float[Array, "*B I O"], momentum: Float[Array, "*B I O"], halves: int
) -> tuple[Float[Array, "*B I O"], Float[Array, "*B I O"]]:
    """(the scaled direction, the momentum after this gradient) of one weight, upcast.

    halves: how many matrices lie side by side over the outputs: two in a fused gate_up, else one.
    """
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    g, before, mu = gradient.astype(wide), momentum.astype(wide), config.muon_momentum
    after = before + (1 - mu) * (g - before)
    ahead = g + mu * (after - g) if config.muon_nesterov else after
    parts = jnp.split(ahead, halves, axis=-1)
    scale = update_scale(config.muon_scale, parts[0].shape[-2], parts[0].shape[-1])
    return scale * jnp.concatenate([orthogonalize(p, config.muon_steps) for p in parts], axis=-1), after
