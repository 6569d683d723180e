"""What keeps a bad batch out of the weights, decided on the device before the update. Twin: torchref/guard.py.

    finite    the loss and the global gradient norm are finite
    spike     x - mean > spike_z * max(std, 1e-6 |mean|) for x the loss or the gradient norm,
              mean and std (divided by n - 1) over the n <= spike_window last accepted steps, once n >= spike_window / 2
    accepted  finite and no spike; any other step changes nothing but the step count and the guard

The loss is the total one. In float16 it is multiplied by a scale, so that small gradients do not vanish, and the
gradients are divided by it. The scale follows torch.amp.GradScaler: an overflow halves it, `loss_scale_steps` finite
steps double it. Source of loss scaling: Micikevicius et al., arXiv:1710.03740, section 3.2.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.config import OptimConfig, RunConfig, TrainConfig
from jaxlm.optim import Scalars
from jaxlm.shapes import Bool, Float, Int

LEAST_DEVIATION = 1e-6  # of the mean: equal losses do not make a rounding error a spike


class Guard(NamedTuple):
    """What a run remembers of the steps it skipped and of those it took."""

    skipped: Int[Array, ""]  # int32, updates skipped since the run began
    in_a_row: Int[Array, ""]  # int32, the latest of them without an update between; see `next_guard`
    loss_scale: Float[Array, ""]  # float32, factor on the loss in float16
    good_steps: Int[Array, ""]  # int32, finite steps since the scale last changed
    losses: Float[Array, " W"]  # of accepted steps, a ring: the k-th from 0 lies at k mod W
    norms: Float[Array, " W"]  # likewise
    seen: Int[Array, ""]  # int32, accepted steps that went into the rings


class Verdict(NamedTuple):
    """What is thought of a step."""

    finite: Bool[Array, ""]
    accepted: Bool[Array, ""]


def init_guard(run: RunConfig) -> Guard:
    """Nothing seen, nothing skipped; the rings are as wide as the widest of the run's types, float32 at least."""
    wide: Any = jnp.dtype(jnp.float32)
    for name in (run.train.dtype, run.train.param_dtype):
        wide = jnp.promote_types(wide, jnp.dtype(name))
    # Arrays of their own: a step is given its state to overwrite, and no buffer can be given twice.
    skipped, in_a_row, good_steps, seen = (jnp.zeros((), jnp.int32) for _ in range(4))
    losses, norms = (jnp.zeros(run.train.spike_window, wide) for _ in range(2))
    scale = jnp.asarray(run.train.loss_scale, jnp.float32)
    return Guard(skipped, in_a_row, scale, good_steps, losses, norms, seen)


def is_spike(
    ring: Float[Array, " W"], seen: Int[Array, ""], value: Float[Array, ""], limit: float
) -> Bool[Array, ""]:
    """Whether a value lies more than `limit` deviations above the ring's mean; never before half the ring is full."""
    size = ring.shape[0]
    n = jnp.minimum(seen, size)
    known = jnp.arange(size) < n
    mean = jnp.sum(jnp.where(known, ring, 0)) / jnp.maximum(n, 1)
    squares = jnp.sum(jnp.where(known, jnp.square(ring - mean), 0))
    std = jnp.sqrt(squares / jnp.maximum(n - 1, 1))
    high = value - mean > limit * jnp.maximum(std, LEAST_DEVIATION * jnp.abs(mean))
    return high & (n >= max(2, -(-size // 2)))


def judge(config: TrainConfig, guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""]) -> Verdict:
    """Whether a step's loss and gradient norm are finite, and good enough to be taken."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if not config.spike_z:
        return Verdict(finite, finite)
    spike = is_spike(guard.losses, guard.seen, loss, config.spike_z)
    spike |= is_spike(guard.norms, guard.seen, norm, config.spike_z)
    return Verdict(finite, finite & ~spike)


def next_guard(
    config: TrainConfig, guard: Guard, verdict: Verdict, loss: Float[Array, ""], norm: Float[Array, ""]
) -> Guard:
    """The guard after a step.

    in_a_row counts what the run should stop for in the end. Gradients that overflow in float16 under a finite loss
    are not among it as long as the scale is above 1: lowering it is the cure.
    """
    finite, accepted = verdict
    skipped = (~accepted).astype(jnp.int32)
    curable = jnp.zeros((), bool)
    scale, good = guard.loss_scale, guard.good_steps
    if config.dtype == "float16":
        curable = ~finite & jnp.isfinite(loss) & (scale > 1)
        good = jnp.where(finite, good + 1, 0)
        grown = finite & (good == config.loss_scale_steps)
        doubled = jnp.where(jnp.isfinite(2 * scale), 2 * scale, scale)
        scale = jnp.where(finite, jnp.where(grown, doubled, scale), scale / 2)
        good = jnp.where(grown, 0, good)
    in_a_row = jnp.where(accepted, 0, guard.in_a_row + jnp.where(curable, 0, 1))
    here = accepted & (jnp.arange(guard.losses.shape[0]) == guard.seen % guard.losses.shape[0])
    return Guard(
        skipped=guard.skipped + skipped,
        in_a_row=in_a_row.astype(jnp.int32),
        loss_scale=scale,
        good_steps=good.astype(jnp.int32),
        losses=jnp.where(here, loss.astype(guard.losses.dtype), guard.losses),
        norms=jnp.where(here, norm.astype(guard.norms.dtype), guard.norms),
        seen=guard.seen + 1 - skipped,
    )


def guard_metrics(config: TrainConfig, guard: Guard, verdict: Verdict) -> dict[str, Array]:
    """What a step says of its guard: skipped (0 or 1), skips and skips_in_a_row after it, and the scale it leaves.

    guard: the one after the step.
    """
    metrics = {
        "skipped": (~verdict.accepted).astype(jnp.int32),
        "skips": guard.skipped,
        "skips_in_a_row": guard.in_a_row,
    }
    return metrics | ({"loss_scale": guard.loss_scale} if config.dtype == "float16" else {})


def corrected(
    config: OptimConfig, scalars: Scalars, step: Int[Array, ""], skipped: Int[Array, ""]
) -> Scalars:
    """The host's scalars of a step, with bias corrections that count updates instead of steps once some were skipped.

    1 - b^t = -expm1(t ln b) loses no digits for small t. The learning rate goes by steps.
    """
    rate = jnp.asarray(scalars.lr)
    wide = jnp.promote_types(rate.dtype, jnp.float32)
    t = (step + 1 - skipped).astype(wide)
    first, second = (-jnp.expm1(t * (math.log(b) if b else -math.inf)) for b in (config.b1, config.b2))

    def chosen(host: Any, device: Array) -> Array:
        return jnp.where(skipped == 0, host, device.astype(rate.dtype))

    return scalars._replace(
        step_size=chosen(scalars.step_size, rate.astype(wide) / first),
        bias2_root=chosen(scalars.bias2_root, jnp.sqrt(second)),
    )


def keep(accepted: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Every leaf of the new tree where the step was accepted, bit for bit the old one where not."""
    return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
