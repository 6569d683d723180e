"""The two decoders as fine-tuning sees them: adapters on a frozen base, preferences, in one form for both frameworks.

As in sides.py everything that leaves is numpy in jaxlm's names and layouts, and what runs is the ordinary code of
either package: its tasks, its training step, its merge.
"""

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import torch

import jaxlm.finetune.dpo
import jaxlm.finetune.lora
import jaxlm.finetune.tasks
import jaxlm.train
import torchref.finetune.dpo
import torchref.finetune.lora
import torchref.finetune.sft
import torchref.train
from convert.native import adapter_to_jax, adapter_to_torch, pairs, to_jax, to_torch
from convert.parity.inputs import Arrays
from convert.parity.sides import (
    JaxSide,
    JaxTrainer,
    Side,
    TorchSide,
    TorchTrainer,
    Trainer,
    with_accumulation,
)
from convert.rules import convert
from convert.tree import Flat, from_jax, to_numpy, to_tensor
from jaxlm.adapter_config import FACTORS
from jaxlm.config import ModelConfig
from jaxlm.model import merge_model
from jaxlm.tune_config import TuneRun


class Tuned(Protocol):
    """A decoder under a fine-tuning run."""

    run: TuneRun

    def fresh(self) -> Flat:
        """What is trained, before the first step, as the run's seed draws it."""
        ...

    def trained(self) -> Flat:
        """What is trained."""
        ...

    def frozen(self) -> Flat:
        """What is used and not trained: under the decoder's own names, quantised weights as their parts."""
        ...

    def gradients(self, batch: Arrays, accumulation: int = 1) -> tuple[Flat, dict[str, Any]]:
        """Gradients of the task's loss and its metrics."""
        ...

    def evaluated(self, batch: Arrays) -> dict[str, Any]:
        """The task's sums over a batch, as validation takes them."""
        ...

    def activations(self, batch: Arrays) -> Flat:
        """Every activation of the adapted decoder but attention's scores, in the order of their making."""
        ...

    def merged(self, back: bool = False) -> Flat:
        """The weights with the adapter merged into them; back: and taken off again."""
        ...

    def references(self, batch: Arrays) -> np.ndarray:
        """Summed log-probabilities [B, 2] of both answers under the run's base."""
        ...

    def trainer(self) -> "TunedTrainer":
        """Optimizer steps from here with a fresh optimizer."""
        ...


class TunedTrainer(Trainer, Protocol):
    """An optimizer state of what is trained, beside what is not."""

    def frozen(self) -> Flat:
        """The base, after the steps that were taken."""
        ...


def tuned(side: Side, run: TuneRun, trained: Mapping[str, np.ndarray] | None = None) -> Tuned:
    """A side under a fine-tuning run. trained: factors or weights to train; None = the side's own weights."""
    return (JaxTuned if isinstance(side, JaxSide) else TorchTuned)(side, run, trained)  # type: ignore[arg-type]


