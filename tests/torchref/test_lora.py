"""The reference's adapters: against the merged weights, against jaxlm, and what they leave alone."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from tolerances import tolerance

torch = pytest.importorskip("torch")

from convert.native import build_torch  # noqa: E402
from jaxlm.adapter_config import PROJECTIONS, AdapterConfig, Override  # noqa: E402
from jaxlm.config import ConfigError, ModelConfig  # noqa: E402
from jaxlm.finetune.lora import adapted, adapted_decoder  # noqa: E402
from jaxlm.finetune.lora import freeze as freeze_jax  # noqa: E402
from jaxlm.finetune.sft import sft_task as jax_task  # noqa: E402
from jaxlm.train import make_gradient_fn as jax_gradient_fn  # noqa: E402
from jaxlm.tune_config import TuneConfig, TuneRun  # noqa: E402
from torchref.finetune.lora import LoraLinear, adapt, freeze, merge, set_key, unmerge  # noqa: E402
from torchref.model import Decoder  # noqa: E402
from torchref.train import make_gradient_fn, place_batch  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = tiny({"pattern": (False, True), "shared_d_ff": 12, "shared_gate": True}, qkv_bias=True)
TARGETS = (*PROJECTIONS, r".*\.router\.weight", r".*\.shared_gate\.weight", r"lm_head\.weight")
ADAPTER = AdapterConfig(3, 5.0, targets=TARGETS, overrides=(Override(r".*\.o_proj\.weight", 2, 7.0),))


def tuned(model: ModelConfig, adapter: AdapterConfig, quant: Any = "none", **train: Any) -> TuneRun:
    """A tiny run of supervised fine-tuning."""
    run = tiny_run(model, **train)
    return TuneRun.of(run, TuneConfig("sft", "base", adapter=adapter, quant=quant))


def adapted_torch(run: TuneRun, base: Any, seed: int = 1) -> tuple[Decoder, dict[str, Any]]:
    """An adapted decoder of which no factor is zero, and its factors."""
    assert run.tune.adapter is not None
    decoder, rngs = freeze(run, build_torch(run.model, base)), torch.Generator().manual_seed(seed)
    decoder = adapt(decoder, run.tune.adapter, rngs=rngs, dtype=getattr(torch, run.train.param_dtype))
    factors = {path: p for path, p in decoder.named_parameters() if p.requires_grad}
    for parameter in factors.values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=rngs, dtype=parameter.dtype)
    return decoder, {path: p.detach() for path, p in factors.items()}


def test_adapted_is_merged() -> None:
    """Fresh factors change nothing; others give the decoder of the merged weights, which unmerged are the base's."""
    run, base = tuned(MODEL, ADAPTER), random_params(MODEL)
    plain, ids = build_torch(MODEL, base), torch.from_numpy(hard_batch()["inputs"]).long()
    weights = {path: p.detach().clone() for path, p in plain.named_parameters()}
    fresh = adapt(
        build_torch(MODEL, base), ADAPTER, rngs=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    decoder, factors = adapted_torch(run, base)
    merged = merge(weights, factors, ADAPTER)
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids)[0], plain(ids)[0], rtol=0, atol=0)
        for path, p in plain.named_parameters():
            p.data = merged[path]
        assert relative_error(decoder(ids)[0], plain(ids)[0]) <= tolerance("f64_peft")
    assert_close(tree_errors(unmerge(merged, factors, ADAPTER), weights), tolerance("f64"))
    with pytest.raises(ConfigError, match="is no weight of this base"):
        merge({}, factors, ADAPTER)


def test_the_grouped_product_takes_adapted_experts() -> None:
    """Its half-precision result is the loop's."""
    model = tiny({"d_ff": 16}, n_layers=1, d_model=32)
    run = tuned(model, AdapterConfig(2, 4.0), dtype="bfloat16", param_dtype="bfloat16")
    decoder, _ = adapted_torch(run, random_params(model, dtype=np.float32))
    ids, outputs = torch.from_numpy(hard_batch()["inputs"]).long(), []
    for decoder.blocks[0].moe.experts.backend in ("auto", "grouped"):
        with torch.no_grad():
            outputs.append(decoder(ids)[0].double())
    assert relative_error(outputs[1], outputs[0]) <= tolerance("bf16_attention")


