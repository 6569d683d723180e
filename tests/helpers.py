"""What test files share: tiny models that hide no bug behind a default, hard batches, and how errors are measured."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from convert.parity import inputs
from jaxlm.config import ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig
from jaxlm.model import abstract_model

Arrays = dict[str, np.ndarray]
V, T = 61, 19  # vocabulary and length of the tiny runs; T is not a multiple of 8


def float64() -> Any:
    """Context in which jax computes in float64."""
    return jax.enable_x64(True)


def tiny(moe: Mapping[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A small decoder; `moe` (a dict of MoEConfig fields) makes it a mixture of 4 experts, 2 active.

    D != N*H, so no projection is square; N/K = 3 differs from K = 2; theta and eps differ from every library's default.
    """
    experts = (
        MoEConfig() if moe is None else MoEConfig(**({"n_experts": 4, "n_active": 2, "d_ff": 20} | dict(moe)))
    )
    sizes = {
        "vocab_size": V,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 6,
        "d_ff": 40,
    }
    rest = {"context": 32, "rope_theta": 5e4, "norm_eps": 3e-6, "moe": experts}
    return ModelConfig(**(sizes | rest | changes))


def tiny_run(
    model: ModelConfig, optim: Mapping[str, Any] | None = None, mesh: Any = None, **train: Any
) -> RunConfig:
    """A float64 run of a few steps: warmup, decay, an active clip and a z-loss; `train` changes TrainConfig."""
    loop = {"steps": 10, "batch_size": 4, "seq_len": T, "dtype": "float64", "param_dtype": "float64"}
    chosen = {
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup_steps": 3,
        "decay_steps": 10,
        "clip_norm": 0.05,
        "z_loss_coef": 1e-3,
    }
    run = RunConfig(
        model, optim=OptimConfig(**(chosen | dict(optim or {}))), train=TrainConfig(**(loop | train))
    )
    return run if mesh is None else dataclasses.replace(run, mesh=mesh)


def hard_batch(rows: int = 4, length: int = T, vocab: int = V, seed: int = 0) -> Arrays:
    """Unequal rows, full, padded on the left, packed, padded on the right, as the parity suite compares on."""
    return inputs.hard_batch(rows, length, vocab, seed)


def random_params(
    config: ModelConfig, seed: int = 0, init: str | None = None, dtype: Any = np.float64
) -> Arrays:
    """Parameters of jaxlm drawn by numpy, as wide as `init` says; what starts as zero or one is random too."""
    shapes = {path: tuple(shape.shape) for path, shape in abstract_model(config).shapes.items()}
    return inputs.random_params(config, shapes, seed, init, dtype)


def norm(x: Any) -> float:
    """Euclidean norm of an array, in float64."""
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def relative_error(a: Any, b: Any, floor: float = 0.0) -> float:
    """||a - b|| / max(||b||, floor); 0 where both are exactly equal. NaN counts as infinitely wrong."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    difference = norm(a - b)
    if difference == 0:
        return 0.0
    return difference / max(norm(b), floor, 1e-300) if math.isfinite(difference) else math.inf


def tree_errors(
    a: Mapping[str, Any], b: Mapping[str, Any], zero: Callable[[str], bool] | None = None
) -> dict[str, float]:
    """`relative_error` of every tensor, with the floor 1e-6 ||all|| sqrt(n/n_all) for tensors that are nearly zero.

    zero: names of gradients that are zero by mathematics; they are measured against ||all|| instead.
    """
    assert set(a) == set(b), f"names differ: {sorted(set(a) ^ set(b))}"
    whole = math.sqrt(sum(norm(x) ** 2 for x in b.values()))
    size = sum(math.prod(x.shape) for x in b.values())
    floors = {
        name: whole if zero and zero(name) else 1e-6 * whole * math.sqrt(math.prod(x.shape) / size)
        for name, x in b.items()
    }
    return {name: relative_error(a[name], b[name], floors[name]) for name in b}


def assert_close(errors: Mapping[str, float], limit: float, what: str = "tensors") -> None:
    """Fails with the names of the worst offenders."""
    bad = sorted(((e, name) for name, e in errors.items() if not e <= limit), reverse=True)
    shown = ", ".join(f"{name} {e:.2e}" for e, name in bad[:5])
    assert not bad, f"{len(bad)} of {len(errors)} {what} are off by more than {limit:g}: {shown}"


QUICK = {"xla_backend_optimization_level": 0}  # tiny programs compile twice as fast and run no slower


def quick_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` for programs that run once or twice."""
    return jax.jit(function, compiler_options=QUICK, **options)
