"""The products of the expert MLPs as kernels for CUDA: Pallas, lowered through Triton; on CPU they are interpreted.

Over the layout of `jaxlm.dispatch`, rows in S slots, tiles of one expert each; `jaxlm.grouped_pallas` composes them:

    experts_up            h = rows @ up[e] + bias and hidden = activation(h), gate and up in one read of the rows
    experts_rows          rows @ weights[e] + bias, or @ weights[e]^T
    experts_d_activation  from the gradient of hidden that of h, with what the weights and the router need beside it
    experts_d_weights     per expert the sum over its rows of row^T d_row, written once; zero for an expert without rows

Half-precision inputs are multiplied as such and add up in float32. The columns of a tile run fastest over the programs,
so that an expert's weights are read from memory once and then from the cache. Behind the last tile in use a program
ends at once and leaves its part of the result unwritten: nobody may read it.

Sources: grouped products in both directions, arXiv:2211.15841 (MegaBlocks); block sizes, tokamax's measurements of its
own kernels on an H100.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxlm.dispatch import Activation, Blocks, KernelPlan, Layout, accumulator

LEAST = 16  # the smallest side of a product in Triton


class Tiles(NamedTuple):
    """A layout as the kernels read it."""

    owner: Array  # int32 [S / tile], the tile's expert; -1 where it is not in use
    first: Array  # int32 [E], first tile of each group
    count: Array  # int32 [E], tiles of each group


def tiles_of(layout: Layout, tile: int) -> Tiles:
    """The tiles of a layout that was made for tiles of this many rows."""
    used = jnp.arange(layout.owner.size) < layout.rows.sum() // tile
    return Tiles(jnp.where(used, layout.owner, -1), layout.start // tile, layout.rows // tile)


class _Span(NamedTuple):
    """Part of a dimension: `size` entries from `start`; those from `end` on read as zero and are not written."""

    start: Any
    size: int
    end: int | None = None  # None: all lie inside


def _spans(total: int, block: int) -> Callable[..., _Span]:
    """The i-th block of a dimension, or of the part of it that begins at `offset`."""
    ragged = total % block != 0
    return lambda i, offset=0: _Span(offset + i * block, block, offset + total if ragged else None)


def _mask(index: Sequence[Any]) -> Array | None:
    spans = [i for i in index if isinstance(i, _Span)]
    shape, mask = tuple(span.size for span in spans), None
    for axis, span in enumerate(spans):
        if span.end is not None:
            along = [span.size if a == axis else 1 for a in range(len(spans))]
            inside = (span.start + jnp.arange(span.size) < span.end).reshape(along)
            mask = inside if mask is None else mask & inside
    return None if mask is None else jnp.broadcast_to(mask, shape)


def _at(ref: Any, index: Sequence[Any]) -> Any:
    return ref.at[tuple(pl.ds(i.start, i.size) if isinstance(i, _Span) else i for i in index)]


def _read(ref: Any, *index: Any) -> Array:
    mask = _mask(index)
    return plt.load(_at(ref, index), mask=mask, other=None if mask is None else 0)


def _store(ref: Any, value: Array, *index: Any) -> None:
    plt.store(_at(ref, index), value.astype(ref.dtype), mask=_mask(index))


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    # The default would keep 10 bits of the mantissa of float32.
    precision = None if a.dtype.itemsize == 2 else lax.Precision.HIGHEST
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=accumulator(a.dtype))


def _cut(block: int, size: int) -> int:
    """The block, or the smallest power of two that holds the dimension."""
    return min(block, max(LEAST, 1 << (size - 1).bit_length()))


def _run(
    body: Callable[..., None], arrays: Any, shapes: Any, grid: tuple[int, ...], blocks: Blocks, name: str
) -> Any:
    """Calls the kernel with whole arrays; results are (shape, dtype)."""
    kinds = [jax.typeof(a).manual_axis_type for a in jax.tree.leaves(arrays)]
    axes = functools.reduce(frozenset.union, (kind.varying for kind in kinds))
    kind = {"manual_axis_type": kinds[0].update(varying=axes)} if axes else {}
    out = [jax.ShapeDtypeStruct(shape, dtype, **kind) for shape, dtype in shapes]
    # Half precision is what the cuts are for; wider rows must not need more shared memory.
    wide = max(a.dtype.itemsize for a in jax.tree.leaves(arrays) if a.ndim > 1)
    params = plt.CompilerParams(num_warps=blocks.warps, num_stages=max(1, 2 * blocks.stages // wide))

    def call(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(body, out, grid=grid, interpret=interpret, compiler_params=params, name=name)

    # By the platform that is compiled for, which need not be that of the process.
    return lax.platform_dependent(*arrays, cpu=call(True), default=call(False))


def _over_tiles(blocks: Blocks, tile: int) -> Blocks:
    """Warps beyond one per 16 rows would have no part in a product."""
    return blocks._replace(warps=min(blocks.warps, max(4, tile // LEAST)))


def erf(x: Array) -> Array:
    """The error function within 1.5e-7, from what Triton has; in float64, which is only ever interpreted, exactly.

    Source: Abramowitz and Stegun, 7.1.26.
    """
    if x.dtype == jnp.float64:
        return lax.erf(x)
    size = jnp.abs(x)
    t = 1 / (1 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return jnp.where(x < 0, -1, 1) * (1 - series * jnp.exp(-size * size))


def activate(*pre: Array, keep: Array | None, activation: Activation, rate: float) -> Array:
    """Activation and dropout of (gate, up) for swiglu, else (up,); `keep` is int8, zero where dropped."""
    if activation == "swiglu":
        gate, up = pre
        out = gate * lax.logistic(gate) * up
    elif activation == "gelu_tanh":
        out = jax.nn.gelu(pre[0], approximate=True)
    else:
        out = 0.5 * pre[0] * (1 + erf(pre[0] * 0.5**0.5))
    return out if keep is None else jnp.where(keep != 0, out / (1 - rate), 0)


def experts_up(
    owner: Array, rows: Array, up: Array, bias: Array | None, keep: Array | None, plan: KernelPlan, save: bool
) -> tuple[Array | None, Array]:
    """(h [S, U], None unless `save`; hidden [S, F]) of rows [S, D]; up [E, D, U], bias [E, U], keep int8 [S, F]."""
    (S, D), U, tile, blocks = rows.shape, up.shape[2], plan.tile, plan.kernels.up
    F = U // 2 if plan.activation == "swiglu" else U
    columns, inner = _cut(blocks.columns, F), _cut(blocks.inner, D)
    column_span, inner_span = _spans(F, columns), _spans(D, inner)
    zero = jnp.zeros((tile, columns), accumulator(rows.dtype))

    def body(owner: Any, rows: Any, up: Any, bias: Any, keep: Any, *out: Any) -> None:
        column, row = pl.program_id(0), pl.program_id(1)
        e, here = _read(owner, row), _Span(row * tile, tile)
        parts = [column_span(column, half * F) for half in range(U // F)]

        @pl.when(e >= 0)
        def _() -> None:
            def step(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
                own = _read(rows, here, inner_span(k))
                pairs = zip(totals, parts, strict=True)
                return tuple(t + _dot(own, _read(up, e, inner_span(k), part), (1, 0)) for t, part in pairs)

            pre = lax.fori_loop(0, pl.cdiv(D, inner), step, (jnp.zeros_like(zero),) * len(parts))
            if bias is not None:
                pre = tuple(p + _read(bias, e, part)[None] for p, part in zip(pre, parts, strict=True))
            if save:
                for p, part in zip(pre, parts, strict=True):
                    _store(out[0], p, here, part)
            kept = None if keep is None else _read(keep, here, parts[0])
            hidden = activate(*pre, keep=kept, activation=plan.activation, rate=plan.rate)
            _store(out[-1], hidden, here, parts[0])

    shapes = [((S, U), rows.dtype)] * save + [((S, F), rows.dtype)]
    grid = (pl.cdiv(F, columns), S // tile)
    arrays = (owner, rows, up, bias, keep)
    made = _run(body, arrays, shapes, grid, _over_tiles(blocks, tile), "experts_up")
    return made[0] if save else None, made[-1]


def experts_rows(
    owner: Array, rows: Array, weights: Array, bias: Array | None, tile: int, blocks: Blocks, transposed: bool
) -> Array:
    """rows [S, K] @ weights[e] [K, N] + bias [E, N], or @ weights[e]^T of weights [E, N, K]: [S, N] in rows' dtype."""
    (S, K), N = rows.shape, weights.shape[1 if transposed else 2]
    columns, inner = _cut(blocks.columns, N), _cut(blocks.inner, K)
    column_span, inner_span = _spans(N, columns), _spans(K, inner)

    def body(owner: Any, rows: Any, weights: Any, bias: Any, out: Any) -> None:
        column, row = pl.program_id(0), pl.program_id(1)
        e, here, part = _read(owner, row), _Span(row * tile, tile), column_span(column)

        @pl.when(e >= 0)
        def _() -> None:
            def step(k: Array, total: Array) -> Array:
                inside = inner_span(k)
                own = _read(weights, e, *((part, inside) if transposed else (inside, part)))
                return total + _dot(_read(rows, here, inside), own, (1, 1 if transposed else 0))

            zero = jnp.zeros((tile, columns), accumulator(rows.dtype))
            total = lax.fori_loop(0, pl.cdiv(K, inner), step, zero)
            _store(out, total if bias is None else total + _read(bias, e, part)[None], here, part)

    grid, arrays = (pl.cdiv(N, columns), S // tile), (owner, rows, weights, bias)
    return _run(body, arrays, [((S, N), rows.dtype)], grid, _over_tiles(blocks, tile), "experts_rows")[0]


def experts_d_activation(
    owner: Array, d_hidden: Array, h: Array, share: Array, keep: Array | None, plan: KernelPlan
) -> tuple[Array, Array, Array]:
    """(d_h [S, U], c hidden [S, F], d_c [S]) of d_hidden [S, F], h [S, U] and c = share [S]; keep int8 [S, F].

    d_hidden is the gradient before c. d_c, the gradient of c, lacks the share of the down projection's bias.
    """
    (S, F), U, blocks = d_hidden.shape, h.shape[1], plan.kernels.d_activation
    columns, lines = _cut(blocks.columns, F), min(blocks.rows, plan.tile)
    column_span, acc = _spans(F, columns), accumulator(h.dtype)

    def body(owner: Any, d_hidden: Any, h: Any, share: Any, keep: Any, d_h: Any, made: Any, d_c: Any) -> None:
        row, column = pl.program_id(0), pl.program_id(1)
        here = _Span(row * lines, lines)
        parts = [column_span(column, half * F) for half in range(U // F)]

        @pl.when(_read(owner, row // (plan.tile // lines)) >= 0)
        def _() -> None:
            kept = None if keep is None else _read(keep, here, parts[0])
            own = functools.partial(activate, keep=kept, activation=plan.activation, rate=plan.rate)
            hidden, pull = jax.vjp(own, *(_read(h, here, part).astype(acc) for part in parts))
            d, c = _read(d_hidden, here, parts[0]).astype(acc), _read(share, here)[:, None]
            for gradient, part in zip(pull(c * d), parts, strict=True):
                _store(d_h, gradient, here, part)
            _store(made, c * hidden, here, parts[0])
            _store(d_c, (d * hidden).sum(1), column, here)

    n_columns = pl.cdiv(F, columns)
    shapes = [((S, U), h.dtype), ((S, F), h.dtype), ((n_columns, S), acc)]
    arrays, grid = (owner, d_hidden, h, share, keep), (S // lines, n_columns)
    d_h, made, d_c = _run(body, arrays, shapes, grid, blocks, "experts_d_activation")
    return d_h, made, d_c.sum(0)


def experts_d_weights(tiles: Tiles, rows: Array, d_rows: Array, tile: int, blocks: Blocks) -> Array:
    """Per expert the sum over its slots of rows [S, K]^T d_rows [S, N]: [E, K, N] in rows' dtype."""
    E, K, N = tiles.count.size, rows.shape[1], d_rows.shape[1]
    lines, columns, inner = _cut(blocks.rows, K), _cut(blocks.columns, N), min(blocks.inner, tile)
    line_span, column_span = _spans(K, lines), _spans(N, columns)

    def body(first: Any, count: Any, rows: Any, d_rows: Any, out: Any) -> None:
        e, up, across = pl.program_id(2), line_span(pl.program_id(1)), column_span(pl.program_id(0))
        start = _read(first, e) * tile

        def step(k: Array, total: Array) -> Array:
            inside = _Span(start + k * inner, inner)
            return total + _dot(_read(rows, inside, up), _read(d_rows, inside, across), (0, 0))

        zero = jnp.zeros((lines, columns), accumulator(rows.dtype))
        _store(out, lax.fori_loop(0, _read(count, e) * (tile // inner), step, zero), e, up, across)

    grid, arrays = (pl.cdiv(N, columns), pl.cdiv(K, lines), E), (tiles.first, tiles.count, rows, d_rows)
    return _run(body, arrays, [((E, K, N), rows.dtype)], grid, blocks, "experts_d_weights")[0]
