"""What a step says of itself beside its loss. Twin: torchref/vitals.py.

Norms are Euclidean, over all parameters and over each group of them (`optim.group_of`): of the gradients before
clipping, of the parameters that the step began with, and of their change, weight decay and rounding included. The
update-to-parameter ratio is the quotient of the last two. Entropies are in nats, from upcast logits.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.config import ModelConfig
from jaxlm.loss import Counts
from jaxlm.optim import group_of
from jaxlm.shapes import Bool, Float


def expert_metrics(
    model: ModelConfig, acts: dict[str, Array], valid: Bool[Array, "B T"], counts: Counts
) -> dict[str, Array]:
    """Share of the valid tokens' assignments that each expert of each MoE layer got, and the share dropped."""
    layers = [i for i in range(model.n_layers) if model.is_moe(i)]
    if not layers:
        return {}
    E, A = model.moe.n_experts, model.moe.n_active
    chosen = [jax.nn.one_hot(acts[f"blocks.{i}.moe.expert_ids"], E) for i in layers]
    load = [jnp.sum(ids * valid[..., None, None], (0, 1, 2)) for ids in chosen]
    lost = [jnp.sum(~acts[f"blocks.{i}.moe.kept"] & valid[..., None]) for i in layers]
    total = A * counts.valid_tokens
    return {"expert_load": jnp.stack(load) / total, "dropped": sum(lost) / (len(layers) * total)}


def router_entropy(
    model: ModelConfig, acts: dict[str, Array], valid: Bool[Array, "B T"], counts: Counts
) -> dict[str, Array]:
    """Entropy of the routers' softmax over the E experts, mean over valid tokens and MoE layers; ln E at most."""
    layers = [i for i in range(model.n_layers) if model.is_moe(i)]
    if not layers:
        return {}
    total = jnp.zeros((), counts.valid_tokens.dtype)
    for i in layers:
        logp = jax.nn.log_softmax(jax.lax.stop_gradient(acts[f"blocks.{i}.moe.router_logits"]), axis=-1)
        total -= jnp.sum(jnp.exp(logp) * logp * valid[..., None])
    return {"router_entropy": total / (len(layers) * counts.valid_tokens)}


def squares(tree: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
    """Sum of squares of every tensor, accumulated upcast."""
    return {path: jnp.sum(jnp.square(_wide(x))) for path, x in tree.items()}


def norms(
    grads: Mapping[str, Array], before: Mapping[str, Array], after: Mapping[str, Array]
) -> dict[str, Float[Array, ""]]:
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
        ratio = root["update_norm"] / jnp.where(root["param_norm"] > 0, root["param_norm"], jnp.inf)
        found |= {f"{name}{suffix}": value for name, value in (root | {"update_ratio": ratio}).items()}
    del found["grad_norm"]  # the step's own, which the clip went by
    return found


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _root(parts: Iterable[Array]) -> Array:
    return jnp.sqrt(jnp.sum(jnp.stack(list(parts))))
