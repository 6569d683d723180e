"""Moments in 8 bits: bitsandbytes' codes, absmax and values to the bit, whatever the layout of the weight."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from jaxlm.moments8 import BLOCK, Moment8, dequantize, is_narrow, quantize, zeros
from jaxlm.quant import dynamic_map

# 256 divides the blocks' axis; does not, and leaves a last block that is short; one axis; a stack.
SHAPES = [(16, 512), (80, 96), (5000,), (8192,), (3, 24, 256), (3, 40, 72)]


@pytest.fixture
def oracle() -> Iterator[Any]:
    """bitsandbytes' functional API on one thread."""
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pytest.importorskip("bitsandbytes").functional
    torch.set_num_threads(threads)


def drawn(shape: tuple[int, ...], signed: bool, scale: float) -> np.ndarray:
    """Numbers over eight decades, one block of zeros, exact zeros between."""
    rng = np.random.default_rng(sum(shape))
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-8, 0, shape) * scale
    flat = x.reshape(-1)
    flat[BLOCK : 2 * BLOCK] = 0
    flat[::17] = 0
    return (x if signed else np.abs(x)).astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_bitsandbytes(signed: bool, oracle: Any) -> None:
    """256 places, with and without a sign."""
    np.testing.assert_array_equal(dynamic_map(signed), oracle.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_bitsandbytes_to_the_bit(shape: tuple[int, ...], signed: bool, oracle: Any) -> None:
    """Codes, absmax and values of the flat tensor: ordinary, huge, tiny; jitted; the weight transposed or not."""
    import torch

    code = oracle.create_dynamic_map(signed=signed)
    for scale in (1.0, 1e-3, 1e30, 1e-20):
        x = drawn(shape, signed, scale)
        codes, state = oracle.quantize_blockwise(torch.from_numpy(x).reshape(-1), code=code, blocksize=BLOCK)
        values = oracle.dequantize_blockwise(codes, state).numpy()
        for transposed in (False, True) if x.ndim > 1 else (False,):
            here = np.swapaxes(x, -1, -2) if transposed else x
            made = quick_jit(lambda x: quantize(x, signed, transposed))(jnp.asarray(here))  # noqa: B023
            back = quick_jit(lambda made: dequantize(made, signed, transposed))(made)  # noqa: B023
            there = [np.asarray(part) for part in (*made, back)]
            if transposed:
                there = [part.swapaxes(-1, -2) if part.ndim > 1 else part for part in there]
            for ours, theirs in zip(there, (codes, state.absmax, values), strict=True):
                np.testing.assert_array_equal(ours.reshape(-1), np.asarray(theirs))


def test_codes_lie_as_the_weight_does() -> None:
    """Where 256 divides the blocks' axis the absmax have the weight's axes, else they are a row; zeros are zero."""
    made = zeros((512, 24), transposed=True)
    assert (made.codes.shape, made.absmax.shape) == ((512, 24), (2, 24))
    assert zeros((512, 24), transposed=False).absmax.shape == (48,)
    assert zeros((3, 24, 512), transposed=False).absmax.shape == (3, 24, 2)
    assert zeros((3, 512, 24), transposed=True).absmax.shape == (3, 2, 24)
    for shape, transposed in (((512, 24), True), ((70, 80), True)):

        def start(shape: tuple[int, ...] = shape, transposed: bool = transposed) -> tuple:
            fresh = zeros(shape, transposed)
            return fresh, quantize(jnp.zeros(shape), True, transposed), dequantize(fresh, True, transposed)

        fresh, same, values = quick_jit(start)()
        assert [np.array_equal(a, b) for a, b in zip(fresh, same, strict=True)] == [True, True]
        assert not np.any(values)
    assert isinstance(made, Moment8)
    assert is_narrow((64, 64)) and not is_narrow((4095,))


def test_a_block_of_numbers_below_float32_is_one_of_zeros() -> None:
    """Instead of a division by a number whose reciprocal overflows."""
    made = quick_jit(lambda x: quantize(x, True, False))(np.full(BLOCK, 1e-40, np.float32))
    assert not np.any(made.codes) and float(made.absmax[0]) < 1e-38
