"""The training step, eager. Same public names: jaxlm/train.py.

    state, metrics = step(state, batch, scalars)

A batch is a dict of arrays [B, T]: inputs, targets, loss_mask, and optionally segments, positions and
expert_ids [B, T, L, A] (a routing to replay). Micro-batch m of
M holds rows m, m+M, m+2M, ...
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jaxlm.config import ModelConfig, RunConfig
from torchref.layers import Backends
from torchref.loss import Counts, chunked_token_loss, total_loss
from torchref.model import Decoder
from torchref.optim import Scalars, clip_scale, global_norm, make_optimizer

Batch = dict[str, Tensor]
Params = dict[str, Tensor]
KEPT_WIDE = (
    "norm.weight",
    "router.weight",
)  # parameters that half-precision runs compute with in master precision


class TrainState(NamedTuple):
    """Everything a step changes; unlike jaxlm's, it is changed in place."""

    step: int  # optimizer steps done
    model: Decoder  # master weights
    optimizer: torch.optim.AdamW
    seed: int  # dropout's; the generator of a step is seeded from it and the step


def cast_params(params: Params, dtype: torch.dtype) -> Params:
    """One copy in the dtype of the computation; norms and the router stay in master precision."""
    return {k: v if k.endswith(KEPT_WIDE) else v.to(dtype) for k, v in params.items()}


def init_state(
    run: RunConfig, device: torch.device | str = "cpu", backends: Backends = Backends()
) -> TrainState:
    """A fresh state from the run's seed."""
    generator = torch.Generator().manual_seed(run.train.seed)
    dtype = getattr(torch, run.train.param_dtype)
    model = Decoder(run.model, backends, rngs=generator, dtype=dtype, remat=run.train.remat).to(device)
    return TrainState(0, model, make_optimizer(run.optim, model), run.train.seed)


