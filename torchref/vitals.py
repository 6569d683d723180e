"""What a step says of itself beside its loss. Twin: jaxlm/vitals.py.

Norms are Euclidean, over all parameters and over each group of them (`optim.group_of`): of the gradients before
clipping, of the parameters that the step began with, and of their change, weight decay and rounding included. The
update-to-parameter ratio is the quotient of the last two. Entropies are in nats, from upcast logits.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from jaxlm.config import ModelConfig
from torchref.loss import Counts
from torchref.optim import group_of
from torchref.shapes import Bool, Float


def expert_metrics(
    model: ModelConfig, acts: dict[str, Tensor], valid: Bool[Tensor, "B T"], counts: Counts
) -> dict[str, Tensor]:
    """Share of the valid tokens' assignments that each expert of each MoE layer got, and the share dropped."""
    layers = [i for i in range(model.n_layers) if model.is_moe(i)]
    if not layers:
        return {}
    E, A = model.moe.n_experts, model.moe.n_active
    load = [F.one_hot(acts[f"blocks.{i}.moe.expert_ids"][valid], E).sum((0, 1)) for i in layers]
    lost = [(~acts[f"blocks.{i}.moe.kept"] & valid[..., None]).sum() for i in layers]
    total = A * counts.valid_tokens
    return {"expert_load": torch.stack(load) / total, "dropped": sum(lost) / (len(layers) * total)}


def router_entropy(
    model: ModelConfig, acts: dict[str, Tensor], valid: Bool[Tensor, "B T"], counts: Counts
) -> dict[str, Tensor]:
    """Entropy of the routers' softmax over the E experts, mean over valid tokens and MoE layers; ln E at most."""
    layers = [i for i in range(model.n_layers) if model.is_moe(i)]
    if not layers:
        return {}
    total = torch.zeros_like(counts.valid_tokens)
    for i in layers:
        logp = acts[f"blocks.{i}.moe.router_logits"].detach()[valid].log_softmax(-1)
        total -= (logp.exp() * logp).sum()
    return {"router_entropy": total / (len(layers) * counts.valid_tokens)}


def squares(tree: Mapping[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
    """Sum of squares of every tensor, accumulated upcast."""
    return {path: _wide(x).square().sum() for path, x in tree.items()}


def norms(
    grads: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, ""]]:
    """param_norm, update_norm and update_ratio, whole and, with grad_norm, as NAME/GROUP.

    grads: gradients before clipping; before, after: the parameters a step began and ended with; all by path. A ratio
    to parameters that are all zero is given as zero.
    """
    moved = {path: _wide(after[path]) - _wide(before[path]) for path in before}
    sums = {"grad_norm": squares(grads), "param_norm": squares(before), "update_norm": squares(moved)}
    groups: dict[str, list[str]] = {}
    for path in before:
        groups.setdefault(group_of(path), []).append(path)
    found = {}
    for suffix, paths in ({"": list(before)} | {f"/{name}": groups[name] for name in sorted(groups)}).items():
        root = {name: _root(parts[path] for path in paths) for name, parts in sums.items()}
        ratio = root["update_norm"] / root["param_norm"].where(root["param_norm"] > 0, torch.inf)
        found |= {f"{name}{suffix}": value for name, value in (root | {"update_ratio": ratio}).items()}
    del found["grad_norm"]  # the step's own, which the clip went by
    return found


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _root(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum().sqrt()
