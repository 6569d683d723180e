"""What keeps a bad batch out of the weights, decided before the update. Twin: jaxlm/guard.py.

    finite    the loss and the global gradient norm are finite
    spike     x - mean > spike_z * max(std, 1e-6 |mean|) for x the loss or the gradient norm,
              mean and std (divided by n - 1) over the n <= spike_window last accepted steps, once n >= spike_window / 2
    accepted  finite and no spike; any other step changes nothing but the step count and the guard

The loss is the total one. In float16 it is multiplied by a scale, so that small gradients do not vanish, and the
gradients are divided by it. The scale follows torch.amp.GradScaler: an overflow halves it, `loss_scale_steps` finite
steps double it. Source of loss scaling: Micikevicius et al., arXiv:1710.03740, section 3.2.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jaxlm.config import RunConfig, TrainConfig
from torchref.shapes import Float

LEAST_DEVIATION = 1e-6  # of the mean: equal losses do not make a rounding error a spike
LARGEST_SCALE = 2.0**127  # a scale above it would be infinite in float32, jaxlm's type


class Guard(NamedTuple):
    """What a run remembers of the steps it skipped and of those it took."""

    skipped: int  # updates skipped since the run began
    in_a_row: int  # the latest of them without an update between; see `next_guard`
    loss_scale: float  # factor on the loss in float16
    good_steps: int  # finite steps since the scale last changed
    losses: Float[Tensor, " W"]  # of accepted steps, a ring: the k-th from 0 lies at k mod W
    norms: Float[Tensor, " W"]  # likewise
    seen: int  # accepted steps that went into the rings


class Verdict(NamedTuple):
    """What is thought of a step."""

    finite: bool
    accepted: bool


def init_guard(run: RunConfig) -> Guard:
    """Nothing seen, nothing skipped; the rings are as wide as the widest of the run's types, float32 at least."""
    wide = torch.float32
    for name in (run.train.dtype, run.train.param_dtype):
        wide = torch.promote_types(wide, getattr(torch, name))
    ring = torch.zeros(run.train.spike_window, dtype=wide)
    scale = float(torch.tensor(run.train.loss_scale, dtype=torch.float32))
    return Guard(0, 0, scale, 0, ring, ring.clone(), 0)


def is_spike(ring: Float[Tensor, " W"], seen: int, value: Float[Tensor, ""], limit: float) -> bool:
    """Whether a value lies more than `limit` deviations above the ring's mean; never before half the ring is full."""
    known = ring[:seen]
    if len(known) < max(2, -(-len(ring) // 2)):
        return False
    mean, std = known.mean(), known.std()
    return bool(value.to(ring) - mean > limit * torch.maximum(std, LEAST_DEVIATION * mean.abs()))


def judge(config: TrainConfig, guard: Guard, loss: Float[Tensor, ""], norm: Float[Tensor, ""]) -> Verdict:
    """Whether a step's loss and gradient norm are finite, and good enough to be taken."""
    finite = math.isfinite(loss) and math.isfinite(norm)
    if not finite or not config.spike_z:
        return Verdict(finite, finite)
    pairs = ((guard.losses, loss), (guard.norms, norm))
    return Verdict(True, not any(is_spike(ring, guard.seen, x, config.spike_z) for ring, x in pairs))


def next_guard(
    config: TrainConfig, guard: Guard, verdict: Verdict, loss: Float[Tensor, ""], norm: Float[Tensor, ""]
) -> Guard:
    """The guard after a step; the rings are changed in place.

    in_a_row counts what the run should stop for in the end. Gradients that overflow in float16 under a finite loss
    are not among it as long as the scale is above 1: lowering it is the cure.
    """
    curable, scale, good = False, guard.loss_scale, guard.good_steps
    if config.dtype == "float16":
        curable = not verdict.finite and math.isfinite(loss) and scale > 1
        good = good + 1 if verdict.finite else 0
        if not verdict.finite:
            scale = scale / 2
        elif good == config.loss_scale_steps:
            scale, good = 2 * scale if scale < LARGEST_SCALE else scale, 0
    guard = guard._replace(loss_scale=scale, good_steps=good)
    if not verdict.accepted:
        return guard._replace(skipped=guard.skipped + 1, in_a_row=guard.in_a_row + (not curable))
    here = guard.seen % len(guard.losses)
    guard.losses[here], guard.norms[here] = loss, norm
    return guard._replace(in_a_row=0, seen=guard.seen + 1)


def guard_metrics(config: TrainConfig, guard: Guard, verdict: Verdict) -> dict[str, Tensor]:
    """What a step says of its guard: skipped (0 or 1), skips and skips_in_a_row after it, and the scale it leaves.

    guard: the one after the step.
    """
    metrics = {
        "skipped": torch.tensor(int(not verdict.accepted)),
        "skips": torch.tensor(guard.skipped),
        "skips_in_a_row": torch.tensor(guard.in_a_row),
    }
    return metrics | ({"loss_scale": torch.tensor(guard.loss_scale)} if config.dtype == "float16" else {})
