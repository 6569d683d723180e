"""ModelConfig <-> the metadata of llama.cpp's `llama` architecture, and what that architecture cannot say.

What llama.cpp computes was read off its sources and is held to by the tests that run it. Numbers travel as float32 and
come back as the shortest decimal that gives the same float32. Our own key `jaxlm.config` keeps what has no place in the
format (initialisation, dropout, the balance loss); it counts only while it agrees with the rest of the file.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.gguf_header import Stored, Value
from convert.rules import ConversionError
from jaxlm.config import ConfigError, ModelConfig, MoEConfig, RopeScaling, from_dict, to_dict
from jaxlm.rope_table import rope_frequencies

ARCHITECTURE = "llama"
CONFIG_KEY = "jaxlm.config"
_MOST_LAYERS, _MOST_EXPERTS, _LONGEST = 512, 1024, 1 << 24  # the first two are llama.cpp's own limits
_YARN_DEFAULTS = (32.0, 1.0)  # beta_fast, beta_slow: this architecture takes no others

# Keys that say nothing new or nothing about the arithmetic; keys that are neither read nor here are refused.
_INERT = {"llama.tensor_data_layout", "llama.rope.scaling.finetuned", "llama.expert_feed_forward_length"}


def refused_fields(config: ModelConfig) -> list[str]:
    """Every field that the architecture cannot express, with its value, one line each."""
    c, moe = config, config.moe
    mixed = len({c.is_moe(layer) for layer in range(c.n_layers)}) > 1
    cases = {
        f"position={c.position!r}: only 'rope'": c.position != "rope",
        f"windows={c.windows}: only full attention": any(0 < w < c.context for w in c.windows),
        f"mlp={c.mlp!r}: only 'swiglu'": c.mlp != "swiglu",
        f"qk_norm={c.qk_norm}: no norm on q and k": c.qk_norm,
        f"head_bias={c.head_bias}: no bias on the logits": c.head_bias,
        f"attn_bias_table={c.attn_bias_table}: no bias on the scores": c.attn_bias_table,
        f"n_layers={c.n_layers}: at most {_MOST_LAYERS}": c.n_layers > _MOST_LAYERS,
    }
    if moe.n_experts:
        cases |= {
            f"moe.n_experts={moe.n_experts}: at most {_MOST_EXPERTS}": moe.n_experts > _MOST_EXPERTS,
            f"moe.pattern={moe.pattern}: all layers or none": mixed,
            f"moe.renormalize={moe.renormalize}: only renormalised routing": not moe.renormalize,
            f"moe.expert_bias={moe.expert_bias}: no biases in experts": moe.expert_bias,
            f"moe.shared_d_ff={moe.shared_d_ff}: no shared expert": moe.shared_d_ff > 0,
        }
    problems = [f"{case} in GGUF's llama architecture" for case, refused in cases.items() if refused]
    if not problems:
        problems += [
            f"{key}={value} is beyond float32"
            for key, value in metadata(config).items()
            if isinstance(value, float) and not (0 < abs(_single(value)) < math.inf)
        ]
    return problems


def metadata(config: ModelConfig) -> dict[str, int | float | str]:
    """The keys that decide the arithmetic; ints are written as uint32, floats as float32."""
    c = config
    facts: dict[str, int | float | str] = {
        "vocab_size": c.vocab_size,
        "context_length": c.context,
        "embedding_length": c.d_model,
        "block_count": c.n_layers,
        "feed_forward_length": c.expert_d_ff if c.moe.n_experts else c.d_ff,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta,
    }
    if c.moe.n_experts:
        facts |= {"expert_count": c.moe.n_experts, "expert_used_count": c.moe.n_active}
    facts |= _scaling_metadata(c)
    return {f"{ARCHITECTURE}.{key}": value for key, value in facts.items()}


def _scaling_metadata(config: ModelConfig) -> dict[str, int | float | str]:
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if scaling.kind != "yarn":
        return {}
    _, magnitude = rope_frequencies(config.head_dim, config.rope_theta, scaling, config.context)
    if not _yarn_is_expressible(config):
        return {} if magnitude == 1 else {"rope.scaling.attn_factor": magnitude}
    facts: dict[str, int | float | str] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_context,
    }
    extra = magnitude / _yarn_magnitude(scaling.factor)
    return facts if extra == 1 else facts | {"rope.scaling.attn_factor": extra}


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama.cpp must divide each frequency by [H/2] float32 where metadata cannot say it, else None.

    Llama 3's scaling travels like this by convention; here so does YaRN with other ramps than the default.
    """
    scaling = config.rope_scaling
    if scaling.kind in ("none", "linear") or (scaling.kind == "yarn" and _yarn_is_expressible(config)):
        return None
    plain, _ = rope_frequencies(config.head_dim, config.rope_theta, RopeScaling(), config.context)
    scaled, _ = rope_frequencies(config.head_dim, config.rope_theta, scaling, config.context)
    return (plain / scaled).astype(np.float32)


