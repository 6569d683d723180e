"""Faults of the kernels that multiply experts on a GPU; here they are interpreted."""

from typing import Any

import jax.numpy as jnp

from convert.parity.faults.fault import Fault, Rewrite


def _by_kernels(original: Any) -> Any:
    return lambda *args, **options: original(*args, **(options | {"backend": "pallas"}))


def _halves_swapped(original: Any) -> Any:
    """The second half of the product is taken for the gate."""
    return lambda *pre, **options: original(*pre[::-1], **options)


def _neighbours_expert(original: Any) -> Any:
    """A tile is multiplied by the weights of the expert whose tile comes before it."""

    def experts_rows(owner, rows, weights, bias, tile, blocks, transposed):
        before = jnp.where(owner >= 0, jnp.roll(owner, 1), owner)
        return original(before if not transposed else owner, rows, weights, bias, tile, blocks, transposed)

    return experts_rows


def _gate_half_only(original: Any) -> Any:
    """The gradient of the rows sums over the first half of the pre-activations."""

    def experts_rows(owner, rows, weights, bias, tile, blocks, transposed):
        if transposed and weights.shape[2] > 1.5 * weights.shape[1]:  # of the up projection
            rows = rows * (jnp.arange(rows.shape[1]) < rows.shape[1] // 2)
        return original(owner, rows, weights, bias, tile, blocks, transposed)

    return experts_rows


def _share_lost(original: Any) -> Any:
    """The backward pass forgets the choices' weights."""

    def experts_d_activation(owner, d_hidden, h, share, keep, plan):
        return original(owner, d_hidden, h, (share != 0).astype(share.dtype), keep, plan)

    return experts_d_activation


def _last_tile_left_out(original: Any) -> Any:
    """The weights' gradient ends a tile before the expert's last."""

    def experts_d_weights(tiles, *rest):
        return original(tiles._replace(count=jnp.maximum(tiles.count - 1, 0)), *rest)

    return experts_d_weights


BY_KERNELS = Rewrite("experts by the kernels for CUDA", "jaxlm.moe.expert_mlp", _by_kernels)
HOME = "jaxlm.grouped_pallas"

_TABLE = (
    (
        "gate and up swapped in a kernel",
        "layout",
        "jaxlm.grouped_kernels.activate",
        _halves_swapped,
        "activations",
        "moe.combined",
    ),
    (
        "a tile takes its neighbour's expert",
        "layout",
        f"{HOME}.experts_rows",
        _neighbours_expert,
        "activations",
        "moe.combined",
    ),
    (
        "half of the rows' gradient",
        "layout",
        f"{HOME}.experts_rows",
        _gate_half_only,
        "gradients",
        "mlp_norm.weight",
    ),
    (
        "choices' weights lost backwards",
        "scale",
        f"{HOME}.experts_d_activation",
        _share_lost,
        "gradients",
        "moe.experts.down",
    ),
    (
        "an expert's last rows left out",
        "masks",
        f"{HOME}.experts_d_weights",
        _last_tile_left_out,
        "gradients",
        "moe.experts.down",
    ),
)
FAULTS = tuple(Fault(*row, beside=BY_KERNELS) for row in _TABLE)  # type: ignore[arg-type]
