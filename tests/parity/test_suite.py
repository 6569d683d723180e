"""The parity suite: twins pass every rung, and whatever differs is named with rung, layer and operation."""

import dataclasses
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import random_params, tiny  # noqa: E402

import jaxlm.layers  # noqa: E402
from convert.native import build_torch  # noqa: E402
from convert.parity.inputs import blind_spots, hard_length, shrunk, zero_gradients  # noqa: E402
from convert.parity.limits import limit  # noqa: E402
from convert.parity.results import ORDER, Report  # noqa: E402
from convert.parity.suite import Options, compare_decoders  # noqa: E402
from convert.parity.tuning import RUNGS as TUNED  # noqa: E402
from jaxlm.config import InputError, RunConfig, TrainConfig  # noqa: E402
from jaxlm.presets import PRESETS, preset  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = tiny({"pattern": (True, False)}, windows=(0, 7), qk_norm=True, qkv_bias=True)
RUN = RunConfig(model=MODEL, train=TrainConfig(seq_len=19))
SHALLOW = ("config", "tree", "activations")
BELOW_FLOAT64 = {"activations_cap", "kl", "gradients_cap"}


def compared(change: Any = None, model: Any = MODEL, **options: Any) -> Report:
    """The model against its twin after `change` (of the torch module) has been made."""
    run = RunConfig(model=model, train=TrainConfig(seq_len=19))
    params = random_params(model, init="fan_in")
    module = build_torch(model, params)
    if change is not None:
        with torch.no_grad():
            change(module)
    settings = {"rungs": SHALLOW, "length": 19, "steps": 4} | options
    return compare_decoders(run, params, module, Options(**settings))


@pytest.fixture(scope="module")
def whole() -> Report:
    """Every rung but those of fine-tuning, which have tests of their own; both initialisations."""
    wanted = tuple(name for name in ORDER if name not in TUNED)
    return compare_decoders(RUN, options=Options(rungs=wanted, steps=6, length=19))


def test_twins_agree_on_every_rung(whole: Report) -> None:
    """All rungs of float64 are climbed and pass, within the limits that the suite promises."""
    assert whole.passed, "\n".join(whole.lines())
    assert {rung.name for rung in whole.rungs} == set(ORDER) - BELOW_FLOAT64 - set(TUNED)
    assert {r.case for r in whole.rungs if r.name == "gradients"} == {"normal", "fan_in"}
    for name in ("activations", "loss", "gradients", "trajectory", "decoding", "handover"):
        assert whole[name].worst.value <= limit("float64"), name
    deltas = [f for f in whole["updates"].findings if f.name.startswith("delta:")]
    assert deltas and max(f.value for f in deltas) <= limit("float64_delta")


