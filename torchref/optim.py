"""AdamW over torch.optim, with the clip and the schedule said here. Same public names: jaxlm/optim.py.

The update is torch.optim.AdamW's own; learning rate and weight decay reach it through parameter groups.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jaxlm.config import OptimConfig

DECAY_POLICY: tuple[tuple[str, str], ...] = (  # every parameter matches exactly one
    (r"(.*\.)?(bias|gate_up_bias|up_bias|down_bias|head_bias)", "never"),
    (r"(.*norm)\.weight", "never"),
    (r"(embed|pos_embed)\.weight", "embedding"),
    (r".*\.bias_table", "embedding"),
    (r"(.*_proj|.*router|.*shared_gate|lm_head)\.weight", "matrix"),
    (r".*\.experts\.(gate_up|up|down)", "matrix"),
)
CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Scalars(NamedTuple):
    """What one AdamW step needs besides tensors."""

    lr: float  # learning rate
    step_size: float  # lr / (1 - b1^t)
    bias2_root: float  # sqrt(1 - b2^t)
    decay: float  # lr * weight_decay


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of step `step` (from 0): (s+1)/w warmup, then a half cosine to min_lr, then min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, config.decay_steps - config.warmup_steps)
    done = min(step - config.warmup_steps, span)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * (done / span)))


def scalars(config: OptimConfig, step: int) -> Scalars:
    """The scalars of step `step` (from 0), for the log and for comparison: torch.optim computes its own."""
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


def global_norm(tree: Iterable[Tensor]) -> Tensor:
    """Root of the sum of squares of all tensors, accumulated upcast."""
    squares = [x.to(torch.promote_types(x.dtype, torch.float32)).square().sum() for x in tree]
    return torch.stack(squares).sum().sqrt()


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """Factor on the gradients: min(1, limit / (norm + 1e-6)); 1 when limit is 0."""
    return (limit / (norm + CLIP_EPS)).clamp(max=1.0) if limit else torch.ones_like(norm)


class AdamState(NamedTuple):
    """Moments by parameter path."""

    m: dict[str, Tensor]
    v: dict[str, Tensor]


def make_optimizer(
    config: OptimConfig, model: nn.Module, policy: Callable[[OptimConfig, str], bool] | None = None
) -> torch.optim.AdamW:
    """AdamW with one group that decays and one that does not; fused where the parameters are on CUDA.

    policy: which paths decay; None is `decays`, the decoder's.
    """
    named, decayed = dict(model.named_parameters()), policy or decays
    groups = [
        {
            "params": [p for path, p in named.items() if decayed(config, path) == wanted],
            "weight_decay": amount,
        }
        for wanted, amount in ((True, config.weight_decay), (False, 0.0))
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.b1, config.b2),
        eps=config.eps,
        fused=fused,
    )


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> AdamState:
    """The Adam moments by parameter path; empty before the first step."""
    named = {path: optimizer.state[p] for path, p in model.named_parameters() if p in optimizer.state}
    return AdamState(
        {k: s["exp_avg"] for k, s in named.items()}, {k: s["exp_avg_sq"] for k, s in named.items()}
    )
