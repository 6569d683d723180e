"""The families that Hugging Face and jaxlm share: tensor names, classes, and what a class takes for an absent key.

Mixtures are stored in two layouts. `per_expert` is what the files on the hub hold and what both transformers 4 and 5
open: a matrix for each expert. `fused` is how transformers 5 keeps them in memory: the experts of a layer stacked,
gate and up in one tensor. Defaults are those of the configuration classes, the same in transformers 4.57 and 5.23.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from convert.rules import (
    EACH,
    EACH_FIRST_HALF,
    EACH_SECOND_HALF,
    SAME,
    TRANSPOSE,
    ConversionError,
    Pair,
    Rule,
    pair_up,
)
from jaxlm.config import ModelConfig
from jaxlm.model import abstract_model

Layout = Literal["per_expert", "fused"]

_BLOCK = r"blocks\.(\d+)\."
_LAYER = r"model.layers.\1."

_DECODER = (
    Rule(r"embed\.weight", "model.embed_tokens.weight", SAME),
    Rule(_BLOCK + r"attn_norm\.weight", _LAYER + "input_layernorm.weight", SAME),
    Rule(_BLOCK + r"mlp_norm\.weight", _LAYER + "post_attention_layernorm.weight", SAME),
    Rule(_BLOCK + r"attn\.([qkvo]_proj)\.weight", _LAYER + r"self_attn.\2.weight", TRANSPOSE),
    Rule(r"final_norm\.weight", "model.norm.weight", SAME),
    Rule(r"lm_head\.weight", "lm_head.weight", TRANSPOSE),
)
_MLP = Rule(_BLOCK + r"mlp\.(gate|up|down)_proj\.weight", _LAYER + r"mlp.\2_proj.weight", TRANSPOSE)
_MLP_BIAS = Rule(_BLOCK + r"mlp\.(gate|up|down)_proj\.bias", _LAYER + r"mlp.\2_proj.bias", SAME)
_QKV_BIAS = Rule(_BLOCK + r"attn\.([qkv]_proj)\.bias", _LAYER + r"self_attn.\2.bias", SAME)
_ATTN_BIAS = Rule(_BLOCK + r"attn\.([qkvo]_proj)\.bias", _LAYER + r"self_attn.\2.bias", SAME)
_QK_NORM = Rule(_BLOCK + r"attn\.([qk]_norm)\.weight", _LAYER + r"self_attn.\2.weight", SAME)
_SHARED = (
    Rule(
        _BLOCK + r"moe\.shared\.(gate|up|down)_proj\.weight",
        _LAYER + r"mlp.shared_expert.\2_proj.weight",
        TRANSPOSE,
    ),
    Rule(_BLOCK + r"moe\.shared_gate\.weight", _LAYER + "mlp.shared_expert_gate.weight", TRANSPOSE),
)


def _per_expert(module: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    expert = _LAYER + module + ".experts.{e}."
    return (
        Rule(_BLOCK + r"moe\.router\.weight", _LAYER + module + ".gate.weight", TRANSPOSE),
        Rule(_BLOCK + r"moe\.experts\.gate_up", expert + gate + ".weight", TRANSPOSE, EACH_FIRST_HALF),
        Rule(_BLOCK + r"moe\.experts\.gate_up", expert + up + ".weight", TRANSPOSE, EACH_SECOND_HALF),
        Rule(_BLOCK + r"moe\.experts\.down", expert + down + ".weight", TRANSPOSE, EACH),
    )


_FUSED = (
    Rule(_BLOCK + r"moe\.router\.weight", _LAYER + "mlp.gate.weight", TRANSPOSE),
    Rule(_BLOCK + r"moe\.experts\.gate_up", _LAYER + "mlp.experts.gate_up_proj", TRANSPOSE),
    Rule(_BLOCK + r"moe\.experts\.down", _LAYER + "mlp.experts.down_proj", TRANSPOSE),
)
_MIXTRAL = {"per_expert": _per_expert("block_sparse_moe", "w1", "w3", "w2"), "fused": _FUSED}
_QWEN = {"per_expert": _per_expert("mlp", "gate_proj", "up_proj", "down_proj"), "fused": _FUSED}


@dataclass(frozen=True)
class Family:
    """One model_type of transformers."""

    name: str  # model_type
    architecture: str  # the class that generates text
    rules: tuple[Rule, ...]  # of everything but the experts
    defaults: Mapping[str, Any]  # value of a key that a config.json does not have
    experts: Mapping[str, tuple[Rule, ...]] | None = None  # layout -> rules; None = every layer is dense
    # What a sliding window can be said of. None in qwen2_moe: transformers 4 and 5 put it on different layers.
    windows: Literal["none", "all", "layers"] = "none"
    alias: tuple[str, str] | None = (
        None  # a key that only transformers 5 reads, and the key that both versions read
    )


_BASE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,  # hidden_size // num_attention_heads
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_MISTRAL = _BASE | {
    "vocab_size": 32_000,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
_QWEN2 = _BASE | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN_MOE = _QWEN2 | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            (*_DECODER, _MLP, _MLP_BIAS, _ATTN_BIAS),
            _BASE
            | {
                "vocab_size": 32_000,
                "intermediate_size": 11_008,
                "num_key_value_heads": None,  # num_attention_heads
                "max_position_embeddings": 2048,
                "attention_bias": False,
                "mlp_bias": False,
            },
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            (*_DECODER, _MLP),
            _MISTRAL | {"sliding_window": 4096},
            windows="all",
        ),
        Family("qwen2", "Qwen2ForCausalLM", (*_DECODER, _MLP, _QKV_BIAS), _QWEN2, windows="layers"),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            (*_DECODER, _MLP, _ATTN_BIAS, _QK_NORM),
            _QWEN2 | {"head_dim": 128, "attention_bias": False},
            windows="layers",
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            _DECODER,
            _MISTRAL
            | {
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "sliding_window": None,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "router_aux_loss_coef": 0.001,
            },
            _MIXTRAL,
            windows="all",
            alias=("num_experts", "num_local_experts"),
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            (*_DECODER, _MLP, _QKV_BIAS, *_SHARED),
            _QWEN_MOE
            | {
                "intermediate_size": 5632,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "num_experts_per_tok": 4,
                "num_experts": 60,
                "qkv_bias": True,
            },
            _QWEN,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            (*_DECODER, _MLP, _ATTN_BIAS, _QK_NORM),
            {
                key: value
                for key, value in _QWEN_MOE.items()
                if key not in ("max_window_layers", "layer_types")
            }
            | {
                "intermediate_size": 6144,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 768,
                "num_experts_per_tok": 8,
                "num_experts": 128,
                "attention_bias": False,
            },
            _QWEN,
            windows="all",
            alias=("num_local_experts", "num_experts"),  # the one that transformers 5 writes
        ),
    )
}

# Buffers that files written by old versions of transformers hold; computed from the config, never read.
INERT_TENSORS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def family_named(name: str) -> Family:
    """The family of a model_type. Raises ConversionError with the known ones."""
    if name not in FAMILIES:
        raise ConversionError(f"model_type={name!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def pairs(config: ModelConfig, family: str, layout: Layout = "per_expert") -> list[Pair]:
    """The table of a family applied to a model: our paths and layouts, Hugging Face's names and [out, in] layouts.

    Raises ConversionError for an unknown family or layout, and where the family has no place for a tensor.
    """
    chosen = family_named(family)
    if layout not in get_args(Layout):
        raise ConversionError(f"layout={layout!r} must be one of {', '.join(get_args(Layout))}")
    rules = chosen.rules + (chosen.experts[layout] if chosen.experts else ())
    return pair_up(rules, {path: tuple(s.shape) for path, s in abstract_model(config).shapes.items()})


def layout_of(names: Iterable[str]) -> Layout:
    """Which layout the experts of a checkpoint are stored in; `per_expert` where it has none.

    Raises ConversionError if both are mixed.
    """
    found: dict[Layout, str] = {}
    for name in names:
        if re.search(r"\.experts\.\d+\.", name):
            found.setdefault("per_expert", name)
        elif re.search(r"\.experts\.(gate_up|down)_proj$", name):
            found.setdefault("fused", name)
    if len(found) > 1:
        raise ConversionError(
            f"the experts are stored in two layouts at once: {found['per_expert']} and {found['fused']}"
        )
    return "fused" if "fused" in found else "per_expert"
