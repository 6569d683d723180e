"""Rotary position embeddings as numbers: cos and sin in float64, made once and shared by both frameworks.

Every formula starts from the base frequencies of RoFormer (arXiv:2104.09864, section 3.2.2),

    inv_freq[i] = theta^(-2i/H),    i = 0 .. H/2 - 1,    angle[p, i] = p * inv_freq[i]

and stretches them as the config says. A wavelength below is 2 pi / inv_freq: the positions one full rotation
takes. The layout is half-split: column i of the tables turns the pair (i, i + H/2) of a head.
"""

import functools
import math

import numpy as np

from jaxlm.config import ConfigError, ModelConfig, RopeScaling


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling, context: int
) -> tuple[np.ndarray, float]:
    """Rotary frequencies of one head.

    Args:
        head_dim: H, even.
        theta: base of the frequencies.
        scaling: the stretch.
        context: positions of the table; no kind depends on it (`scaling.original_context` is what they use).

    Returns:
        inv_freq [H/2] float64, radians per position, and the factor of cos and sin (1 except for yarn).
    """
    inv_freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match scaling.kind:
        case "none":
            return inv_freq, 1.0
        case "linear":
            return _linear(inv_freq, scaling), 1.0
        case "llama3":
            return _llama3(inv_freq, scaling), 1.0
        case "yarn":
            return _yarn(inv_freq, theta, scaling), _yarn_attention_factor(scaling)
    raise ConfigError(f"rope_scaling.kind={scaling.kind!r} must be one of none, linear, llama3, yarn")


def rope_table(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of all positions of the context, times yarn's attention factor.

    Models with the same head_dim, rope_theta, rope_scaling and context share one pair of arrays, which is
    read-only.

    Returns:
        cos, sin: each [context, H/2] float64. Rounding p * inv_freq to float64 alone costs up to p * 2^-53
        radians.

    Raises:
        ConfigError: the model has no rotary positions.
    """
    if config.position != "rope":
        raise ConfigError(f"position={config.position!r} has no rotary table; it needs position='rope'")
    return _table(config.head_dim, config.rope_theta, config.rope_scaling, config.context)


@functools.lru_cache(maxsize=4)
def _table(head_dim: int, theta: float, scaling: RopeScaling, context: int) -> tuple[np.ndarray, np.ndarray]:
    inv_freq, attention_factor = rope_frequencies(head_dim, theta, scaling, context)
    angles = np.arange(context, dtype=np.float64)[:, None] * inv_freq
    cos, sin = np.cos(angles) * attention_factor, np.sin(angles) * attention_factor
    cos.setflags(write=False)
    sin.setflags(write=False)
    return cos, sin


def _linear(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Position interpolation (arXiv:2306.15595, equation 4): position p is read as p / factor."""
    return inv_freq / scaling.factor


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """The rule of the Llama 3.1 release (`apply_scaling` of its reference code).

    With r = original_context / wavelength, the rotations a frequency makes over the original context: r at or
    above high_freq_factor keeps the frequency, r at or below low_freq_factor divides it by factor, and in
    between the two are mixed with the weight (r - low_freq_factor) / (high_freq_factor - low_freq_factor).
    """
    rotations = scaling.original_context * inv_freq / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((rotations - scaling.low_freq_factor) / span, 0.0, 1.0)
    return kept * inv_freq + (1.0 - kept) * inv_freq / scaling.factor


def _yarn(inv_freq: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """NTK-by-parts of YaRN (arXiv:2309.00071, section 3.2), with the ramp of the authors' release.

    Pair i makes r(i) = original_context * inv_freq[i] / (2 pi) rotations over the original context. The paper
    mixes linearly in r between beta_slow and beta_fast; the release, and transformers with it, mixes linearly
    in i between the pairs where r crosses the two, rounded outwards. Trained models follow the release, and
    so does this.
    """
    head_dim = 2 * len(inv_freq)

    def pair_with(rotations: float) -> float:
        ratio = scaling.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    first = max(math.floor(pair_with(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_with(scaling.beta_slow)), head_dim - 1)
    # The release's guard: a ramp without width is a step just after `first`.
    width = last - first or 0.001
    stretched = np.clip((np.arange(len(inv_freq)) - first) / width, 0.0, 1.0)
    return (1.0 - stretched) * inv_freq + stretched * inv_freq / scaling.factor


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """Multiplier of cos and sin: the root of YaRN's 1/t (arXiv:2309.00071, section 3.4); 1 where factor <= 1."""
    if scaling.attention_factor:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0
