"""The expert MLPs out of the kernels of `jaxlm.grouped_kernels`, with their gradient.

    forward    rows = x by slot;  h, hidden = up(rows);  y = down(hidden);  out[p] = sum_a c[p, a] y[slot of (p, a)]
    backward   d_out = dy by slot;  d_hidden = d_out @ down^T;  d_h, c hidden, d_c from d_hidden and h;
               d_rows = d_h @ up^T;  d_up = rows^T d_h;  d_down = (c hidden)^T d_out;  dx[p] = sum_a d_rows[slot]

x and h are kept for it, gathered rows are not. It is itself not differentiable.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlm.dispatch import (
    EXPERT_HIDDEN,
    ExpertWeights,
    KernelPlan,
    Layout,
    accumulator,
    sort_by_expert,
)
from jaxlm.grouped_kernels import (
    Tiles,
    experts_d_activation,
    experts_d_weights,
    experts_rows,
    experts_up,
    tiles_of,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def kernel_mlp(
    plan: KernelPlan, x: Array, weights: ExpertWeights, ids: Array, combine: Array, keep: Array | None
) -> Array:
    """sum_a combine[p, a] * MLP_{ids[p, a]}(x[p]) of x [P, D]; keep: dropout's mask, bool [P, A, F]."""
    return _forward(plan, x, weights, ids, combine, keep, save=False)[0]


def _forward(
    plan: KernelPlan,
    x: Array,
    weights: ExpertWeights,
    ids: Array,
    combine: Array,
    keep: Array | None,
    save: bool = True,
) -> tuple[Array, Any]:
    layout = sort_by_expert(ids, len(weights.up), plan.tile)
    owner, rows = tiles_of(layout, plan.tile).owner, _to_slots(x, layout)
    h, hidden = experts_up(owner, rows, weights.up, weights.up_bias, _kept(keep, layout), plan, save)
    # What the gradient reads, by name: a remat policy that keeps it runs no product of the forward pass again.
    h, layout = checkpoint_name((h, layout), EXPERT_HIDDEN)
    y = experts_rows(owner, hidden, weights.down, weights.down_bias, plan.tile, plan.kernels.down, False)
    out = _to_tokens(y, layout, combine.astype(accumulator(x.dtype)))
    return out.astype(x.dtype), (x, weights, combine, keep, layout, h)


def _backward(plan: KernelPlan, saved: Any, dy: Array) -> Any:
    x, weights, combine, keep, layout, h = saved
    acc, tiles, tile, kernels = accumulator(x.dtype), tiles_of(layout, plan.tile), plan.tile, plan.kernels
    # Padding has rows of zeros and no share: it adds nothing to the gradients of the weights.
    share = jnp.where(layout.filled, combine.reshape(-1)[layout.assignment].astype(acc), 0)
    rows, d_out = _to_slots(x, layout), _to_slots(dy.astype(x.dtype), layout)
    d_hidden = experts_rows(tiles.owner, d_out, weights.down, None, tile, kernels.d_hidden, True)
    d_h, hidden, d_c = experts_d_activation(tiles.owner, d_hidden, h, share, _kept(keep, layout), plan)
    d_rows = experts_rows(tiles.owner, d_h, weights.up, None, tile, kernels.d_rows, True)
    d_up = experts_d_weights(tiles, rows, d_h, tile, kernels.d_weights)
    d_down = experts_d_weights(tiles, hidden, d_out, tile, kernels.d_weights)
    d_up_bias = d_down_bias = None
    if weights.up_bias is not None:
        d_up_bias = _sum_by_expert(d_h, tiles).astype(weights.up_bias.dtype)
    if weights.down_bias is not None:
        bias = weights.down_bias[layout.owner].astype(acc)[:, None]  # [S / tile, 1, D]
        d_c += (d_out.reshape(len(bias), tile, -1) * bias).sum(-1).reshape(-1)
        d_down_bias = _sum_by_expert(share[:, None] * d_out, tiles).astype(weights.down_bias.dtype)
    dx = _to_tokens(d_rows, layout, jnp.ones(combine.shape, acc)).astype(x.dtype)
    d_combine = jnp.where(layout.local, d_c[layout.slot], 0).astype(combine.dtype)
    return dx, ExpertWeights(d_up, d_up_bias, d_down, d_down_bias), None, d_combine, None


kernel_mlp.defvjp(_forward, _backward)


def _to_slots(x: Array, layout: Layout) -> Array:
    """Each slot's row of x [P, D], zero in padding: [S, D]."""
    return jnp.where(layout.filled[:, None], x[layout.assignment // layout.slot.shape[1]], 0)


def _to_tokens(rows: Array, layout: Layout, weights: Array) -> Array:
    """sum_a weights[p, a] * rows[slot of (p, a)]: [P, D] in weights' dtype. Choice by choice: no [P, A, D]."""
    total = jnp.zeros((len(weights), rows.shape[1]), weights.dtype)
    for a in range(weights.shape[1]):
        own = jnp.where(layout.local[:, a, None], rows[layout.slot[:, a]].astype(weights.dtype), 0)
        total += weights[:, a, None] * own
    return total


def _kept(keep: Array | None, layout: Layout) -> Array | None:
    return None if keep is None else keep.reshape(-1, keep.shape[-1])[layout.assignment].astype(jnp.int8)


def _sum_by_expert(rows: Array, tiles: Tiles) -> Array:
    """Sums of rows [S, N] per expert, in a fixed order: [E, N]."""
    acc = accumulator(rows.dtype)
    by_tile = rows.reshape(tiles.owner.size, -1, rows.shape[1]).astype(acc).sum(1)
    by_tile = jnp.where((tiles.owner >= 0)[:, None], by_tile, 0)  # unused tiles hold anything
    onehot = jax.nn.one_hot(tiles.owner, tiles.count.size, dtype=acc, axis=0)
    return jnp.matmul(onehot, by_tile, precision="highest")
