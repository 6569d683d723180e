"""The two decoders behind one face: activations, loss, gradients, optimizer steps, decoding.

Everything that leaves a side is numpy in jaxlm's names and layouts, so that comparing needs no framework. A side
runs the ordinary code of its package: the model, the training step, the decoder loop that users call.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxlm.cached
import jaxlm.generate
import jaxlm.guard
import jaxlm.optim
import jaxlm.train
import torchref.cached
import torchref.generate
import torchref.guard
import torchref.optim
import torchref.train
from convert.native import build_torch, pairs, to_jax, to_torch
from convert.parity.inputs import Arrays
from convert.parity.precision import COMPILER_OPTIONS
from convert.rules import convert
from convert.tree import Flat, from_torch, load_torch, to_numpy
from jaxlm.config import ModelConfig, RunConfig
from jaxlm.model import Split, abstract_model, merge_model
from jaxlm.sampling import Sampling
from torchref.model import Decoder as TorchDecoder

# Every processor at work, and none so strong that it alone decides.
SAMPLED = Sampling(
    temperature=0.8,
    top_k=40,
    top_p=0.95,
    min_p=0.02,
    repetition_penalty=1.2,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    no_repeat_ngram=2,
)


class Step(NamedTuple):
    """One optimizer step as the metrics tell it."""

    metrics: dict[str, float]  # loss, z, balance, router_z, total_loss, grad_norm, clip_scale, lr


class Optimized(NamedTuple):
    """Parameters and optimizer state, in jaxlm's names."""

    params: Flat
    m: Flat
    v: Flat
    count: int


class Side(Protocol):
    """A decoder of one framework with its weights."""

    framework: str
    run: RunConfig

    def weights(self) -> Flat:
        """Master weights."""
        ...

    def replaced(self, params: Flat) -> "Side":
        """The same decoder with other weights."""
        ...

    def rope(self, positions: np.ndarray) -> Flat:
        """cos and sin [B, T, H/2] as the decoder takes them; {} without rotary positions."""
        ...

    def activations(self, batch: Arrays, train: bool = True, explicit: bool = True) -> Flat:
        """Every activation by module path, in the order of their making; explicit: with the scores of attention."""
        ...

    def gradients(self, batch: Arrays, accumulation: int = 1) -> tuple[Flat, dict[str, Any]]:
        """Gradients of the training loss and its metrics."""
        ...

    def trainer(self, run: RunConfig) -> "Trainer":
        """Optimizer steps from these weights with a fresh optimizer."""
        ...

    def cached_logits(self, prompts: Sequence[Sequence[int]], answers: np.ndarray) -> list[np.ndarray]:
        """Logits [B, V] after the prompts and after each token of answers [B, M], through the cache."""
        ...

    def answers(
        self, prompts: Sequence[Sequence[int]], noise: np.ndarray | None, length: int
    ) -> list[list[int]]:
        """Greedy answers, or sampled ones under the given Gumbel noise [M, B, V] and all processors."""
        ...


class Trainer(Protocol):
    """An optimizer state that moves step by step."""

    def step(self, batch: Arrays) -> Step:
        """One optimizer step."""
        ...

    def state(self) -> Optimized:
        """Where the optimizer stands."""
        ...


