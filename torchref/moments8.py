"""Moments of AdamW in 8 bits: blocks of 256 values, each with its absmax. Twin: jaxlm/moments8.py.

A block is divided by its absmax and each value becomes its place in a dynamic map, signed for the first moment,
unsigned for the second (arXiv:2110.02861, section 2), as bitsandbytes' CPU kernel does it to the bit: rounded to one of
65,536 points of [-1, 1], then to the place nearest to the point.

Blocks are cut along the last axis; where 256 does not divide it, from the flattened tensor, the last one shorter.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchref.quant import dynamic_map
from torchref.shapes import Float

BLOCK = 256  # values with one absmax
SMALLEST = 4096  # parameters with fewer values keep wide moments, as bitsandbytes has it
POINTS = 65536  # of [-1, 1] that a value is rounded to first
LEAST = torch.finfo(torch.float32).tiny  # a block with a smaller absmax is one of zeros


class Moment8(NamedTuple):
    """One moment."""

    codes: Tensor  # uint8, in the shape of the parameter
    absmax: Tensor  # float32, [..., dim/256] or, from the flattened tensor, [blocks]


def is_narrow(shape: tuple[int, ...]) -> bool:
    """Whether moments of a parameter of this shape are kept in 8 bits."""
    return math.prod(shape) >= SMALLEST


def quantize(moment: Float[Tensor, "..."], signed: bool) -> Moment8:
    """Codes and absmax of a moment, taken in float32."""
    rows = _rows(moment.float())
    absmax = rows.abs().amax(-1)
    empty = absmax < LEAST
    scaled = rows * absmax.reciprocal().masked_fill(empty, 0)[:, None]
    points = ((scaled.clamp(-1, 1) + 1) * 0.5 * (POINTS - 1) + 0.5).floor().nan_to_num().long()
    codes = _places(signed).to(moment.device)[points].masked_fill(empty[:, None], 0)
    return Moment8(codes.reshape(-1)[: moment.numel()].view(moment.shape), absmax.view(_lengths(moment)))


def dequantize(stored: Moment8, signed: bool) -> Float[Tensor, "..."]:
    """The float32 moment that the codes stand for; the inverse of `quantize`."""
    levels = dynamic_map(signed).to(stored.codes.device)[_rows(stored.codes).int()]
    values = levels * stored.absmax.view(-1, 1)
    return values.reshape(-1)[: stored.codes.numel()].view(stored.codes.shape)


def zeros(shape: tuple[int, ...]) -> Moment8:
    """A moment before the first step."""
    codes = torch.zeros(shape, dtype=torch.uint8)
    return Moment8(codes, torch.zeros(_lengths(codes)))


@lru_cache(maxsize=2)
def _places(signed: bool) -> Tensor:
    """Place in the map nearest to each of the points; bitsandbytes spreads them over [-1, 1] in float32."""
    points = torch.arange(POINTS, dtype=torch.float32) / (POINTS - 1) * 2 - 1
    levels = dynamic_map(signed).double()
    return torch.bucketize(points.double(), (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def _rows(x: Tensor) -> Tensor:
    """The flattened tensor in rows of a block; where 256 divides the last axis, its blocks are among them."""
    flat = x.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _lengths(x: Tensor) -> tuple[int, ...]:
    """Shape of the absmax."""
    if x.size(-1) % BLOCK == 0:
        return (*x.shape[:-1], x.size(-1) // BLOCK)
    return (-(-x.numel() // BLOCK),)
