"""Every named run holds the numbers of its source, and the counts are right."""

import subprocess
import sys

import pytest

from jaxlm.config import ConfigError, ModelConfig, MoEConfig, RunConfig, from_dict, to_dict
from jaxlm.count import active_param_count, flops_per_token, param_count
from jaxlm.presets import PRESETS, preset

PUBLISHED = {  # totals that stand outside this project, or follow from its quickstart's description
    "quickstart": 6_102_720,
    "astragpt-7b": 6_195_253_248,
    "gptoss": 2_857_434_112,
    "gptoss-original": 3_664_132_435,
    "tfm-1.5": 152_557_440,
    "tfm-1.6": 167_237_504,
    "llama3-8b": 8_030_261_248,
    "llama-1.1b": 1_100_048_384,
}
each_preset = pytest.mark.parametrize("name", PRESETS)


def small(**changes: object) -> ModelConfig:
    """A decoder small enough to count by hand."""
    values: dict = dict(vocab_size=11, d_model=6, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=10)
    values |= dict(context=5, rope_theta=10_000.0, norm_eps=1e-5)
    return ModelConfig(**(values | changes))


@each_preset
def test_literal_is_the_parameter_count(name: str) -> None:
    """The number written beside a preset is what its config adds up to."""
    assert param_count(PRESETS[name].config.model) == PRESETS[name].params


@pytest.mark.parametrize(("name", "params"), PUBLISHED.items())
def test_published_totals(name: str, params: int) -> None:
    """The exact published totals."""
    assert param_count(preset(name).model) == params


@pytest.mark.parametrize(
    ("name", "claimed"),
    [
        ("tfm-1.5", 152e6),
        ("tfm-1.6", 167e6),
        ("minigpt-124m", 124e6),
        ("astragpt-3b", 3e9),
        ("astragpt-1b", 1e9),
    ],
)
def test_rounded_totals(name: str, claimed: float) -> None:
    """Where a source gives a rounded size, the preset is within two percent of it, and TFM within one."""
    limit = 0.01 if name.startswith("tfm") else 0.02
    assert abs(param_count(preset(name).model) / claimed - 1) < limit


def test_seven_billion_counts_full_attention() -> None:
    """AstraGPT's 7.0B is its model with as many kv heads as query heads."""
    fields = to_dict(preset("astragpt-7b").model) | {"n_kv_heads": 32}
    full = from_dict(ModelConfig, fields)
    assert round(param_count(full) / 1e9, 1) == 7.0
    assert round(full.n_layers * 4 * full.d_model**2 / 1e9, 2) == 2.15


def test_bias_tables_are_a_third_of_the_original() -> None:
    """1.61B of gptoss-original are its attention bias tables."""
    fields = to_dict(preset("gptoss-original").model)
    without = from_dict(ModelConfig, fields | {"attn_bias_table": False})
    assert (
        param_count(preset("gptoss-original").model) - param_count(without)
        == 12 * 32 * 2048**2
        == 1_610_612_736
    )


@each_preset
def test_preset_round_trips_through_json(name: str) -> None:
    """A preset written to a run's config.json reads back equal."""
    config = preset(name)
    assert from_dict(RunConfig, to_dict(config)) == config


@each_preset
def test_preset_has_a_source_and_a_note(name: str) -> None:
    """One line each."""
    for text in (PRESETS[name].source, PRESETS[name].note):
        assert text and "\n" not in text


@pytest.mark.parametrize(
    ("wrong", "near"), [("quick-start", "quickstart"), ("gpt-oss", "gptoss"), ("llama3_8b", "llama3-8b")]
)
def test_unknown_preset_names_the_nearest(wrong: str, near: str) -> None:
    """A misspelt name is answered with the right one and the list."""
    with pytest.raises(ConfigError) as error:
        preset(wrong)
    message = str(error.value)
    assert repr(wrong) in message and f"did you mean {near!r}?" in message and "\n" not in message
    assert all(name in message for name in PRESETS)


def test_quickstart_can_be_said_in_mixtral_terms_and_hides_no_default() -> None:
    """Only Mixtral's options are on; theta, eps, head_dim and more differ from its class's defaults."""
    configuration = pytest.importorskip("transformers.models.mixtral.configuration_mixtral")
    run = preset("quickstart")
    model = run.model
    plain = ModelConfig(
        **{
            name: getattr(model, name)
            for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads")
        },
        **{name: getattr(model, name) for name in ("head_dim", "d_ff", "context", "rope_theta", "norm_eps")},
        moe=MoEConfig(n_experts=8, n_active=2, balance_coef=model.moe.balance_coef),
    )
    assert model == plain
    theirs = configuration.MixtralConfig()
    assert model.rope_theta not in (theirs.rope_parameters["rope_theta"], 10_000.0)
    assert model.norm_eps not in (theirs.rms_norm_eps, 1e-5, 1e-6)
    assert model.head_dim != model.d_model // model.n_heads
    assert run.train.steps * run.train.batch_size * run.train.seq_len >= 1_000_000
    assert active_param_count(model) == 2_563_776


def test_dense_quickstart_costs_what_the_sparse_one_does() -> None:
    """Equal matmul FLOPs but for the router of each layer."""
    sparse, dense = preset("quickstart").model, preset("quickstart-dense").model
    router = 6 * sparse.n_layers * sparse.d_model * sparse.moe.n_experts
    assert flops_per_token(sparse, 256) - flops_per_token(dense, 256) == router


