"""Preferences for tests: a hard batch of pairs, and runs that learn from it."""

from typing import Any

import numpy as np
from helpers import Arrays, T, V, tiny_run

from jaxlm.adapter_config import AdapterConfig
from jaxlm.config import ModelConfig
from jaxlm.tune_config import DpoConfig, TuneConfig, TuneRun

PAIRS = 4


def hard_pairs(pairs: int = PAIRS, length: int = T, seed: int = 0) -> Arrays:
    """Unequal prompts and answers, one of one token, a row that is full; [pairs, 2, length] padded on the right."""
    rng = np.random.default_rng(seed)
    batch = {
        name: np.zeros((pairs, 2, length), np.int32)
        for name in ("inputs", "targets", "segments", "positions")
    }
    batch["loss_mask"] = np.zeros((pairs, 2, length))
    for b in range(pairs):
        prompt = int(rng.integers(1, length // 2))
        for side in range(2):
            answer = int(rng.integers(1, length + 1 - prompt))
            answer = {(0, 0): length + 1 - prompt, (1, 1): 1}.get((b, side), answer)
            ids = rng.integers(0, V, prompt + answer)
            ids[:prompt] = (np.arange(prompt) * 7 + b) % V  # one prompt, two answers
            row, n = (b, side), prompt + answer - 1
            batch["inputs"][row][:n], batch["targets"][row][:n] = ids[:-1], ids[1:]
            batch["segments"][row][:n], batch["positions"][row][:n] = 1, np.arange(n)
            batch["loss_mask"][row][prompt - 1 : n] = 1
    return batch


def filled_up(batch: Arrays, pairs: int) -> Arrays:
    """The batch with empty pairs at its end, as a loader fills up the last one of an evaluation."""
    return {k: np.concatenate([x, np.zeros((pairs, *x.shape[1:]), x.dtype)]) for k, x in batch.items()}


def dpo_run(
    model: ModelConfig, reference: str, dpo: dict[str, Any] | None = None, mesh: Any = None, **train: Any
) -> TuneRun:
    """A float64 run on pairs. reference: adapter_off, which brings an adapter of rank 3, frozen or stored."""
    adapter = AdapterConfig(rank=3, alpha=5.0) if reference == "adapter_off" else None
    config = DpoConfig(**({"beta": 0.3, "reference": reference} | (dpo or {})))
    run = tiny_run(model, optim={"z_loss_coef": 0.0}, mesh=mesh, **({"batch_size": PAIRS} | train))
    tune = TuneConfig("dpo", "base", adapter=adapter, dpo=config)
    return TuneRun(run.model, mesh=run.mesh, optim=run.optim, train=run.train, tune=tune)