def _yarn_magnitude(factor: float) -> float:
    """Factor of cos and sin that llama.cpp takes by itself."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _yarn_is_expressible(config: ModelConfig) -> bool:
    """Whether llama.cpp builds the same ramp from its fixed betas: in float32, and never of negative width."""
    scaling, double = config.rope_scaling, 2 * math.log(config.rope_theta)
    if (scaling.beta_fast, scaling.beta_slow) != _YARN_DEFAULTS:
        return False
    first, last = (
        config.head_dim * math.log(scaling.original_context / (beta * 2 * math.pi)) / double
        for beta in _YARN_DEFAULTS
    )
    near = any(
        abs(end - round(end)) < 1e-3 for end in (first, last)
    )  # where float32 may round to the other side
    return not near and min(math.ceil(last), config.head_dim - 1) >= max(math.floor(first), 0)


def _single(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _shortest(value: float) -> float:
    """The shortest decimal that float32 reads as this value: 1e-05 for the float32 next to it."""
    return float(str(np.float32(value)))


def read_config(
    facts: Mapping[str, Value], tensors: Mapping[str, Stored], factors: np.ndarray | None
) -> tuple[ModelConfig, list[str]]:
    """The model that a file describes, and notes on what was left aside.

    Args:
        facts: the file's metadata.
        tensors: its tensors; biases and a tied head are recognised by them.
        factors: the values of rope_freqs.weight, if there.

    Raises:
        ConversionError: a key is missing, mistyped, contradictory, or asks for other arithmetic; all of them at once.
    """
    if facts.get("general.architecture") != ARCHITECTURE:
        raise ConversionError(
            f"general.architecture={facts.get('general.architecture')!r} is not supported; only 'llama' is"
        )
    if facts.get("split.count", 0) not in (0, 1):
        raise ConversionError(f"split.count={facts['split.count']}: merge the parts into one file first")
    kept = _kept_config(facts, factors)
    if kept is not None:
        return kept, _notes(facts)
    config = _told_config(facts, tensors, factors)
    stale = (
        [f"{CONFIG_KEY} does not describe this file any more and was ignored"] if CONFIG_KEY in facts else []
    )
    return config, stale + _notes(facts)


def _kept_config(facts: Mapping[str, Value], factors: np.ndarray | None) -> ModelConfig | None:
    """`jaxlm.config`, if writing it again would give the same metadata and the same factors."""
    try:
        config = from_dict(ModelConfig, json.loads(str(facts.get(CONFIG_KEY, ""))))
        if config.n_layers > _MOST_LAYERS or refused_fields(config):
            return None
        wanted, expected = metadata(config), rope_factors(config)
    except (ValueError, RecursionError, OverflowError):  # no config, or a damaged one
        return None
    own = {k: v for k, v in facts.items() if k.startswith(f"{ARCHITECTURE}.")}
    same = wanted.keys() == own.keys() and all(
        type(own[k]) is type(v) and own[k] == (_single(v) if isinstance(v, float) else v)
        for k, v in wanted.items()
    )
    if expected is None or factors is None:
        return config if same and expected is None and factors is None else None
    return config if same and np.array_equal(expected, factors) else None


class _Reader:
    """Typed look-ups that remember what was asked for and collect what was wrong."""

    def __init__(self, facts: Mapping[str, Value]) -> None:
        self.facts, self.seen, self.problems = facts, set[str](), list[str]()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        name = f"{ARCHITECTURE}.{key}"
        self.seen.add(name)
        value: Any = self.facts.get(name, default)
        if value is None:
            self.problems.append(f"{name} is missing")
        elif type(value) is not kind:
            self.problems.append(f"{name}={str(value)[:60]} must be one {kind.__name__}")
        elif kind is int and not 0 <= value < 1 << 31:
            self.problems.append(f"{name}={value} must be between 0 and 2^31")
        elif kind is float and not math.isfinite(value):
            self.problems.append(f"{name}={value} must be finite")
        else:
            return _shortest(value) if kind is float else value
        return {int: 1, float: 1.0, str: ""}[kind]  # stands in until the problems are reported


def _told_config(
    facts: Mapping[str, Value], tensors: Mapping[str, Stored], factors: np.ndarray | None
) -> ModelConfig:
    """The config that the format's own keys and the tensors' names tell."""
    keys = _Reader(facts)
    D, N = keys.get("embedding_length", int), keys.get("attention.head_count", int)
    H = keys.get("attention.key_length", int, D // max(N, 1))
    told: dict[str, Any] = {
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 1,
        "d_model": D,
        "n_layers": keys.get("block_count", int),
        "n_heads": N,
        "n_kv_heads": keys.get("attention.head_count_kv", int, N),
        "head_dim": H,
        "d_ff": keys.get("feed_forward_length", int),
        "context": keys.get("context_length", int),
        "rope_theta": keys.get("rope.freq_base", float, 10000.0),
        "norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "attn_out_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tied": "output.weight" not in tensors,
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, int, H) != H:
            keys.problems.append(
                f"{ARCHITECTURE}.{key}={facts[f'{ARCHITECTURE}.{key}']} must be the head's {H}"
            )
    if keys.get("vocab_size", int, told["vocab_size"]) != told["vocab_size"]:
        keys.problems.append(
            f"llama.vocab_size={facts['llama.vocab_size']}, token_embd has {told['vocab_size']}"
        )
    experts = {
        "n_experts": keys.get("expert_count", int, 0),
        "n_active": keys.get("expert_used_count", int, 0),
    }
    told["moe"] = experts if experts["n_experts"] else {}
    told["rope_scaling"] = _told_scaling(keys, told, factors)
    keys.problems += _out_of_reach(told, tensors)
    keys.problems += [
        f"{key}={str(value)[:60]} may change the arithmetic and is not supported"
        for key, value in facts.items()
        if key.startswith(f"{ARCHITECTURE}.") and key not in keys.seen | _INERT
    ]
    if keys.problems:
        raise ConversionError("\n".join(keys.problems))
    try:
        told["moe"] = MoEConfig(**told["moe"])
        return ModelConfig(**told)
    except ConfigError as error:
        raise ConversionError(f"the metadata describes no model: {error}") from None


def _out_of_reach(told: Mapping[str, Any], tensors: Mapping[str, Stored]) -> list[str]:
    """Sizes that no tensor of the file has, so that nothing is built from them."""
    largest = max((n for t in tensors.values() for n in t.shape), default=0)
    sizes = {
        "llama.embedding_length": told["d_model"],
        "llama.feed_forward_length": told["d_ff"],
        "llama.attention.head_count times key_length": told["n_heads"] * told["head_dim"],
        "llama.expert_count": told["moe"].get("n_experts", 0),
    }
    problems = [
        f"{key}={size}, but no tensor has an axis longer than {largest}"
        for key, size in sizes.items()
        if size > largest
    ]
    if told["n_layers"] > len(tensors):
        problems.append(f"llama.block_count={told['n_layers']} in a file of {len(tensors)} tensors")
    if told["context"] > _LONGEST:
        problems.append(f"llama.context_length={told['context']} is above {_LONGEST}")
    return problems


def _told_scaling(keys: _Reader, told: Mapping[str, Any], factors: np.ndarray | None) -> RopeScaling:
    """The scaling that metadata and factors ask for; anything but the known combinations is a problem."""
    older = keys.get("rope.scale_linear", float, 1.0)  # the key's former name
    factor = keys.get("rope.scaling.factor", float, older) or 1.0  # 0 stands for unscaled
    kind = keys.get("rope.scaling.type", str, "linear")
    original = keys.get("rope.scaling.original_context_length", int, told["context"])
    extra = keys.get("rope.scaling.attn_factor", float, 1.0)
    for key, usual in (("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0), ("yarn_attn_factor", 1.0)):
        if keys.get(f"rope.scaling.{key}", float, usual) != usual:
            keys.problems.append(
                f"llama.rope.scaling.{key} is ignored by llama.cpp, so what is meant is unclear"
            )
    try:
        if kind == "yarn" and factors is None:
            attention = 0.0 if extra == 1 else extra * _yarn_magnitude(factor)
            scaling = RopeScaling("yarn", factor, original, attention_factor=attention)
            if not _yarn_is_expressible(_rotary(told, scaling)):
                keys.problems.append(
                    f"llama.rope.scaling.original_context_length={original}: degenerate ramp"
                )
            return scaling
        if kind not in ("none", "linear") or extra != 1 or (factors is not None and factor != 1):
            keys.problems.append(
                f"llama.rope.scaling type={kind!r}, attn_factor={extra} is not supported here"
            )
        elif factors is not None:
            return _llama3(_rotary(told, RopeScaling()), factors)
        elif kind == "linear" and factor != 1:
            return RopeScaling("linear", factor)
    except (ConfigError, ConversionError, ValueError, ZeroDivisionError) as error:
        keys.problems.append(f"rope scaling: {error}")
    return RopeScaling()


def _rotary(told: Mapping[str, Any], scaling: RopeScaling) -> ModelConfig:
    """A model of one dimension with these rotary frequencies."""
    names = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
    kept = {name: told[name] for name in ("head_dim", "rope_theta", "context")}
    return ModelConfig(**dict.fromkeys(names, 1), **kept, norm_eps=1.0, rope_scaling=scaling)


def _llama3(config: ModelConfig, factors: np.ndarray) -> RopeScaling:
    """The published Llama 3 rule that gives these factors; only its factor is not fixed."""
    if (factors == 1).all():
        return RopeScaling()
    scaling = RopeScaling("llama3", _shortest(float(factors.max())), 8192)
    shape = (config.head_dim, config.rope_theta)
    plain, _ = rope_frequencies(*shape, RopeScaling(), config.context)
    scaled, _ = rope_frequencies(*shape, scaling, config.context)
    if factors.shape != plain.shape or not np.allclose(factors, plain / scaled, rtol=1e-5, atol=0):
        raise ConversionError(
            "rope_freqs.weight is not Llama 3's rule (low 1, high 4, original context 8192)"
        )
    return scaling


def _notes(facts: Mapping[str, Value]) -> list[str]:
    known = ("general.", "tokenizer.", f"{ARCHITECTURE}.", "jaxlm.", "split.")
    return [f"metadata key {key} was ignored" for key in facts if not key.startswith(known)] + [
        f"metadata key {key} was ignored" for key in sorted(_INERT & facts.keys())
    ]


def config_json(config: ModelConfig) -> str:
    """What stands under `jaxlm.config`."""
    return json.dumps(to_dict(config), sort_keys=True)
