"""Weight-only quantisation in jaxlm: bitsandbytes to the bit, bounds on the error, memory, and what is refused."""

import functools
import importlib.metadata
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny

from jaxlm.cached import step
from jaxlm.config import ConfigError, InputError, ModelConfig
from jaxlm.model import Split, abstract_model
from jaxlm.presets import preset
from jaxlm.quant import (
    BLOCK,
    KINDS,
    NF4_LEVELS,
    abstract_quantized,
    dequantize_absmax,
    dequantize_tensor,
    dynamic_map,
    errors,
    is_quantized,
    quantize,
    quantize_params,
    quantize_tensor,
)
from jaxlm.tensor_file import Lazy

ROOT = Path(__file__).resolve().parents[2]
# bitsandbytes blocks a flat weight: rows that 64 divides, blocks across rows, last blocks that are short, odd counts.
SHAPES = [(128, 256), (64, 64), (96, 80), (7, 33), (3, 5), (1, 1), (1, 65), (3, 64, 96), (512, 1000)]
MOE = tiny({"expert_bias": True, "shared_d_ff": 28, "pattern": (True, False)}, init="fan_in", qkv_bias=True)


def split(config: ModelConfig, dtype: Any = np.float32) -> Split:
    """A model with random weights."""
    params = {path: jnp.asarray(value) for path, value in random_params(config, dtype=dtype).items()}
    return Split(abstract_model(config).graphdef, params)


def drawn(shape: tuple[int, ...], scale: float = 0.02) -> np.ndarray:
    """Normal weights with a hole of zeros where there is room for one."""
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(scale)
    if weight.size > 3 * BLOCK:
        weight.reshape(-1)[BLOCK : 2 * BLOCK] = 0
    return weight


@pytest.fixture(scope="module")
def oracle() -> Any:
    """bitsandbytes' functions, with one thread: the last bit of a mean depends on their number."""
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):  # for odd shapes it would compile for seconds
        yield pytest.importorskip("bitsandbytes").functional
    torch.set_num_threads(threads)


