"""What an adapter on a frozen base will need: against the shapes that are trained, and the compiler's own figures."""

import dataclasses
import math
from typing import Any

import jax
import pytest

from jaxlm.adapter_config import ADAPTABLE, AdapterConfig
from jaxlm.config import MeshConfig
from jaxlm.count import flops_per_token, matmul_param_count
from jaxlm.estimate import device, memory
from jaxlm.estimate_lora import (
    factor_count,
    matrix_shapes,
    tuned_budget,
    tuned_memory,
    tuning_flops_per_token,
)
from jaxlm.finetune.tasks import task_of
from jaxlm.model import abstract_model
from jaxlm.presets import preset
from jaxlm.tune_config import TuneConfig, TuneRun

# Peaks of whole steps on micro-batches of two sequences that jax 0.10.2's compiler found: preset, changes, GB. The two
# whole models are those of docs/planning.md.
COMPILED: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("astragpt-7b", {"n_layers": 4}, 5.426),
    ("astragpt-7b", {"n_layers": 4, "remat": "dots"}, 5.460),
    ("astragpt-7b", {"n_layers": 4, "quant": "nf4"}, 4.374),
    ("gptoss", {"n_layers": 4, "remat": "block"}, 4.394),
    ("astragpt-7b", {"remat": "block"}, 14.744),
    ("astragpt-7b", {"remat": "block", "quant": "nf4", "mesh": "data=2"}, 5.633),
)


def run_of(name: str, **changes: Any) -> TuneRun:
    """A preset with an adapter of rank 16."""
    run = preset(name)
    quant, mesh = changes.pop("quant", "none"), MeshConfig.parse(changes.pop("mesh", ""))
    depth = changes.pop("n_layers", run.model.n_layers)
    train = dataclasses.replace(run.train, batch_size=2, accumulation=1, **changes)
    tune = TuneConfig("sft", "base", adapter=AdapterConfig(16, 32.0), quant=quant)
    model = dataclasses.replace(run.model, n_layers=depth)
    return TuneRun(model=model, optim=run.optim, train=train, mesh=mesh, tune=tune)


@pytest.mark.parametrize("name", ["quickstart", "gptoss-original", "minigpt-124m"])
def test_matrices_are_those_of_the_model(name: str) -> None:
    """Every weight that may carry an adapter, with its shape, as the decoder has them."""
    model = dataclasses.replace(preset(name).model, n_layers=1)
    shapes = {path: s.shape for path, s in abstract_model(model).shapes.items() if ADAPTABLE.fullmatch(path)}
    assert matrix_shapes(model) == shapes


def test_factors_are_as_many_as_are_trained() -> None:
    """Against the shapes of the task."""
    run = run_of("quickstart", n_layers=1)
    assert run.tune.adapter is not None
    trained = sum(math.prod(s.shape) for s in task_of(run).shapes.values())
    assert factor_count(run.model, run.tune.adapter) == trained


@pytest.mark.parametrize("name, changes, found", COMPILED)
def test_the_peak_is_within_10_percent_of_the_compilers(
    name: str, changes: dict[str, Any], found: float
) -> None:
    """Frozen bases in bfloat16 and nf4, every remat policy, two devices."""
    peak = tuned_memory(run_of(name, **changes)).peak / 1e9
    assert abs(peak / found - 1) <= 0.1, f"{peak:.2f} GB against {found} GB"


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_base_is_as_large_as_it_lies(quant: str) -> None:
    """Against the shapes of what is frozen; scales of small weights weigh more than the rule says."""
    run = run_of("quickstart-dense", quant=quant, n_layers=1)
    factors = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(dict(task_of(run).shapes)))
    frozen = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(dict(task_of(run).frozen_shapes)))
    assert tuned_memory(run).weights - factors == pytest.approx(frozen, rel=0.01)


def test_frozen_matrices_cost_two_thirds() -> None:
    """No gradient of their own: 4 of 6 FLOPs a parameter; factors cost 6."""
    run = run_of("astragpt-7b")
    assert run.tune.adapter is not None
    whole = flops_per_token(run.model, run.train.seq_len)
    factors = factor_count(run.model, run.tune.adapter)
    assert tuning_flops_per_token(run) == whole - 2 * matmul_param_count(run.model) + 6 * factors
    assert 0.66 < tuning_flops_per_token(run) / whole < 0.72


def test_without_an_adapter_all_is_as_in_training() -> None:
    """Memory and budget of full fine-tuning are those of pretraining."""
    run = run_of("quickstart")
    run = dataclasses.replace(run, tune=dataclasses.replace(run.tune, adapter=None))
    assert tuned_memory(run) == memory(run)
    assert tuned_budget(run, device("h200"), 0.4, 1000).flops_per_token == flops_per_token(run.model, 256)
