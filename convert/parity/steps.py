"""The rungs of the optimizer in float64: one step, K steps, a whole trajectory, and changing the framework midway."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from convert.optstate import train_state_to_jax, train_state_to_torch
from convert.parity.compare import Finding, compare, compare_gradients, relative_error
from convert.parity.inputs import Arrays, hard_batch, hard_length
from convert.parity.limits import limit
from convert.parity.rungs import Pair, backward_order
from convert.parity.sides import JaxTrainer, Optimized, Step, TorchTrainer, Trainer
from convert.tree import Flat
from jaxlm.config import OptimConfig, RunConfig
from jaxlm.optim import treatment

TURNS = 4  # batches of a trajectory
K = 5  # steps of the rung `updates`
STABLE_LR = 1e-3  # above it trajectories of random models turn chaotic, and compare only chaos


class Course(NamedTuple):
    """A trainer's way: metrics of every step, and the optimizer at the steps that were asked for."""

    steps: list[Step]
    at: dict[int, Optimized]


def batches(run: RunConfig, seed: int, start: int = 0) -> Iterator[Arrays]:
    """The batch order of a trajectory: a few hard batches in turn, without end, so that the loss has a way to fall."""
    length = hard_length(run.train.seq_len, run.train.seq_len)
    for step in itertools.count(start):
        turn = step % TURNS
        seed_of_turn, first_kind = seed * 100_003 + turn, 2 * (turn % 2)
        yield hard_batch(run.train.batch_size, length, run.model.vocab_size, seed_of_turn, first_kind)


def trajectory_run(pair: Pair, length: int) -> RunConfig:
    """The run of the optimizer rungs."""
    (ours, _), _ = pair.gradients
    train = dataclasses.replace(pair.run.train, seq_len=length)
    return dataclasses.replace(pair.run, optim=live(pair.run.optim, pair.steps, ours), train=train)