def loss_and_metrics(
    model: ModelConfig,
    z_loss_coef: float,
    decoder: Decoder,
    params: Params,
    batch: Batch,
    counts: Counts,
    train: bool,
    key: torch.Generator | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch and what a run wants to know about it."""
    segments = batch.get("segments")
    arguments = (batch["inputs"], batch.get("positions"), segments)
    call = {"method": "hidden", "train": train, "key": key, "expert_ids": batch.get("expert_ids")}
    hidden, acts, _ = torch.func.functional_call(_Caller(decoder), _under(params), arguments, call)
    tokens = chunked_token_loss(hidden, *_head(decoder, params), batch["targets"], batch["loss_mask"])
    valid = torch.ones_like(batch["inputs"], dtype=torch.bool) if segments is None else segments > 0
    terms = total_loss(model, z_loss_coef, tokens, acts, valid, counts)
    metrics = {
        "loss": terms.cross_entropy,
        "z": terms.z,
        "balance": terms.balance,
        "router_z": terms.router_z,
    }
    return terms.total, metrics | expert_metrics(model, acts, valid, counts)


class _Caller(torch.nn.Module):
    """Lets `functional_call` reach a method other than forward."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, *args: Any, method: str, **kwargs: Any) -> Any:
        return getattr(self.decoder, method)(*args, **kwargs)


def _under(params: Params) -> Params:
    return {f"decoder.{path}": value for path, value in params.items()}


def _head(decoder: Decoder, params: Params) -> tuple[Tensor, Tensor | None]:
    if decoder.lm_head is None:
        return params["embed.weight"].T, params.get("head_bias")
    return params["lm_head.weight"].T, params.get("lm_head.bias")


def expert_metrics(
    model: ModelConfig, acts: dict[str, Tensor], valid: Tensor, counts: Counts
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


def batch_counts(batch: Batch, microbatches: int) -> Counts:
    """What the loss divides by, over the whole batch; at least one, so that an all-masked batch gives zero."""
    valid = (batch["segments"] > 0).sum() if "segments" in batch else torch.tensor(batch["inputs"].numel())
    dtype = batch["loss_mask"].dtype
    return Counts(batch["loss_mask"].sum().clamp(min=1), valid.clamp(min=1).to(dtype), microbatches)


def make_gradient_fn(run: RunConfig) -> Callable[..., tuple[Params, dict[str, Tensor]]]:
    """(decoder, batch, key) -> gradients and metrics of the whole batch, accumulated over micro-batches."""
    dtype, M = getattr(torch, run.train.dtype), run.train.accumulation

    def gradients(
        decoder: Decoder, batch: Batch, key: torch.Generator | None = None
    ) -> tuple[Params, dict[str, Tensor]]:
        wide = torch.promote_types(dtype, torch.float32)
        batch = batch | {"loss_mask": batch["loss_mask"].to(wide)}
        counts = batch_counts(batch, M)
        params: Params = dict(decoder.named_parameters())
        grads: Params = {}
        metrics: dict[str, Tensor] = {}
        for m in range(M):
            rows = {k: v[m::M] for k, v in batch.items()}
            cast = cast_params(params, dtype)
            total, part = loss_and_metrics(
                run.model, run.optim.z_loss_coef, decoder, cast, rows, counts, True, key
            )
            found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
            for (path, p), g in zip(params.items(), found, strict=True):
                g = torch.zeros_like(p) if g is None else g
                grads[path] = grads[path] + g if path in grads else g
            for name, value in (part | {"total_loss": total}).items():
                metrics[name] = metrics.get(name, 0) + value.detach()
        return grads, metrics

    return gradients


def make_train_step(
    run: RunConfig,
) -> Callable[[TrainState, Batch, Scalars], tuple[TrainState, dict[str, Tensor]]]:
    """The step. Of the scalars it takes the learning rate; torch.optim derives the rest."""
    gradients = make_gradient_fn(run)

    def step(state: TrainState, batch: Batch, scalars: Scalars) -> tuple[TrainState, dict[str, Tensor]]:
        device = next(state.model.parameters()).device
        key = None
        if run.model.dropout:
            key = torch.Generator(device).manual_seed(state.seed * 1_000_003 + state.step)
        grads, metrics = gradients(state.model, batch, key)
        norm = global_norm(grads.values())
        scale = clip_scale(norm, run.optim.clip_norm)
        for path, parameter in state.model.named_parameters():
            parameter.grad = grads[path] * scale.to(grads[path].dtype)
        for group in state.optimizer.param_groups:
            group["lr"] = float(scalars.lr)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        metrics |= {
            "grad_norm": norm,
            "clip_scale": scale,
            "lr": torch.tensor(float(scalars.lr), dtype=torch.float64),
        }
        return state._replace(step=state.step + 1), metrics

    return step


def make_eval_step(run: RunConfig) -> Callable[[Decoder, Batch], dict[str, Tensor]]:
    """(decoder, batch) -> summed cross-entropy and loss-carrying tokens of one batch, nothing dropped, no dropout."""
    dtype = getattr(torch, run.train.dtype)

    @torch.no_grad()
    def evaluate(decoder: Decoder, batch: Batch) -> dict[str, Tensor]:
        cast = cast_params(dict(decoder.named_parameters()), dtype)
        arguments = (batch["inputs"], batch.get("positions"), batch.get("segments"))
        hidden, _, _ = torch.func.functional_call(
            _Caller(decoder), _under(cast), arguments, {"method": "hidden"}
        )
        tokens = chunked_token_loss(hidden, *_head(decoder, cast), batch["targets"], batch["loss_mask"])
        return {"loss_sum": tokens.cross_entropy, "tokens": batch["loss_mask"].sum()}

    return evaluate


def place_batch(batch: dict[str, np.ndarray], device: torch.device | str = "cpu") -> Batch:
    """Puts a host batch on the device; ids become int64, as torch's lookups want them."""
    return {
        k: torch.from_numpy(np.ascontiguousarray(v)).to(device, torch.long if v.dtype.kind in "iu" else None)
        for k, v in batch.items()
    }
