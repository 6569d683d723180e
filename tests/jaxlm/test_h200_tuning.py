"""Fine-tuning steps as they compile for an H200 that is not there: no copies of what is frozen, no gradients of it.

Needs jax's CUDA compiler plugin of jax's own version, no GPU and no driver; without it every test is skipped.
"""

import dataclasses
import importlib.metadata
import math

import jax
import pytest

from jaxlm.adapter_config import AdapterConfig
from jaxlm.config import MeshConfig, ModelConfig, TrainConfig
from jaxlm.count import param_count
from jaxlm.hlo import instructions
from jaxlm.plan import Compiled, compile_step
from jaxlm.presets import preset
from jaxlm.tune_config import TuneConfig, TuneRun


def plugin() -> bool:
    """Whether jax's compiler for CUDA is here, in jax's version."""
    try:
        found = {importlib.metadata.version(f"jax-cuda13-{part}") for part in ("plugin", "pjrt")}
    except importlib.metadata.PackageNotFoundError:
        return False
    return found == {jax.__version__}


pytestmark = [pytest.mark.h200, pytest.mark.skipif(not plugin(), reason="needs jax's CUDA compiler plugin")]
# Much weight and few tokens, so that a copy of the weights shows beside the activations.
MODEL = ModelConfig(
    vocab_size=512,
    d_model=1024,
    n_layers=4,
    n_heads=8,
    n_kv_heads=8,
    head_dim=128,
    d_ff=4096,
    context=128,
    rope_theta=10_000.0,
    norm_eps=1e-5,
)


def compiled(quant: str, remat: str) -> tuple[TuneRun, Compiled]:
    """A step of LoRA on one row of 128 tokens."""
    train = TrainConfig(batch_size=1, seq_len=128, dtype="bfloat16", remat=remat)
    tune = TuneConfig("sft", "base", adapter=AdapterConfig(8, 16.0), quant=quant)
    run = TuneRun(model=MODEL, train=train, tune=tune)
    return run, compile_step(run)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_frozen_weights_are_not_copied(quant: str) -> None:
    """Neither widened, nor dequantised ahead of their product, nor kept for the backward pass."""
    run, found = compiled(quant, "none")
    weights = 2 * param_count(run.model)
    assert found.temporary_bytes < 0.4 * weights, (
        f"{found.temporary_bytes / 1e6:.0f} MB of temporaries beside {weights / 1e6:.0f} MB of weights"
    )


@pytest.mark.slow
@pytest.mark.parametrize("quant, mesh, limit", [("none", "", 16.0), ("nf4", "data=2", 10.0)])
def test_an_adapter_of_astragpt_7b_fits(quant: str, mesh: str, limit: float) -> None:
    """Rank 16, micro-batches of two rows of 2,048 tokens, remat block, GB per device.

    The first is 18.8 where XLA may join products of frozen weights with those of factors (jaxlm.train.FROZEN).
    """
    run = preset("astragpt-7b")
    micro = 2 * max(1, MeshConfig.parse(mesh).size)
    train = dataclasses.replace(run.train, batch_size=micro, accumulation=1, remat="block")
    tune = TuneConfig("sft", "base", adapter=AdapterConfig(16, 32.0), quant=quant)
    found = compile_step(TuneRun(model=run.model, train=train, mesh=MeshConfig.parse(mesh), tune=tune))
    assert found.peak_bytes / 1e9 < limit


def test_nothing_frozen_has_a_gradient() -> None:
    """No product has the shape of a frozen matrix, either way round, and the head's is among them."""
    _, found = compiled("none", "block")
    D, F, V = MODEL.d_model, MODEL.d_ff, MODEL.vocab_size
    matrices = {frozenset(shape) for shape in ((D, F), (D, V))}
    made = [
        shape
        for one in instructions(found.text, fused=True)
        if one.operation in ("dot", "custom-call", "while")
        for _, shape in one.arrays
        if frozenset(shape) in matrices and math.prod(shape) >= D * V
    ]
    assert not made, made
