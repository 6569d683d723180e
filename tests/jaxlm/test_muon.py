"""Muon: what the iteration does to singular values, and torch.optim.Muon's own steps in float64."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit, relative_error
from tolerances import tolerance

from jaxlm.config import OptimConfig
from jaxlm.muon import COEFFICIENTS, direction, orthogonalize, update_scale
from jaxlm.optim import as_arrays, make_optimizer, scalars

CONFIG = OptimConfig(optimizer="muon", lr=2e-2, min_lr=1e-3, warmup_steps=3, decay_steps=20, clip_norm=0.0)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (1, 7)])
def test_only_singular_values_change_and_by_the_polynomial(shape: tuple[int, int], x64: None) -> None:
    """U p(p(p(p(p(s/|s|))))) V^T with p(s) = a s + b s^3 + c s^5, by numpy's SVD in float64."""
    matrix, (a, b, c) = drawn(*shape), COEFFICIENTS
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert relative_error(quick_jit(lambda x: orthogonalize(x, 5))(matrix), u * s @ vt) <= tolerance(
        "f64_muon"
    )


def test_singular_values_come_near_one() -> None:
    """Of an ill-conditioned matrix in float32, spread over two decades: all within the band of Jordan's polynomial."""
    u, _, vt = np.linalg.svd(drawn(32, 48), full_matrices=False)
    matrix = (u * np.geomspace(1, 0.01, 32) @ vt).astype(np.float32)
    values = np.linalg.svd(np.asarray(orthogonalize(jnp.asarray(matrix), 5)), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.25
    assert np.linalg.cond(matrix) > 99


def test_experts_are_matrices_of_their_own(x64: None) -> None:
    """A stack gives what each expert alone gives, gate and up too; an expert without a gradient stays where it is."""
    gradient, momentum = drawn(3, 6, 10), drawn(3, 6, 10, seed=1)
    gradient[1] = momentum[1] = 0
    of = {halves: quick_jit(functools.partial(direction, CONFIG, halves=halves)) for halves in (1, 2)}
    whole, after = of[2](gradient, momentum)
    for e in range(3):
        for half in (slice(0, 5), slice(5, 10)):
            alone, kept = of[1](gradient[e][:, half], momentum[e][:, half])
            assert relative_error(whole[e][:, half], alone) <= tolerance("f64_muon")
            assert relative_error(after[e][:, half], kept) == 0
    assert not np.any(whole[1])


def test_scales_are_the_published_ones() -> None:
    """0.2 sqrt(max(in, out)), whose update has AdamW's root mean square of about 0.2; sqrt(max(1, out/in))."""
    assert update_scale("match_rms", 64, 256) == update_scale("match_rms", 256, 64) == 3.2
    assert update_scale("original", 64, 256) == 2.0 and update_scale("original", 256, 64) == 1.0
    x = orthogonalize(jnp.asarray(drawn(64, 256)), 5) * update_scale("match_rms", 64, 256)
    assert math.sqrt(float(jnp.mean(x * x))) == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [("match_rms", "match_rms_adamw"), ("original", "original")])
def test_twenty_steps_equal_torch_optim_muon(
    ours: str, theirs: str, nesterov: bool, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.optim.Muon, kept from casting to bfloat16, on wide, tall and square weights it has as [out, in]."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    config = dataclasses.replace(CONFIG, muon_scale=ours, muon_nesterov=nesterov)
    shapes = {"q": (12, 12), "k": (12, 5), "o": (7, 12)}
    params = {f"blocks.0.attn.{n}_proj.weight": drawn(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    tensors = {path: torch.nn.Parameter(torch.from_numpy(p.T.copy())) for path, p in params.items()}
    names: Any = {"momentum": config.muon_momentum, "nesterov": nesterov, "adjust_lr_fn": theirs}
    other = torch.optim.Muon(tensors.values(), weight_decay=config.weight_decay, **names)
    chain = make_optimizer(config)
    here = {path: jnp.asarray(p) for path, p in params.items()}
    state, update = chain.init(here), quick_jit(chain.update)
    for s in range(20):
        grads = {path: drawn(*p.shape, seed=100 * s + i) for i, (path, p) in enumerate(params.items())}
        numbers = as_arrays(scalars(config, s), np.float64)
        changes, state = update(grads, state, here, scalars=numbers)
        here = jax.tree.map(jnp.add, here, changes)
        for path, p in tensors.items():
            p.grad = torch.from_numpy(grads[path].T.copy())
        other.param_groups[0]["lr"] = float(numbers.lr)
        other.step()
    for path, p in here.items():
        assert relative_error(p, tensors[path].detach().numpy().T) <= tolerance("f64_muon"), path