@pytest.mark.parametrize("quant", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_both_frameworks_have_the_same_gradients(quant: str, x64: None) -> None:
    """Loss and the gradients of every factor, under the same canonical names; no other parameter has one."""
    run = tuned(MODEL, dataclasses.replace(ADAPTER, targets=TARGETS[:-1]), quant)
    base = random_params(MODEL)
    decoder, factors = adapted_torch(run, base)
    ours = {path: jnp.asarray(value.mT.numpy()) for path, value in factors.items()}
    assert {path: value.shape for path, value in ours.items()} == {
        path: shape.shape for path, shape in adapted(run).shapes.items()
    }
    compute = quick_jit(jax_gradient_fn(run, task=jax_task(run)))
    expected, metrics = compute(ours, hard_batch(), None, None, freeze_jax(run, base))
    found, others = make_gradient_fn(run)(decoder, place_batch(hard_batch()))
    assert relative_error(others["loss"], metrics["loss"]) <= tolerance("f64")
    assert_close(tree_errors({k: v.mT for k, v in found.items()}, expected), tolerance("f64"), "gradients")
    names = {path.replace(".base", "") for path, p in decoder.named_parameters() if not p.requires_grad}
    assert names == adapted(run).frozen_shapes.keys()


def test_both_frameworks_have_the_same_head(x64: None) -> None:
    """Logits where the head is adapted too."""
    run = tuned(tiny(n_layers=1), dataclasses.replace(ADAPTER, overrides=(), targets=(r"lm_head\.weight",)))
    base, ids = random_params(run.model), hard_batch()["inputs"]
    decoder, factors = adapted_torch(run, base)
    ours = {path: jnp.asarray(value.mT.numpy()) for path, value in factors.items()}
    logits = adapted_decoder(adapted(run).graphdef, freeze_jax(run, base), ours)(jnp.asarray(ids))[0]
    with torch.no_grad():
        assert relative_error(decoder(torch.from_numpy(ids).long())[0], logits) <= tolerance("f64")


def test_dropout_is_of_adapters_with_a_key() -> None:
    """The same seed drops the same, another another, none nothing, also where activations are computed again."""
    adapter = AdapterConfig(3, 5.0, 0.3)
    grads = {}
    for remat in ("none", "block", "dots"):
        run = tuned(tiny(n_layers=2), adapter, remat=remat)
        decoder, _ = adapted_torch(run, random_params(run.model))
        decoder.remat = remat
        for seed in (0, 1):
            key = torch.Generator().manual_seed(seed)
            set_key(decoder, key)
            grads[remat, seed] = make_gradient_fn(run)(decoder, place_batch(hard_batch()), key)[0]
    for remat in ("block", "dots"):
        assert_close(tree_errors(grads[remat, 0], grads["none", 0]), tolerance("f64"), "gradients")
    assert min(tree_errors(grads["none", 1], grads["none", 0]).values()) > 1e-3
    linear, x = decoder.blocks[0].attn.q_proj, torch.ones(4, 24, dtype=torch.float64)
    assert isinstance(linear, LoraLinear)
    set_key(decoder, torch.Generator().manual_seed(0))
    many = torch.stack([linear(x) for _ in range(500)]).mean((0, 1))
    set_key(decoder, None)
    torch.testing.assert_close(linear(x), linear(x), rtol=0, atol=0)
    assert relative_error(many.detach(), linear(x)[0].detach()) < 0.05


def test_fresh_factors_are_pefts() -> None:
    """a uniform within 1/sqrt(in), b zero, in the dtype that was asked for."""
    run = tuned(
        tiny(d_model=256, n_layers=1), AdapterConfig(8, 16.0), dtype="bfloat16", param_dtype="float32"
    )
    decoder = freeze(run, build_torch(run.model, random_params(run.model, dtype=np.float32)))
    decoder = adapt(
        decoder, AdapterConfig(8, 16.0), rngs=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    for path, p in decoder.named_parameters():
        wide = path.endswith(("norm.weight", "lora_a", "lora_b"))
        assert p.dtype == (torch.float32 if wide else torch.bfloat16), path
        assert p.requires_grad == path.endswith(("lora_a", "lora_b"))
        if path.endswith("lora_b"):
            assert not p.any()
        if path.endswith("lora_a"):
            bound = p.shape[-1] ** -0.5
            assert p.detach().abs().max() <= bound
            assert 0.9 < float(p.detach().std()) / (bound / 3**0.5) < 1.1, path


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (AdapterConfig(2, 2.0, targets=("q_proj",)), "'q_proj' matches no weight"),
        (AdapterConfig(2, 2.0, 0.1, targets=(r"lm_head\.weight",)), "lm_head.weight has no dropout"),
    ],
)
def test_what_cannot_be_adapted_is_refused(adapter: AdapterConfig, message: str) -> None:
    """As jaxlm refuses it."""
    decoder = build_torch(DENSE := tiny(n_layers=1), random_params(DENSE, dtype=np.float32))
    with pytest.raises(ConfigError, match=message):
        adapt(decoder, adapter, rngs=None, dtype=torch.float32)
