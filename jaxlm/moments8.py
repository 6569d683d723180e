"""Moments of AdamW in 8 bits: blocks of 256 values, each with its absmax. Twin: torchref/moments8.py.

A block is divided by its absmax and each value becomes its place in a dynamic map, signed for the first moment,
unsigned for the second. Source: arXiv:2110.02861, section 2. Codes, absmax and values are bitsandbytes' (the CPU
kernel of its `functional.quantize_blockwise`) to the bit: it rounds to one of 65,536 points of [-1, 1] and takes the
place nearest to the point. So a second moment is never kept below 1.5e-5 of its block's largest, which damps the
smallest gradients of a block and keeps the root in the denominator away from zero.

Blocks are cut along the last axis of the weight as PyTorch has it: for a matrix [in, out] of jaxlm, `transposed`, along
its inputs. Where 256 divides that axis, the absmax have the moment's shape with that axis 256 times shorter, so that
they are sharded as it is; else blocks are cut from the flattened weight of PyTorch and the absmax are one row. Codes
have the moment's shape in any case. So both frameworks and bitsandbytes hold the same bytes.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.quant import dynamic_map
from jaxlm.shapes import Float

BLOCK = 256  # values with one absmax
SMALLEST = 4096  # parameters with fewer values keep wide moments, as bitsandbytes has it
POINTS = 65536  # of [-1, 1] that a value is rounded to first
LEAST = np.finfo(np.float32).tiny  # a block with a smaller absmax is one of zeros


class Moment8(NamedTuple):
    """One moment."""

    codes: Any  # uint8, in the shape of the parameter
    absmax: Any  # float32, [..., in/256, out], [..., dim/256] or, from the flattened weight, [blocks]


def is_narrow(shape: tuple[int, ...]) -> bool:
    """Whether moments of a parameter of this shape are kept in 8 bits."""
    return math.prod(shape) >= SMALLEST


def quantize(moment: Float[Array, "..."], signed: bool, transposed: bool) -> Moment8:
    """Codes and absmax of a moment, taken in float32."""
    blocks, axis = _blocks(moment.astype(jnp.float32), transposed)
    absmax = jnp.max(jnp.abs(blocks), axis=axis, keepdims=True)
    scaled = blocks * jnp.where(absmax < LEAST, 0, 1 / absmax)
    points = jnp.floor((jnp.clip(scaled, -1, 1) + 1) * 0.5 * (POINTS - 1) + 0.5).astype(jnp.int32)
    codes = jnp.asarray(_places(signed)).at[points].get(mode="clip")
    codes = jnp.where(absmax < LEAST, jnp.uint8(0), codes)
    return Moment8(_whole(codes, moment.shape, transposed), jnp.squeeze(absmax, axis))


def dequantize(stored: Moment8, signed: bool, transposed: bool) -> Float[Array, "..."]:
    """The float32 moment that the codes stand for; the inverse of `quantize`."""
    codes, axis = _blocks(stored.codes, transposed)
    levels = jnp.asarray(dynamic_map(signed)).at[codes].get(mode="promise_in_bounds")
    return _whole(levels * jnp.expand_dims(stored.absmax, axis), stored.codes.shape, transposed)


def zeros(shape: tuple[int, ...], transposed: bool) -> Moment8:
    """A moment before the first step."""
    axis, whole = _axis(shape, transposed)
    lengths = (*shape[:axis], shape[axis] // BLOCK, *shape[axis + 1 :])
    rows = lengths if whole else (-(-math.prod(shape) // BLOCK),)
    return Moment8(jnp.zeros(shape, jnp.uint8), jnp.zeros(rows, jnp.float32))


@lru_cache(maxsize=2)
def _places(signed: bool) -> np.ndarray:
    """Place in the map nearest to each of the points; bitsandbytes spreads them over [-1, 1] in float32."""
    points = np.arange(POINTS, dtype=np.float32) / np.float32(POINTS - 1) * np.float32(2) - np.float32(1)
    levels = dynamic_map(signed).astype(np.float64)
    return np.searchsorted((levels[:-1] + levels[1:]) / 2, points).astype(np.uint8)


def _axis(shape: tuple[int, ...], transposed: bool) -> tuple[int, bool]:
    """The axis along which blocks are cut, and whether blocks divide it."""
    axis = len(shape) - (2 if transposed else 1)
    return axis, shape[axis] % BLOCK == 0


def _blocks(x: Array, transposed: bool) -> tuple[Array, int]:
    """x with an axis of 256 of its own, and that axis."""
    axis, whole = _axis(x.shape, transposed)
    if whole:
        return x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]), axis + 1
    flat = (x.mT if transposed else x).reshape(-1)
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK), 1


def _whole(blocks: Array, shape: tuple[int, ...], transposed: bool) -> Array:
    """The inverse of `_blocks`."""
    if _axis(shape, transposed)[1]:
        return blocks.reshape(shape)
    flat = blocks.reshape(-1)[: math.prod(shape)]
    return flat.reshape(*shape[:-2], shape[-1], shape[-2]).mT if transposed else flat.reshape(shape)
