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
from torch import Tensor

from jaxlm.config import RunConfig
from torchref.guard import Guard, guard_metrics, init_guard, judge, next_guard
from torchref.layers import Backends
from torchref.loss import Counts, chunked_token_loss, total_loss
from torchref.model import Decoder
from torchref.optim import Scalars, clip_scale, global_norm, make_optimizer
from torchref.vitals import expert_metrics, norms, router_entropy

Batch = dict[str, Tensor]
Params = dict[str, Tensor]
# Parameters that half-precision runs compute with in master precision.
KEPT_WIDE = ("norm.weight", "router.weight", "router.weight.lora_a", "router.weight.lora_b")


class TrainState(NamedTuple):
    """Everything a step changes; unlike jaxlm's, it is changed in place."""

    step: int  # optimizer steps done, skipped updates among them
    model: Decoder  # master weights
    optimizer: torch.optim.Optimizer
    seed: int  # dropout's; the generator of a step is seeded from it and the step
    guard: Guard  # what was skipped, and what spikes are judged by


class Task(NamedTuple):
    """What is trained, and towards what: pretraining, fine-tuning, adapters and preferences differ in this alone.

    What is trained are the parameters of the decoder that require a gradient.
    """

    # (decoder, params, batch, counts, train, key) -> loss and metrics of one micro-batch, which add up to the batch's;
    # params: all of the decoder's, those that are trained in the dtype of the computation
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    evaluate: Callable[
        [Decoder, Params, Batch], dict[str, Tensor]
    ]  # sums over a batch: loss_sum, tokens, others
    draws: bool  # whether training drops out anything
    # (batch, micro-batches) -> what the loss of the whole batch divides by; None = batch_counts
    count: Callable[[Batch, int], Counts] | None = None