def with_accumulation(run: RunConfig, accumulation: int) -> RunConfig:
    """The run with its batch split into micro-batches."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation=accumulation))


@dataclass
class Programs:
    """Compiled functions of jaxlm, kept for as long as one comparison lasts: weights come as arguments."""

    compiled: dict[Any, Any] = field(default_factory=dict)

    def __call__(self, key: Any, function: Any, *args: Any) -> Any:
        """Runs `function`, compiled once per key and shapes."""
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(args))
        key = (key, shapes, jax.config.jax_enable_x64)
        if key not in self.compiled:
            self.compiled[key] = jax.jit(function).lower(*args).compile(COMPILER_OPTIONS)
        return self.compiled[key](*args)


class JaxSide:
    """jaxlm's decoder under its ordinary backends."""

    framework = "jax"

    def __init__(self, run: RunConfig, params: Mapping[str, Any], programs: Programs | None = None):
        self.run, self.programs = run, Programs() if programs is None else programs
        self.params = {k: jnp.asarray(v, run.train.param_dtype) for k, v in params.items()}
        self.graphdef = abstract_model(run.model, remat=run.train.remat).graphdef
        self.dtype = jnp.dtype(run.train.dtype)

    def weights(self) -> Flat:
        """Master weights."""
        return {path: np.asarray(p) for path, p in self.params.items()}

    def replaced(self, params: Flat) -> "JaxSide":
        """The same decoder with other weights."""
        return JaxSide(self.run, params, self.programs)

    def rope(self, positions: np.ndarray) -> Flat:
        """cos and sin [B, T, H/2] as the decoder takes them; {} without rotary positions."""
        tables = merge_model(self.graphdef, self.params)._rope(jnp.asarray(positions), self.dtype)
        return {} if tables is None else {"cos": np.asarray(tables[0]), "sin": np.asarray(tables[1])}

    def activations(self, batch: Arrays, train: bool = True, explicit: bool = True) -> Flat:
        """Every activation by module path, in the order of their making."""
        order: list[str] = []

        def forward(params: Any, batch: Any) -> Any:
            decoder = merge_model(self.graphdef, jaxlm.train.cast_params(params, self.dtype))
            _, acts, _ = decoder(
                batch["inputs"],
                batch.get("positions"),
                batch.get("segments"),
                train=train,
                expert_ids=batch.get("expert_ids"),
            )
            order[:] = acts
            return acts

        key = ("activations", self.run, train)
        acts = self.programs(key, forward, self.params, _on_jax(batch))
        order = self.programs.compiled.setdefault((key, "order"), order)
        return {name: _wide(acts[name]) for name in order}

    def gradients(self, batch: Arrays, accumulation: int = 1) -> tuple[Flat, dict[str, Any]]:
        """Gradients of the training loss and its metrics."""
        run = with_accumulation(self.run, accumulation)
        function = jaxlm.train.make_gradient_fn(run)
        grads, metrics = self.programs(("gradients", run), function, self.params, _on_jax(batch))
        return {k: np.asarray(g) for k, g in grads.items()}, {k: np.asarray(v) for k, v in metrics.items()}

    def trainer(self, run: RunConfig) -> "JaxTrainer":
        """Optimizer steps from these weights with a fresh optimizer."""
        return JaxTrainer(run, self.params, self.programs)

    def cached_logits(self, prompts: Sequence[Sequence[int]], answers: np.ndarray) -> list[np.ndarray]:
        """Logits [B, V] after the prompts and after each token of answers [B, M], through the cache."""
        model = self._split()
        logits, state = jaxlm.cached.prefill(model, prompts, max(map(len, prompts)) + answers.shape[1])
        found = [_wide(logits)]
        for tokens in answers.T:
            logits, state = jaxlm.cached.decode_step(model, jnp.asarray(tokens, jnp.int32), state)
            found.append(_wide(logits))
        return found

    def answers(
        self, prompts: Sequence[Sequence[int]], noise: np.ndarray | None, length: int
    ) -> list[list[int]]:
        """Greedy answers, or sampled ones under the given Gumbel noise [M, B, V] and all processors."""
        settings = (
            Sampling(length, greedy=True)
            if noise is None
            else dataclasses.replace(SAMPLED, max_new_tokens=length)
        )
        draws = None if noise is None else jnp.asarray(noise)
        return [best.ids for (best,) in jaxlm.generate.decode(self._split(), prompts, settings, draws)]

    def _split(self) -> Split:
        return Split(self.graphdef, jaxlm.train.cast_params(self.params, self.dtype))


