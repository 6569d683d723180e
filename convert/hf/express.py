"""Which transformers class computes what a model of ours computes, and the keys that say so."""

from typing import Any

from convert.hf.families import FAMILIES, Family, family_named
from convert.hf.rope import write_rope
from convert.rules import ConversionError
from jaxlm.config import ModelConfig


def require_family(config: ModelConfig, family: str | None = None) -> Family:
    """The asked family, or the first that computes what this model computes.

    Raises ConversionError with every field and value that stands in the way.
    """
    if family is not None:
        chosen, found = family_named(family), obstacles(config, family)
        if found:
            raise ConversionError(
                "\n".join(f"{problem}: no {chosen.architecture} computes this" for problem in found)
            )
        return chosen
    mixture = config.moe.n_experts > 0
    near = {
        name: obstacles(config, name) for name, f in FAMILIES.items() if (f.experts is not None) == mixture
    }
    for name, found in near.items():
        if not found:
            return FAMILIES[name]
    everywhere = [
        problem for problem in next(iter(near.values())) if all(problem in found for found in near.values())
    ]
    lines = [f"{problem}: no transformers class computes this" for problem in everywhere]
    rest = {name: [problem for problem in found if problem not in everywhere] for name, found in near.items()}
    if all(rest.values()):
        lines.append("no transformers class computes this combination:")
        lines += [f"  {name} has no place for {', '.join(found)}" for name, found in rest.items()]
    raise ConversionError("\n".join(lines))


def obstacles(config: ModelConfig, family: str) -> list[str]:
    """Fields, with their values, that a family's class would compute otherwise; empty if it is the same model."""
    if family not in FAMILIES:
        return [f"model_type={family!r}"]
    chosen, found = FAMILIES[family], []

    def need(name: str, value: Any, *allowed: Any) -> None:
        if value not in allowed:
            found.append(f"{name}={value!r}")

    need("position", config.position, "rope")
    need("mlp", config.mlp, "swiglu")
    need("head_bias", config.head_bias, False)
    need("attn_bias_table", config.attn_bias_table, False)
    need("mlp_bias", config.mlp_bias, False, "mlp_bias" in chosen.defaults)
    need("qk_norm", config.qk_norm, family.startswith("qwen3"))
    if "attention_bias" in chosen.defaults:
        if config.qkv_bias != config.attn_out_bias:
            found.append(f"qkv_bias={config.qkv_bias} beside attn_out_bias={config.attn_out_bias}")
    else:
        need("attn_out_bias", config.attn_out_bias, False)
        need("qkv_bias", config.qkv_bias, family == "qwen2", family in ("qwen2", "qwen2_moe"))
    if family == "llama" and config.d_model % config.n_heads:
        found.append(f"d_model={config.d_model} that is no multiple of n_heads={config.n_heads}")
    sizes = {config.window(i) for i in range(config.n_layers)}
    allowed = {"none": sizes == {0}, "all": len(sizes) == 1, "layers": len(sizes - {0}) <= 1}
    if not allowed[chosen.windows]:
        found.append(f"windows={config.windows}")
    return found + _moe_obstacles(config, chosen)


def _moe_obstacles(config: ModelConfig, family: Family) -> list[str]:
    moe, found = config.moe, []
    if (family.experts is None and moe.n_experts) or (family.name == "mixtral" and not moe.n_experts):
        return [f"moe.n_experts={moe.n_experts}"]
    if not moe.n_experts:
        return []
    if moe.expert_bias:
        found.append(f"moe.expert_bias={moe.expert_bias}")
    if family.name == "mixtral":
        if not moe.renormalize:
            found.append(f"moe.renormalize={moe.renormalize}")
        if not all(map(config.is_moe, range(config.n_layers))):
            found.append(f"moe.pattern={moe.pattern}")
    if (family.name == "qwen2_moe") != bool(moe.shared_d_ff):
        found.append(f"moe.shared_d_ff={moe.shared_d_ff}")
    elif moe.shared_d_ff and not moe.shared_gate:
        found.append(f"moe.shared_gate={moe.shared_gate}")
    return found


def fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json that say what a model computes, and how it was initialised."""
    keys = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.expert_d_ff if family.name == "mixtral" else config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
    }
    keys |= write_rope(config)
    biases = {
        "attention_bias": config.attn_out_bias,
        "mlp_bias": config.mlp_bias,
        "qkv_bias": config.qkv_bias,
    }
    keys |= {key: value for key, value in biases.items() if key in family.defaults}
    return keys | _windows(config, family) | _moe(config, family)


def _windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    layers = [config.window(i) for i in range(config.n_layers)]
    size = max(layers) or None
    if "sliding_window" not in family.defaults:
        return {}
    keys: dict[str, Any] = {"sliding_window": size}
    if "use_sliding_window" in family.defaults:
        keys |= {"use_sliding_window": size is not None}
    if size and "layer_types" in family.defaults:
        # Versions that know no layer_types put the window on every layer from max_window_layers on.
        keys["max_window_layers"] = next(i for i, window in enumerate(layers) if window)
        keys["layer_types"] = ["sliding_attention" if window else "full_attention" for window in layers]
    return keys


def _moe(config: ModelConfig, family: Family) -> dict[str, Any]:
    moe = config.moe
    if family.experts is None:
        return {}
    if not moe.n_experts:
        return {"num_experts": 0}
    keys: dict[str, Any] = {
        "num_experts_per_tok": moe.n_active,
        "router_aux_loss_coef": 0.0 if moe.balance == "none" else moe.balance_coef,
    }
    if family.name == "mixtral":
        return keys | {"num_local_experts": moe.n_experts}
    sparse = [config.is_moe(i) for i in range(config.n_layers)]
    regular = range(1, config.n_layers + 1)
    steps = [s for s in regular if sparse == [(i + 1) % s == 0 for i in range(config.n_layers)]]
    keys |= {
        "num_experts": moe.n_experts,
        "moe_intermediate_size": config.expert_d_ff,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": steps[0] if steps else 1,
        "mlp_only_layers": [] if steps else [i for i, on in enumerate(sparse) if not on],
    }
    return keys | ({"shared_expert_intermediate_size": moe.shared_d_ff} if moe.shared_d_ff else {})


def notes_on(config: ModelConfig, family: Family) -> tuple[str, ...]:
    """What no config.json holds because only training reads it, and what transformers 4 makes of the rest."""
    moe, notes = config.moe, []
    if config.dropout:
        notes.append(f"dropout={config.dropout}")
    if config.init != "normal":
        notes.append(f"init={config.init!r}")
    if moe.n_experts:
        if moe.capacity_factor:
            notes.append(f"moe.capacity_factor={moe.capacity_factor}")
        if moe.router_z_coef:
            notes.append(f"moe.router_z_coef={moe.router_z_coef}")
        if moe.balance not in ("mixtral", "none"):
            notes.append(f"moe.balance={moe.balance!r}")
    notes = [f"{note} is not stored: only training reads it" for note in notes]
    if family.name == "qwen2_moe" and config.n_heads * config.head_dim != config.d_model:
        notes.append(
            f"transformers 4 does not open a qwen2_moe whose n_heads*head_dim={config.n_heads * config.head_dim} "
            f"differs from d_model={config.d_model}; transformers 5 does"
        )
    return tuple(notes)
