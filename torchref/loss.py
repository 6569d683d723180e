"""The training loss. Twin: jaxlm/loss.py.

    total = CE + z_loss_coef * Z + balance_coef * balance + router_z_coef * router_z

CE and Z are means over the tokens that carry loss; the head is applied chunk by chunk along T, so that the logits of
all tokens never exist at once. Under accumulation CE, Z and router_z are sums over the global count, which makes them
equal to the full batch; the balance loss is a product of means, taken per micro-batch and averaged.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jaxlm.config import ModelConfig
from torchref.layers import upcast
from torchref.moe import balance_loss, router_z_sum
from torchref.shapes import Bool, Float, Int

CHUNK_LOGITS = 2**26  # logits of one chunk: 256 MB in float32


class TokenLoss(NamedTuple):
    """Sums over tokens, weighted by the loss mask. Only `loss` carries a gradient."""

    loss: Float[Tensor, ""]  # cross_entropy + z_coef * z
    cross_entropy: Float[Tensor, ""]
    z: Float[Tensor, ""]
    entropy: Float[Tensor, ""]  # of the softmax, in nats; zero unless asked for


class Terms(NamedTuple):
    """The parts of the loss, uncoefficiented, and their weighted total."""

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    z: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    router_z: Float[Tensor, ""]


class Counts(NamedTuple):
    """What the sums are divided by: loss-carrying tokens and valid tokens of the whole batch, and micro-batches."""

    loss_tokens: Float[Tensor, ""]
    valid_tokens: Float[Tensor, ""]
    microbatches: int


def token_loss(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D V"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, "B T"],
    mask: Float[Tensor, "B T"],
    z_coef: float = 0.0,
    entropy: bool = False,
) -> TokenLoss:
    """Cross-entropy in nats, logsumexp^2 and, if asked, entropy, summed over tokens with weight `mask`; logits upcast.

    Source of the z term: PaLM, arXiv:2204.02311, section 5.
    """
    logits = hidden @ weight.to(hidden.dtype)
    wide = upcast(logits if bias is None else logits + bias.to(hidden.dtype))
    log_z = wide.logsumexp(-1)
    target_logit = wide.gather(-1, targets.long()[..., None])[..., 0]
    mask = mask.to(wide.dtype)
    spread = _entropy(wide.detach(), log_z.detach()) if entropy else torch.zeros_like(mask)
    cross_entropy, z = ((log_z - target_logit) * mask).sum(), (log_z.square() * mask).sum()
    return TokenLoss(cross_entropy + z_coef * z, cross_entropy.detach(), z.detach(), (spread * mask).sum())


def _entropy(logits: Float[Tensor, "B T V"], log_z: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """H = log Z - sum p x, in nats."""
    return log_z - ((logits - log_z[..., None]).exp() * logits).sum(-1)


def chunked_token_loss(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D V"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, "B T"],
    mask: Float[Tensor, "B T"],
    z_coef: float = 0.0,
    chunk_logits: int | None = None,
    entropy: bool = False,
) -> TokenLoss:
    """`token_loss` over chunks of T, logits recomputed in the backward pass; one chunk where all logits are small."""
    B, T, _ = hidden.shape
    length = max(1, min(T, (chunk_logits or CHUNK_LOGITS) // (B * weight.shape[1])))
    if length == T:
        return token_loss(hidden, weight, bias, targets, mask, z_coef, entropy)
    parts = [
        checkpoint(token_loss, x, weight, bias, y, m, z_coef, entropy, use_reentrant=False)
        for x, y, m in zip(
            hidden.split(length, 1), targets.split(length, 1), mask.split(length, 1), strict=True
        )
    ]
    return TokenLoss(*(torch.stack(terms).sum() for terms in zip(*parts, strict=True)))


def total_loss(
    config: ModelConfig,
    tokens: TokenLoss,
    acts: dict[str, Tensor],
    valid: Bool[Tensor, "B T"],
    counts: Counts,
) -> Terms:
    """All terms of one micro-batch, such that their sums over the micro-batches are the batch's."""
    moe, layers = config.moe, [i for i in range(config.n_layers) if config.is_moe(i)]
    cross_entropy, z = tokens.cross_entropy / counts.loss_tokens, tokens.z / counts.loss_tokens
    total = tokens.loss / counts.loss_tokens
    balance = router_z = torch.zeros_like(total)
    if layers:
        logits = [acts[f"blocks.{i}.moe.router_logits"] for i in layers]
        ids = [acts[f"blocks.{i}.moe.expert_ids"] for i in layers]
        balance = balance_loss(moe.balance, logits, ids, valid) / counts.microbatches
        router_z = router_z_sum(logits, valid) / counts.valid_tokens
        total = total + moe.balance_coef * balance + moe.router_z_coef * router_z
    return Terms(total, cross_entropy, z, balance, router_z)