class JaxTrainer:
    """jaxlm's training step, driven as its engine drives it; task: what is trained, on what is frozen."""

    def __init__(
        self,
        run: RunConfig,
        params: Any,
        programs: Programs,
        task: jaxlm.train.Task | None = None,
        base: Mapping[str, Any] = MappingProxyType({}),
    ):
        optimizer = jaxlm.optim.make_optimizer(run.optim)
        params = {k: jnp.array(v) for k, v in params.items()}  # the step donates its state
        seed = jnp.asarray(run.train.seed, jnp.uint32)
        self.run, self.programs, self.task, self.base = run, programs, task, dict(base)
        self.jax_state = jaxlm.train.TrainState(
            jnp.zeros((), jnp.int32), params, optimizer.init(params), seed, jaxlm.guard.init_guard(run)
        )

    def step(self, batch: Arrays) -> Step:
        """One optimizer step."""
        values = jaxlm.optim.scalars(self.run.optim, int(self.jax_state.step))
        arrays = jaxlm.optim.as_arrays(values, np.dtype(self.run.train.param_dtype))
        args = (self.jax_state, jaxlm.train.place_batch(batch), arrays, self.base)
        key = ("step", self.run, *((k, v.shape) for k, v in batch.items()))
        if key not in self.programs.compiled:
            step = jaxlm.train.make_train_step(self.run, task=self.task)
            self.programs.compiled[key] = step.lower(*args).compile(COMPILER_OPTIONS)
        self.jax_state, metrics = self.programs.compiled[key](*args)
        return Step({k: float(v) for k, v in metrics.items() if np.ndim(v) == 0} | {"lr": values.lr})

    def state(self) -> Optimized:
        """Where the optimizer stands."""
        m, v = jaxlm.optim.wide_moments(self.jax_state.opt_state)
        flat = [{k: np.array(x) for k, x in tree.items()} for tree in (self.jax_state.params, m, v)]
        return Optimized(*flat, count=int(self.jax_state.step))


class TorchSide:
    """torchref's decoder; its module may come from anywhere, in jaxlm's names it is what the rules make of it."""

    framework = "torch"

    def __init__(self, run: RunConfig, module: TorchDecoder):
        self.run, self.module = run, module.to(getattr(torch, run.train.param_dtype))
        self.dtype = getattr(torch, run.train.dtype)

    @classmethod
    def twin(cls, run: RunConfig, params: Mapping[str, Any]) -> "TorchSide":
        """The torch decoder with jaxlm's parameters."""
        return cls(run, build_torch(run.model, params))

    def weights(self) -> Flat:
        """Master weights."""
        return self._flat(from_torch(self.module))

    def replaced(self, params: Flat) -> "TorchSide":
        """The same decoder with other weights, given in jaxlm's names."""
        return TorchSide(self.run, _with_weights(self.module, to_torch(self.run.model, params)))

    def rope(self, positions: np.ndarray) -> Flat:
        """cos and sin [B, T, H/2] as the decoder takes them; {} without rotary positions."""
        tables = self.module._rope(torch.from_numpy(positions).long(), self.dtype)
        return {} if tables is None else {"cos": tables[0].numpy(), "sin": tables[1].numpy()}

    @torch.no_grad()
    def activations(self, batch: Arrays, train: bool = True, explicit: bool = True) -> Flat:
        """Every activation by module path, in the order of their making; only explicit attention shows its scores."""
        cast = torchref.train.cast_params(dict(self.module.named_parameters()), self.dtype)
        rows = torchref.train.place_batch(batch)
        with _explicit_attention(self.module) if explicit else contextlib.nullcontext():
            _, acts, _ = torch.func.functional_call(
                self.module,
                cast,
                (rows["inputs"], rows.get("positions"), rows.get("segments")),
                {"train": train, "expert_ids": rows.get("expert_ids")},
            )
        return {name: _wide(to_numpy(value)) for name, value in acts.items()}

    def gradients(self, batch: Arrays, accumulation: int = 1) -> tuple[Flat, dict[str, Any]]:
        """Gradients of the training loss and its metrics."""
        function = torchref.train.make_gradient_fn(with_accumulation(self.run, accumulation))
        grads, metrics = function(self.module, torchref.train.place_batch(batch))
        flat = self._flat({path: to_numpy(g) for path, g in grads.items()})
        return flat, {name: to_numpy(value) for name, value in metrics.items()}

    def trainer(self, run: RunConfig) -> "TorchTrainer":
        """Optimizer steps from these weights with a fresh optimizer."""
        return TorchTrainer(run, self.module)

    def cached_logits(self, prompts: Sequence[Sequence[int]], answers: np.ndarray) -> list[np.ndarray]:
        """Logits [B, V] after the prompts and after each token of answers [B, M], through the cache."""
        model = self._cast()
        slots = max(map(len, prompts)) + answers.shape[1]
        logits, state = torchref.cached.prefill(model, prompts, slots)
        found = [_wide(to_numpy(logits))]
        for tokens in answers.T:
            tokens = torch.from_numpy(np.ascontiguousarray(tokens)).long()
            logits, state = torchref.cached.decode_step(model, tokens, state)
            found.append(_wide(to_numpy(logits)))
        return found

    def answers(
        self, prompts: Sequence[Sequence[int]], noise: np.ndarray | None, length: int
    ) -> list[list[int]]:
        """Greedy answers, or sampled ones under the given Gumbel noise [M, B, V] and all processors."""
        settings = (
            Sampling(length, greedy=True)
            if noise is None
            else dataclasses.replace(SAMPLED, max_new_tokens=length)
        )
        draws = None if noise is None else torch.from_numpy(noise)
        return [best.ids for (best,) in torchref.generate.decode(self._cast(), prompts, settings, draws)]

    def _cast(self) -> TorchDecoder:
        cast = torchref.train.cast_params(dict(self.module.named_parameters()), self.dtype)
        return _with_weights(self.module, {path: to_numpy(p) for path, p in cast.items()})

    def _flat(self, flat: Flat) -> Flat:
        return to_jax(self.run.model, flat)


