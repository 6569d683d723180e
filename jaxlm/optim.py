"""AdamW as an optax chain whose scalars are exact. Same public names: torchref/optim.py.

optax computes learning rate and bias corrections in float32 on the device, 1e-5 off at b2 = 0.999. Here the host
computes them in double for each step (`scalars`) and the chain takes them as an argument, so that float64 trajectories
agree with torch to rounding. The clip is torch's formula: g * min(1, c / (norm + 1e-6)).
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlm.config import OptimConfig

DECAY_POLICY: tuple[tuple[str, str], ...] = (  # every parameter matches exactly one
    (r"(.*\.)?(bias|gate_up_bias|up_bias|down_bias|head_bias)", "never"),
    (r"(.*norm)\.weight", "never"),
    (r"(embed|pos_embed)\.weight", "embedding"),
    (r".*\.bias_table", "embedding"),
    (r"(.*_proj|.*router|.*shared_gate|lm_head)\.weight", "matrix"),
    (r".*\.experts\.(gate_up|up|down)", "matrix"),
)
CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


class Scalars(NamedTuple):
    """What one AdamW step needs besides arrays, computed in double on the host."""

    lr: Any  # learning rate; all four are floats, or 0-d arrays under jit
    step_size: Any  # lr / (1 - b1^t)
    bias2_root: Any  # sqrt(1 - b2^t)
    decay: Any  # lr * weight_decay


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of step `step` (from 0): (s+1)/w warmup, then a half cosine to min_lr, then min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.decay_steps - config.warmup_steps))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


def scalars(config: OptimConfig, step: int) -> Scalars:
    """The scalars of step `step` (from 0), in double."""
    lr, t = learning_rate(config, step), step + 1
    return Scalars(lr, lr / (1 - config.b1**t), math.sqrt(1 - config.b2**t), lr * config.weight_decay)


def decays(config: OptimConfig, path: str) -> bool:
    """Whether weight decay touches a parameter. Raises ValueError unless exactly one policy line names it."""
    kinds = [kind for pattern, kind in DECAY_POLICY if re.fullmatch(pattern, path)]
    if len(kinds) != 1:
        raise ValueError(
            f"parameter {path!r} matches {len(kinds)} lines of the weight decay policy; it must match one"
        )
    return kinds[0] == "matrix" or (kinds[0] == "embedding" and config.decay == "matrices_and_embeddings")


def global_norm(tree: Any) -> Array:
    """Root of the sum of squares of all leaves, accumulated upcast."""
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def clip_scale(norm: Array, limit: float) -> Array:
    """Factor on the gradients: min(1, limit / (norm + 1e-6)); 1 when limit is 0."""
    return jnp.minimum(1.0, limit / (norm + CLIP_EPS)) if limit else jnp.ones_like(norm)


class AdamState(NamedTuple):
    """Moments by parameter path."""

    m: Any
    v: Any


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """The clip as a link of the chain."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scale = clip_scale(global_norm(updates), limit)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_exact_adamw(
    config: OptimConfig, policy: Callable[[OptimConfig, str], bool] | None = None
) -> optax.GradientTransformationExtraArgs:
    """AdamW's update -(step_size * m / (sqrt(v)/bias2_root + eps) + decay * p).

    policy: which paths decay; None is `decays`, the decoder's. Source: arXiv:1711.05101, algorithm 2.
    """

    def init(params: Any) -> AdamState:
        return AdamState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AdamState]:
        scalars: Scalars = extra["scalars"]
        m = jax.tree.map(lambda g, m: m + (1 - config.b1) * (g - m), updates, state.m)
        v = jax.tree.map(lambda g, v: config.b2 * v + (1 - config.b2) * g * g, updates, state.v)

        def leaf(path: str, p: Array, m: Array, v: Array) -> Array:
            lr, step_size, root, decay = (jnp.asarray(s, p.dtype) for s in scalars)
            delta = -step_size * (m / (jnp.sqrt(v) / root + config.eps))
            return delta - decay * p if (policy or decays)(config, path) else delta

        return {path: leaf(path, params[path], m[path], v[path]) for path in params}, AdamState(m, v)

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Clip, then AdamW; `update(grads, state, params, scalars=...)` over flat dicts by parameter path."""
    links = [clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*links, scale_by_exact_adamw(config))


def moments(state: Any) -> AdamState:
    """The Adam moments inside the chain's state."""
    return next(s for s in state if isinstance(s, AdamState))


def as_arrays(values: Scalars, dtype: Any) -> Scalars:
    """Scalars as 0-d numpy arrays, so that a new value never recompiles the step."""
    return Scalars(*(np.asarray(v, dtype) for v in values))
