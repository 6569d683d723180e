"""Faults of the mixture of experts: router, combination, balance loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import torch

from convert.parity.faults.fault import Fault
from jaxlm.config import RunConfig


def all_layers_mixed(run: RunConfig) -> RunConfig:
    """Two layers of experts, where sums and means over layers differ."""
    moe = dataclasses.replace(run.model.moe, pattern=(True,))
    return dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe))


def _not_renormalised(original: Any) -> Any:
    return lambda logits, n_active, renormalize, ids=None: original(logits, n_active, False, ids)


def _sigmoid_scores(original: Any) -> Any:
    """Sigmoids instead of a softmax, renormalised over the chosen."""

    def route(logits, n_active, renormalize, ids=None):
        ids, _ = original(logits, n_active, renormalize, ids)
        chosen = jax.nn.sigmoid(jnp.take_along_axis(logits, ids, axis=-1))
        return ids, chosen / jnp.sum(chosen, axis=-1, keepdims=True)

    return route


def _library_top_k(original: Any) -> Any:
    """torch.topk, which breaks ties in no particular order."""

    def route(logits, n_active, renormalize, ids=None):
        return original(logits, n_active, renormalize, logits.topk(n_active).indices if ids is None else ids)

    return route


def _router_in_bfloat16(original: Any) -> Any:
    return lambda x: x.astype(jnp.bfloat16)


def _weights_without_gradient(original: Any) -> Any:
    def route(*args):
        ids, weights = original(*args)
        return ids, weights.detach()

    return route


def _epsilon_in_the_sum(original: Any) -> Any:
    """The chosen probabilities divided by their sum plus 1e-9."""

    def route(logits, n_active, renormalize, ids=None):
        ids, weights = original(logits, n_active, False, ids)
        return ids, weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-9)

    return route


def _ids_sorted_alone(original: Any) -> Any:
    """The ids in ascending order, the weights left in the order of the choice."""

    def route(*args):
        ids, weights = original(*args)
        return ids.sort(-1).values, weights

    return route


def _weights_on_the_input(original: Any) -> Any:
    """An expert's weight multiplies its input instead of its output, as Llama 4's."""

    def call(self, x, ids, weights, key=None):
        one = jnp.ones_like(weights[..., :1])
        parts = [
            original(self, x * weights[..., a : a + 1], ids[..., a : a + 1], one)
            for a in range(ids.shape[-1])
        ]
        return sum(parts[1:], parts[0])

    return call


def _with_padding(original: Any) -> Any:
    """Padding counts like any token."""
    return lambda *args: original(*args[:-1], torch.ones_like(args[-1]))


def _share_over_active(original: Any) -> Any:
    """f_e sums to one instead of A."""
    return lambda reduction, logits, ids, valid: original(reduction, logits, ids, valid) / ids[0].shape[-1]


def _other_reduction(name: str) -> Any:
    return lambda original: lambda reduction, *rest: original(name, *rest)


def _without_gradient(original: Any) -> Any:
    return lambda *args: jax.lax.stop_gradient(original(*args))


def _probability_squared(original: Any) -> Any:
    """P_e in the place of f_e."""

    def share(logits, ids, valid):
        _, probability = original(logits, ids, valid)
        return probability, probability

    return share


def _coefficient_lost(original: Any) -> Any:
    """The balance loss under the default coefficient instead of the run's."""

    def total_loss(config, *rest):
        moe = dataclasses.replace(config.moe, balance_coef=0.01)
        return original(dataclasses.replace(config, moe=moe), *rest)

    return total_loss


def _mean_over_layers(original: Any) -> Any:
    return lambda logits, valid: original(logits, valid) / len(logits)


TORCH_ROUTE, JAX_ROUTE = "torchref.moe.route", "jaxlm.moe.route"
TORCH_BALANCE, JAX_BALANCE = "torchref.loss.balance_loss", "jaxlm.loss.balance_loss"

_TABLE = (
    (
        "chosen weights not renormalised",
        "router",
        TORCH_ROUTE,
        _not_renormalised,
        "activations",
        "moe.weights",
    ),
    ("sigmoid instead of softmax", "router", JAX_ROUTE, _sigmoid_scores, "activations", "moe.weights"),
    (
        "epsilon in the renormalisation",
        "router",
        JAX_ROUTE,
        _epsilon_in_the_sum,
        "activations",
        "moe.weights",
    ),
    ("torch.topk on ties", "router", TORCH_ROUTE, _library_top_k, "ties", "moe.expert_ids"),
    (
        "router in bfloat16",
        "router",
        "jaxlm.moe.upcast",
        _router_in_bfloat16,
        "activations",
        "moe.router_logits",
    ),
    (
        "ids sorted without their weights",
        "router",
        TORCH_ROUTE,
        _ids_sorted_alone,
        "activations",
        "moe.expert_ids",
    ),
    (
        "weights on the experts' input",
        "router",
        "jaxlm.moe.Experts.__call__",
        _weights_on_the_input,
        "activations",
        "moe.combined",
    ),
    # The balance and z-losses still reach the router: its gradient is wrong, not zero.
    (
        "no gradient through the weights",
        "router",
        TORCH_ROUTE,
        _weights_without_gradient,
        "gradients",
        "moe.router.weight",
    ),
    ("padding counted", "balance loss", TORCH_BALANCE, _with_padding, "loss", "balance"),
    (
        "padding in the router's z-loss",
        "balance loss",
        "torchref.loss.router_z_sum",
        _with_padding,
        "loss",
        "router_z",
    ),
    ("f divided by the active experts", "balance loss", JAX_BALANCE, _share_over_active, "loss", "balance"),
    (
        "P in the place of f",
        "balance loss",
        "torchref.moe._share_and_probability",
        _probability_squared,
        "loss",
        "balance",
    ),
    ("coefficient lost", "balance loss", "jaxlm.train.total_loss", _coefficient_lost, "loss", "total_loss"),
    # Its value is right; the first parameter that feels it is the router.
    ("no gradient", "balance loss", JAX_BALANCE, _without_gradient, "gradients", "moe.router.weight"),
    (
        "summed over the layers",
        "balance loss",
        TORCH_BALANCE,
        _other_reduction("layer_sum"),
        "loss",
        "balance",
        all_layers_mixed,
    ),
    (
        "layers averaged instead of pooled",
        "balance loss",
        TORCH_BALANCE,
        _other_reduction("layer_mean"),
        "loss",
        "balance",
        all_layers_mixed,
    ),
    (
        "router's z-loss averaged over the layers",
        "balance loss",
        "torchref.loss.router_z_sum",
        _mean_over_layers,
        "loss",
        "router_z",
        all_layers_mixed,
    ),
)
FAULTS = tuple(Fault(*row) for row in _TABLE)  # type: ignore[arg-type]
