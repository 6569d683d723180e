"""What the grouped products of experts share: assignments sorted by expert, in tiles of one expert each.

The P*A assignments (token p, choice a) are sorted by expert and each expert's group is padded to whole tiles, so that a
tile belongs to one expert:

    slot        0 1 2 3 | 4 5 6 7 | 8 9 . . | 12 . . .      (tile = 4, . = padding)
    expert            0 |       0 |       0 |        2      (nobody chose expert 1: it has no tile)
    assignment  0 3 4 6 | 7 8 a b | d f     | 5             (index into [P, A] flattened)

Buffers have the fixed size of the worst routing, but loops and kernels end with the last tile in use: skewed routing,
empty experts and experts of other devices cost no product. Dispatch gathers rows by `Layout.assignment`, combine
gathers them by its inverse `Layout.slot`, and a hand-written gradient swaps the two, so that a scatter-add (slow on
CPU, slow and unordered on a GPU) never occurs.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Activation = Literal["swiglu", "gelu_erf", "gelu_tanh"]

EXPERT_HIDDEN = "expert_hidden"  # name of the hidden pre-activations and their layout, for remat policies


class ExpertWeights(NamedTuple):
    """The MLPs of E experts. U, the width of `up`, is 2F with the gate half first (swiglu) or F (gelu)."""

    up: Array  # [E, D, U]
    up_bias: Array | None  # [E, U]
    down: Array  # [E, F, D]
    down_bias: Array | None  # [E, D]


class Layout(NamedTuple):
    """Where each assignment stands in the S padded slots, S a multiple of the tile; see the picture above."""

    assignment: Array  # int32 [S], index into [P*A]; arbitrary in padding
    filled: Array  # bool [S], False in padding
    slot: Array  # int32 [P, A], inverse of `assignment`; 0 where not local
    local: Array  # bool [P, A], the expert is one of ours
    start: Array  # int32 [E], first slot of each group
    rows: Array  # int32 [E], slots of each group, padding included
    owner: Array  # int32 [S / tile], expert of each tile; arbitrary behind the last group


class Blocks(NamedTuple):
    """How a kernel cuts its work; powers of two."""

    columns: int  # of a program's result
    inner: int  # of the contracted dimension, read at a time
    warps: int
    stages: int  # reads under way at once
    rows: int = 128  # of a program's result; the products over tiles take the tile's


class Kernels(NamedTuple):
    """The cut of every kernel; a benchmark sweeps them. `up` counts the columns of one half of swiglu's."""

    up: Blocks = Blocks(128, 32, 8, 5)
    down: Blocks = Blocks(256, 32, 8, 5)
    d_hidden: Blocks = Blocks(256, 32, 8, 5)
    d_rows: Blocks = Blocks(256, 32, 8, 5)
    d_weights: Blocks = Blocks(256, 32, 8, 5)
    d_activation: Blocks = Blocks(512, 1, 4, 1, rows=4)


class KernelPlan(NamedTuple):
    """What is fixed at trace time."""

    activation: Activation
    rate: float  # of dropout
    tile: int  # rows
    kernels: Kernels = Kernels()


def sort_by_expert(ids: Array, n_experts: int, tile: int, chunk: int = 1) -> Layout:
    """The layout of ids [P, A] in tiles of `tile` rows; more than `chunk` tiles are filled up to whole chunks."""
    count = ids.size
    local = (ids >= 0) & (ids < n_experts)
    expert = jnp.where(local, ids, n_experts).reshape(-1).astype(jnp.int32)  # [P*A]
    # The index in the low digits makes the keys distinct: one array to sort, in a third of the time of pairs.
    order = lax.sort(expert * count + jnp.arange(count, dtype=jnp.int32), is_stable=False) % count
    mine = jax.nn.one_hot(expert, n_experts, dtype=jnp.int32)  # [P*A, E]
    running = jnp.cumsum(mine, axis=0)
    size = running[-1]
    first = jnp.cumsum(size) - size  # in `order`, [E]
    n_tiles = -(-size // tile)
    last_tile = jnp.cumsum(n_tiles)
    start = (last_tile - n_tiles) * tile
    # The most tiles there can be: a group that is not empty pads at most tile - 1 rows.
    bound = (count + min(n_experts, count) * (tile - 1)) // tile
    bound = bound if bound <= chunk else -(-bound // chunk) * chunk
    owner = jnp.searchsorted(last_tile, jnp.arange(bound), side="right", method="compare_all")
    owner = jnp.minimum(owner, n_experts - 1).astype(jnp.int32)
    rank = jnp.arange(bound * tile).reshape(bound, tile) - start[owner][:, None]
    filled = rank < size[owner][:, None]
    assignment = order[jnp.clip(first[owner][:, None] + rank, 0, count - 1)]
    slot = (mine * (running - 1 + start[None])).sum(-1).reshape(ids.shape)
    return Layout(assignment.reshape(-1), filled.reshape(-1), slot, local, start, n_tiles * tile, owner)


def accumulator(dtype: Any) -> Any:
    """The dtype that products of `dtype` add up in."""
    return jnp.promote_types(dtype, jnp.float32)