def test_every_activation_of_the_issue_is_compared(whole: Report) -> None:
    """Norms, q and k after RoPE, scores, heads, attention out, router, experts, combine, block, final norm, logits."""
    names = {finding.name for finding in whole["activations"].findings}
    parts = ("attn_norm", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.heads", "attn", "mlp_norm")
    assert {f"blocks.0.{part}" for part in parts} <= names
    moe = ("router_logits", "expert_ids", "weights", "kept", "combined")
    assert {f"blocks.0.moe.{part}" for part in moe} <= names
    assert {"embed", "blocks.0", "blocks.1", "blocks.1.mlp", "final_norm", "logits"} <= names
    assert not {f.name for f in whole["loss"].findings} ^ {
        *("cross_entropy", "z", "balance", "router_z", "total_loss", "expert_load", "dropped"),
        *("logit_entropy", "router_entropy"),
    }


def exchange_experts(module: Any) -> None:
    for name in ("gate_up", "down"):
        weight = getattr(module.blocks[0].moe.experts, name)
        weight.copy_(weight[[1, 0, 2, 3]])


def permute_query(module: Any) -> None:
    weight = module.blocks[1].attn.q_proj.weight
    rows = torch.arange(6).view(2, 3).T.reshape(-1)
    weight[:6] = weight[:6][rows]


def permute_key(module: Any) -> None:
    weight = module.blocks[1].attn.k_proj.weight
    rows = torch.arange(12).view(2, 2, 3).transpose(1, 2).reshape(-1)
    weight.copy_(weight[rows])


def round_matrix(module: Any) -> None:
    weight = module.blocks[1].mlp.down_proj.weight
    weight.copy_(weight.bfloat16())


@pytest.mark.parametrize(
    ("change", "operation", "layer", "guess"),
    [
        (exchange_experts, "moe.experts.down", 0, "experts 0 and 1 exchanged"),
        (permute_query, "attn.q_proj.weight", 1, "RoPE's half-split and interleaved layout (head 0, H=6)"),
        (permute_key, "attn.k_proj.weight", 1, "RoPE's half-split and interleaved layout (all heads, H=6)"),
        (round_matrix, "mlp.down_proj.weight", 1, "rounded to bfloat16"),
    ],
    ids=["experts", "query", "key", "rounded"],
)
def test_a_damaged_export_is_named_and_explained(change: Any, operation: str, layer: int, guess: str) -> None:
    """One exchange of experts, one permutation of q or k rows, one rounded matrix: tensor and cause."""
    found = compared(change, rungs=("config", "tree"))
    first = found.divergence
    assert first is not None and not found.passed
    assert (first.rung, first.layer, first.operation) == ("tree", layer, operation)
    assert guess in first.causes[0]


def test_the_weights_of_a_damaged_export_part_the_forward_pass_too() -> None:
    """Beside the tensor, the report says where the activations part: at the projection's own output."""
    found = compared(permute_key)
    assert found.divergences()["forward"].operation == "attn.k" and found.divergences()["forward"].layer == 1


def test_what_no_weight_shows_is_located_in_the_forward_pass() -> None:
    """Another eps in one norm: same config, same weights, and the report points to that norm of that layer."""

    def change(module: Any) -> None:
        module.blocks[1].mlp_norm.eps = 1e-6

    first = compared(change).divergence
    assert first is not None
    assert (first.rung, first.layer, first.operation) == ("activations", 1, "mlp_norm")
    assert any("eps" in cause for cause in first.causes) and {"jax", "torch", "index"} <= set(first.detail)


def test_one_weight_by_a_part_in_ten_million_is_seen() -> None:
    """Also where only logits are compared."""

    def change(module: Any) -> None:
        module.lm_head.weight[3, 4] *= 1 + 1e-7

    found = compared(change)
    assert [rung.name for rung in found.rungs if not rung.passed] == ["tree", "activations"]


def test_another_configuration_is_named_by_its_field() -> None:
    """A lost theta: the config rung says the field and both values."""
    run = RunConfig(model=MODEL, train=TrainConfig(seq_len=19))
    params = random_params(MODEL)
    module = build_torch(dataclasses.replace(MODEL, rope_theta=10_000.0), params)
    first = compare_decoders(run, params, module, Options(rungs=SHALLOW, length=19)).divergence
    assert first is not None and (first.rung, first.operation) == ("config", "rope_theta")
    assert first.detail == {"jax": 5e4, "torch": 1e4}


def test_a_rung_that_raises_has_failed() -> None:
    """An error inside a rung is its finding: one line, and the other rungs are still climbed."""
    with mock.patch("torchref.attention.masked_softmax", side_effect=RuntimeError("no softmax today")):
        found = compared(rungs=("tree", "activations", "schedule"))
    assert [rung.passed for rung in found.rungs] == [True, False, True]
    assert found.divergence is not None and "no softmax today" in found.divergence.causes[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_is_judged_against_float64(dtype: str) -> None:
    """Both frameworks within the one-sided ratios and the caps, dense and mixture layers, routing replayed."""
    judged = ("activations", "activations_cap", "loss", "kl", "gradients", "gradients_cap")
    found = compare_decoders(RUN, options=Options(dtype=dtype, rungs=judged, length=19, inits=("fan_in",)))
    assert found.passed, "\n".join(found.lines())
    assert {rung.name for rung in found.rungs} == set(judged)
    assert found.inputs["flips_fan_in"]["decisions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rung_of_low_precision(dtype: str) -> None:
    """At both initialisations; in float32 with the trajectory's drift against that of an ensemble, and decoding."""
    found = compare_decoders(RUN, options=Options(dtype=dtype, steps=10, length=19))
    assert found.passed, "\n".join(found.lines())
    names = {rung.name for rung in found.rungs}
    assert names >= BELOW_FLOAT64 and ({"trajectory", "decoding"} <= names) == (dtype == "float32")
    if dtype == "float32":
        assert {"loss_jax", "loss_torch", "loss_float64", "loss_jax_raw"} <= set(found.curves)


def test_a_narrow_norm_in_jax_fails_the_one_sided_ratio() -> None:
    """Statistics in bfloat16 inside a float32 run: the ratio and the cap see it, at the first norm."""

    def narrow(self: Any, x: Any) -> Any:
        x = x.astype(jnp.bfloat16)
        root = jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
        return ((x / root) * self.weight[...].astype(jnp.bfloat16)).astype(jnp.float32)

    options = Options(dtype="float32", rungs=("activations", "activations_cap"), length=19, inits=("fan_in",))
    with mock.patch.object(jaxlm.layers.RMSNorm, "__call__", narrow):
        found = compare_decoders(RUN, options=options)
    first = found.divergence
    assert not found["activations"].passed and not found["activations_cap"].passed
    assert first is not None and (first.layer, first.operation) == (0, "attn_norm")


def test_gradients_called_zero_are_zero_and_no_others() -> None:
    """What the configuration proves to be zero is rounding in both frameworks; every other gradient is not."""
    model = tiny(
        {"n_active": 1, "balance_coef": 0.0},
        position="learned",
        qkv_bias=True,
        windows=(0, 1),
        mlp="gelu_erf",
    )
    zero = zero_gradients(model, 19)
    assert zero >= {"blocks.0.attn.k_proj.bias", "blocks.1.attn.q_proj.weight"}
    from convert.parity.inputs import hard_batch
    from convert.parity.sides import TorchSide

    train = TrainConfig(batch_size=4, seq_len=19, dtype="float64", param_dtype="float64")
    side = TorchSide.twin(RunConfig(model=model, train=train), random_params(model, init="fan_in"))
    grads, _ = side.gradients(hard_batch(4, 19, model.vocab_size))
    whole = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    assert {path for path, g in grads.items() if np.linalg.norm(g) <= limit("float64_zero") * whole} == zero


def test_presets_shrink_to_valid_models_that_keep_their_options() -> None:
    """Every preset: small sizes, the same switches, heads that stay grouped alike."""
    for name in PRESETS:
        model, small = preset(name).model, shrunk(preset(name)).model
        for field in (
            "position",
            "mlp",
            "qkv_bias",
            "qk_norm",
            "tied",
            "attn_bias_table",
            "rope_theta",
            "norm_eps",
        ):
            assert getattr(small, field) == getattr(model, field), (name, field)
        assert small.n_heads // small.n_kv_heads == model.n_heads // model.n_kv_heads, name
        assert small.d_model * small.n_layers <= 56 * 3 and bool(small.moe.n_experts) == bool(
            model.moe.n_experts
        )


def test_hard_lengths_are_no_multiple_of_eight() -> None:
    """515 where the context allows, and never a length that hides a padding error."""
    assert [hard_length(c) for c in (4096, 515, 512, 64, 19)] == [515, 515, 511, 63, 19]


def test_blind_spots_are_told() -> None:
    """A configuration on which faults can hide says which."""
    soft = tiny(rope_theta=10_000.0, norm_eps=1e-5, d_model=36)
    told = " ".join(blind_spots(soft))
    assert all(word in told for word in ("rope_theta", "norm_eps", "q_proj"))
    assert not [spot for spot in blind_spots(tiny()) if "context" not in spot]


@pytest.mark.parametrize(
    "bad", [{"rungs": ("forward",)}, {"dtype": "float16"}, {"steps": 0}], ids=["rung", "dtype", "steps"]
)
def test_options_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    """One line that says what is possible."""
    with pytest.raises(InputError):
        Options(**bad)
