"""The rotary table against 50-digit arithmetic and against transformers' own functions."""

import math
import subprocess
import sys
import types

import numpy as np
import pytest

from jaxlm.config import ConfigError, ModelConfig, RopeScaling
from jaxlm.rope_table import rope_frequencies, rope_table

UNIT = 2.0**-53  # largest relative error of one float64 rounding
THETA, HEAD_DIM = 500_000.0, 64
SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling("linear", factor=3.7),
    "llama3": RopeScaling(
        "llama3", factor=8.0, original_context=8192, low_freq_factor=1.5, high_freq_factor=5.0
    ),
    "yarn": RopeScaling("yarn", factor=16.0, original_context=4096, beta_fast=30.0, beta_slow=1.5),
    "yarn-factor": RopeScaling("yarn", factor=4.0, original_context=8192, attention_factor=1.25),
    "yarn-step": RopeScaling("yarn", factor=4.0, original_context=6),  # both corners at pair 0: no ramp
    "yarn-short": RopeScaling("yarn", factor=4.0, original_context=3),  # both corners below pair 0
}
POSITIONS = (0, 1, 2, 3, 255, 1000, 4095, 8191, 32_768, 65_537, 100_003, 131_071)
each_scaling = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())


def model(scaling: RopeScaling = SCALINGS["none"], context: int = 64, **changes: object) -> ModelConfig:
    """A decoder whose rotary part is the one under test."""
    values: dict = dict(
        vocab_size=64, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, norm_eps=1e-5
    )
    values |= dict(head_dim=HEAD_DIM, context=context, rope_theta=THETA, rope_scaling=scaling)
    return ModelConfig(**(values | changes))


def exact(mp: types.ModuleType, scaling: RopeScaling) -> tuple[list, object]:
    """inv_freq and attention factor to 50 digits, each formula written out as its source gives it."""
    num, pairs = mp.mpf, HEAD_DIM // 2
    base = [num(THETA) ** (-num(2 * i) / HEAD_DIM) for i in range(pairs)]
    factor, original = num(scaling.factor), scaling.original_context
    if scaling.kind == "none":
        return base, num(1)
    if scaling.kind == "linear":
        return [f / factor for f in base], num(1)
    if scaling.kind == "llama3":
        low, high = num(scaling.low_freq_factor), num(scaling.high_freq_factor)
        result = []
        for f in base:
            wavelength = 2 * mp.pi / f
            smooth = (original / wavelength - low) / (high - low)
            if wavelength < original / high:
                result.append(f)
            elif wavelength > original / low:
                result.append(f / factor)
            else:
                result.append((1 - smooth) * f / factor + smooth * f)
        return result, num(1)
    crossing = [
        HEAD_DIM * mp.log(original / (num(beta) * 2 * mp.pi)) / (2 * mp.log(num(THETA)))
        for beta in (scaling.beta_fast, scaling.beta_slow)
    ]
    low, high = max(int(mp.floor(crossing[0])), 0), min(int(mp.ceil(crossing[1])), HEAD_DIM - 1)
    span = num(high - low) if high != low else num("0.001")
    ramp = [min(max((i - low) / span, num(0)), num(1)) for i in range(pairs)]
    mixed = [f / factor * r + f * (1 - r) for f, r in zip(base, ramp, strict=True)]
    return mixed, num(scaling.attention_factor or mp.log(factor) / 10 + 1)


@each_scaling
def test_table_is_as_exact_as_float64_angles_allow(scaling: RopeScaling) -> None:
    """Up to position 131,071, cos and sin are within the rounding of their float64 angle.

    An angle p * f carries one rounding of the product and those of f: the power theta^-x turns the rounding
    of its exponent into x ln(theta) units, and a scaling adds a few operations. 10 units in all bound every
    kind; what is left for cos, sin and the attention factor is two units, times the factor.
    """
    mpmath = pytest.importorskip("mpmath")
    cos, sin = rope_table(model(scaling, context=131_072))
    with mpmath.workdps(50):
        frequencies, factor = exact(mpmath, scaling)
        for position in POSITIONS:
            for pair, frequency in enumerate(frequencies):
                angle = position * frequency
                bound = (
                    float(factor) * UNIT * (2 + (10 + math.log(THETA) * 2 * pair / HEAD_DIM) * float(angle))
                )
                for got, want in ((cos, mpmath.cos(angle)), (sin, mpmath.sin(angle))):
                    error = abs(float(mpmath.mpf(float(got[position, pair])) - factor * want))
                    assert error <= bound, f"position {position}, pair {pair}: {error} > {bound}"
                    if position <= 1:
                        assert error < 1e-15


