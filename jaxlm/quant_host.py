"""Blocks of weights on the host: their absmax, packed codes, and double quantisation to bitsandbytes' last bit.

For `jaxlm.quant`, which says what the numbers mean; numpy alone, whatever device the weights go to.
"""

from collections.abc import Callable

import numpy as np

from jaxlm.config import InputError

_PIECE = 1 << 22  # weights that are quantised at once


def block_absmax(flat: np.ndarray, block: int) -> np.ndarray:
    """Largest magnitude of each block of a flat array; the last block may be shorter."""
    full = flat.size // block * block
    absmax = np.abs(flat[:full]).reshape(-1, block).max(-1)
    return absmax if full == flat.size else np.append(absmax, np.abs(flat[full:]).max())


def rounded(weight: np.ndarray, scales: np.ndarray, largest: int) -> np.ndarray:
    """weight/scale to the nearest integer, half to even; zero where the scale is."""
    return np.clip(np.rint(weight / np.where(scales == 0, np.float32(1), scales)), -largest, largest)


def pack(flat: np.ndarray, block: int, codes: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Two codes a byte, the first in the high half; `codes` gets rows of a block each and the blocks' numbers."""
    packed = []
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        rows = np.pad(piece, (0, -piece.size % block)).reshape(-1, block)
        made = codes(rows, start // block + np.arange(len(rows))).astype(np.uint8).reshape(-1, 2)
        packed.append((made[:, 0] << 4 | made[:, 1])[: -(-piece.size // 2)])
    return np.concatenate(packed)


def quantize_absmax(
    absmax: np.ndarray, table: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Double quantisation: places in the table [blocks], absmax of their blocks, and the mean taken off.

    Raises InputError where the sum is not finite.
    """
    offset = _mean(absmax)
    if not np.isfinite(offset):
        raise InputError("the largest weights are too large for float32 to hold the sum of")
    centred = absmax - offset
    nested = block_absmax(centred, block)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = centred * (np.float32(1) / nested).repeat(block)[: centred.size]
    # bitsandbytes rounds to one of 65,536 points first and looks up the place nearest to that.
    halves = (np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(0.5)
    points = np.floor((halves.astype(np.float64) * 65535 + 0.5).astype(np.float32))
    wide = table.astype(np.float64)
    places = np.searchsorted((wide[:-1] + wide[1:]) / 2, points.astype(np.float64) / 65535 * 2 - 1)
    # A block of equal absmax has nothing left to say; bitsandbytes gives it the first place.
    places[(nested == 0).repeat(block)[: centred.size]] = 0
    return places.astype(np.uint8), nested, np.asarray(offset)


def _mean(values: np.ndarray) -> np.float32:
    """float32 mean, added in the order of PyTorch's CPU kernel of eight lanes on one thread, as bitsandbytes does.

    Four rows of lanes are added side by side in a cascade (arXiv:1401.0248 on pairwise sums): sums of `step` rows, of
    `step` such sums, and so on, three times. The last bit of the mean depends on this order.
    """
    lanes = 8 if values.size >= 8 else 1
    vectors = values[: values.size // lanes * lanes].reshape(-1, lanes)
    rows = vectors[: len(vectors) // 4 * 4].reshape(-1, 4, lanes)
    step = 1 << max(4, (len(rows) - 1).bit_length() // 4 if len(rows) > 1 else 0)
    level, parts = rows, []
    for _ in range(3):
        whole = len(level) // step * step
        parts.append(_in_order(level[whole:]))
        level = _in_order(level[:whole].reshape(-1, step, 4, lanes).swapaxes(0, 1))
    four = _in_order(np.stack([*parts, _in_order(level)]))
    four[0] = _in_order(np.concatenate([four[:1], vectors[len(rows) * 4 :]]))
    total = _in_order(np.concatenate([values[vectors.size :], _in_order(four)]))
    return np.float32(total / np.float32(values.size))


def _in_order(values: np.ndarray) -> np.ndarray:
    """Sum over the first axis, one after the other."""
    total = np.zeros(values.shape[1:], np.float32)
    for value in values:
        total += value
    return total
