"""Direct preference optimisation: a policy learns which of two answers is better. Twin: jaxlm/finetune/dpo.py.

    l = log p(answer | prompt), summed over the answer's tokens;  d = l - l of the reference
    sigmoid   -(1 - s) log sigmoid(beta (d_c - d_r)) - s log sigmoid(beta (d_r - d_c))
    ipo       (d_c / n_c - d_r / n_r - 1 / (2 beta))^2

c is the chosen answer, r the rejected one, n the number of an answer's tokens. Sources: sigmoid arXiv:2305.18290, eq.
7, with label smoothing s as conservative DPO has it (Mitchell 2023); ipo arXiv:2310.12036, eq. 17, of log-probabilities
per token as TRL takes them, which its authors confirmed. A batch is that of torchref/train.py with two sequences a row:
arrays are [B, 2, T], the chosen answer first, and `reference` [B, 2] holds l of the reference where it is stored.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from jaxlm.adapter_config import FACTORS
from jaxlm.tune_config import DpoConfig, TuneRun
from torchref.finetune.lora import set_key
from torchref.layers import upcast
from torchref.loss import CHUNK_LOGITS, Counts, TokenLoss, total_loss
from torchref.model import Decoder
from torchref.shapes import Float, Int
from torchref.train import Batch, Params, Task, batch_counts, cast_params, place_batch
from torchref.vitals import expert_metrics, router_entropy


def answer_log_probs(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D V"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, "B T"],
    mask: Float[Tensor, "B T"],
    chunk_logits: int | None = None,
) -> Float[Tensor, " B"]:
    """Log-probabilities in nats, upcast, summed over each row's tokens with weight `mask`.

    The head is applied to chunks of T, in the backward pass again; one chunk where all logits are small.
    """
    B, T, _ = hidden.shape
    length = max(1, min(T, (chunk_logits or CHUNK_LOGITS) // (B * weight.shape[1])))
    if length == T:
        log_probs = _of_tokens(hidden, weight, bias, targets)
    else:
        parts = [
            checkpoint(_of_tokens, x, weight, bias, y, use_reentrant=False)
            for x, y in zip(hidden.split(length, 1), targets.split(length, 1), strict=True)
        ]
        log_probs = torch.cat(parts, 1)
    return (log_probs * mask.to(log_probs.dtype)).sum(1)


def _of_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = hidden @ weight.to(hidden.dtype)
    wide = upcast(logits if bias is None else logits + bias.to(hidden.dtype))
    return wide.log_softmax(-1).gather(-1, targets.long()[..., None])[..., 0]


def preference_loss(
    config: DpoConfig,
    policy: Float[Tensor, "B 2"],
    reference: Float[Tensor, "B 2"],
    lengths: Float[Tensor, "B 2"],
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B 2"]]:
    """Loss of each pair, and the rewards beta (l - l of the reference), which carry no gradient.

    policy, reference: summed log-probabilities of the answers, chosen first; lengths: tokens of the answers, of which
    only ipo knows.
    """
    chosen, rejected = (policy - reference).unbind(1)
    rewards = config.beta * (policy - reference).detach()
    if config.loss == "ipo":
        n_chosen, n_rejected = lengths.clamp(min=1).unbind(1)
        return (chosen / n_chosen - rejected / n_rejected - 1 / (2 * config.beta)).square(), rewards
    logits, flipped = config.beta * (chosen - rejected), config.label_smoothing
    return -(1 - flipped) * logsigmoid(logits) - flipped * logsigmoid(-logits), rewards


def pair_counts(batch: Batch, microbatches: int) -> Counts:
    """What the loss of a batch of pairs divides by: `loss_tokens` is the number of pairs that carry loss."""
    counts = batch_counts(batch, microbatches)
    return counts._replace(loss_tokens=_real(batch["loss_mask"]).sum().clamp(min=1))


def _real(mask: Tensor) -> Tensor:
    """[B]: 1 for a pair, 0 for what fills a batch up."""
    return (mask > 0).flatten(1).any(1).to(mask.dtype)


def dpo_task(run: TuneRun, reference: Decoder | None = None) -> Task:
    """All weights where the run has no adapter, else the factors; the loss is the mean over the pairs of a batch.

    The reference is the decoder without its adapter (adapter_off, and frozen with an adapter), the decoder `reference`
    (frozen, without an adapter), or what the batch stores. It is computed without dropout, gradient or capacity limit;
    the policy as in any training.

    Balance and router z terms of MoE models are those of the policy's tokens with the model's own coefficients, as in
    any training; there is no z-loss of the head. The accuracy is the share of pairs whose chosen answer has the larger
    reward, which a tie has not. Evaluation sums the preference loss alone, and its `tokens` are pairs.
    """
    adapter, stored = run.tune.adapter, run.tune.reference == "stored"

    def references(decoder: Decoder, params: Params, batch: Batch) -> Tensor:
        if stored:
            return batch["reference"]
        with torch.no_grad():
            if adapter is not None:  # an adapter whose factors are zero changes nothing
                zeros = {k: torch.zeros_like(p) for k, p in params.items() if k.endswith(FACTORS)}
                return _answers(decoder, params | zeros, batch)[0]
            assert reference is not None, "a frozen reference has to be given"
            own = cast_params(dict(reference.named_parameters()), getattr(torch, run.train.dtype))
            return _answers(reference, own, batch)[0]

    def loss(
        decoder: Decoder,
        params: Params,
        batch: Batch,
        counts: Counts,
        train: bool,
        key: torch.Generator | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        fixed = references(decoder, params, batch)
        policy, acts = _answers(decoder, params, batch, train, key)
        sums = _sums(run.tune.dpo, policy, fixed, batch["loss_mask"])
        return _total(run, sums, acts, _valid(batch), counts)

    def evaluate(decoder: Decoder, params: Params, batch: Batch) -> dict[str, Tensor]:
        policy, _ = _answers(decoder, params, batch)
        sums = _sums(run.tune.dpo, policy, references(decoder, params, batch), batch["loss_mask"])
        return {"loss_sum": sums.pop("loss"), "tokens": _real(batch["loss_mask"]).sum(), **sums}

    draws = bool(run.model.dropout or (adapter and adapter.dropout))
    return Task(loss, evaluate, draws, pair_counts)


class _Scorer(nn.Module):
    """Lets `functional_call` reach hidden states and head under the same parameters."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
        hidden, acts, _ = self.decoder.hidden(*args, **kwargs)
        return hidden, acts, *self.decoder.head()