def live(optim: OptimConfig, steps: int, grads: Flat) -> OptimConfig:
    """Warmup, decay to the end, a clip that is active at the start, where these are the gradients; a stable rate."""
    norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in grads.values()))
    return dataclasses.replace(
        optim,
        lr=min(optim.lr, STABLE_LR),
        min_lr=min(optim.min_lr, STABLE_LR / 10),
        warmup_steps=min(max(optim.warmup_steps, 2), max(2, steps // 5)),
        decay_steps=max(steps, K, 3),
        clip_norm=0.7 * norm,
    )


def course(trainer: Trainer, order: Iterator[Arrays], start: int, stop: int, marks: set[int]) -> Course:
    """Drives a trainer from step `start` to `stop`, over the batches that come next."""
    steps, at = [], {}
    for step in range(start, stop):
        steps.append(trainer.step(next(order)))
        if step + 1 in marks or step + 1 == stop:
            at[step + 1] = trainer.state()
    return Course(steps, at)


class Courses(NamedTuple):
    """Both frameworks' ways under one run."""

    run: RunConfig
    start: tuple[Flat, Flat]  # weights before the first step
    jax: Course
    torch: Course


def courses(pair: Pair, total: int, progress: Callable[[str], None] = lambda text: None) -> Courses:
    """`total` steps of both frameworks, computed once for all rungs of the optimizer."""
    if "courses" not in pair.cache:
        run = trajectory_run(pair, pair.run.train.seq_len)
        start, made = [], []
        for side in (pair.jax, pair.torch):
            progress(f"{total} optimizer steps in {side.framework}")
            start.append({path: np.array(value) for path, value in side.weights().items()})
            marks = {1, min(K, total)}
            made.append(course(side.trainer(run), batches(run, pair.seed), 0, total, marks))
        pair.cache["courses"] = Courses(run, (start[0], start[1]), made[0], made[1])
    return pair.cache["courses"]


def updates(pair: Pair, total: int, at: int) -> list[Finding]:
    """Count, m, v and the change of every parameter after `at` of `total` steps."""
    return changes(courses(pair, total), at, pair.counted)


def changes(made: Courses, at: int, counted: Callable[[Flat], Flat]) -> list[Finding]:
    """Count, m, v and the change of every parameter after `at` steps. counted: leaves out those of no gradient."""
    run, start, ours, theirs = made
    a, b = ours.at[at], theirs.at[at]
    findings = [
        Finding("count", float(abs(a.count - b.count)), limit("exact"), {"jax": a.count, "torch": b.count})
    ]
    moved = [_difference(state.params, first) for state, first in zip((a, b), start)]
    for slot, mine, other, bound in (
        ("m", a.m, b.m, "float64_state"),
        ("v", a.v, b.v, "float64_state"),
        ("delta", *moved, "float64_delta"),
    ):
        mine, other = counted(mine), counted(other)
        found = compare_gradients(mine, other, limit(bound), backward_order(mine))
        findings += [dataclasses.replace(f, name=f"{slot}:{f.name}") for f in found]
    return [_with_policy(finding, run) for finding in findings]


def _with_policy(finding: Finding, run: RunConfig) -> Finding:
    """A failing change is told with which optimizer the parameter has, and whether weight decay should touch it."""
    if finding.passed or not finding.name.startswith("delta:"):
        return finding
    plan = treatment(run.optim, finding.name.partition(":")[2])
    detail = {"optimizer": plan.optimizer, "weight_decay": bool(plan.decay)}
    return dataclasses.replace(finding, detail=dict(finding.detail) | detail)


def _difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {path: np.asarray(a[path], np.float64) - np.asarray(b[path], np.float64) for path in a}


def trajectory(pair: Pair, total: int) -> list[Finding]:
    """Losses, clipped norm and learning rate of every step, then parameters and moments at the end."""
    return ways(courses(pair, total), pair.counted)


def ways(made: Courses, counted: Callable[[Flat], Flat]) -> list[Finding]:
    """Metrics of every step, then parameters and moments at the end. counted: as of `changes`."""
    _, _, ours, theirs = made
    names = [name for name in ours.steps[0].metrics if name in theirs.steps[0].metrics]
    findings = []
    for name in names:
        a, b = ([step.metrics[name] for step in side.steps] for side in (ours, theirs))
        errors = [relative_error(x, y, floor=1e-300) for x, y in zip(a, b, strict=True)]
        bound = limit("float64_scalar" if name == "lr" else "float64")
        bad = next((i for i, e in enumerate(errors) if not e <= bound), None)
        detail = {} if bad is None else {"step": bad, "jax": a[bad], "torch": b[bad]}
        findings.append(Finding(name, max(errors), bound, detail))
    end = max(ours.at)
    for slot in ("params", "m", "v"):
        mine, other = (counted(getattr(side.at[end], slot)) for side in (ours, theirs))
        found = compare_gradients(mine, other, limit("float64_state"), backward_order(mine))
        findings += [dataclasses.replace(f, name=f"{slot}:{f.name}") for f in found]
    return findings


def handover(pair: Pair, total: int) -> list[Finding]:
    """Some steps in one framework and the next in the other, against an uninterrupted run: no seam, either way."""
    run, _, whole, _ = courses(pair, total)
    at = min(K, total) // 2
    more = min(K, total) - at
    findings = []
    for name, begun, rest in (("torch to jax", pair.torch, pair.jax), ("jax to torch", pair.jax, pair.torch)):
        first, second = begun.trainer(run), rest.trainer(run)
        course(first, batches(run, pair.seed), 0, at, set())
        if isinstance(first, TorchTrainer) and isinstance(second, JaxTrainer):
            second.jax_state = train_state_to_jax(run, first.torch_state)
        elif isinstance(first, JaxTrainer) and isinstance(second, TorchTrainer):
            second.torch_state = train_state_to_torch(run, first.jax_state)
        ended = course(second, batches(run, pair.seed, at), at, at + more, {at + more})
        for step, mine in enumerate(ended.steps, start=at):
            reference = whole.steps[step].metrics
            for metric in ("total_loss", "grad_norm", "lr"):
                label = f"{name}.{metric}:step {step}"
                findings.append(compare(label, mine.metrics[metric], reference[metric], limit("float64")))
        end, reference = ended.at[at + more], whole.at[at + more]
        for slot in ("params", "m", "v"):
            mine, other = (pair.counted(getattr(state, slot)) for state in (end, reference))
            found = compare_gradients(mine, other, limit("float64_state"), backward_order(mine))
            findings += [dataclasses.replace(f, name=f"{name}.{slot}:{f.name}") for f in found]
    return findings
