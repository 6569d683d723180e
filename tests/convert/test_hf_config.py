"""config.json of the Hugging Face families: what is read, what is refused, and what is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny

from convert.hf.config import from_model, to_model
from convert.hf.express import obstacles, require_family
from convert.hf.families import FAMILIES
from convert.rules import ConversionError
from jaxlm.config import ModelConfig, RopeScaling

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "rms_norm_eps": 3e-6,
    "rope_theta": 5e4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def raw(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json of a family with some keys changed."""
    return RAW | {"architectures": [FAMILIES[family].architecture], "model_type": family} | changes


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": (raw() | {"model_type": "gpt2"}, "model_type='gpt2'"),
    "no family": (raw() | {"model_type": None}, "model_type=None"),
    "activation": (raw(hidden_act="gelu"), "hidden_act='gelu'"),
    "quantised": (raw(quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
    "own code": (raw(auto_map={"AutoModel": "x.Y"}), "auto_map={'AutoModel': 'x.Y'}"),
    "classifier": (
        raw(architectures=["LlamaForSequenceClassification"]),
        "architectures=['LlamaForSequenceClassification']",
    ),
    "unknown": (raw(clip_qkv=8.0), "clip_qkv=8.0"),
    "partial": (raw(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "partial 5": (
        raw(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "rope_parameters.partial_rotary_factor=0.5",
    ),
    "dynamic": (raw(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling.rope_type='dynamic'"),
    "longrope": (raw(rope_scaling={"rope_type": "longrope"}), "rope_scaling.rope_type='longrope'"),
    "two types": (
        raw(rope_scaling={"rope_type": "linear", "type": "yarn", "factor": 2.0}),
        "rope_scaling.rope_type='linear' and rope_scaling.type='yarn' disagree",
    ),
    "no factor": (raw(rope_scaling={"rope_type": "linear"}), "rope_scaling.factor=None"),
    "factor": (raw(rope_scaling={"rope_type": "linear", "factor": "2"}), "rope_scaling.factor='2'"),
    "llama3 half": (
        raw(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        "rope_scaling.high_freq_factor=None",
    ),
    "llama3 order": (
        raw(rope_scaling={"rope_type": "llama3"} | LLAMA3 | {"low_freq_factor": 5.0}),
        "low_freq_factor=5.0",
    ),
    "yarn ramp": (
        raw(rope_scaling={"rope_type": "yarn", "factor": 4.0, "truncate": False}),
        "rope_scaling.truncate=False",
    ),
    "scaling key": (
        raw(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 32}),
        "rope_scaling.beta_fast=32",
    ),
    "two thetas": (
        raw(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "rope_theta=50000.0 and rope_parameters.rope_theta=10000.0 disagree",
    ),
    "two scalings": (
        raw(
            rope_scaling={"rope_type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
        ),
        "'factor': 2.0",
    ),
    "theta": (raw(rope_theta="1e4"), "rope_theta='1e4'"),
    "width": (raw(hidden_size="24"), "hidden_size='24'"),
    "layers": (raw(num_hidden_layers=0), "num_hidden_layers=0"),
    "heads": (raw(num_key_value_heads=4), "n_kv_heads=4"),
    "tie": (raw(tie_word_embeddings="yes"), "tie_word_embeddings='yes'"),
    "eps": (raw(rms_norm_eps=None), "rms_norm_eps=None"),
    "llama window": (raw(sliding_window=16), "sliding_window=16"),
    "llama layer types": (
        raw(layer_types=["sliding_attention", "full_attention"]),
        "layer_types=['sliding_attention', 'full_attention']",
    ),
    "mistral bias": (raw("mistral", attention_bias=True), "attention_bias=True"),
    "mistral window": (raw("mistral", sliding_window=0), "sliding_window=0"),
    "qwen2 mlp bias": (raw("qwen2", mlp_bias=True), "mlp_bias=True"),
    "qwen2 layer types": (raw("qwen2", layer_types=["full_attention"]), "layer_types=['full_attention']"),
    "qwen2 idle window": (
        raw("qwen2", layer_types=["sliding_attention"] * 2),
        "layer_types=['sliding_attention'",
    ),
    "qwen2_moe window": (raw("qwen2_moe", use_sliding_window=True), "use_sliding_window=True"),
    "qwen3 head_dim": (raw("qwen3", head_dim=None), "head_dim=None"),
    "qwen3_moe layers": (raw("qwen3_moe", mlp_only_layers=[7]), "mlp_only_layers=[7]"),
    "qwen3_moe step": (raw("qwen3_moe", decoder_sparse_step=0), "decoder_sparse_step=0"),
    "two counts": (
        raw("qwen3_moe", **MIXTURE, num_local_experts=8),
        "num_experts=4 and num_local_experts=8 disagree",
    ),
    "too active": (raw("mixtral", num_local_experts=4, num_experts_per_tok=5), "n_active=5"),
    "shared": (
        raw("qwen3_moe", **MIXTURE, shared_expert_intermediate_size=8),
        "shared_expert_intermediate_size=8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_cannot_express_is_refused_by_key_and_value(name: str) -> None:
    """One line with the key and what stands there."""
    values, expected = REFUSED[name]
    with pytest.raises(ConversionError) as caught:
        to_model(values)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and expected in lines[0], lines


def test_all_refusals_come_at_once() -> None:
    """Four faults of four kinds, four lines."""
    faults = {"hidden_act": "gelu", "clip_qkv": 8.0, "rope_scaling": {"type": "dynamic"}, "rms_norm_eps": "x"}
    with pytest.raises(ConversionError) as caught:
        to_model(raw(**faults))
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_key_means_what_transformers_takes(family: str) -> None:
    """Every default in the table is the class's own, and the whole of an empty config reads alike."""
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, FAMILIES[family].architecture.replace("ForCausalLM", "Config"))
    config, defaults = config_class(), FAMILIES[family].defaults
    for key, value in defaults.items():
        if key == "rope_theta":
            assert config.rope_parameters["rope_theta"] == value
        else:  # None stands for a class that has no such field, and derives it
            assert getattr(config_class, key, None) == value, key
    ours = to_model({"model_type": family}).config
    assert ours.vocab_size == config.vocab_size
    assert ours.rope_theta == config.rope_parameters["rope_theta"]
    assert ours.norm_eps == config.rms_norm_eps
    heads = config.hidden_size // config.num_attention_heads
    assert ours.head_dim == (getattr(config, "head_dim", None) or heads)
    assert ours.n_kv_heads == config.num_key_value_heads
    full = to_model(json.loads(json.dumps(config.to_dict()))).config  # every key written out
    assert full == ours


@pytest.mark.parametrize(
    ("kind", "facts", "expected"),
    [
        ("linear", {"factor": 2.5}, RopeScaling("linear", 2.5)),
        ("llama3", LLAMA3, RopeScaling("llama3", 8.0, 8, 1.0, 4.0)),
        ("yarn", {"factor": 4.0}, RopeScaling("yarn", 4.0, 32)),  # the context stands in for the original one
        (
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16, "beta_slow": 2}
            | {"attention_factor": 1.25},
            RopeScaling("yarn", 4.0, 8, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25),
        ),
    ],
)
def test_both_forms_of_rope_say_the_same(kind: str, facts: dict[str, Any], expected: RopeScaling) -> None:
    """`rope_theta` with `rope_scaling` (by either name of the type), `rope_parameters`, and all three together."""
    bare = {key: value for key, value in RAW.items() if key != "rope_theta"}
    four = {"rope_theta": 5e4, "rope_scaling": {"rope_type": kind} | facts}
    five = {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4} | facts}
    forms = [four, five, four | five, {"rope_theta": 5e4, "rope_scaling": {"type": kind} | facts}]
    for form in forms:
        config = to_model(bare | form).config
        assert (config.rope_theta, config.rope_scaling) == (5e4, expected)
    again, _ = from_model(to_model(bare | four).config, "float32")
    assert again["rope_parameters"] == again["rope_scaling"] | {"rope_theta": again["rope_theta"]}
    assert to_model(again).config == to_model(bare | four).config


def test_yarn_with_mscale_scales_as_transformers() -> None:
    """mscale over mscale_all_dim becomes the attention factor that transformers computes from them."""
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    scaling |= {"mscale": 1.5, "mscale_all_dim": 0.5}
    config = transformers.LlamaConfig(**raw(rope_scaling=dict(scaling)))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert to_model(raw(rope_scaling=scaling)).config.rope_scaling.attention_factor == pytest.approx(
        expected, rel=1e-15
    )


def test_training_only_settings_are_noted_not_refused() -> None:
    """Dropout and jitter change nothing that is computed after training."""
    imported = to_model(raw("mixtral", attention_dropout=0.1, router_jitter_noise=0.2))
    assert [note.split(" ")[0] for note in imported.notes] == [
        "attention_dropout=0.1",
        "router_jitter_noise=0.2",
    ]
    config = tiny(
        {"capacity_factor": 2.0, "router_z_coef": 0.1, "balance": "maxtext"}, dropout=0.1, init="fan_in"
    )
    named = [note.split("=")[0] for note in from_model(config, "float32")[1]]
    assert named == ["dropout", "init", "moe.capacity_factor", "moe.router_z_coef", "moe.balance"]


CHOICES: dict[str, ModelConfig] = {
    "llama": tiny(),
    "llama ": tiny(qkv_bias=True, attn_out_bias=True, mlp_bias=True),
    "mistral": tiny(windows=(8,)),
    "mistral ": tiny(n_heads=5, n_kv_heads=5),  # LlamaConfig wants d_model to be a multiple of n_heads
    "qwen2": tiny(qkv_bias=True, windows=(0, 8)),
    "qwen3": tiny(qk_norm=True),
    "qwen3 ": tiny(qk_norm=True, qkv_bias=True, attn_out_bias=True),
    "mixtral": tiny({}, windows=(8,)),
    "qwen2_moe": tiny({"shared_d_ff": 16, "shared_gate": True}, qkv_bias=True),
    "qwen2_moe ": tiny({"shared_d_ff": 16, "shared_gate": True, "renormalize": False}),
    "qwen3_moe": tiny({"renormalize": False, "pattern": (False, True)}, qk_norm=True),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_family_is_the_first_that_computes_the_same(name: str) -> None:
    """Without being told; what it writes reads back as the same model."""
    config = CHOICES[name]
    assert require_family(config).name == name.strip()
    values, _ = from_model(config, "float32")
    assert values["model_type"] == name.strip()
    back = to_model(values).config
    if name.strip() == "mixtral":  # has one width, and no dense layer that could have another
        config = dataclasses.replace(config, d_ff=20, moe=dataclasses.replace(config.moe, d_ff=0))
    assert back == config


UNEXPRESSED: dict[str, tuple[ModelConfig, list[str]]] = {
    "learned": (tiny(position="learned"), ["position='learned'"]),
    "gelu": (tiny(mlp="gelu_erf"), ["mlp='gelu_erf'"]),
    "table": (tiny(attn_bias_table=True, head_bias=True), ["attn_bias_table=True", "head_bias=True"]),
    "biases": (
        tiny(qkv_bias=True, qk_norm=True),
        ["qk_norm=True", "qkv_bias=True beside attn_out_bias=False"],
    ),
    "out bias": (tiny(attn_out_bias=True), ["qkv_bias=False beside attn_out_bias=True"]),
    "windows": (tiny(windows=(4, 8)), ["windows=(4, 8)"]),
    "expert bias": (tiny({"expert_bias": True}), ["moe.expert_bias=True"]),
    "raw router": (
        tiny({"renormalize": False}),
        ["moe.renormalize=False", "moe.shared_d_ff=0", "qk_norm=False"],
    ),
    "no gate": (tiny({"shared_d_ff": 8}), ["moe.shared_gate=False"]),
    "all": (tiny(position="learned", mlp="gelu_tanh", head_bias=True), ["position=", "mlp=", "head_bias="]),
}


@pytest.mark.parametrize("name", UNEXPRESSED)
def test_what_no_class_computes_is_refused_with_field_and_value(name: str) -> None:
    """Everything that stands in the way, at once; and a family that was asked for says its own."""
    config, expected = UNEXPRESSED[name]
    with pytest.raises(ConversionError, match="no transformers class computes this") as caught:
        from_model(config, "float32")
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    with pytest.raises(ConversionError, match="no Qwen3ForCausalLM computes this"):
        from_model(config, "float32", family="qwen3")
    assert obstacles(config, "llama")


ORIGINS = {
    "legacy": raw(
        "llama", rope_scaling={"type": "linear", "factor": 2.0}, pretraining_tp=2, torch_dtype="float16"
    ),
    "five": raw("mistral", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 7e4}),
    "sparse keys": {
        key: value for key, value in raw("qwen2").items() if key not in ("head_dim", "rms_norm_eps")
    },
    "alias": raw("qwen3_moe", num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=20),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_an_unchanged_config_keeps_its_own_keys(name: str) -> None:
    """Every key as it was, and what a reader of the other version of transformers would miss."""
    origin = {key: value for key, value in ORIGINS[name].items() if value is not None}
    config = to_model(origin).config
    out, _ = from_model(config, origin.get("torch_dtype", "float32"), origin)
    added = {key: value for key, value in out.items() if key not in origin}
    assert {key: out[key] for key in origin} == origin
    assert (
        added
        == {
            "legacy": {"dtype": "float16"},
            "five": {"rope_theta": 7e4},
            "sparse keys": {},
            "alias": {"num_experts": 4},
        }[name]
    )


def test_changed_fields_are_written_and_nothing_else_is() -> None:
    """A longer context and another theta in the form the file had, the rest verbatim."""
    origin = raw("qwen2", rope_scaling=None, use_cache=False, max_window_layers=28)
    config = dataclasses.replace(to_model(origin).config, context=64, rope_theta=9e4)
    out, _ = from_model(config, "float32", origin)
    assert to_model(out).config == config
    changed = {key for key in origin if out.get(key) != origin[key]}
    assert changed == {"max_position_embeddings", "rope_theta"}
    wider = dataclasses.replace(config, d_model=48, n_layers=3, windows=(0, 8, 8))  # head_dim must not follow
    sparse = {key: value for key, value in origin.items() if key != "head_dim"}
    sparse["hidden_size"] = 36
    out, _ = from_model(dataclasses.replace(wider, head_dim=6), "float32", sparse)
    assert to_model(out).config == dataclasses.replace(wider, head_dim=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_theta_survives_in_both_key_forms(family: str) -> None:
    """What transformers 4 reads and what transformers 5 reads are the same numbers, and not the class's default."""
    values, _ = from_model(
        to_model(raw(family, rope_theta=123.0)).config, "bfloat16", special_ids={"eos_token_id": 5}
    )
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 123.0
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"
    assert (values["bos_token_id"], values["eos_token_id"]) == (None, 5)


def test_a_config_that_transformers_saved_reads_as_the_object_it_was(tmp_path: Path) -> None:
    """Windows from max_window_layers, in the saved file and in one that leaves layer_types to the class."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
        "num_hidden_layers": 4,
    }
    transformers.Qwen3Config(**(RAW | settings)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text()) | {"architectures": None}
    for values in (saved, raw("qwen3", **settings)):
        assert to_model(values).config.windows == (0, 0, 5, 5)
