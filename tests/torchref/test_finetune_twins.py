"""Fine-tuning in float64: preferences and masked tokens give both frameworks the same loss, metrics and gradients."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import (  # noqa: E402
    Arrays,
    T,
    V,
    assert_close,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tree_errors,
)
from pair_batches import dpo_run, filled_up, hard_pairs  # noqa: E402
from tolerances import tolerance  # noqa: E402

import torchref.finetune.dpo as twin  # noqa: E402
from convert import native  # noqa: E402
from jaxlm.finetune.dpo import reference_log_probs  # noqa: E402
from jaxlm.finetune.lora import freeze  # noqa: E402
from jaxlm.finetune.tasks import task_of  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from jaxlm.train import make_gradient_fn  # noqa: E402
from jaxlm.tune_config import TuneRun  # noqa: E402
from torchref import train as torch_train  # noqa: E402
from torchref.finetune.sft import sft_task  # noqa: E402

pytestmark = pytest.mark.torch

LOOP = Backends(experts="loop")
DENSE = tiny(n_layers=1, tied=True, head_bias=True)
MIXTURE = tiny({"router_z_coef": 1e-2, "balance_coef": 0.3, "shared_d_ff": 12}, n_layers=1)


class Sides(NamedTuple):
    """One run with the same weights in both frameworks."""

    run: TuneRun
    params: Arrays  # what jaxlm trains
    frozen: Arrays
    decoder: Any  # torchref's policy
    reference: Any  # and, where that is another model, its reference

    @property
    def task(self) -> torch_train.Task:
        """torchref's."""
        sft = self.run.tune.method == "sft"
        return sft_task(self.run) if sft else twin.dpo_task(self.run, self.reference)


def sides(run: TuneRun) -> Sides:
    """Random weights; factors that are not zero; a reference that is not the policy."""
    base = random_params(run.model, init="fan_in")
    if run.tune.adapter is None:
        other = random_params(run.model, 7, "fan_in")
        frozen = other if run.tune.reference == "frozen" else {}
        return Sides(
            run, base, frozen, native.build_torch(run.model, base), native.build_torch(run.model, other)
        )
    rng = np.random.default_rng(8)
    factors = {path: 0.2 * rng.standard_normal(s.shape) for path, s in task_of(run, LOOP).shapes.items()}
    decoder = native.build_adapted(run.model, base, factors, run.tune.adapter)
    return Sides(run, factors, freeze(run, base), decoder, None)


def to_jax(side: Sides, grads: dict[str, Any]) -> Arrays:
    """torchref's gradients in jaxlm's layout."""
    arrays = {path: g.numpy() for path, g in grads.items()}
    return (
        native.to_jax(side.run.model, arrays)
        if side.run.tune.adapter is None
        else native.adapter_to_jax(arrays)
    )


def check(side: Sides, batch: Arrays) -> None:
    """Every metric and every gradient of a batch and, where it is whole, the sums of an evaluation of it."""
    task = task_of(side.run, LOOP)
    function = quick_jit(make_gradient_fn(side.run, LOOP, task))
    grads, metrics = function(side.params, batch, None, None, side.frozen)
    theirs, their_metrics = torch_train.make_gradient_fn(side.run, side.task)(
        side.decoder, torch_train.place_batch(batch)
    )
    assert set(metrics) == set(their_metrics)
    limit = tolerance("f64_dpo")
    assert_close({k: relative_error(metrics[k], their_metrics[k]) for k in metrics}, limit, "metrics")
    assert_close(tree_errors(to_jax(side, theirs), grads), limit, "gradients")
    if side.run.train.accumulation > 1:
        return
    sums = quick_jit(task.evaluate)(side.params, side.frozen, batch)
    their_sums = torch_train.make_eval_step(side.run, side.task)(side.decoder, torch_train.place_batch(batch))
    assert set(sums) == set(their_sums)
    assert_close({k: relative_error(sums[k], their_sums[k]) for k in sums}, limit, "sums")


@pytest.mark.parametrize(
    ("model", "reference", "dpo", "accumulation"),
    [
        pytest.param(
            DENSE, "frozen", {"label_smoothing": 0.1}, 1, id="dense-frozen-smoothed", marks=pytest.mark.slow
        ),
        pytest.param(DENSE, "adapter_off", {"loss": "ipo"}, 2, id="dense-adapter-ipo"),
        pytest.param(MIXTURE, "stored", {"loss": "ipo"}, 2, id="mixture-stored-ipo", marks=pytest.mark.slow),
        pytest.param(MIXTURE, "adapter_off", {}, 1, id="mixture-adapter-sigmoid"),
    ],
)
def test_preferences_are_the_same_in_both(
    model: Any, reference: str, dpo: dict[str, Any], accumulation: int, x64: None
) -> None:
    """Full training and adapters, dense and experts, each reference and loss, an empty pair among the others."""
    side = sides(dpo_run(model, reference, dpo, accumulation=accumulation))
    batch = filled_up(hard_pairs(3), 1)
    if reference == "stored":
        batch["reference"] = np.random.default_rng(4).uniform(-40, -20, (4, 2))
    check(side, batch)


@pytest.mark.parametrize(
    "adapter", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["adapter", "whole"]
)
def test_supervised_fine_tuning_is_the_same_in_both(adapter: bool, x64: None) -> None:
    """Masked, packed and padded rows; all weights or factors alone."""
    run = dpo_run(MIXTURE, "adapter_off" if adapter else "stored")
    check(sides(dataclasses.replace(run, tune=dataclasses.replace(run.tune, method="sft"))), hard_batch())


def test_stored_references_are_the_same_in_both(x64: None) -> None:
    """Of a batch that is filled up."""
    side, batch = sides(dpo_run(DENSE, "frozen")), filled_up(hard_pairs(3), 1)
    ours = reference_log_probs(side.run, {k: jnp.asarray(p) for k, p in side.frozen.items()}, [batch], LOOP)
    theirs = twin.reference_log_probs(side.run, side.reference, [batch])
    assert ours.shape == theirs.shape == (3, 2)
    assert relative_error(ours, theirs) <= tolerance("f64_dpo")


@pytest.mark.parametrize("chunk_logits", [1, 7 * V])
def test_the_references_own_chunks_change_nothing(chunk_logits: int) -> None:
    """Values and gradients of torchref's log-probabilities, by tokens and in ragged chunks, against all at once."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((4, T, 10), (10, V), (V,))
    )
    targets = torch.randint(0, V, (4, T), generator=generator)
    mask = (torch.rand(4, T, generator=generator) < 0.6).double()
    found = []
    for chunk in (chunk_logits, None):
        sums = twin.answer_log_probs(hidden, weight, bias, targets, mask, chunk)
        grads = torch.autograd.grad((sums**2).sum(), (hidden, weight, bias))
        found.append([sums.detach(), *grads])
    for chunked, whole in zip(*found, strict=True):
        assert relative_error(chunked, whole) <= tolerance("f64")
