"""Rewrites that compute the same numbers by another way: a suite that alarms at one of them is too strict."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

import torchref.attention
from convert.parity.faults.conversion import TRANSPOSED
from convert.parity.faults.fault import Rewrite
from convert.parity.faults.serving import island_by
from convert.parity.faults.training import own_update
from convert.rules import Rule
from jaxlm.optim import decays


def _queries_scaled_first(original: Any) -> Any:
    def attention(q, k, v, mask, bias, rate, key):
        B, T, N, H = q.shape
        grouped = (q / math.sqrt(H)).reshape(B, T, k.shape[2], -1, H)
        scores = torch.einsum("btkgh,bskh->bkgts", grouped, k)
        weights = torchref.attention.masked_softmax(scores, mask[:, None, None])
        out = torch.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
        return out, scores.masked_fill(~mask[:, None, None], -torch.inf).reshape(B, N, T, -1)

    return attention


def _finite_mask(original: Any) -> Any:
    """A large negative number instead of -inf, and rows that may see nothing set to zero."""

    def masked_softmax(scores, mask):
        weights = scores.masked_fill(~mask, -1e30).softmax(-1)
        return torch.where(mask.any(-1, keepdim=True), weights, 0)

    return masked_softmax


def _softmax_of_the_chosen(original: Any) -> Any:
    """The softmax over the chosen logits alone, which is the renormalised softmax over all."""

    def route(logits, n_active, renormalize, ids=None):
        ids, _ = original(logits, n_active, renormalize, ids)
        return ids, logits.gather(-1, ids).softmax(-1)

    return route


def _silu_spelled_out(original: Any) -> Any:
    return lambda kind, gate, up: gate * torch.sigmoid(gate) * up


def _norm_by_division(original: Any) -> Any:
    def forward(self, x):
        return self.weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    return forward


def _lookup_as_product(original: Any) -> Any:
    def forward(self, ids):
        return F.one_hot(ids, self.weight.shape[0]).to(self.weight.dtype) @ self.weight

    return forward


def _last_expert_first(original: Any) -> Any:
    def forward(self, x, ids, weights, key=None):
        rows, chosen, share = x.reshape(-1, x.shape[-1]), ids.flatten(0, 1), weights.flatten(0, 1)
        out = torch.zeros_like(rows)
        for expert in reversed(range(self.down.shape[0])):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            out = out.index_add(0, token, self.expert(expert, rows[token]) * share[token, slot, None])
        return out.view_as(x)

    return forward


def _positions_with_padding(original: Any) -> Any:
    """A left-padded row counts its padding: rotary positions matter by their differences alone."""

    def pad(prompts, longest):
        ids, positions, segments = original(prompts, longest)
        positions[:] = range(longest)
        return ids, positions, segments

    return pad


def _decay_before_the_step(config, path, p, m, v, s):
    """torch's order: the parameter shrinks first, then it moves."""
    kept = p * (1 - s.decay) if decays(config, path) else p
    return kept - s.step_size * (m / (jnp.sqrt(v) / s.bias2_root + config.eps)) - p


def _all_tensors_at_once(original: Any) -> Any:
    """torch's multi-tensor AdamW, which CPUs do not take by themselves."""

    def make_optimizer(config, model):
        optimizer = original(config, model)
        for group in optimizer.param_groups:
            group["foreach"] = True
        return optimizer

    return make_optimizer


def _rules_one_by_one(original: Any) -> Any:
    """The rule for projections taken apart into a rule for each."""
    old = next(rule for rule in original if rule.source == TRANSPOSED)
    names = (
        r".*(?:q|k)_proj",
        r".*(?:v|o)_proj",
        r".*(?:gate|up|down)_proj",
        r".*router|.*shared_gate|lm_head",
    )
    parts = (Rule(rf"({name})\.weight", old.target, old.transform) for name in names)
    return (*(rule for rule in original if rule is not old), *parts)


def _sum_then_slice(out: Any) -> Any:
    """The whole sum on every device, of which each takes its rows."""
    rows = out.shape[0] // jax.lax.axis_size("expert")
    whole = jax.lax.psum(out, "expert")
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("expert") * rows, rows)


def _in_chunks(original: Any) -> Any:
    """Logits of three positions at a time."""
    return lambda hidden, weight, bias, targets, mask, **options: original(
        hidden, weight, bias, targets, mask, chunk_logits=3 * hidden.shape[0] * weight.shape[1], **options
    )


def _every_expert_on_every_token(original: Any) -> Any:
    """The plain loop of the tests' oracle instead of the grouped products."""
    return lambda *args, **options: original(*args, **(options | {"backend": "loop"}))


def _recomputed(original: Any) -> Any:
    return lambda config, *rest, **options: original(config, *rest, **(options | {"remat": "block"}))


REWRITES = (
    Rewrite(
        "attention head by head",
        "torchref.attention.fast_attention",
        lambda original: torchref.attention.readable_attention,
    ),
    Rewrite(
        "explicit attention in training",
        "torchref.attention.choose_attention",
        lambda original: lambda requested, q, plain: "explicit",
    ),
    Rewrite("queries scaled before the product", "torchref.attention.fast_attention", _queries_scaled_first),
    Rewrite("-1e30 as mask, empty rows zeroed", "torchref.attention.masked_softmax", _finite_mask),
    Rewrite("softmax of the chosen logits", "torchref.moe.route", _softmax_of_the_chosen),
    Rewrite("silu as x sigmoid(x)", "torchref.moe.activate", _silu_spelled_out),
    Rewrite("norm by division", "torchref.layers.RMSNorm.forward", _norm_by_division),
    Rewrite("embedding as a product", "torchref.layers.Embed.forward", _lookup_as_product),
    Rewrite("last expert first", "torchref.moe.Experts.forward", _last_expert_first),
    Rewrite("positions counted with the padding", "torchref.cached._pad", _positions_with_padding),
    Rewrite("AdamW over all tensors at once", "torchref.optim.make_optimizer", _all_tensors_at_once),
    Rewrite("a rule for each projection", "convert.native.RULES", _rules_one_by_one),
    Rewrite("decay before the step", "jaxlm.optim.scale_by_exact_adamw", own_update(_decay_before_the_step)),
    Rewrite("all-reduce instead of reduce-scatter", "jaxlm.moe._over_mesh", island_by(_sum_then_slice)),
    Rewrite("loss in small chunks", "jaxlm.train.chunked_token_loss", _in_chunks),
    Rewrite("every expert on every token", "jaxlm.moe.expert_mlp", _every_expert_on_every_token),
    Rewrite("blocks recomputed in the backward pass", "jaxlm.train.abstract_model", _recomputed),
)