class JaxTuned:
    """jaxlm's fine-tuning, as its engine drives it."""

    def __init__(self, side: JaxSide, run: TuneRun, trained: Mapping[str, np.ndarray] | None):
        self.run, self.programs, self.side = run, side.programs, side
        self.task = jaxlm.finetune.tasks.task_of(run)
        self.base = jaxlm.finetune.lora.freeze(run, side.params) if self.task.frozen_shapes else {}
        chosen = side.params if trained is None else trained
        self.params = {path: jnp.asarray(x, run.train.param_dtype) for path, x in chosen.items()}

    def fresh(self) -> Flat:
        """Factors before the first step."""
        return from_jax(self.programs(("fresh", self.run), self.task.fresh))

    def trained(self) -> Flat:
        """What is trained, by canonical names."""
        return from_jax(self.params)

    def frozen(self) -> Flat:
        """What is used and not trained, by canonical names."""
        return from_jax(self.base)

    def gradients(self, batch: Arrays, accumulation: int = 1) -> tuple[Flat, dict[str, Any]]:
        """Gradients of what is trained, and the metrics of the whole batch."""
        run = with_accumulation(self.run, accumulation)
        function = jaxlm.train.make_gradient_fn(run, task=self.task)
        rows = jaxlm.train.place_batch(batch)
        grads, metrics = self.programs(
            ("tuned gradients", run), function, self.params, rows, None, None, self.base
        )
        return from_jax(grads), from_jax(metrics)

    def evaluated(self, batch: Arrays) -> dict[str, Any]:
        """The task's sums over a batch."""
        function = jaxlm.train.make_eval_step(self.run, task=self.task)
        rows = jaxlm.train.place_batch(batch)
        return from_jax(self.programs(("evaluated", self.run), function, self.params, rows, self.base))

    def activations(self, batch: Arrays) -> Flat:
        """Every activation by module path."""
        split = jaxlm.finetune.lora.generation_model(self.run, self.base, self.params)
        order: list[str] = []

        def forward(params: Any, batch: Any) -> Any:
            decoder = merge_model(split.graphdef, params)
            _, acts, _ = decoder(batch["inputs"], batch["positions"], batch["segments"], train=True)
            order[:] = acts
            return acts

        rows = jaxlm.train.place_batch(batch)
        key = ("adapted activations", self.run)
        acts = self.programs(key, forward, split.params, rows)
        order = self.programs.compiled.setdefault((key, "order"), order)
        return {name: np.asarray(acts[name]) for name in order if not name.endswith(".scores")}

    def merged(self, back: bool = False) -> Flat:
        """All weights, with the adapter in them."""
        adapter: Any = self.run.tune.adapter
        whole: Any = jaxlm.finetune.lora.merge(self.side.params, self.params, adapter)
        return from_jax(jaxlm.finetune.lora.unmerge(whole, self.params, adapter) if back else whole)

    def references(self, batch: Arrays) -> np.ndarray:
        """The reference's log-probabilities of stored answers."""
        base = self.base or self.side.params
        return np.asarray(jaxlm.finetune.dpo.reference_log_probs(self.run, base, [batch]))

    def trainer(self) -> "TunedJaxTrainer":
        """Optimizer steps from here with a fresh optimizer."""
        return TunedJaxTrainer(self)


class TunedJaxTrainer(JaxTrainer):
    """jaxlm's training step of a task."""

    def __init__(self, tuned: JaxTuned):
        super().__init__(tuned.run, tuned.params, tuned.programs, tuned.task, tuned.base)

    def frozen(self) -> Flat:
        """The base, after the steps that were taken."""
        return from_jax(self.base)


