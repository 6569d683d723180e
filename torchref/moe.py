"""Mixture of experts: router, experts, balance losses. Twin: jaxlm/moe.py.

    y = sum over the A chosen experts e of  weight_e * MLP_e(x)   (+ shared expert)

Dropless by default. The router computes upcast; ties go to the lowest expert index in both frameworks.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxlm.config import ModelConfig
from torchref.layers import MLP, Backends, Linear, activate, dropout, init_std, make_param, upcast
from torchref.shapes import Bool, Float, Int


class Routing(NamedTuple):
    """Where each token goes. `kept` is False where a capacity limit dropped the assignment."""

    logits: Float[Tensor, "B T E"]
    ids: Int[Tensor, "B T A"]
    weights: Float[Tensor, "B T A"]
    kept: Bool[Tensor, "B T A"]


def route(
    logits: Float[Tensor, "*B E"], n_active: int, renormalize: bool, ids: Int[Tensor, "*B A"] | None = None
) -> tuple[Tensor, Tensor]:
    """Ids [*B, A] of the largest logits, best first, lowest index on ties, and their softmax probabilities [*B, A].

    ids: the experts of a recorded routing, taken instead of the largest logits.
    """
    probs = logits.softmax(-1)
    # torch.topk breaks ties in no particular order; a stable sort keeps the lowest index first.
    if ids is None:
        ids = logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., :n_active]
    weights = probs.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights


def within_capacity(
    ids: Int[Tensor, "B T A"], valid: Bool[Tensor, "B T"], n_experts: int, factor: float
) -> Bool[Tensor, "B T A"]:
    """True for the first int(factor * B*T / E) tokens of each expert in token order; padding takes no place."""
    B, T, A = ids.shape
    capacity = int(factor * B * T / n_experts)
    chosen_PE = F.one_hot(ids, n_experts).sum(2).mul(valid[..., None]).view(B * T, n_experts)
    fits_PE = chosen_PE.cumsum(0) <= capacity
    return fits_PE.gather(1, ids.reshape(B * T, A)).view(B, T, A)


def balance_loss(
    reduction: str, logits: list[Tensor], ids: list[Tensor], valid: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Load-balancing loss over the valid tokens of all MoE layers, uncoefficiented; 0 for reduction 'none'.

    With f_e the share of tokens that chose e (summing to A) and P_e the mean router probability, per layer:

    mixtral     E sum_e f_e P_e over the tokens of all layers pooled; A at balance. Source: transformers' Mixtral.
    layer_mean  mean over layers of E sum_e f_e P_e; A at balance.
    layer_sum   sum over layers of E sum_e f_e P_e; A L at balance. Source: gptoss.
    megatron    sum over layers of (E/A) sum_e f_e P_e; L at balance. Source: Megatron-Core, arXiv:2101.03961 eq. 4.
    levanter    sum over layers of (E/A) sum_e (f_e/A) P_e; L/A at balance. Source: Levanter's Mixtral.
    maxtext     mean over layers and sequences of E sum_e f_e P_e per sequence; A at balance. Source: MaxText.
    """
    if reduction == "none" or not logits:
        return torch.zeros((), dtype=logits[0].dtype if logits else torch.float32, device=valid.device)
    if reduction == "mixtral":
        pooled = [
            _share_and_probability(layer, chosen, valid) for layer, chosen in zip(logits, ids, strict=True)
        ]
        f, p = (torch.stack(part).mean(0) for part in zip(*pooled, strict=True))
        return logits[0].shape[-1] * (f * p).sum()
    if reduction == "maxtext":
        layers = []
        for layer, chosen in zip(logits, ids, strict=True):
            rows = [row for row in range(len(valid)) if valid[row].any()]
            layers.append(
                torch.stack(
                    [_product(layer[r : r + 1], chosen[r : r + 1], valid[r : r + 1]) for r in rows]
                ).mean()
                if rows
                else layer.sum() * 0
            )
        return torch.stack(layers).mean()
    losses = torch.stack([_product(layer, chosen, valid) for layer, chosen in zip(logits, ids, strict=True)])
    n_active = ids[0].shape[-1]
    if reduction == "layer_mean":
        return losses.mean()
    return losses.sum() / {"layer_sum": 1, "megatron": n_active, "levanter": n_active**2}[reduction]