def pretraining(run: RunConfig) -> Task:
    """All weights of a decoder, towards the next token; the tokens that carry loss say of what."""

    def loss(
        decoder: Decoder,
        params: Params,
        batch: Batch,
        counts: Counts,
        train: bool,
        key: torch.Generator | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_and_metrics(run, decoder, params, batch, counts, train, key)

    return Task(loss, evaluation, bool(run.model.dropout))


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
    return TrainState(0, model, make_optimizer(run.optim, model), run.train.seed, init_guard(run))


def loss_and_metrics(
    run: RunConfig,
    decoder: Decoder,
    params: Params,
    batch: Batch,
    counts: Counts,
    train: bool,
    key: torch.Generator | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch and what a run wants to know about it; metrics add up to those of the batch."""
    model, details = run.model, run.log.details
    segments = batch.get("segments")
    arguments = (batch["inputs"], batch.get("positions"), segments)
    call = {"method": "hidden", "train": train, "key": key, "expert_ids": batch.get("expert_ids")}
    hidden, acts, _ = torch.func.functional_call(_Caller(decoder), _under(params), arguments, call)
    weight, bias = _head(decoder, params)
    targets, mask, z_coef = batch["targets"], batch["loss_mask"], run.optim.z_loss_coef
    tokens = chunked_token_loss(hidden, weight, bias, targets, mask, z_coef=z_coef, entropy=details)
    valid = torch.ones_like(batch["inputs"], dtype=torch.bool) if segments is None else segments > 0
    terms = total_loss(model, tokens, acts, valid, counts)
    metrics = {
        "loss": terms.cross_entropy,
        "z": terms.z,
        "balance": terms.balance,
        "router_z": terms.router_z,
        "total_loss": terms.total,
    }
    metrics |= expert_metrics(model, acts, valid, counts)
    if details:
        metrics |= {"logit_entropy": tokens.entropy / counts.loss_tokens}
        metrics |= router_entropy(model, acts, valid, counts)
    return terms.total, metrics


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
    """The head's weight and bias made of these parameters."""
    return torch.func.functional_call(_Caller(decoder), _under(params), (), {"method": "head"})


def batch_counts(batch: Batch, microbatches: int) -> Counts:
    """What the loss divides by, over the whole batch; at least one, so that an all-masked batch gives zero."""
    valid = (batch["segments"] > 0).sum() if "segments" in batch else torch.tensor(batch["inputs"].numel())
    dtype = batch["loss_mask"].dtype
    return Counts(batch["loss_mask"].sum().clamp(min=1), valid.clamp(min=1).to(dtype), microbatches)


def make_gradient_fn(
    run: RunConfig, task: Task | None = None
) -> Callable[..., tuple[Params, dict[str, Tensor]]]:
    """(decoder, batch, key, loss_scale) -> gradients and metrics of the whole batch, accumulated over micro-batches.

    Gradients are those of the parameters that require one. task: what the loss is; None = pretraining.

    With a loss scale, the loss is multiplied and the gradients are divided by it; the metrics are as without.
    """
    task = pretraining(run) if task is None else task
    loss, dtype, M = task.loss, getattr(torch, run.train.dtype), run.train.accumulation

    def gradients(
        decoder: Decoder, batch: Batch, key: torch.Generator | None = None, loss_scale: float | None = None
    ) -> tuple[Params, dict[str, Tensor]]:
        wide = torch.promote_types(dtype, torch.float32)
        batch = batch | {"loss_mask": batch["loss_mask"].to(wide)}
        counts = (task.count or batch_counts)(batch, M)
        params: Params = dict(decoder.named_parameters())
        trained = {path: p for path, p in params.items() if p.requires_grad}
        grads: Params = {}
        metrics: dict[str, Tensor] = {}
        for m in range(M):
            rows = {k: v[m::M] for k, v in batch.items()}
            total, part = loss(decoder, params | cast_params(trained, dtype), rows, counts, True, key)
            scaled = total if loss_scale is None else total * loss_scale
            found = torch.autograd.grad(scaled, list(trained.values()), allow_unused=True)
            for (path, p), g in zip(trained.items(), found, strict=True):
                g = torch.zeros_like(p) if g is None else g
                grads[path] = grads[path] + g if path in grads else g
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0) + value.detach()
        if loss_scale is not None:
            grads = {path: _unscaled(g, loss_scale) for path, g in grads.items()}
        return grads, metrics

    return gradients


def _unscaled(grad: Tensor, scale: float) -> Tensor:
    return (grad.to(torch.promote_types(grad.dtype, torch.float32)) / scale).to(grad.dtype)


def make_train_step(
    run: RunConfig, task: Task | None = None
) -> Callable[[TrainState, Batch, Scalars], tuple[TrainState, dict[str, Tensor]]]:
    """The step. Of the scalars it takes the learning rate; torch.optim derives the rest. task: None = pretraining.

    Where `judge` does not accept the batch, the optimizer is not stepped.
    """
    task = pretraining(run) if task is None else task
    gradients = make_gradient_fn(run, task)

    def step(state: TrainState, batch: Batch, scalars: Scalars) -> tuple[TrainState, dict[str, Tensor]]:
        named = {path: p for path, p in state.model.named_parameters() if p.requires_grad}
        key = None
        if task.draws:
            device = next(iter(named.values())).device
            key = torch.Generator(device).manual_seed(state.seed * 1_000_003 + state.step)
        loss_scale = (state.guard.loss_scale,) if run.train.dtype == "float16" else ()
        grads, metrics = gradients(state.model, batch, key, *loss_scale)
        norm, loss = global_norm(grads.values()), metrics["total_loss"]
        scale = clip_scale(norm, run.optim.clip_norm)
        verdict = judge(run.train, state.guard, loss, norm)
        before = {path: p.detach().clone() for path, p in named.items()} if run.log.details else {}
        for group in state.optimizer.param_groups:
            group["lr"] = float(scalars.lr)
        if verdict.accepted:
            for path, parameter in named.items():
                parameter.grad = grads[path] * scale.to(grads[path].dtype)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
        guard = next_guard(run.train, state.guard, verdict, loss, norm)
        metrics |= {
            "grad_norm": norm,
            "clip_scale": scale,
            "lr": torch.tensor(float(scalars.lr), dtype=torch.float64),
        }
        metrics |= guard_metrics(run.train, guard, verdict)
        if run.log.details:
            metrics |= norms(grads, before, named)
        return state._replace(step=state.step + 1, guard=guard), metrics

    return step


def evaluation(decoder: Decoder, params: Params, batch: Batch) -> dict[str, Tensor]:
    """Summed cross-entropy and loss-carrying tokens of one batch, nothing dropped, no dropout."""
    arguments = (batch["inputs"], batch.get("positions"), batch.get("segments"))
    hidden, _, _ = torch.func.functional_call(
        _Caller(decoder), _under(params), arguments, {"method": "hidden"}
    )
    tokens = chunked_token_loss(hidden, *_head(decoder, params), batch["targets"], batch["loss_mask"])
    return {"loss_sum": tokens.cross_entropy, "tokens": batch["loss_mask"].sum()}


def make_eval_step(run: RunConfig, task: Task | None = None) -> Callable[[Decoder, Batch], dict[str, Tensor]]:
    """(decoder, batch) -> the task's sums over one batch, nothing dropped, no dropout."""
    own, dtype = (pretraining(run) if task is None else task).evaluate, getattr(torch, run.train.dtype)

    @torch.no_grad()
    def evaluate(decoder: Decoder, batch: Batch) -> dict[str, Tensor]:
        params: Params = dict(decoder.named_parameters())
        trained = {path: p for path, p in params.items() if p.requires_grad}
        return own(decoder, params | cast_params(trained, dtype), batch)

    return evaluate


def place_batch(batch: dict[str, np.ndarray], device: torch.device | str = "cpu") -> Batch:
    """Puts a host batch on the device; ids become int64, as torch's lookups want them."""
    return {
        k: torch.from_numpy(np.ascontiguousarray(v)).to(device, torch.long if v.dtype.kind in "iu" else None)
        for k, v in batch.items()
    }