class TorchTrainer:
    """torchref's training step, driven as its engine drives it; task: what is trained."""

    def __init__(self, run: RunConfig, module: TorchDecoder, task: torchref.train.Task | None = None):
        model = copy.deepcopy(module)
        optimizer = torchref.optim.make_optimizer(run.optim, model)
        self.run = run
        self.torch_state = torchref.train.TrainState(
            0, model, optimizer, run.train.seed, torchref.guard.init_guard(run)
        )
        self._step = torchref.train.make_train_step(run, task)

    def step(self, batch: Arrays) -> Step:
        """One optimizer step; the learning rate is read back from the optimizer that used it."""
        values = torchref.optim.scalars(self.run.optim, self.torch_state.step)
        self.torch_state, metrics = self._step(self.torch_state, torchref.train.place_batch(batch), values)
        used = {float(group["lr"]) for group in self.torch_state.optimizer.param_groups}
        return Step({k: float(v) for k, v in metrics.items() if v.ndim == 0} | {"lr": max(used)})

    def state(self) -> Optimized:
        """Where the optimizer stands."""
        model, optimizer = self.torch_state.model, self.torch_state.optimizer
        m, v = torchref.optim.wide_moments(model, optimizer)
        trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
        flat = [{k: to_numpy(x).copy() for k, x in tree.items()} for tree in (trained, m, v)]
        counts = {int(optimizer.state[p]["step"]) for p in trained.values()}
        assert len(counts) == 1, f"torch counted {sorted(counts)} steps for different parameters"
        return Optimized(*map(self.here, flat), count=counts.pop())

    def here(self, flat: Flat) -> Flat:
        """Parameters or their moments, as many as there are, in jaxlm's names and layouts."""
        table = pairs(self.run.model)
        return convert([p for p in table if p.other in flat], flat, inverse=True)


def _with_weights(module: TorchDecoder, flat: Flat) -> TorchDecoder:
    """A copy of the module itself, whatever was done to it, with other weights (in torch's names)."""
    made = copy.deepcopy(module)
    load_torch(made, flat)
    return made


@contextlib.contextmanager
def _explicit_attention(module: TorchDecoder) -> Iterator[None]:
    """Lets attention go the way on which scores exist; the fused kernel has none."""
    attentions: list[Any] = [block.attn for block in module.blocks]
    before = [attention.backend for attention in attentions]
    try:
        for attention in attentions:
            attention.backend = "explicit"
        yield
    finally:
        for attention, backend in zip(attentions, before, strict=True):
            attention.backend = backend


def recorded_routing(config: ModelConfig, acts: Flat) -> np.ndarray | None:
    """The experts chosen in a forward pass, [B, T, L, A], for replay; None without experts."""
    if not config.moe.n_experts:
        return None
    found = {i: acts[f"blocks.{i}.moe.expert_ids"] for i in range(config.n_layers) if config.is_moe(i)}
    empty = np.zeros_like(next(iter(found.values())))
    return np.stack([found.get(i, empty) for i in range(config.n_layers)], axis=2).astype(np.int32)


def _on_jax(batch: Arrays) -> dict[str, Any]:
    return {k: jnp.asarray(v) for k, v in batch.items()}


def _wide(x: Any) -> np.ndarray:
    """A host array; bfloat16 as float32, which holds it exactly."""
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.kind == "V" or x.dtype.name == "bfloat16" else x