class TorchTuned:
    """torchref's fine-tuning, of a copy of the side's module."""

    def __init__(self, side: TorchSide, run: TuneRun, trained: Mapping[str, np.ndarray] | None):
        self.run, self.side, tune = run, side, run.tune
        self.plain = copy.deepcopy(side.module)  # without an adapter
        if tune.adapter is not None:
            self.plain = torchref.finetune.lora.freeze(run, self.plain)
        self.module = copy.deepcopy(self.plain)
        if tune.adapter is not None:
            drawn, dtype = (
                torch.Generator().manual_seed(run.train.seed),
                getattr(torch, run.train.param_dtype),
            )
            torchref.finetune.lora.adapt(self.module, tune.adapter, rngs=drawn, dtype=dtype)
        if trained is not None:
            self._load(trained)
        self.task = self._task()

    def _load(self, trained: Mapping[str, np.ndarray]) -> None:
        flat = self._there(dict(trained))
        named = {path: p for path, p in self.module.named_parameters() if p.requires_grad}
        assert flat.keys() == named.keys(), f"torch trains others: {sorted(flat.keys() ^ named.keys())[:4]}"
        with torch.no_grad():
            for path, parameter in named.items():
                parameter.copy_(to_tensor(flat[path]))

    def _task(self) -> torchref.train.Task:
        if self.run.tune.method == "sft":
            return torchref.finetune.sft.sft_task(self.run)
        alone = self.run.tune.adapter is None and self.run.tune.reference == "frozen"
        return torchref.finetune.dpo.dpo_task(self.run, self.plain if alone else None)

    def _there(self, flat: Flat) -> Flat:
        if self.run.tune.adapter is not None:
            return adapter_to_torch(flat)
        return to_torch(self.run.model, flat)

    def here(self, flat: Flat) -> Flat:
        """Arrays of torchref under our names and in our layouts."""
        if self.run.tune.adapter is None:
            return to_jax(self.run.model, flat)
        factors = {path: x for path, x in flat.items() if path.endswith(FACTORS)}
        return flat | adapter_to_jax(factors)  # what else is trained keeps its name, and is seen by it

    def fresh(self) -> Flat:
        """Factors before the first step."""
        return self.trained()

    def trained(self) -> Flat:
        """What is trained, by canonical names."""
        named = self.module.named_parameters()
        return self.here({path: to_numpy(p).copy() for path, p in named if p.requires_grad})

    def frozen(self) -> Flat:
        """What is used and not trained, by canonical names."""
        return frozen_of(self.run.model, self.module)

    def gradients(self, batch: Arrays, accumulation: int = 1) -> tuple[Flat, dict[str, Any]]:
        """Gradients of what is trained, and the metrics of the whole batch."""
        function = torchref.train.make_gradient_fn(with_accumulation(self.run, accumulation), self.task)
        grads, metrics = function(self.module, torchref.train.place_batch(batch))
        return self.here(_numpy(grads)), _numpy(metrics)

    def evaluated(self, batch: Arrays) -> dict[str, Any]:
        """The task's sums over a batch."""
        function = torchref.train.make_eval_step(self.run, self.task)
        return _numpy(function(self.module, torchref.train.place_batch(batch)))

    @torch.no_grad()
    def activations(self, batch: Arrays) -> Flat:
        """Every activation by module path."""
        rows = torchref.train.place_batch(batch)
        _, acts, _ = self.module(rows["inputs"], rows["positions"], rows["segments"], train=True)
        return {name: to_numpy(x) for name, x in acts.items() if not name.endswith(".scores")}

    def merged(self, back: bool = False) -> Flat:
        """All weights, with the adapter in them."""
        adapter: Any = self.run.tune.adapter
        factors = {path: p.detach() for path, p in self.module.named_parameters() if p.requires_grad}
        params = {path: p.detach() for path, p in self.side.module.named_parameters()}
        whole = torchref.finetune.lora.merge(params, factors, adapter)
        found = torchref.finetune.lora.unmerge(whole, factors, adapter) if back else whole
        return to_jax(self.run.model, _numpy(found))

    def references(self, batch: Arrays) -> np.ndarray:
        """The reference's log-probabilities of stored answers."""
        return torchref.finetune.dpo.reference_log_probs(self.run, self.plain, [batch])

    def trainer(self) -> "TunedTorchTrainer":
        """Optimizer steps from here with a fresh optimizer."""
        return TunedTorchTrainer(self)


class TunedTorchTrainer(TorchTrainer):
    """torchref's training step of a task."""

    def __init__(self, tuned: TorchTuned):
        super().__init__(tuned.run, tuned.module, tuned.task)
        self.here = tuned.here

    def frozen(self) -> Flat:
        """The base, after the steps that were taken."""
        return frozen_of(self.run.model, self.torch_state.model)


def frozen_of(config: ModelConfig, module: torch.nn.Module) -> Flat:
    """The parameters of an adapted module that require no gradient, by canonical names; codes as they are stored."""
    flat = {
        ".".join(part for part in path.split(".") if part != "base"): to_numpy(p)
        for path, p in module.named_parameters()
        if not p.requires_grad
    }
    table = [pair for pair in pairs(config) if pair.other in flat]
    rest = {path: x for path, x in flat.items() if path not in {pair.other for pair in table}}
    return convert(table, {pair.other: flat[pair.other] for pair in table}, inverse=True) | rest


def _numpy(tensors: Mapping[str, torch.Tensor]) -> Flat:
    return {path: to_numpy(x) for path, x in tensors.items()}
