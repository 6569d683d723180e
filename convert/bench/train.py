"""Training steps: the real step of jaxlm beside PyTorch's of the same work, compiled and eager.

Sides of PyTorch: `compile` casts the weights once per step, as torchref does, and compiles forward and loss; with
`autocast` that is torch's own; `eager` compiles nothing. Then, of a mixture, `grouped` or `loop` experts. All clip by
the global norm and step with fused AdamW at the same learning rates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from convert.bench import torch_parts
from convert.bench.cases import Case
from convert.bench.results import OURS
from convert.bench.side import Side
from jaxlm.config import RunConfig
from jaxlm.optim import as_arrays, scalars
from jaxlm.train import init_state, make_train_step, place_batch
from torchref.loss import Counts, TokenLoss, total_loss
from torchref.optim import learning_rate, make_optimizer
from torchref.train import _Caller, _head, _under, cast_params

STEPS = 3  # whose losses are compared


def make(case: Case, name: str, steps: int = STEPS) -> Side:
    """A side of a training case; its trace is the losses of the first `steps`."""
    run = case.run
    assert run is not None
    return _ours(run, steps) if name == OURS else _theirs(run, name.partition(":")[2], steps)


def batch_of(run: RunConfig) -> dict[str, np.ndarray]:
    """One batch of random ids, the same for both."""
    shape = (run.train.batch_size, run.train.seq_len + 1)
    ids = np.random.default_rng(0).integers(0, run.model.vocab_size, shape, dtype=np.int32)
    mask = np.ones((shape[0], shape[1] - 1), np.float32)
    return {"inputs": ids[:, :-1].copy(), "targets": ids[:, 1:].copy(), "loss_mask": mask}


def _ours(run: RunConfig, compared: int) -> Side:
    state, step, batch = init_state(run), make_train_step(run), place_batch(batch_of(run))
    held: dict[str, Any] = {"state": state}
    del state  # donated at every step
    losses: list[Any] = []

    def steps(n: int) -> None:
        metrics: dict[str, Any] = {}
        for _ in range(n):
            now = as_arrays(scalars(run.optim, len(losses)), np.float32)
            held["state"], metrics = step(held["state"], batch, now)
            losses.append(metrics["total_loss"])
        jax.block_until_ready((held["state"].params, metrics))

    def trace() -> list[float]:
        steps(max(0, compared - len(losses)))
        return [float(loss) for loss in losses[:compared]]

    return Side(steps, trace)


def _theirs(run: RunConfig, how: str, compared: int) -> Side:
    words = set(how.split("-"))
    stepper = _Stepper(run, words)
    losses: list[Tensor] = []

    def steps(n: int) -> None:
        with torch_parts.attention_kernels():
            for _ in range(n):
                losses.append(stepper(len(losses)))
        torch_parts.wait()

    def trace() -> list[float]:
        steps(max(0, compared - len(losses)))
        return [float(loss) for loss in losses[:compared]]

    return Side(steps, trace)


class _Stepper:
    """One step of PyTorch at a time; words: compile or eager, autocast, grouped or loop."""

    def __init__(self, run: RunConfig, words: set[str]):
        self.run, self.dtype = run, getattr(torch, run.train.dtype)
        self.autocast = "autocast" in words
        # jaxlm draws the weights; on a GPU they go over without a copy on the host.
        params = jax.jit(lambda: _initial(run))()
        self.model = torch_parts.twin(run.model, params, "grouped" if "grouped" in words else "loop")
        for leaf in params.values():
            leaf.delete()
        place = torch_parts.device()
        self.batch = {
            k: torch.from_numpy(v).to(place, torch.long if v.dtype.kind in "iu" else None)
            for k, v in batch_of(run).items()
        }
        # What make_optimizer would decay, with torch's fused kernel also on the CPU.
        groups = make_optimizer(run.optim, self.model).param_groups
        kept = [{k: g[k] for k in ("params", "weight_decay")} for g in groups]
        optim = run.optim
        self.optimizer = torch.optim.AdamW(
            kept, lr=optim.lr, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True
        )
        self.parameters = list(self.model.parameters())
        self.many = batch_of(run)["inputs"].size * run.model.vocab_size > torch_parts.FULL_LOGITS
        compiled = "compile" in words
        if compiled and run.model.moe.n_experts and not (self.dtype == torch.bfloat16 and "grouped" in words):
            for block in self.model.blocks:
                if block.moe is not None:
                    layer: Any = block.moe
                    torch_parts.outside_of_graphs(layer.experts)
        forward = self._hidden if self.many else self._loss
        self.forward = torch.compile(forward, dynamic=False) if compiled else forward

    def __call__(self, index: int) -> Tensor:
        """Step number `index`: its loss before the update."""
        with torch.autocast(torch_parts.device().type, self.dtype, enabled=self.autocast):
            if self.many:
                hidden, weight, rest = self.forward()
                tokens = torch_parts.head_loss(hidden, weight, self.batch["targets"], self.batch["loss_mask"])
                loss = tokens / self.batch["loss_mask"].sum() + rest
            else:
                loss = self.forward()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.run.optim, index)
        if self.run.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.run.optim.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _hidden(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and head [V, D] in the dtype of the computation, and the loss's terms beside the tokens'."""
        params: dict[str, Tensor] = dict(self.model.named_parameters())
        params = params if self.autocast else cast_params(params, self.dtype)
        ids = self.batch["inputs"]
        hidden, acts, _ = torch.func.functional_call(
            _Caller(self.model), _under(params), (ids,), {"method": "hidden", "train": True}
        )
        zero = torch.zeros((), device=ids.device)
        count = self.batch["loss_mask"].sum()
        counts = Counts(count, torch.full_like(count, ids.numel()), 1)
        valid = torch.ones_like(ids, dtype=torch.bool)
        rest = total_loss(self.run.model, TokenLoss(zero, zero, zero, zero), acts, valid, counts).total
        return hidden.to(self.dtype), _head(self.model, params)[0].T.to(self.dtype), rest

    def _loss(self) -> Tensor:
        hidden, weight, rest = self._hidden()
        tokens = torch_parts.head_loss(hidden, weight, self.batch["targets"], self.batch["loss_mask"])
        return tokens / self.batch["loss_mask"].sum() + rest


def _initial(run: RunConfig) -> dict[str, jax.Array]:
    from jaxlm.model import init_params

    return init_params(run.model, run.train.seed, jnp.dtype(run.train.param_dtype))