def test_original_gptoss_training_is_that_of_its_code() -> None:
    """The settings that its checkpoints and losses depend on."""
    run = preset("gptoss-original")
    moe, optim, train = run.model.moe, run.optim, run.train
    assert (moe.capacity_factor, moe.balance, moe.balance_coef, moe.renormalize) == (
        1.25,
        "layer_sum",
        0.01,
        True,
    )
    assert (run.model.norm_eps, run.model.rope_theta, run.model.dropout) == (1.1920929e-07, 10_000.0, 0.1)
    assert (optim.lr, optim.min_lr, optim.warmup_steps, optim.clip_norm) == (3e-4, 3e-5, 1_000, 1.0)
    assert (optim.b1, optim.b2, optim.weight_decay, optim.decay) == (
        0.9,
        0.95,
        0.1,
        "matrices_and_embeddings",
    )
    assert (train.batch_size // train.accumulation, train.accumulation) == (2, 8)
    assert train.steps * train.batch_size * train.seq_len == 65_536_000
    assert run.data.tokenizer == "o200k_base"


BASE = 11 * 6 * 2 + 6  # embedding, head, final norm
BLOCK = 6 + 6 * 32 + 2 * 6 * 16 + 32 * 6 + 6  # attn_norm, q, k and v, o, mlp_norm


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, BASE + BLOCK + 3 * 60),
        ({"n_layers": 3}, BASE + 3 * (BLOCK + 3 * 60)),
        ({"tied": True}, BASE - 66 + BLOCK + 180),
        ({"tied": True, "head_bias": True}, BASE - 66 + 11 + BLOCK + 180),
        ({"position": "learned"}, BASE + 5 * 6 + BLOCK + 180),
        ({"mlp": "gelu_erf"}, BASE + BLOCK + 120),
        ({"mlp_bias": True}, BASE + BLOCK + 180 + 10 + 10 + 6),
        ({"mlp": "gelu_tanh", "mlp_bias": True}, BASE + BLOCK + 120 + 10 + 6),
        ({"qkv_bias": True}, BASE + BLOCK + 180 + 32 + 16 + 16),
        ({"attn_out_bias": True}, BASE + BLOCK + 180 + 6),
        ({"attn_bias_table": True}, BASE + BLOCK + 180 + 4 * 5 * 5),
        ({"qk_norm": True}, BASE + BLOCK + 180 + 2 * 8),
        ({"moe": MoEConfig(n_experts=4)}, BASE + BLOCK + 6 * 4 + 4 * 180),
        ({"moe": MoEConfig(n_experts=4, d_ff=7)}, BASE + BLOCK + 6 * 4 + 4 * 3 * 42),
        ({"moe": MoEConfig(n_experts=4, expert_bias=True)}, BASE + BLOCK + 24 + 4 * (180 + 20 + 6)),
        (
            {"mlp": "gelu_erf", "moe": MoEConfig(n_experts=4, expert_bias=True)},
            BASE + BLOCK + 24 + 4 * (120 + 10 + 6),
        ),
        (
            {"mlp_bias": True, "moe": MoEConfig(n_experts=4, shared_d_ff=9, shared_gate=True)},
            BASE + BLOCK + 24 + 4 * 180 + (3 * 54 + 9 + 9 + 6) + 6,
        ),
        (
            {"n_layers": 3, "moe": MoEConfig(n_experts=4, pattern=(False, True))},
            BASE + 3 * BLOCK + 2 * 180 + 24 + 4 * 180,
        ),
    ],
)
def test_each_option_adds_its_own_tensors(changes: dict, expected: int) -> None:
    """Totals of a small decoder, added up by hand for every option that has parameters."""
    assert param_count(small(**changes)) == expected


def test_active_parameters_leave_out_idle_experts() -> None:
    """Of 4 experts with biases, 2 work; routers, shared experts and dense layers count in full."""
    moe = MoEConfig(n_experts=4, n_active=2, pattern=(True, False), expert_bias=True, shared_d_ff=9)
    model = small(n_layers=2, moe=moe)
    assert param_count(model) - active_param_count(model) == 2 * (180 + 20 + 6)
    assert active_param_count(small()) == param_count(small())


@pytest.mark.parametrize(
    ("name", "seq_len", "causal", "gigaflops"),
    [
        ("gptoss", 2_048, True, 2.477),
        ("gptoss", 2_048, False, 2.628),
        ("minigpt-124m", 1_024, True, 0.798),
        ("minigpt-124m", 1_024, False, 0.854),
        ("llama-1.1b", 2_048, True, 6.760),
        ("llama-1.1b", 2_048, False, 7.314),
    ],
)
def test_training_flops(name: str, seq_len: int, causal: bool, gigaflops: float) -> None:
    """Three models, counted by hand: 6 per active matmul parameter and 12 L N H T (half if causal)."""
    assert round(flops_per_token(preset(name).model, seq_len, causal) / 1e9, 3) == gigaflops


def test_windows_shorten_attention_only() -> None:
    """A window of W costs the pairs under its band, and one as long as the sequence costs nothing less."""
    full, per_position = flops_per_token(small(), 64), 12 * 4 * 8
    assert flops_per_token(small(windows=(64,)), 64) == flops_per_token(small(windows=(999,)), 64) == full
    band = (16 * 16 / 2 + 48 * 16) / 64  # a triangle of 16 rows, then 48 full ones
    assert full - flops_per_token(small(windows=(16,)), 64) == pytest.approx(per_position * (32 - band))
    mixed = flops_per_token(small(n_layers=2, windows=(16, 0)), 64)
    alone = flops_per_token(small(n_layers=2), 64)
    assert alone - mixed == pytest.approx(full - flops_per_token(small(windows=(16,)), 64))


def test_counting_needs_no_framework() -> None:
    """Presets and counts load neither jax nor torch."""
    code = (
        "import sys, jaxlm.count, jaxlm.presets; print(sorted({'jax', 'torch', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