@each_scaling
def test_frequencies_equal_transformers(scaling: RopeScaling, monkeypatch: pytest.MonkeyPatch) -> None:
    """inv_freq agrees to 1e-13, relative, with transformers' functions in float64; the factor is equal."""
    want, want_factor = transformers_frequencies(scaling, monkeypatch)
    got, got_factor = rope_frequencies(HEAD_DIM, THETA, scaling, context=131_072)
    assert want.dtype == got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=0)
    assert got_factor == want_factor


def test_columns_are_in_transformers_half_split_order() -> None:
    """[cos, cos] and [sin, sin] are what transformers' rotary module multiplies with (float32: 1e-5)."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    scaling = SCALINGS["yarn"]
    rotary = modeling.LlamaRotaryEmbedding(transformers_config(scaling))
    want = rotary(torch.zeros(1), torch.arange(64)[None])
    for ours, theirs in zip(rope_table(model(scaling)), want, strict=True):
        np.testing.assert_allclose(
            np.concatenate([ours, ours], axis=-1), theirs[0].numpy(), rtol=0, atol=1e-5
        )


def transformers_config(scaling: RopeScaling):
    """The same rotary settings in transformers' words."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    parameters: dict = {
        "rope_type": "default" if scaling.kind == "none" else scaling.kind,
        "rope_theta": THETA,
    }
    if scaling.kind != "none":
        parameters["factor"] = scaling.factor
    if scaling.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_freq_factor
        parameters["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        parameters["beta_fast"], parameters["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        if scaling.attention_factor:
            parameters["attention_factor"] = scaling.attention_factor
    return transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=131_072,
        rope_parameters=parameters,
    )


def transformers_frequencies(
    scaling: RopeScaling, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, float]:
    """transformers' inv_freq and attention factor, with the float32 of its source read as float64."""
    torch = pytest.importorskip("torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers_config(scaling)

    class Torch64(types.ModuleType):
        def __getattr__(self, name: str):
            return torch.float64 if name in ("float", "float32") else getattr(torch, name)

    for module in (rope_utils, modeling):
        monkeypatch.setattr(module, "torch", Torch64("torch"))
    function = (
        modeling.LlamaRotaryEmbedding.compute_default_rope_parameters
        if scaling.kind == "none"
        else rope_utils.ROPE_INIT_FUNCTIONS[scaling.kind]
    )
    inv_freq, factor = function(config)
    return inv_freq.numpy(), factor


def test_factor_of_one_is_the_unscaled_table() -> None:
    """Every kind with factor 1 is plain RoPE."""
    plain, _ = rope_frequencies(HEAD_DIM, THETA, RopeScaling(), context=64)
    for kind in ("linear", "llama3", "yarn"):
        scaled, factor = rope_frequencies(
            HEAD_DIM, THETA, RopeScaling(kind, original_context=8192), context=64
        )
        np.testing.assert_allclose(scaled, plain, rtol=4 * UNIT, atol=0)
        assert factor == 1.0


def test_tables_are_shared_and_read_only() -> None:
    """Two models with one rotary setting hold the same arrays, and nobody can write into them."""
    first, second = rope_table(model(d_ff=16)), rope_table(model(d_ff=48))
    assert first[0] is second[0] and first[1] is second[1]
    assert first[0].shape == (64, HEAD_DIM // 2) and first[0].dtype == np.float64
    for table in first:
        with pytest.raises(ValueError, match="read-only"):
            table[0, 0] = 1.0


def test_every_setting_reaches_the_table() -> None:
    """Theta, factor, context of origin and the corner settings each change the numbers."""
    tables = {
        name: rope_table(model(scaling, **changes))[1].tobytes()
        for name, scaling, changes in [
            ("none", RopeScaling(), {}),
            ("theta", RopeScaling(), {"rope_theta": THETA + 1}),
            *((name, scaling, {}) for name, scaling in SCALINGS.items() if name != "none"),
            ("yarn-fast", RopeScaling("yarn", 16.0, 4096, beta_fast=60.0, beta_slow=1.5), {}),
            ("yarn-slow", RopeScaling("yarn", 16.0, 4096, beta_fast=30.0, beta_slow=0.5), {}),
            ("llama3-original", RopeScaling("llama3", 8.0, 4096, 1.5, 5.0), {}),
            ("llama3-low", RopeScaling("llama3", 8.0, 8192, 1.0, 5.0), {}),
            ("llama3-high", RopeScaling("llama3", 8.0, 8192, 1.5, 6.0), {}),
        ]
    }
    assert len(set(tables.values())) == len(tables)


def test_learned_positions_have_no_table() -> None:
    """Asking for one is refused in words."""
    with pytest.raises(ConfigError, match="position='learned'"):
        rope_table(model(position="learned"))


def test_table_needs_no_framework() -> None:
    """Importing the table loads neither jax nor torch."""
    code = "import sys, jaxlm.rope_table; print(sorted({'jax', 'torch', 'flax'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