def test_tables_are_those_of_bitsandbytes(oracle: Any) -> None:
    """The 16 levels of nf4 and the 256 places of the dynamic map."""
    np.testing.assert_array_equal(np.float32(NF4_LEVELS), oracle.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(dynamic_map(), oracle.create_dynamic_map().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_bitsandbytes_to_the_bit(shape: tuple[int, ...], dtype: str, oracle: Any) -> None:
    """Codes, absmax in both stages, their mean, and values in the weight's dtype; ordinary, huge and tiny weights.

    bitsandbytes is given the flat weight: its kernel for AVX-512 takes the absmax of another block where 64 does not
    divide the last axis.
    """
    import torch

    for scale in (0.02, 1e32, 1e-28, 0.0):
        weight = torch.from_numpy(drawn(shape, scale)).to(getattr(torch, dtype))
        codes, state = oracle.quantize_4bit(
            weight.flatten(), quant_type="nf4", blocksize=BLOCK, compress_statistics=True
        )
        ours = quantize_tensor(np.asarray(weight.float()), "nf4")
        np.testing.assert_array_equal(ours.codes, codes.flatten().numpy())
        np.testing.assert_array_equal(ours.scales, state.absmax.numpy())
        np.testing.assert_array_equal(ours.nested, state.state2.absmax.numpy())
        np.testing.assert_array_equal(ours.offset, state.offset.numpy())
        absmax = oracle.dequantize_blockwise(state.absmax, state.state2) + state.offset
        if scale:  # a short block of zeros has an absmax of 1e-38, which XLA takes for zero
            np.testing.assert_array_equal(dequantize_absmax(ours), absmax.numpy())
        found = dequantize_tensor(ours, "nf4", shape).astype(dtype)
        expected = oracle.dequantize_4bit(codes, state).reshape(shape).float()
        np.testing.assert_array_equal(np.asarray(found, np.float32), expected.numpy())


def test_weights_on_the_borders_of_the_levels_fall_as_in_bitsandbytes(oracle: Any) -> None:
    """A full block is multiplied by 1/absmax and a short last one divided by absmax: other sides of a border."""
    import torch

    levels = np.float32(NF4_LEVELS)
    middles = (levels[:-1] + levels[1:]) / np.float32(2)
    for largest in np.random.default_rng(0).uniform(0.01, 0.1, 40).astype(np.float32):
        at = middles * largest
        near = np.concatenate([at, np.nextafter(at, np.float32(-1)), np.nextafter(at, np.float32(1))])
        block = np.pad(np.append(near, largest), (0, BLOCK - near.size - 1))
        weight = np.concatenate([block, block[:50]])
        codes, _ = oracle.quantize_4bit(torch.from_numpy(weight), quant_type="nf4", compress_statistics=True)
        np.testing.assert_array_equal(quantize_tensor(weight[None], "nf4").codes, codes.flatten().numpy())


def test_large_means_are_added_in_the_order_of_bitsandbytes(oracle: Any) -> None:
    """Sums of sums of sums: enough blocks for all levels of the cascade."""
    import torch

    for blocks in (40_001, 150_037):
        weight = drawn((blocks, BLOCK))
        state = oracle.quantize_4bit(
            torch.from_numpy(weight).flatten(), quant_type="nf4", compress_statistics=True
        )[1]
        ours = quantize_tensor(weight, "nf4")
        np.testing.assert_array_equal(ours.offset, state.offset.numpy())
        np.testing.assert_array_equal(ours.scales, state.absmax.numpy())


@pytest.mark.parametrize("shape", [(24, 40), (5, 33), (3, 8, 64)])
def test_rounding_is_within_half_a_step(shape: tuple[int, ...]) -> None:
    """int8 and int4 against scale/2 of their channel or block, nf4 against half its widest gap times the absmax."""
    weight = drawn(shape, 1.0)
    limit = 1 + 1e-6  # float32 scales and products
    stored = quantize_tensor(weight, "int8")
    error = np.abs(dequantize_tensor(stored, "int8", shape) - weight)
    assert np.all(error <= stored.scales[..., None] / 2 * limit + 1e-12)
    np.testing.assert_allclose(stored.scales, np.abs(weight).max(-1) / 127, rtol=1e-6)
    stored = quantize_tensor(weight, "int4")
    error = np.abs(dequantize_tensor(stored, "int4", shape) - weight).reshape(-1)
    assert np.all(error <= stored.scales.repeat(BLOCK)[: weight.size] / 2 * limit + 1e-12)
    padded = np.pad(np.abs(weight).reshape(-1), (0, -weight.size % BLOCK)).reshape(-1, BLOCK)
    np.testing.assert_allclose(stored.scales, padded.max(-1) / 7, rtol=1e-6)
    stored = quantize_tensor(weight, "nf4")
    error = np.abs(dequantize_tensor(stored, "nf4", shape) - weight).reshape(-1)
    true, kept = padded.max(-1), np.asarray(dequantize_absmax(stored))
    bound = np.diff(NF4_LEVELS).max() / 2 * true + np.abs(true - kept)
    assert np.all(error <= bound.repeat(BLOCK)[: weight.size] * limit)
    assert np.all(np.abs(true - kept) <= np.asarray(stored.nested).repeat(256)[: len(true)] * 0.01)


def test_bits_per_weight() -> None:
    """What is stored of a large weight, scales included: arXiv:2305.14314 has 0.127 bits of constants for nf4."""
    weight = drawn((512, 2048))
    bits = {
        kind: 8 * sum(part.nbytes for part in quantize_tensor(weight, kind) if part is not None) / weight.size
        for kind in KINDS
    }
    assert bits == {"int8": 8 + 32 / 2048, "int4": 4.5, "nf4": pytest.approx(4.127, abs=1e-3)}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_values_are_those_outside(kind: str) -> None:
    """No fused multiply-add between the two stages of nf4: jitted and not, the same bits."""
    shape = (96, 80)
    stored = quantize_tensor(drawn(shape), kind)
    compiled = jax.jit(lambda stored: dequantize_tensor(stored, kind, shape))(stored)
    np.testing.assert_array_equal(compiled, dequantize_tensor(stored, kind, shape))


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_a_quantised_model_is_the_same(kind: str) -> None:
    """From a model, from tensors read one by one, and without memory: names, shapes, dtypes and bits."""
    model = split(MOE)
    whole = quantize(model, kind)
    reads: list[str] = []

    def lazy(path: str, value: np.ndarray) -> Lazy:
        return Lazy(value.shape, value.dtype, lambda: reads.append(path) or value)  # type: ignore[func-returns-value]

    tensors = {path: lazy(path, np.asarray(value)) for path, value in model.params.items()}
    read = quantize_params(MOE, tensors, kind)
    assert reads == list(model.params), "each tensor is read once"
    assert read.graphdef == abstract_quantized(MOE, kind).graphdef
    assert read.params.keys() == whole.params.keys()
    for path, value in whole.params.items():
        np.testing.assert_array_equal(read.params[path], value)
    shapes = {path: (value.shape, value.dtype) for path, value in whole.params.items()}
    abstract = abstract_quantized(MOE, kind)
    assert {path: (value.shape, value.dtype) for path, value in abstract.shapes.items()} == shapes
    left = {path for path in model.params if path in whole.params}
    assert left == {path for path in model.params if not is_quantized(path)}
    assert {path.split(".")[-2] for path in left if path.endswith("weight")} == {
        *("embed", "lm_head", "router", "attn_norm", "mlp_norm", "final_norm")
    }


def test_errors_order_the_kinds() -> None:
    """int8 is closest, nf4 closer than int4 on normal weights, and the bytes are those of the parameters."""
    model = split(tiny({}, init="fan_in", n_layers=1))
    rows = {kind: errors(model, quantize(model, kind)) for kind in KINDS}
    mean = {kind: float(np.mean([row.error for row in found])) for kind, found in rows.items()}
    assert 0 < mean["int8"] < 0.02 < mean["nf4"] < mean["int4"] < 0.2
    quantized = quantize(model, "nf4")
    assert sum(row.bytes_after for row in rows["nf4"]) == sum(
        value.nbytes for path, value in quantized.params.items() if path not in model.params
    )


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_are_dequantised_one_at_a_time_inside_the_loop(kind: str) -> None:
    """A loop over tokens needs no more memory than a few weights of one layer: nothing is hoisted out of it."""
    config = tiny(n_layers=4, d_model=64, d_ff=512)
    model = abstract_quantized(config, kind)
    cache = jax.eval_shape(functools.partial(_empty, config))
    row = jax.ShapeDtypeStruct((1,), jnp.int32)

    def run(params: Any, cache: Any, tokens: Any, positions: Any, count: Any) -> Any:
        def one(carry: Any) -> Any:
            logits, cache, positions = step(model.graphdef, params, carry[1], carry[2], carry[3])
            return carry[0] + 1, cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), positions

        return jax.lax.while_loop(lambda c: c[0] < count, one, (0, cache, tokens, positions))

    compiled = jax.jit(run, donate_argnums=1).lower(model.shapes, cache, row, row, 5).compile()
    largest = 4 * math.prod((64, 512))
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * largest, (
        "one layer has 3 of these, the model 12"
    )


def _empty(config: ModelConfig) -> Any:
    from jaxlm.attention import init_cache

    return init_cache(config, 1, 16, jnp.float32)


def test_what_cannot_be_quantised_is_refused() -> None:
    """Unknown kinds, values that are not finite, models quantised before, tensors of another model: one line each."""
    model = split(tiny(n_layers=1))
    with pytest.raises(
        ConfigError, match=r"kind='nf3' must be one of int8, int4, nf4 \(did you mean 'nf4'\?\)"
    ):
        quantize(model, "nf3")
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(quantize(model, "int8"), "nf4")
    path = "blocks.0.attn.q_proj.weight"
    broken = model.params | {path: model.params[path].at[1, 2].set(jnp.nan)}
    for kind in KINDS:
        with pytest.raises(InputError, match=f"{path}: a weight holds NaN or infinity"):
            quantize(Split(model.graphdef, broken), kind)
    config = tiny(n_layers=1)
    arrays = {name: np.asarray(value) for name, value in model.params.items()}
    with pytest.raises(InputError, match="extra is not the model's"):
        quantize_params(config, arrays | {"extra": arrays[path]}, "int8")
    with pytest.raises(InputError, match=r"q_proj.weight is \(36, 24\), not \(24, 36\)"):
        quantize_params(config, arrays | {path: arrays[path].T}, "int8")


def test_astragpt_7b_is_four_gigabytes_in_nf4() -> None:
    """Shapes alone: 5.4 billion weights in 4.127 bits, embedding and head in bfloat16."""
    abstract = abstract_quantized(preset("astragpt-7b").model, "nf4", dtype=jnp.bfloat16)
    size = sum(shape.size * shape.dtype.itemsize for shape in abstract.shapes.values())
    assert 3.97e9 < size < 3.98e9


PLAN = """
import os
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"], os.environ["JAX_PLATFORMS"] = "1", "cuda,cpu"
from jaxlm.plan import compile_decode
from jaxlm.presets import preset
compiled = compile_decode(preset("astragpt-7b").model, "nf4", 2048, 1)
assert compiled.peak_bytes <= 6e9, compiled.peak_bytes
# More than a few weights of one layer at a time would be gigabytes.
assert compiled.temporary_bytes < 5e8, compiled.temporary_bytes
"""


@pytest.mark.slow
def test_decoding_astragpt_7b_in_nf4_fits_six_gigabytes_of_an_h200() -> None:
    """Compiled for the card that is not there, where jax's compiler for it is installed."""
    try:
        found = importlib.metadata.version("jax-cuda13-plugin")
    except importlib.metadata.PackageNotFoundError:
        found = "missing"
    if found != jax.__version__:
        pytest.skip(f"jax-cuda13-plugin is {found}, not {jax.__version__}")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-c", PLAN], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-2000:]