def _share_and_probability(logits: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """f_e and P_e over the valid tokens, each [E]."""
    count, weight = valid.sum().clamp(min=1), valid[..., None].to(logits.dtype)
    chosen = F.one_hot(ids, logits.shape[-1]).sum(2).to(logits.dtype)
    return (chosen * weight).sum((0, 1)) / count, (logits.softmax(-1) * weight).sum((0, 1)) / count


def _product(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    f, p = _share_and_probability(logits, ids, valid)
    return logits.shape[-1] * (f * p).sum()


def router_z_sum(logits: list[Tensor], valid: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum over layers and valid tokens of logsumexp(router logits)^2. Source: ST-MoE, arXiv:2202.08906, eq. 5."""
    total = torch.zeros((), dtype=logits[0].dtype if logits else torch.float32, device=valid.device)
    for layer in logits:
        total = total + (layer.logsumexp(-1).square() * valid).sum()
    return total


class Experts(nn.Module):
    """E expert MLPs, weights stacked over E: gate_up [E, 2F, D] ([gate | up]) or up [E, F, D], down [E, D, F]."""

    def __init__(
        self, config: ModelConfig, backends: Backends, *, rngs: torch.Generator | None, dtype: torch.dtype
    ):
        super().__init__()
        E, D, F_, bias = config.moe.n_experts, config.d_model, config.expert_d_ff, config.moe.expert_bias
        gated = config.mlp == "swiglu"
        up_std, down_std = init_std(config, D), init_std(config, F_, residual=True)
        up = make_param((E, 2 * F_ if gated else F_, D), up_std, rngs, dtype)
        up_bias = make_param((E, 2 * F_ if gated else F_), 0.0, rngs, dtype) if bias else None
        self.gate_up, self.up = (up, None) if gated else (None, up)
        self.gate_up_bias, self.up_bias = (up_bias, None) if gated else (None, up_bias)
        self.down = make_param((E, D, F_), down_std, rngs, dtype)
        self.down_bias = make_param((E, D), 0.0, rngs, dtype) if bias else None
        self.kind, self.rate, self.backend = config.mlp, config.dropout, backends.experts

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        ids: Int[Tensor, "B T A"],
        weights: Float[Tensor, "B T A"],
        key: torch.Generator | None = None,
    ) -> Float[Tensor, "B T D"]:
        """sum_a weights[a] * MLP_{ids[a]}(x), one expert after the other over the tokens that chose it.

        `auto` is this loop; `grouped` does all experts in one product of torch's, for speed.
        """
        x_PD, ids_PA, weights_PA = x.reshape(-1, x.shape[-1]), ids.flatten(0, 1), weights.flatten(0, 1)
        if self.backend == "grouped":
            return self._grouped(x_PD, ids_PA, weights_PA, key).view_as(x)
        out_PD = torch.zeros_like(x_PD)
        for expert in range(self.down.shape[0]):
            token, slot = (ids_PA == expert).nonzero(as_tuple=True)
            y = self.expert(expert, x_PD[token], key) * weights_PA[token, slot, None]
            out_PD = out_PD.index_add(0, token, y)
        return out_PD.view_as(x)

    def expert(
        self, index: int, x: Float[Tensor, "P D"], key: torch.Generator | None = None
    ) -> Float[Tensor, "P D"]:
        """The MLP of one expert."""
        up, up_bias = (self.gate_up, self.gate_up_bias) if self.up is None else (self.up, self.up_bias)
        assert up is not None
        hidden = F.linear(x, up[index].to(x.dtype), None if up_bias is None else up_bias[index].to(x.dtype))
        gate, up = hidden.chunk(2, dim=-1) if self.kind == "swiglu" else (hidden, None)
        hidden = dropout(activate(self.kind, gate, up), self.rate, key)
        bias = None if self.down_bias is None else self.down_bias[index].to(x.dtype)
        return F.linear(hidden, self.down[index].to(x.dtype), bias)

    def _grouped(self, x: Tensor, ids: Tensor, weights: Tensor, key: torch.Generator | None) -> Tensor:
        """x [P, D], ids and weights [P, A]: assignments sorted by expert, then one grouped product per layer."""
        (P, A), n_experts = ids.shape, self.down.shape[0]
        up, up_bias = (self.gate_up, self.gate_up_bias) if self.up is None else (self.up, self.up_bias)
        assert up is not None
        flat = ids.flatten()
        order = flat.sort(stable=True).indices
        inverse, owner = order.sort().indices, flat[order]
        ends = (flat[:, None] == torch.arange(n_experts, device=x.device)).sum(0).cumsum(0).to(torch.int32)
        rows = _Permuted.apply(x[:, None].expand(P, A, -1).reshape(P * A, -1), order, inverse)
        hidden = torch._grouped_mm(rows, up[...].to(x.dtype).mT, ends)
        hidden = hidden if up_bias is None else hidden + up_bias.to(x.dtype)[owner]
        gate, linear = hidden.chunk(2, dim=-1) if self.kind == "swiglu" else (hidden, None)
        hidden = dropout(activate(self.kind, gate, linear), self.rate, key)
        out = torch._grouped_mm(hidden, self.down[...].to(x.dtype).mT, ends)
        out = out if self.down_bias is None else out + self.down_bias.to(x.dtype)[owner]
        return (_Permuted.apply(out, inverse, order).view(P, A, -1) * weights[..., None]).sum(1)


class _Permuted(torch.autograd.Function):
    """x[order], whose gradient is g[inverse]: torch would add the rows up one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None


class MoE(nn.Module):
    """Router, experts and an optional shared expert that every token passes through."""

    def __init__(
        self, config: ModelConfig, backends: Backends, *, rngs: torch.Generator | None, dtype: torch.dtype
    ):
        super().__init__()
        D, moe = config.d_model, config.moe
        std = init_std(config, D)
        self.router = Linear(D, moe.n_experts, bias=False, std=std, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, backends, rngs=rngs, dtype=dtype)
        self.shared = MLP(config, moe.shared_d_ff, rngs=rngs, dtype=dtype) if moe.shared_d_ff else None
        self.shared_gate = (
            Linear(D, 1, bias=False, std=std, rngs=rngs, dtype=dtype) if moe.shared_gate else None
        )
        self.config = moe

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        valid: Bool[Tensor, "B T"],
        train: bool,
        key: torch.Generator | None = None,
        expert_ids: Int[Tensor, "B T A"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor]]:
        """The layer's output and its activations; a capacity limit holds in training only."""
        routing = self.routing(x, valid, train, expert_ids)
        combine = torch.where(routing.kept, routing.weights, 0).to(x.dtype)
        combined = self.experts(x, routing.ids, combine, key)
        acts = {"router_logits": routing.logits, "expert_ids": routing.ids, "weights": routing.weights}
        acts |= {"kept": routing.kept, "combined": combined}
        if self.shared is not None:
            shared = self.shared(x, key)
            if self.shared_gate is not None:
                shared = shared * torch.sigmoid(self.shared_gate(x))
            combined = combined + shared
        return combined, acts

    def routing(
        self,
        x: Float[Tensor, "B T D"],
        valid: Bool[Tensor, "B T"],
        train: bool,
        expert_ids: Int[Tensor, "B T A"] | None = None,
    ) -> Routing:
        """Upcast router logits, chosen (or replayed) experts, their weights, and what a capacity limit keeps."""
        logits = self.router(upcast(x))
        ids, weights = route(logits, self.config.n_active, self.config.renormalize, expert_ids)
        kept = torch.ones_like(ids, dtype=torch.bool)
        if train and self.config.capacity_factor:
            kept = within_capacity(ids, valid, self.config.n_experts, self.config.capacity_factor)
        return Routing(logits, ids, weights, kept)
