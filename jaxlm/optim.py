"""AdamW, 8-bit AdamW and Muon as optax links whose scalars are exact, and the policy. Twin: torchref/optim.py.

optax computes learning rate and bias corrections in float32 on the device, 1e-5 off at b2 = 0.999. Here the host
computes them in double for each step (`scalars`) and the chain takes them as an argument, so that float64 trajectories
agree with torch to rounding. The clip is torch's formula: g * min(1, c / (norm + 1e-6)).

Moments have the dtype of their parameter. With moment_dtype=bfloat16 they, and Muon's momentum, are kept rounded to
the nearest bfloat16, once and from the dtype they were computed in, promote_types(dtype of the parameter, float32);
a step takes its update from the moments before they are rounded. Moments in 8 bits (moments8.py) likewise.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from jaxlm import moments8, muon
from jaxlm.config import OptimConfig, require
from jaxlm.moments8 import Moment8
from jaxlm.policy import check_lines, override, parse_policy
from jaxlm.sharding import Axes, replicated, sharding

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


class Line(NamedTuple):
    """How parameters of one kind are treated where the run says nothing of them."""

    pattern: str  # of whole parameter paths
    group: str  # of the norms that a run reports
    kind: Literal["never", "embedding", "matrix"]  # decays never, with optim.decay, or always
    hidden: bool  # Muon's, where it is chosen


# Every parameter matches exactly one. A matrix is kept as [in, out] here, as [out, in] by PyTorch. Muon is for hidden
# matrices: embedding and head face the vocabulary, and the router is the head of a classifier of experts, whose rows
# are scores; equal steps in all its directions would undo what the balance loss makes of it.
POLICY: tuple[Line, ...] = (
    Line(r"(embed|pos_embed)\.weight", "embed", "embedding", False),
    Line(r"(.*norm)\.weight", "norm", "never", False),
    Line(r".*\.attn\.\w+_proj\.weight", "attention", "matrix", True),
    Line(r".*\.attn\.\w+_proj\.bias", "attention", "never", False),
    Line(r".*\.attn\.bias_table", "attention", "embedding", False),
    Line(r".*\.(mlp|moe\.shared)\.\w+_proj\.weight", "mlp", "matrix", True),
    Line(r".*\.(mlp|moe\.shared)\.\w+_proj\.bias", "mlp", "never", False),
    Line(r".*\.moe\.experts\.(gate_up|up|down)", "experts", "matrix", True),
    Line(r".*\.moe\.experts\.(gate_up|up|down)_bias", "experts", "never", False),
    Line(r".*\.moe\.(router|shared_gate)\.weight", "router", "matrix", False),
    Line(r".*\.moe\.(router|shared_gate)\.bias", "router", "never", False),
    Line(r".*\.lora_[ab]", "adapter", "matrix", False),
    Line(r"lm_head\.weight", "head", "matrix", False),
    Line(r"lm_head\.bias|head_bias", "head", "never", False),
)
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(line.group for line in POLICY))


class Treatment(NamedTuple):
    """What the optimizer does with one parameter."""

    optimizer: str  # adamw, adamw8bit or muon
    lr: float  # factor on the learning rate
    decay: float  # factor on the weight decay


class Scalars(NamedTuple):
    """What one step needs besides arrays, computed in double on the host."""

    lr: Any  # learning rate; all four are floats, or 0-d arrays under jit
    step_size: Any  # lr / (1 - b1^t)
    bias2_root: Any  # sqrt(1 - b2^t)
    decay: Any  # lr * weight_decay


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of step `step` (from 0): (s+1)/w in the warmup, then by the schedule to min_lr at decay_steps.

    cosine and linear fall from the end of the warmup on, wsd (arXiv:2404.06395, section 4) linearly over the last
    share `wsd_decay` of decay_steps, constant never.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    end = config.decay_steps
    span = float(max(0, end - config.warmup_steps))
    if config.schedule == "wsd":
        span = min(span, config.wsd_decay * end)
    if config.schedule == "constant" or step <= max(config.warmup_steps, end - span):
        return config.lr
    left = max(0.0, (end - step) / span) if span else 0.0
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return config.min_lr + (config.lr - config.min_lr) * left


def scalars(config: OptimConfig, step: int) -> Scalars:
    """The scalars of step `step` (from 0), in double."""
    lr, t = learning_rate(config, step), step + 1
    return Scalars(lr, lr / (1 - config.b1**t), math.sqrt(1 - config.b2**t), lr * config.weight_decay)


def line_of(path: str) -> Line:
    """The line of POLICY that names a parameter. Raises ValueError unless exactly one does."""
    found = [line for line in POLICY if re.fullmatch(line.pattern, path)]
    if len(found) != 1:
        raise ValueError(f"parameter {path!r} matches {len(found)} lines of the policy; it must match one")
    return found[0]


def group_of(path: str) -> str:
    """Which of GROUPS a parameter belongs to. Raises ValueError, as `line_of`."""
    return line_of(path).group


def decays(config: OptimConfig, path: str) -> bool:
    """Whether weight decay touches a parameter that the run says nothing of. Raises ValueError, as `line_of`."""
    kind = line_of(path).kind
    return kind == "matrix" or (kind == "embedding" and config.decay == "matrices_and_embeddings")


def treatment(config: OptimConfig, path: str) -> Treatment:
    """What the run and, where it says nothing, POLICY have in mind for a parameter.

    Raises ConfigError where two lines of optim.policy name it or Muon is wanted for what is no matrix, ValueError as
    `line_of`.
    """
    line, own = line_of(path), override(config.policy, path)
    optimizer = "adamw" if config.optimizer == "muon" and not line.hidden else config.optimizer
    lr, decay = 1.0, float(decays(config, path))
    if own is not None:
        require(
            own.optimizer != "muon" or line.kind == "matrix",
            f"optim.policy {own.line!r}: {path} is no matrix of a projection; optimizer=muon cannot update it",
        )
        optimizer = own.optimizer or optimizer
        lr, decay = lr if own.lr is None else own.lr, decay if own.decay is None else own.decay
    return Treatment(optimizer, lr, decay)


def check_policy(config: OptimConfig, paths: Iterable[str]) -> None:
    """Raises ConfigError unless optim.policy fits a model of these parameters; see `treatment` and jaxlm/policy.py."""
    paths = list(paths)
    check_lines(config.policy, paths)
    for path in paths:
        treatment(config, path)


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
    """Moments by parameter path, arrays or Moment8."""

    m: Any
    v: Any


class MuonState(NamedTuple):
    """Momentum by parameter path."""

    momentum: Any


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """The clip as a link of the chain."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scale = clip_scale(global_norm(updates), limit)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_exact_adamw(
    config: OptimConfig, policy: Callable[[OptimConfig, str], bool] | None = None
) -> optax.GradientTransformationExtraArgs:
    """AdamW's update -(step_size * m / (sqrt(v)/bias2_root + eps) + decay * p) for its own parameters.

    policy: which paths decay, all of them AdamW's; None is `treatment`, the decoder's. Source: arXiv:1711.05101,
    algorithm 2.
    """

    def plan(path: str) -> Treatment:
        return (
            treatment(config, path)
            if policy is None
            else Treatment("adamw", 1.0, float(policy(config, path)))
        )

    def init(params: Any) -> AdamState:
        if policy is None:
            check_policy(config, params)
        plans = {path: plan(path) for path in params}
        m, v = (
            {path: _no_moment(config, t, path, params[path]) for path, t in plans.items() if not _muons(t)}
            for _ in "mv"
        )
        return AdamState(m, v)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AdamState]:
        moved, kept_m, kept_v = {}, {}, {}
        for path in state.m:
            p, own = params[path], plan(path)
            same = own.optimizer == "adamw" and config.moment_dtype == "same"
            wide = p.dtype if same else jnp.promote_types(p.dtype, jnp.float32)
            g, m, v = (
                updates[path].astype(wide),
                _read(state.m[path], path, True).astype(wide),
                _read(state.v[path], path, False).astype(wide),
            )
            m = m + (1 - config.b1) * (g - m)
            v = config.b2 * v + (1 - config.b2) * g * g
            _, step_size, root, decay = (jnp.asarray(s, wide) for s in extra["scalars"])
            delta = -(own.lr * step_size) * (m / (jnp.sqrt(v) / root + config.eps))
            if own.decay:
                delta = delta - own.lr * own.decay * decay * p.astype(wide)
            moved[path] = delta.astype(p.dtype)
            kept_m[path], kept_v[path] = (
                _kept(m, state.m[path], path, True),
                _kept(v, state.v[path], path, False),
            )
        return updates | moved, AdamState(kept_m, kept_v)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_muon(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Muon's update -(lr * direction + decay * p) for its own parameters; see jaxlm/muon.py."""

    def init(params: Any) -> MuonState:
        plans = {path: treatment(config, path) for path in params}
        return MuonState(
            {path: _no_moment(config, t, path, params[path]) for path, t in plans.items() if _muons(t)}
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, MuonState]:
        moved, kept = {}, {}
        for path, momentum in state.momentum.items():
            p, plan = params[path], treatment(config, path)
            halves = 2 if path.endswith(".gate_up") else 1
            direction, after = muon.direction(config, updates[path], momentum, halves)
            lr, decay = (jnp.asarray(s, after.dtype) for s in (extra["scalars"].lr, extra["scalars"].decay))
            delta = -(plan.lr * lr) * direction
            if plan.decay:
                delta = delta - plan.lr * plan.decay * decay * p.astype(after.dtype)
            moved[path], kept[path] = delta.astype(p.dtype), _kept(after, momentum, path, True)
        return updates | moved, MuonState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Clip, then each optimizer on its own; `update(grads, state, params, scalars=...)` over flat dicts by path.

    `init` raises ConfigError, as `check_policy`.
    """
    links: list[Any] = [clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    links.append(scale_by_exact_adamw(config))
    if "muon" in (config.optimizer, *(line.optimizer for line in parse_policy(config.policy))):
        links.append(scale_by_muon(config))
    return optax.chain(*links)


def moments(state: Any) -> AdamState:
    """The moments inside the chain's state: m with Muon's momentum, v of AdamW alone."""
    adam = next(s for s in state if isinstance(s, AdamState))
    return AdamState(adam.m | next((s.momentum for s in state if isinstance(s, MuonState)), {}), adam.v)


def wide_moments(state: Any) -> AdamState:
    """`moments` with those in 8 bits as the float32 arrays that they stand for."""
    m, v = moments(state)
    return AdamState(
        {k: _read(x, k, True) for k, x in m.items()}, {k: _read(x, k, False) for k, x in v.items()}
    )


def opt_state_shardings(
    config: OptimConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, Axes], mesh: Mesh
) -> Any:
    """Where each part of the optimizer's state lives: as its parameter does; a single row of absmax everywhere."""
    state = jax.eval_shape(make_optimizer(config).init, dict(shapes))

    def place(path: str, moment: Any) -> Any:
        if not isinstance(moment, Moment8):
            return sharding(mesh, moment.shape, axes[path])
        rows = moment.absmax.shape
        whole = len(rows) == len(axes[path]) and math.prod(rows) * moments8.BLOCK == moment.codes.size
        return Moment8(
            sharding(mesh, moment.codes.shape, axes[path]),
            sharding(mesh, rows, axes[path]) if whole else replicated(mesh),
        )

    def link(part: Any) -> Any:
        if not isinstance(part, AdamState | MuonState):
            return part
        return type(part)(*({path: place(path, x) for path, x in slot.items()} for slot in part))

    return tuple(link(part) for part in state)


def as_arrays(values: Scalars, dtype: Any) -> Scalars:
    """Scalars as 0-d numpy arrays, so that a new value never recompiles the step."""
    return Scalars(*(np.asarray(v, dtype) for v in values))


def _muons(plan: Treatment) -> bool:
    return plan.optimizer == "muon"


def _transposed(path: str) -> bool:
    """Whether PyTorch has this weight the other way round."""
    return line_of(path).kind == "matrix"


def _no_moment(config: OptimConfig, plan: Treatment, path: str, p: Any) -> Any:
    """A moment before the first step."""
    if plan.optimizer == "adamw8bit" and moments8.is_narrow(p.shape):
        return moments8.zeros(p.shape, _transposed(path))
    return jnp.zeros(p.shape, p.dtype if config.moment_dtype == "same" else jnp.bfloat16)


def _read(kept: Any, path: str, signed: bool) -> Array:
    """A moment as an array."""
    return moments8.dequantize(kept, signed, _transposed(path)) if isinstance(kept, Moment8) else kept


def _kept(moment: Array, before: Any, path: str, signed: bool) -> Any:
    """A moment in the form that the one before it has."""
    if isinstance(before, Moment8):
        return moments8.quantize(moment, signed, _transposed(path))
    if before.dtype == jnp.bfloat16 and moment.dtype == jnp.float64:
        moment = jax.lax.reduce_precision(
            moment, 8, 7
        )  # or some backends would round twice, float32 in between
    return moment.astype(before.dtype)
