"""Dropless expert MLPs: every token through the experts its router chose, and only through those.

Five backends compute the same function:

    loop     every expert over every token, masked: E/A times the work, plainly right, the oracle of the tests
    blocks   CPU: one expert after the other, over tiles of its own tokens
    pallas   CUDA in half precision: grouped products as kernels, see `jaxlm.grouped_pallas`
    batched  GPU: batched products over equal tiles, each with a gathered copy of its expert's weights
    sliced   decoding: a product per assignment on its expert's weights where they lie; nobody else's are read

All but `loop` and `sliced` share the layout of `jaxlm.dispatch`. The hand-written gradients keep the hidden
pre-activations of the forward pass, and are themselves not differentiable.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.dispatch import EXPERT_HIDDEN as EXPERT_HIDDEN
from jaxlm.dispatch import Activation as Activation
from jaxlm.dispatch import ExpertWeights as ExpertWeights
from jaxlm.dispatch import KernelPlan, Kernels, Layout, accumulator
from jaxlm.dispatch import sort_by_expert as sort_by_expert
from jaxlm.shapes import Float, Int

Backend = Literal["auto", "loop", "blocks", "pallas", "batched", "sliced"]

CPU_TILES = (512, 128, 32, 8, 4)  # rows; large tiles keep the cores busy, small ones pad less
GPU_TILES = (256, 64, 16)
KERNEL_TILES = (128, 64, 32, 16)
GPU_CHUNK = 16  # tiles of one batched product; bounds the gathered weights and the gradients per tile
SLICES = 16  # assignments that `auto` slices weights for at most: each product is compiled on its own


class _Plan(NamedTuple):
    """What is fixed at trace time."""

    backend: Literal["blocks", "batched"]
    activation: Activation
    rate: float  # of dropout
    tiles: tuple[int, ...]  # rows, descending, each a multiple of the next


def expert_mlp(
    x: Float[Array, "P D"],
    weights: ExpertWeights,
    ids: Int[Array, "P A"],
    combine: Float[Array, "P A"],
    *,
    activation: Activation,
    backend: Backend = "auto",
    hidden_dropout: tuple[Array, float] | None = None,
    tiles: tuple[int, ...] | None = None,
    kernels: Kernels | None = None,
) -> Float[Array, "P D"]:
    """sum_a combine[p, a] * MLP_{ids[p, a]}(x[p]): [P, D] in x's dtype, accumulated in at least float32.

    An id outside [0, E) is nobody's here: it contributes exactly zero to the result and to every gradient.
    `hidden_dropout` is the key and rate of dropout on the hidden layer, drawn per assignment, hence the same for
    all backends. `auto` looks at the default device; name the backend when compiling for another one. `tiles`
    overrides the tile sizes in rows, descending, each a multiple of the next; `pallas` and `batched` take one.
    `kernels` overrides how `pallas` cuts its products.

    Raises ValueError on an unknown activation or backend, and on widths, dtypes or tiles that do not fit.
    """
    _check(x, weights, ids, activation, backend, tiles)
    if backend == "auto":
        fastest = "pallas" if x.dtype.itemsize == 2 else "batched"
        grouped = "blocks" if jax.default_backend() == "cpu" else fastest
        # Up to half the experts at most: fewer bytes than grouping reads, and no sorting.
        backend = "sliced" if ids.size <= min(SLICES, len(weights.up) // 2) else grouped
    key, rate = hidden_dropout or (None, 0.0)
    keep = None
    if key is not None and rate > 0:
        keep = jax.random.bernoulli(key, 1 - rate, (*ids.shape, weights.down.shape[1]))
    if backend == "loop":
        return _loop(x, weights, ids, combine, keep, activation, rate)
    if backend == "sliced":
        return _sliced(x, weights, ids, combine, keep, activation, rate)
    inputs = _vary_alike((x, weights, ids, combine, keep))
    if backend == "pallas":
        each = ids.size // len(weights.up)  # rows of an expert, if all have as many
        tile = tiles[0] if tiles else next((t for t in KERNEL_TILES if t <= each), KERNEL_TILES[-1])
        from jaxlm.grouped_pallas import kernel_mlp  # Pallas takes 0.15 s to import

        return kernel_mlp(KernelPlan(activation, rate, tile, kernels or Kernels()), *inputs)
    if tiles is None:
        sizes, count = (CPU_TILES, 3) if backend == "blocks" else (GPU_TILES, 1)
        # Under two rows per expert, as in decoding, a product per row reads no more weights and pads nothing.
        tiles = tuple(t for t in sizes if t * weights.up.shape[0] <= 4 * ids.size)[:count] or (1,)
    if backend == "blocks":
        # Rows are gathered, kept and multiplied in one dtype: a CPU would convert bfloat16 each time.
        x, *rest = inputs
        wide = x.astype(accumulator(x.dtype))
        return _grouped(_Plan(backend, activation, rate, tiles), wide, *rest).astype(x.dtype)
    return _grouped(_Plan(backend, activation, rate, tiles), *inputs)


def _check(
    x: Array, weights: ExpertWeights, ids: Array, activation: str, backend: str, tiles: tuple[int, ...] | None
) -> None:
    for name, value, known in (("activation", activation, Activation), ("backend", backend, Backend)):
        if value not in get_args(known):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(get_args(known))}")
    f, width = weights.down.shape[1], weights.up.shape[2]
    if width != (2 * f if activation == "swiglu" else f):
        raise ValueError(
            f"up is {width} wide, which does not suit F={f} of down with activation={activation!r}"
        )
    for w in jax.tree.leaves(weights):
        if w.dtype != x.dtype:
            raise ValueError(f"expert weights are {w.dtype} but x is {x.dtype}: cast one of them")
    if (len(weights.up) + 1) * ids.size >= 2**31:
        raise ValueError(
            f"{ids.size} assignments to {len(weights.up)} experts overflow 32-bit keys: use smaller batches"
        )
    too_many = backend in ("batched", "pallas") and len(tiles or ()) > 1
    if tiles is not None and (not tiles or too_many or any(a % b for a, b in itertools.pairwise(tiles))):
        raise ValueError(
            f"tiles={tiles} must be descending, each a multiple of the next; one for pallas and batched"
        )
    if tiles is not None and backend == "pallas" and tiles[0] & (tiles[0] - 1):
        raise ValueError(f"tiles={tiles}: for pallas a power of two, as its blocks are")


def _vary_alike(arrays: Any) -> Any:
    """Inside shard_map, marks the arrays as varying over the union of their axes; gradients are summed."""

    def varying(a: Array) -> frozenset[str]:
        return jax.typeof(a).manual_axis_type.varying

    axes = functools.reduce(frozenset.union, map(varying, jax.tree.leaves(arrays)))

    def mark(a: Array) -> Array:
        missing = tuple(sorted(axes - varying(a)))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(mark, arrays)


def _hidden(h: Array, keep: Array | None, activation: Activation, rate: float) -> Array:
    """Activation and dropout: h [..., U] -> [..., F]."""
    if activation == "swiglu":
        gate, up = jnp.split(h, 2, axis=-1)
        out = jax.nn.silu(gate) * up
    else:
        out = jax.nn.gelu(h, approximate=activation == "gelu_tanh")
    return out if keep is None else jnp.where(keep, out / (1 - rate), 0)


def _loop(
    x: Array,
    weights: ExpertWeights,
    ids: Array,
    combine: Array,
    keep: Array | None,
    activation: Activation,
    rate: float,
) -> Array:
    acc = accumulator(x.dtype)
    out = jnp.zeros(x.shape, acc)
    for e in range(weights.up.shape[0]):
        up, up_bias, down, down_bias = jax.tree.map(lambda w, e=e: w[e].astype(acc), weights)
        h = x.astype(acc) @ up + (0 if up_bias is None else up_bias[None])
        for a in range(ids.shape[1]):
            y = _hidden(h, None if keep is None else keep[:, a], activation, rate) @ down
            y = y + (0 if down_bias is None else down_bias[None])
            out += jnp.where(ids[:, a] == e, combine[:, a], 0).astype(acc)[:, None] * y
    return out.astype(x.dtype)


def _sliced(
    x: Array,
    weights: ExpertWeights,
    ids: Array,
    combine: Array,
    keep: Array | None,
    activation: Activation,
    rate: float,
) -> Array:
    acc, n_experts = accumulator(x.dtype), weights.up.shape[0]
    rows = []
    for p in range(x.shape[0]):
        total = jnp.zeros((1, x.shape[1]), acc)
        for a in range(ids.shape[1]):
            e = ids[p, a]
            ours = (e >= 0) & (e < n_experts)
            own = jax.tree.map(lambda w, e=e: lax.dynamic_index_in_dim(w, e, keepdims=False), weights)
            h = jnp.matmul(x[p : p + 1], own.up, preferred_element_type=acc)
            h = h if own.up_bias is None else h + own.up_bias[None]
            hidden = _hidden(h, None if keep is None else keep[p, a], activation, rate).astype(x.dtype)
            y = jnp.matmul(hidden, own.down, preferred_element_type=acc)
            y = y if own.down_bias is None else y + own.down_bias[None]
            total += jnp.where(ours, combine[p, a].astype(acc) * y, 0)
        rows.append(total)
    return jnp.concatenate(rows).astype(x.dtype)


# A tile's work: (first slot, number of slots, its expert's weights) -> (results per slot, weight gradient).
Work = Callable[[Array, int, ExpertWeights], tuple[tuple[Array, ...], ExpertWeights | None]]
Rows = tuple[Array, ...]  # buffers of S rows


def _run_blocks(
    work: Work, plan: _Plan, layout: Layout, weights: ExpertWeights, rows: Rows, train: bool
) -> Any:
    """Runs `work` expert by expert: one copy of an expert's weights serves all its tiles, and their gradient
    adds up in place before it is written once. Returns the filled rows and, if `train`, the gradient."""
    acc, n_experts = accumulator(weights.up.dtype), weights.up.shape[0]
    index = jnp.arange(n_experts, dtype=jnp.int32)
    busy = lax.sort(jnp.where(layout.rows > 0, index, index + n_experts), is_stable=False) % n_experts

    def one_expert(i: Array, carry: Any) -> Any:
        rows, total = carry
        e = busy[i]
        # Also for bfloat16, whose transposed products are several times slower than float32's on CPU.
        own = jax.tree.map(lambda w: w[e].astype(acc), weights)
        grads = jax.tree.map(jnp.zeros_like, own) if train else None
        start, left = layout.start[e], layout.rows[e]
        for tile in (t for t in plan.tiles if t <= layout.filled.size):

            def one_tile(j: Array, carry: Any, tile: int = tile, start: Array = start) -> Any:
                rows, grads = carry
                at = start + j * tile
                new, more = work(at, tile, own)
                return _write(rows, new, at), jax.tree.map(jnp.add, grads, more)

            rows, grads = lax.fori_loop(0, left // tile, one_tile, (rows, grads))
            start, left = start + left // tile * tile, left % tile
        write = functools.partial(lax.dynamic_update_index_in_dim, index=e, axis=0)
        return rows, jax.tree.map(lambda t, g: write(t, g.astype(t.dtype)), total, grads)

    total = jax.tree.map(jnp.zeros_like, weights) if train else None
    return lax.fori_loop(0, (layout.rows > 0).sum(), one_expert, (rows, total))


def _run_batched(
    work: Work, plan: _Plan, layout: Layout, weights: ExpertWeights, rows: Rows, train: bool
) -> Any:
    """Runs `work` on chunks of tiles at once; the gradients of a chunk's tiles are summed by expert in a
    product with a one-hot matrix, which has a fixed order. Returns what `_run_blocks` does."""
    acc, n_experts = accumulator(weights.up.dtype), weights.up.shape[0]
    tile = plan.tiles[-1]
    chunk = min(GPU_CHUNK, layout.owner.size)

    def one_chunk(i: Array, carry: Any) -> Any:
        rows, total = carry
        at = (i * chunk + jnp.arange(chunk, dtype=jnp.int32)) * tile
        owner = lax.dynamic_slice_in_dim(layout.owner, i * chunk, chunk)
        new, grads = jax.vmap(lambda at, own: work(at, tile, own))(
            at, jax.tree.map(lambda w: w[owner], weights)
        )
        onehot = jax.nn.one_hot(owner, n_experts, dtype=acc, axis=0)
        add = functools.partial(jnp.tensordot, onehot, axes=1, precision="highest")
        new = tuple(n.reshape(-1, *n.shape[2:]) for n in new)
        return _write(rows, new, at[0]), jax.tree.map(lambda t, g: t + add(g), total, grads)

    zero = _zero_after(rows[0]).astype(acc)
    total = jax.tree.map(lambda w: jnp.broadcast_to(zero, w.shape), weights) if train else None
    chunks = -(-layout.rows.sum() // (chunk * tile))
    rows, total = lax.fori_loop(0, chunks, one_chunk, (rows, total))
    return rows, jax.tree.map(lambda t, w: t.astype(w.dtype), total, weights) if train else None


def _write(rows: Rows, new: Rows, at: Array) -> Rows:
    write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
    return tuple(write(r, n.astype(r.dtype)) for r, n in zip(rows, new, strict=True))


_RUN = {"blocks": _run_blocks, "batched": _run_batched}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(
    plan: _Plan, x: Array, weights: ExpertWeights, ids: Array, combine: Array, keep: Array | None
) -> Array:
    return _forward(plan, x, weights, ids, combine, keep)[0]


def _forward(
    plan: _Plan, x: Array, weights: ExpertWeights, ids: Array, combine: Array, keep: Array | None
) -> tuple[Array, Any]:
    acc, n_active = accumulator(x.dtype), ids.shape[1]
    chunk = GPU_CHUNK if plan.backend == "batched" else 1
    layout = sort_by_expert(ids, weights.up.shape[0], plan.tiles[-1], chunk)

    def work(at: Array, n: int, own: ExpertWeights) -> Any:
        a = lax.dynamic_slice_in_dim(layout.assignment, at, n)
        rows = x[a // n_active].astype(own.up.dtype)
        h = jnp.einsum("pd,du->pu", rows, own.up, preferred_element_type=acc)
        h = h if own.up_bias is None else h + own.up_bias[None]
        hidden = _hidden(h, _mask(keep, a), plan.activation, plan.rate).astype(own.down.dtype)
        y = jnp.einsum("pf,fd->pd", hidden, own.down, preferred_element_type=acc)
        return (h, y if own.down_bias is None else y + own.down_bias[None]), None

    zero = _zero_after(x)
    buffers = tuple(
        jnp.broadcast_to(zero, (layout.filled.size, w)) for w in (weights.up.shape[2], x.shape[1])
    )
    (h, y), _ = _RUN[plan.backend](work, plan, layout, weights, buffers, False)
    # What the gradient reads, by name: a remat policy that keeps it runs no product of the forward pass again.
    h, layout = checkpoint_name((h, layout), EXPERT_HIDDEN)
    y = jnp.where(layout.local[..., None], combine.astype(acc)[..., None] * y[layout.slot].astype(acc), 0)
    return y.sum(1).astype(x.dtype), (x, weights, combine, keep, layout, h)


def _backward(plan: _Plan, saved: Any, dy: Array) -> Any:
    x, weights, combine, keep, layout, h = saved
    acc, n_active = accumulator(x.dtype), combine.shape[1]
    # Padding has weight zero: whatever rows it holds, they add nothing to the gradients of the weights.
    share = jnp.where(layout.filled, combine.reshape(-1)[layout.assignment].astype(acc), 0)

    def work(at: Array, n: int, own: ExpertWeights) -> Any:
        a, c, pre = (lax.dynamic_slice_in_dim(v, at, n) for v in (layout.assignment, share, h))
        dtype, c = own.up.dtype, c[:, None]
        activate = functools.partial(_hidden, keep=_mask(keep, a), activation=plan.activation, rate=plan.rate)
        hidden, pull = jax.vjp(activate, pre.astype(acc))
        d_out = dy[a // n_active].astype(dtype)  # of c * y, hence of y it is c * d_out
        d_hidden = jnp.einsum("pd,fd->pf", d_out, own.down, preferred_element_type=acc)
        d_c = (d_hidden * hidden).sum(-1)
        d_y = c * d_out
        (d_h,) = pull(c * d_hidden)
        d_rows = jnp.einsum("pu,du->pd", d_h.astype(dtype), own.up, preferred_element_type=acc)
        rows = x[a // n_active].astype(dtype)
        d_up = jnp.einsum("pd,pu->du", rows, d_h.astype(dtype), preferred_element_type=acc)
        d_down = jnp.einsum("pf,pd->fd", hidden.astype(dtype), d_y.astype(dtype), preferred_element_type=acc)
        if own.down_bias is not None:
            d_c += d_out.astype(acc) @ own.down_bias.astype(acc)
        d_up_bias = None if own.up_bias is None else d_h.sum(0)
        d_down_bias = None if own.down_bias is None else d_y.sum(0)
        return (d_rows, d_c), ExpertWeights(d_up, d_up_bias, d_down, d_down_bias)

    n_slots = layout.filled.size
    zero = _zero_after(dy)
    buffers = (
        jnp.broadcast_to(zero, (n_slots, x.shape[1])),
        jnp.broadcast_to(zero, n_slots).astype(acc),
    )
    (d_rows, d_c), d_weights = _RUN[plan.backend](work, plan, layout, weights, buffers, True)
    dx = jnp.where(layout.local[..., None], d_rows[layout.slot].astype(acc), 0).sum(1).astype(x.dtype)
    d_combine = jnp.where(layout.local, d_c[layout.slot], 0).astype(combine.dtype)
    return dx, d_weights, None, d_combine, None


def _zero_after(x: Array) -> Array:
    """A zero, known to the compiler only once x is.

    It fills buffers early and together where it can: those of all layers would be alive from the first to the last.
    """
    return lax.optimization_barrier((jnp.zeros_like(x, shape=()), x))[0]


def _mask(keep: Array | None, assignment: Array) -> Array | None:
    return None if keep is None else keep.reshape(-1, keep.shape[-1])[assignment]


_grouped.defvjp(_forward, _backward)