def _answers(
    decoder: Decoder, params: Params, batch: Batch, train: bool = False, key: torch.Generator | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed log-probabilities [B, 2] of the answers and the activations of the 2B sequences."""
    set_key(decoder, key)
    rows = {name: x.flatten(0, 1) for name, x in batch.items() if name != "reference"}
    under = {f"decoder.{path}": value for path, value in params.items()}
    arguments = (rows["inputs"], rows.get("positions"), rows.get("segments"))
    call = {"train": train, "key": key, "expert_ids": rows.get("expert_ids")}
    hidden, acts, weight, bias = torch.func.functional_call(_Scorer(decoder), under, arguments, call)
    sums = answer_log_probs(hidden, weight, bias, rows["targets"], rows["loss_mask"])
    return sums.unflatten(0, (-1, 2)), acts


def _valid(batch: Batch) -> Tensor:
    """Tokens of the 2B sequences that are no padding."""
    inputs = batch["inputs"]
    valid = batch["segments"] > 0 if "segments" in batch else torch.ones_like(inputs, dtype=torch.bool)
    return valid.flatten(0, 1)


def _sums(config: DpoConfig, policy: Tensor, reference: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Loss and what goes with it, summed over the pairs of a batch."""
    mask = mask.to(policy.dtype)
    loss, rewards = preference_loss(config, policy, reference.to(policy.dtype), mask.sum(-1))
    margin, log_probs = rewards[:, 0] - rewards[:, 1], policy.detach()
    values = {
        "loss": loss,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margin": margin,
        "rewards/accuracy": (margin > 0).to(margin.dtype),
        "logps/chosen": log_probs[:, 0],
        "logps/rejected": log_probs[:, 1],
    }
    return {name: (value * _real(mask)).sum() for name, value in values.items()}


def _total(
    run: TuneRun, sums: dict[str, Tensor], acts: dict[str, Tensor], valid: Tensor, counts: Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch and its metrics, which add up to those of the batch."""
    loss, zero = sums["loss"], torch.zeros_like(sums["loss"])
    terms = total_loss(run.model, TokenLoss(loss, loss, zero, zero), acts, valid, counts)
    metrics = {name: value.detach() / counts.loss_tokens for name, value in sums.items()}
    metrics |= {"balance": terms.balance, "router_z": terms.router_z, "total_loss": terms.total}
    metrics |= expert_metrics(run.model, acts, valid, counts)
    if run.log.details:
        metrics |= router_entropy(run.model, acts, valid, counts)
    return terms.total, metrics


@torch.no_grad()
def reference_log_probs(
    run: TuneRun,
    reference: Decoder,
    batches: Iterable[dict[str, np.ndarray]],
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n 2"]:
    """What a batch stores as `reference`, of the pairs of all batches in their order; no rows for what fills one up.

    reference: the run's base without an adapter; it is used in train.dtype. progress: is told the number of pairs after
    every batch.
    """
    weights: Params = dict(reference.named_parameters())
    device, dtype = next(iter(weights.values())).device, getattr(torch, run.train.dtype)
    cast = cast_params(weights, dtype)
    found: list[np.ndarray] = []
    pairs = 0
    for batch in batches:
        batch = {name: x for name, x in batch.items() if name != "reference"}
        values = _answers(reference, cast, place_batch(batch, device))[0]
        found.append(values.cpu().numpy()[(batch["loss_mask"] > 0).any((1, 2))])
        pairs += len(found[-1])
        if progress is not None:
            progress(pairs)
    return np.concatenate(found)
