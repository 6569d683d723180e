"""AdamW over torch.optim, 8-bit AdamW and Muon written out, the schedule and the policy. Twin: jaxlm/optim.py.

Where every parameter has AdamW, one learning rate and moments of its own dtype, the update is torch.optim.AdamW's own;
learning rate and weight decay reach it through parameter groups. Everything else is `PolicyOptimizer`'s. Moments that
are kept narrower, in bfloat16 or 8 bits, are computed in promote_types(dtype of the parameter, float32), the update is
taken from them, and then they are rounded.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from jaxlm.config import InputError, OptimConfig, require
from jaxlm.policy import check_lines, override
from torchref import moments8, muon
from torchref.moments8 import Moment8

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
M, V, MOMENTUM = "exp_avg", "exp_avg_sq", "momentum_buffer"  # torch.optim's names


class Line(NamedTuple):
    """How parameters of one kind are treated where the run says nothing of them."""

    pattern: str  # of whole parameter paths
    group: str  # of the norms that a run reports
    kind: Literal["never", "embedding", "matrix"]  # decays never, with optim.decay, or always
    hidden: bool  # Muon's, where it is chosen


POLICY: tuple[Line, ...] = (  # every parameter matches exactly one
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
    """What one AdamW step needs besides tensors."""

    lr: float  # learning rate
    step_size: float  # lr / (1 - b1^t)
    bias2_root: float  # sqrt(1 - b2^t)
    decay: float  # lr * weight_decay


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of step `step` (from 0): (s+1)/w in the warmup, then by the schedule to min_lr at decay_steps.

    cosine and linear fall from the end of the warmup on, wsd (arXiv:2404.06395, section 4) linearly over the last
    share `wsd_decay` of decay_steps, constant never.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end, begin = config.decay_steps, float(config.warmup_steps)
    if config.schedule == "wsd":
        begin = max(begin, end - config.wsd_decay * end)
    if step <= begin:
        return config.lr
    if step >= end:
        return config.min_lr
    if config.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * ((step - begin) / (end - begin))))
    else:
        share = (end - step) / (end - begin)
    return config.lr * share + config.min_lr * (1 - share)


def scalars(config: OptimConfig, step: int) -> Scalars:
    """The scalars of step `step` (from 0), for the log and for comparison: torch.optim computes its own."""
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


def global_norm(tree: Iterable[Tensor]) -> Tensor:
    """Root of the sum of squares of all tensors, accumulated upcast."""
    squares = [x.to(torch.promote_types(x.dtype, torch.float32)).square().sum() for x in tree]
    return torch.stack(squares).sum().sqrt()


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """Factor on the gradients: min(1, limit / (norm + 1e-6)); 1 when limit is 0."""
    return (limit / (norm + CLIP_EPS)).clamp(max=1.0) if limit else torch.ones_like(norm)


class AdamState(NamedTuple):
    """Moments by parameter path, tensors or Moment8."""

    m: dict[str, Any]
    v: dict[str, Any]


class PolicyOptimizer(torch.optim.Optimizer):
    """AdamW, 8-bit AdamW and Muon, each for its own groups; an entry of `state` for every parameter, as torch's have.

    step  float32, updates of this parameter; exp_avg and exp_avg_sq, each a tensor or, in 8 bits, _codes and _absmax
    beside each other; Muon's momentum_buffer.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig):
        """groups: params with their names, optimizer, lr_factor and weight_decay."""
        self.config = config
        super().__init__(groups, {"lr": config.lr, "fused": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients in `.grad`, at each group's `lr` times its `lr_factor`."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr = group["lr"] * group["lr_factor"]
            for name, p in zip(group["names"], group["params"], strict=True):
                if p.grad is None:
                    continue
                entry = self.state[p] or self.empty_entry(group, p)
                entry["step"] += 1
                update = self._muon(name, p, entry) if MOMENTUM in entry else self._adamw(p, entry)
                wide = p.to(update.dtype) * (1 - lr * group["weight_decay"]) - lr * update
                p.copy_(wide)
        return loss

    def empty_entry(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        """The entry of a parameter before its first update, put into `state`."""
        entry = {"step": torch.tensor(0.0)}
        for slot in (MOMENTUM,) if group["optimizer"] == "muon" else (M, V):
            if group["optimizer"] == "adamw8bit" and moments8.is_narrow(tuple(p.shape)):
                zeros = moments8.zeros(tuple(p.shape))
                entry |= {f"{slot}_{name}": part.to(p.device) for name, part in zeros._asdict().items()}
            else:
                dtype = p.dtype if self.config.moment_dtype == "same" else torch.bfloat16
                entry[slot] = torch.zeros_like(p, dtype=dtype)
        self.state[p] = entry
        return entry

    def _adamw(self, p: Tensor, entry: dict[str, Tensor]) -> Tensor:
        b1, b2, t = self.config.b1, self.config.b2, int(entry["step"])
        narrow = M not in entry or entry[M].dtype != p.dtype
        wide = torch.promote_types(p.dtype, torch.float32) if narrow else p.dtype
        assert p.grad is not None
        g = p.grad.to(wide)
        m = b1 * _read(entry, M).to(wide) + (1 - b1) * g
        v = b2 * _read(entry, V).to(wide) + (1 - b2) * g.square()
        _keep(entry, M, m)
        _keep(entry, V, v)
        return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.config.eps)

    def _muon(self, name: str, p: Tensor, entry: dict[str, Tensor]) -> Tensor:
        assert p.grad is not None
        halves = 2 if name.endswith(".gate_up") else 1
        update, momentum = muon.direction(self.config, p.grad, entry[MOMENTUM], halves)
        _keep(entry, MOMENTUM, momentum)
        return update


def make_optimizer(
    config: OptimConfig, model: nn.Module, policy: Callable[[OptimConfig, str], bool] | None = None
) -> torch.optim.Optimizer:
    """One group for each treatment; torch.optim.AdamW where it can do it all, fused where parameters are on CUDA.

    Parameters that require no gradient are frozen: it has nothing of them.

    policy: which paths decay, all of them AdamW's; None is `treatment`, the decoder's. Raises ConfigError, as
    `check_policy`.
    """
    if policy is None:
        check_policy(config, [path for path, _ in _trained(model)])
    made: dict[Treatment, dict[str, Any]] = {}
    for path, p in _trained(model):
        plan = (
            treatment(config, path)
            if policy is None
            else Treatment("adamw", 1.0, float(policy(config, path)))
        )
        empty = {"optimizer": plan.optimizer, "lr_factor": plan.lr, "params": [], "names": []}
        group = made.setdefault(plan, empty | {"weight_decay": config.weight_decay * plan.decay})
        group["params"].append(p)
        group["names"].append(path)
    if config.moment_dtype != "same" or any((p.optimizer, p.lr) != ("adamw", 1.0) for p in made):
        return PolicyOptimizer(list(made.values()), config)
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in made.values()]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.b1, config.b2), eps=config.eps, fused=fused)


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> AdamState:
    """The moments by parameter path, m with Muon's momentum, v of AdamW alone; empty before the first step."""
    m, v = {}, {}
    for path, p in model.named_parameters():
        entry = optimizer.state.get(p, {})
        for slot, found in ((M, m), (MOMENTUM, m), (V, v)):
            if slot in entry:
                found[path] = entry[slot]
            elif f"{slot}_codes" in entry:
                found[path] = Moment8(entry[f"{slot}_codes"], entry[f"{slot}_absmax"])
    return AdamState(m, v)


