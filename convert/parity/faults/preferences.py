"""Faults of fine-tuning's data and losses: masks, packing, supervised loss, preferences."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.parity.faults.fault import Fault, Rewrite


def _carries(move: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """Other tokens of the examples carry loss."""

    def change(original: Any) -> Any:
        def lay_out(examples, slots, seq_len):
            other = copy.copy(examples)
            object.__setattr__(other, "carries", move(examples.carries))
            return original(other, slots, seq_len)

        return lay_out

    return change


def _rows(move: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Any], Any]:
    """Some of a batch's arrays are others."""

    def change(original: Any) -> Any:
        def lay_out(examples, slots, seq_len):
            batch = original(examples, slots, seq_len)
            return batch | move(batch)

        return lay_out

    return change


def _border_carries(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first token of every example but a row's first carries loss."""
    segments, mask = batch["segments"], batch["loss_mask"].copy()
    mask[:, 1:][(segments[:, :-1] != segments[:, 1:]) & (segments[:, 1:] > 0)] = 1
    return {"loss_mask": mask}


def _places_in_row(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    columns = np.broadcast_to(np.arange(batch["inputs"].shape[1], dtype=np.int32), batch["inputs"].shape)
    return {"positions": np.where(batch["segments"] > 0, columns, 0)}


def _without(name: str) -> Callable[[Any], Any]:
    """The loss does not see one of the batch's arrays."""

    def change(original: Any) -> Any:
        def task(run, *rest):
            made = original(run, *rest)

            def loss(*args):
                *before, batch, counts, train, key = args
                return made.loss(*before, {k: v for k, v in batch.items() if k != name}, counts, train, key)

            return made._replace(loss=loss)

        return task

    return change


def _as_if(**settings: Any) -> Callable[[Any], Any]:
    """Another configuration of the preference loss."""
    return lambda original: lambda config, *rest: original(dataclasses.replace(config, **settings), *rest)


def _answers_exchanged(original: Any) -> Any:
    """The rejected answer is preferred; the rewards are right."""

    def preference_loss(config, policy, reference, lengths):
        _, rewards = original(config, policy, reference, lengths)
        loss, _ = original(config, policy.flip(1), reference.flip(1), lengths.flip(1))
        return loss, rewards

    return preference_loss


def _without_lengths(original: Any) -> Any:
    return lambda config, policy, reference, lengths: original(
        config, policy, reference, jnp.ones_like(lengths)
    )


def _whole_margin(original: Any) -> Any:
    """IPO's target is 1 / beta instead of 1 / (2 beta)."""

    def preference_loss(config, *rest):
        loss, rewards = original(config, *rest)
        if config.loss == "ipo":
            loss, _ = original(dataclasses.replace(config, beta=config.beta / 2), *rest)
        return loss, rewards

    return preference_loss


def _mean_of_tokens(original: Any) -> Any:
    def answer_log_probs(hidden, weight, bias, targets, mask, *rest):
        return original(hidden, weight, bias, targets, mask, *rest) / mask.sum(1).clamp(min=1)

    return answer_log_probs


def _prompt_counts(original: Any) -> Any:
    def answer_log_probs(hidden, weight, bias, targets, mask, *rest):
        return original(hidden, weight, bias, targets, jnp.ones_like(mask), *rest)

    return answer_log_probs


def _references(move: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """Another reference: move(policy, reference)."""
    return lambda original: (
        lambda config, policy, reference, mask: original(config, policy, move(policy, reference), mask)
    )


def _follows_the_policy(policy: Any, reference: Any) -> Any:
    """The reference's value, and the policy's gradient with it."""
    return reference + policy - jax.lax.stop_gradient(policy)


def _adapter_stays_on(original: Any) -> Any:
    """No factor is set to zero for the reference."""
    return ()


def _reference_is_the_policy(original: Any) -> Any:
    """The reference moves with the weights that are trained."""

    def dpo_task(run, reference=None):
        made = original(run, reference)
        if reference is None:
            return made

        def loss(decoder, params, *rest):
            own = {k: p.detach() for k, p in params.items()}
            with torch.no_grad():
                for k, p in reference.named_parameters():
                    p.copy_(own[k])
            return made.loss(decoder, params, *rest)

        return made._replace(loss=loss)

    return dpo_task


def _own_pairs(original: Any) -> Any:
    """Every micro-batch is divided by its own pairs: a sum of means."""

    def total(run, sums, acts, valid, counts):
        own = counts.loss_tokens / counts.microbatches
        return original(run, sums, acts, valid, counts._replace(loss_tokens=own))

    return total


def _by_sequences(original: Any) -> Any:
    """The loss is divided by the sequences, two to a pair."""

    def pair_counts(*args):
        counts = original(*args)
        return counts._replace(loss_tokens=2 * counts.loss_tokens)

    return pair_counts


def _by_cross_entropy(original: Any) -> Any:
    """Log-probabilities from torch's cross-entropy over whole rows."""

    def answer_log_probs(hidden, weight, bias, targets, mask, *rest):
        logits = hidden @ weight if bias is None else hidden @ weight + bias
        losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        return -(losses * mask).sum(1)

    return answer_log_probs


def _by_softplus(original: Any) -> Any:
    """-log sigmoid(x) as log(1 + exp(-x))."""

    def preference_loss(config, policy, reference, lengths):
        if config.loss == "ipo":
            return original(config, policy, reference, lengths)
        gap = policy - reference
        x, s = config.beta * (gap[:, 0] - gap[:, 1]), config.label_smoothing
        rewards = jax.lax.stop_gradient(config.beta * gap)
        return (1 - s) * jax.nn.softplus(-x) + s * jax.nn.softplus(x), rewards

    return preference_loss


ROWS = "jaxlm.data.tune_batches.lay_out"
JAX_DPO, TORCH_DPO = "jaxlm.finetune.dpo", "torchref.finetune.dpo"

_EXAMPLES = (
    ("loss mask shifted by one", ROWS, _carries(lambda x: np.roll(x, 1)), "padded loss_mask"),
    ("the prompt carries loss", ROWS, _carries(np.ones_like), "padded loss_mask"),
    ("loss where examples meet", ROWS, _rows(_border_carries), "packed loss_mask"),
    ("inputs as targets", ROWS, _rows(lambda b: {"targets": b["inputs"]}), "padded targets"),
    ("positions not restarted", ROWS, _rows(_places_in_row), "packed positions"),
    (
        "one segment for a whole row",
        ROWS,
        _rows(lambda b: {"segments": np.minimum(b["segments"], 1)}),
        "packed segments",
    ),
    (
        "segments ignored in training",
        "torchref.finetune.sft.pretraining",
        _without("segments"),
        "cross_entropy",
    ),
)
# Of the first kind that shows it: its adapter, its loss, its reference.
_PREFERENCES = (
    ("rejected answers preferred", f"{TORCH_DPO}.preference_loss", _answers_exchanged, "adapter_off loss"),
    ("beta lost", f"{JAX_DPO}.preference_loss", _as_if(beta=1.0), "adapter_off rewards/chosen"),
    ("labels not smoothed", f"{JAX_DPO}.preference_loss", _as_if(label_smoothing=0.0), "adapter_off loss"),
    ("ipo of sums", f"{JAX_DPO}.preference_loss", _without_lengths, "frozen loss"),
    ("ipo's margin doubled", f"{TORCH_DPO}.preference_loss", _whole_margin, "frozen loss"),
    (
        "mean over an answer's tokens",
        f"{TORCH_DPO}.answer_log_probs",
        _mean_of_tokens,
        "adapter_off logps/chosen",
    ),
    (
        "the prompt's tokens summed too",
        f"{JAX_DPO}.answer_log_probs",
        _prompt_counts,
        "adapter_off logps/chosen",
    ),
    (
        "reference of the other answer",
        f"{JAX_DPO}._sums",
        _references(lambda policy, reference: reference[:, ::-1]),
        "adapter_off rewards/chosen",
    ),
    (
        "no reference",
        f"{TORCH_DPO}._sums",
        _references(lambda policy, reference: torch.zeros_like(reference)),
        "adapter_off rewards/chosen",
    ),
    # The value is right; the gradients of both answers cancel.
    (
        "gradient through the reference",
        f"{JAX_DPO}._sums",
        _references(_follows_the_policy),
        "mlp.down_proj.weight.lora_a",
    ),
    (
        "adapter left on in the reference",
        f"{TORCH_DPO}.FACTORS",
        _adapter_stays_on,
        "adapter_off rewards/chosen",
    ),
    (
        "reference moves with the policy",
        f"{TORCH_DPO}.dpo_task",
        _reference_is_the_policy,
        "frozen rewards/chosen",
    ),
    ("own pairs of each micro-batch", f"{TORCH_DPO}._total", _own_pairs, "frozen logps/chosen"),
    ("divided by sequences", f"{JAX_DPO}.pair_counts", _by_sequences, "adapter_off logps/chosen"),
)
FAULTS = (
    *(
        Fault(name, "examples", target, change, "sft", operation, rungs=("sft",))
        for name, target, change, operation in _EXAMPLES
    ),
    *(
        Fault(name, "preferences", target, change, "dpo", operation, rungs=("dpo",))
        for name, target, change, operation in _PREFERENCES
    ),
)
REWRITES = (
    Rewrite(
        "positions counted along the row",
        "torchref.finetune.sft.pretraining",
        _without("positions"),
        rungs=("sft",),
    ),
    Rewrite("answers by cross-entropy", f"{TORCH_DPO}.answer_log_probs", _by_cross_entropy, rungs=("dpo",)),
    Rewrite("-log sigmoid as softplus", f"{JAX_DPO}.preference_loss", _by_softplus, rungs=("dpo",)),
)
