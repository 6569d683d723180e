"""Training steps: the real step of jaxlm beside PyTorch's of the same work, compiled and eager.

Sides of PyTorch: `compile` casts the weights once per step, as torchref does, and compiles forward and loss; with
`autocast` that is torch's own; `eager` compiles nothing. Then, of a mixture, `grouped` or `loop` experts. All clip by
the global norm and step with fused AdamW at the same learning rates.

A trace tells of the first steps: their losses, the norm of the first gradient, and of every matrix but the router what
the optimizer's first moment holds after one step (a share of the clipped gradient) and how far it has moved after all,
each norm a part of its own. A router nearly undecided chooses by rounding; its gradient tells little.
"""

from collections.abc import Callable, Mapping
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
from convert.native import adapter_to_torch, pairs
from convert.tree import to_tensor
from jaxlm.config import RunConfig
from jaxlm.finetune.lora import freeze, init_factors
from jaxlm.finetune.tasks import task_of
from jaxlm.optim import AdamState, as_arrays, scalars
from jaxlm.train import init_state, make_train_step, place_batch
from jaxlm.tune_config import TuneRun
from torchref.finetune.lora import adapt
from torchref.finetune.lora import freeze as freeze_twin
from torchref.loss import Counts, TokenLoss, total_loss
from torchref.model import Decoder
from torchref.optim import learning_rate, make_optimizer
from torchref.train import _Caller, _head, _under, cast_params

STEPS = 3  # that are compared
CORNER = 64  # rows and columns of a matrix whose norms stand for it


def make(case: Case, name: str, steps: int = STEPS) -> Side:
    """A side of a training case; its trace tells of the first `steps` steps, of the weights where they are STEPS.

    After many steps roundings have led the weights apart, and only the losses can be compared.
    """
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
    task, batch = task_of(run), place_batch(batch_of(run))
    state, step = init_state(run, task=task), make_train_step(run, task=task)
    frozen = freeze(run, jax.jit(lambda: _initial(run))()) if isinstance(run, TuneRun) else {}
    held: dict[str, Any] = {"state": state}
    before = _corners(state.params)
    del state  # donated at every step
    losses: list[Any] = []
    first: list[Any] = []

    def steps(n: int) -> None:
        metrics: dict[str, Any] = {}
        for _ in range(n):
            now = as_arrays(scalars(run.optim, len(losses)), np.float32)
            held["state"], metrics = step(held["state"], batch, now, frozen)
            losses.append(metrics["total_loss"])
            if not first:
                moments = next(part for part in held["state"].opt_state if isinstance(part, AdamState))
                first.extend((metrics["grad_norm"], _corners(moments.m)))
        jax.block_until_ready((held["state"].params, metrics))

    def trace() -> dict[str, list[float]]:
        steps(max(0, compared - len(losses)))
        told = _told(losses[:compared], first[0])
        if len(losses) == STEPS:
            told |= _moved(before, _corners(held["state"].params), first[1])
        return told

    return Side(steps, trace)


def _theirs(run: RunConfig, how: str, compared: int) -> Side:
    words = set(how.split("-"))
    stepper = _Stepper(run, words)
    before = _corners(stepper.masters())
    losses: list[Tensor] = []
    first: list[Any] = []

    def steps(n: int) -> None:
        with torch_parts.attention_kernels():
            for _ in range(n):
                losses.append(stepper(len(losses)))
                if not first:
                    first.append(_corners(stepper.moments()))
        torch_parts.wait()

    def trace() -> dict[str, list[float]]:
        steps(max(0, compared - len(losses)))
        told = _told(losses[:compared], stepper.first_norm)
        if len(losses) == STEPS:
            told |= _moved(before, _corners(stepper.masters()), first[0])
        return told

    return Side(steps, trace)


def _told(losses: list[Any], norm: Any) -> dict[str, list[float]]:
    return {"losses": [float(loss) for loss in losses], "norm of the first gradient": [float(norm)]}


def _corners(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The upper left corner of every matrix, of all experts', on the host: a model's whole would be too much."""
    cut = {k: v[..., :CORNER, :CORNER] for k, v in tensors.items() if v.ndim > 1 and "router" not in k}
    return {
        k: v.detach().float().cpu().numpy().copy() if isinstance(v, Tensor) else np.array(v, np.float32)
        for k, v in cut.items()
    }


def _moved(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray]
) -> dict[str, list[float]]:
    """Norms, which are the same of a matrix and of its transpose."""
    norm: Callable[[np.ndarray], list[float]] = lambda x: [float(np.linalg.norm(x.ravel()))]  # noqa: E731
    told = {f"change of {k}": norm(after[k] - before[k]) for k in before}
    return told | {f"first moments of {k}": norm(moments[k]) for k in before}


class _Stepper:
    """One step of PyTorch at a time; words: compile or eager, autocast, grouped or loop."""

    def __init__(self, run: RunConfig, words: set[str]):
        self.run, self.dtype = run, getattr(torch, run.train.dtype)
        self.autocast = "autocast" in words
        # jaxlm draws the weights; on a GPU they go over without a copy on the host.
        params = jax.jit(lambda: _initial(run))()
        self.model = torch_parts.twin(run.model, params, "grouped" if "grouped" in words else "loop")
        self.names = {pair.path: pair.other for pair in pairs(run.model)}
        if isinstance(run, TuneRun):
            self.names = _adapt(run, self.model)
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
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.known = dict(self.model.named_parameters())
        self.first_norm: Tensor | None = None
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
        if self.first_norm is None:
            self.first_norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.parameters if p.grad is not None]
            )
        if self.run.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.run.optim.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def masters(self) -> dict[str, Tensor]:
        """The weights under jaxlm's names."""
        return {path: self.known[name] for path, name in self.names.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's first moments under jaxlm's names; zeros where it has not stepped."""
        state = self.optimizer.state
        return {k: state[p].get("exp_avg", torch.zeros_like(p)) for k, p in self.masters().items()}

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


def _adapt(run: TuneRun, model: Decoder) -> dict[str, str]:
    """Freezes a decoder under jaxlm's fresh factors; their names."""
    assert run.tune.adapter is not None
    factors = jax.jit(lambda: init_factors(run))()
    adapt(freeze_twin(run, model), run.tune.adapter, rngs=None, dtype=torch.float32)
    found = {name: to_tensor(x).to(torch_parts.device()) for name, x in adapter_to_torch(factors).items()}
    _, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected, unexpected
    return {path: path for path in factors}


def _initial(run: RunConfig) -> dict[str, jax.Array]:
    from jaxlm.model import init_params

    return init_params(run.model, run.train.seed, jnp.dtype(run.train.param_dtype))