def wide_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> AdamState:
    """`moments` with those in 8 bits as the float32 tensors that they stand for."""

    def wide(slot: dict[str, Any], signed: bool) -> dict[str, Tensor]:
        return {k: moments8.dequantize(x, signed) if isinstance(x, Moment8) else x for k, x in slot.items()}

    m, v = moments(model, optimizer)
    return AdamState(wide(m, True), wide(v, False))


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state but the counts, by SLOT:PATH; {} before the first step."""
    return {
        f"{slot}:{path}": value.contiguous()
        for path, p in model.named_parameters()
        for slot, value in optimizer.state.get(p, {}).items()
        if slot != "step"
    }


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], updates: int
) -> None:
    """Fills a fresh optimizer from `state_tensors` after so many updates.

    Raises InputError where they are not the tensors of this optimizer on this model.
    """
    entries = expected_state(model, optimizer)
    wanted = {
        f"{slot}:{path}": value
        for path, entry in entries.items()
        for slot, value in entry.items()
        if slot != "step"
    }

    def told(values: Mapping[str, Tensor]) -> dict[str, str]:
        return {name: f"{str(x.dtype)[6:]}{list(x.shape)}" for name, x in values.items()}

    expected, found = told(wanted), told(tensors)
    wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(expected)} tensors of the optimizer do not fit, first {wrong[0]}: "
            f"got {found.get(wrong[0])}, expected {expected.get(wrong[0])}"
        )
    counter_on_device = optimizer.defaults.get("fused")
    for path, p in _trained(model):
        step = torch.tensor(float(updates), device=p.device if counter_on_device else "cpu")
        entry = {slot: tensors[f"{slot}:{path}"].to(p.device) for slot in entries[path] if slot != "step"}
        optimizer.state[p] = {"step": step} | entry


def expected_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Entries of the right shapes and dtypes by parameter path, without memory; the optimizer stays as it is."""
    if not isinstance(optimizer, PolicyOptimizer):
        return {
            path: {slot: torch.empty_like(p, device="meta") for slot in (M, V)} for path, p in _trained(model)
        }
    found = {}
    blank = PolicyOptimizer([{"params": [nn.Parameter(torch.empty(0))], "names": [""]}], optimizer.config)
    for group in optimizer.param_groups:
        for path, p in zip(group["names"], group["params"], strict=True):
            found[path] = blank.empty_entry(group, nn.Parameter(p.to("meta")))
    return found


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(path, p) for path, p in model.named_parameters() if p.requires_grad]


def _read(entry: dict[str, Tensor], slot: str) -> Tensor:
    """A moment as a tensor."""
    if slot in entry:
        return entry[slot]
    return moments8.dequantize(Moment8(entry[f"{slot}_codes"], entry[f"{slot}_absmax"]), slot == M)


def _keep(entry: dict[str, Tensor], slot: str, moment: Tensor) -> None:
    """Puts a moment into an entry, in the form that the one before it has."""
    if slot not in entry:
        made = moments8.quantize(moment, slot == M)
        entry[f"{slot}_codes"], entry[f"{slot}_absmax"] = made
    elif entry[slot].dtype == torch.bfloat16 and moment.dtype == torch.float64:
        entry[slot] = _to_bfloat16(moment)
    else:
        entry[slot] = moment.to(entry[slot].dtype)


def _to_bfloat16(x: Tensor) -> Tensor:
    """float64 to the nearest bfloat16, ties to even; `to` would round to float32 first. Below its range: zero."""
    bits = x.view(torch.int64)
    cut = 52 - 7  # of a double's mantissa
    bits = (bits + (2 ** (cut - 1) - 1) + ((bits >> cut) & 1)) & -(2**cut)
    rounded = bits.view(torch.float64)
    return rounded.masked_fill(rounded.abs() < torch.finfo(torch.bfloat16).tiny, 0).to(torch.bfloat16)
