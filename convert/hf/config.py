"""A Hugging Face config.json and a ModelConfig, in both directions.

Reading: every key is used, known to be inert, or refused; all refusals come together. A key that is absent means what
the class of transformers takes for it. Writing: a family is chosen that computes exactly what the model computes, and
a config that was read from a file keeps that file's own keys where nothing changed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.hf.express import fields, notes_on, obstacles, require_family
from convert.hf.families import FAMILIES, Family, family_named
from convert.hf.keys import FIXED, IDLE, INERT, TRAINING, WHY
from convert.hf.rope import KEYS as ROPE_KEYS
from convert.hf.rope import legacy_rope, read_rope
from convert.rules import ConversionError
from jaxlm.config import ConfigError, ModelConfig, MoEConfig

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Imported:
    """What a config.json says."""

    config: ModelConfig
    family: str
    notes: tuple[str, ...]  # what was read but is not carried over


class _Reader:
    """The keys of one file over the defaults of its class; collects what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any], family: Family):
        self.raw, self.family, self.problems = raw, family, []
        self.values = {**family.defaults, **raw}
        other, key = family.alias or ("", "")
        if other in raw:
            self.values[key] = raw[other]
            if raw.get(key, raw[other]) != raw[other]:
                self.problems.append(f"{key}={raw[key]!r} and {other}={raw[other]!r} disagree")

    def refuse(self, key: str, why: str) -> None:
        self.problems.append(f"{key}={self.values.get(key)!r} {why}")

    def count(self, key: str, default: int = 1, least: int = 1) -> int:
        """A whole number; `default` where the class's own is derived from other keys."""
        value = self.values.get(key)
        if value is None and self.family.defaults.get(key, 0) is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(key, f"must be a whole number from {least}")
            return max(1, least)
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value < 0
        ):
            self.refuse(key, "must be a number that is not negative")
            return 1.0
        return float(value)

    def flag(self, key: str) -> bool:
        if not isinstance(self.values.get(key), bool):
            self.refuse(key, "must be true or false")
        return self.values.get(key) is True


def to_model(raw: Mapping[str, Any]) -> Imported:
    """The model that a config.json describes.

    Raises ConversionError naming every key and value that cannot be expressed, one line each.
    """
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise ConversionError(f"config.json: model_type={name!r} must be one of {', '.join(FAMILIES)}")
    try:
        reader = _Reader(raw, family_named(name))
    except ConversionError as error:
        raise ConversionError(f"config.json: {error}") from None
    notes = _check_keys(reader)
    context = reader.count("max_position_embeddings")
    layers = reader.count("num_hidden_layers")
    heads = reader.count("num_attention_heads")
    width = reader.count("hidden_size")
    theta, scaling, problems = read_rope(raw, reader.family.defaults["rope_theta"], context)
    reader.problems += problems
    qkv_bias, out_bias = _biases(reader)
    facts: dict[str, Any] = {
        "vocab_size": reader.count("vocab_size"),
        "d_model": width,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": reader.count("num_key_value_heads", heads),
        "head_dim": reader.count("head_dim", max(1, width // heads)),
        "d_ff": reader.count("intermediate_size"),
        "context": context,
        "rope_theta": theta,
        "norm_eps": reader.number("rms_norm_eps"),
        "rope_scaling": scaling,
        "qkv_bias": qkv_bias,
        "attn_out_bias": out_bias,
        "mlp_bias": "mlp_bias" in reader.family.defaults and reader.flag("mlp_bias"),
        "qk_norm": name.startswith("qwen3"),
        "tied": reader.flag("tie_word_embeddings"),
        "windows": _read_windows(reader, layers),
        "init_std": reader.number("initializer_range"),
    }
    moe = _read_moe(reader, layers)
    try:
        if not reader.problems:
            config = ModelConfig(**facts, moe=MoEConfig(**moe))
            return Imported(config, name, tuple(notes))
    except ConfigError as error:
        reader.problems.append(str(error))
    raise ConversionError("\n".join(f"config.json: {problem}" for problem in reader.problems))


def _check_keys(reader: _Reader) -> list[str]:
    """Refuses what the class would do and this model cannot, and keys that nobody knows; notes what training reads."""
    notes, defaults = [], reader.family.defaults
    for key, value in reader.raw.items():
        known = key in defaults or key in INERT or key in ROPE_KEYS or key in IDLE
        if reader.family.alias and key == reader.family.alias[0]:
            continue
        if key in TRAINING:
            if value not in (None, 0):
                notes.append(f"{key}={value!r} ({TRAINING[key]}) is not carried over: only training reads it")
        elif key in FIXED and (key not in defaults or key == "hidden_act"):
            if value not in FIXED[key]:
                reader.refuse(key, "is not supported" + (f": {WHY[key]}" if key in WHY else ""))
        elif key == "architectures":
            known_as = [
                [reader.family.architecture],
                *([["LLaMAForCausalLM"]] if reader.family.name == "llama" else []),
            ]
            if value is not None and value not in known_as:
                reader.refuse(key, f"is not supported: only {[reader.family.architecture]} is")
        elif key not in ("model_type", "layer_types") and not known:
            reader.refuse(key, f"is unknown; it may change what a {reader.family.name} computes")
    return notes


def _biases(reader: _Reader) -> tuple[bool, bool]:
    """Biases on q, k and v, and on the attention output."""
    if "attention_bias" in reader.family.defaults:
        both = reader.flag("attention_bias")
        return both, both
    if "qkv_bias" in reader.family.defaults:
        return reader.flag("qkv_bias"), False
    return reader.family.name == "qwen2", False


def _read_windows(reader: _Reader, layers: int) -> tuple[int, ...]:
    """Positions each layer sees, as a cycle; 0 = all."""
    defaults, name = reader.family.defaults, reader.family.name
    size = 0
    if "sliding_window" in defaults and (
        "use_sliding_window" not in defaults or reader.flag("use_sliding_window")
    ):
        size = 0 if reader.values["sliding_window"] is None else reader.count("sliding_window")
        if size and reader.family.windows == "none":
            reader.refuse(
                "use_sliding_window", "is not supported: transformers 4 and 5 window different layers"
            )
    windowed = [bool(size)] * layers
    if size and reader.family.windows == "layers":
        first = reader.count("max_window_layers", least=0)
        windowed = [i >= first for i in range(layers)]
    types = reader.values.get("layer_types")
    if types is None:
        return _shortest_cycle([size if on else 0 for on in windowed])
    if not isinstance(types, list) or not set(map(str, types)) <= {"sliding_attention", "full_attention"}:
        reader.refuse("layer_types", "must be a list of full_attention and sliding_attention")
        return (0,)
    named = [kind == "sliding_attention" for kind in types]
    if len(named) != layers:
        reader.refuse("layer_types", f"has {len(named)} entries for num_hidden_layers={layers}")
    elif reader.family.windows == "layers":
        windowed = named
        if any(named) and not size:
            reader.refuse("layer_types", "names sliding_attention, but no sliding_window is in use")
    elif named != windowed:
        reader.refuse(
            "layer_types", f"disagrees with what a {name} does: a window of {size or 'all'} everywhere"
        )
    return _shortest_cycle([size if on else 0 for on in windowed])


def _shortest_cycle(values: list[Any]) -> tuple[Any, ...]:
    """The shortest start of a list whose repetition gives the list."""
    for period in range(1, len(values)):
        if all(value == values[i % period] for i, value in enumerate(values)):
            return tuple(values[:period])
    return tuple(values)


def _read_moe(reader: _Reader, layers: int) -> dict[str, Any]:
    """MoEConfig's fields; empty for a dense model."""
    if reader.family.experts is None:
        return {}
    if reader.family.name == "mixtral":
        counts = {"n_experts": reader.count("num_local_experts"), "pattern": (True,), "renormalize": True}
    else:
        pattern = _read_pattern(reader, layers)
        experts = reader.count("num_experts", least=0)
        if not experts or not any(pattern):
            return {}
        counts = {"n_experts": experts, "d_ff": reader.count("moe_intermediate_size"), "pattern": pattern}
        counts["renormalize"] = reader.flag("norm_topk_prob")
    if reader.family.name == "qwen2_moe":
        counts |= {"shared_d_ff": reader.count("shared_expert_intermediate_size"), "shared_gate": True}
    coefficient = reader.number("router_aux_loss_coef")
    return counts | {
        "n_active": reader.count("num_experts_per_tok"),
        "balance": "mixtral",
        "balance_coef": coefficient,
    }


def _read_pattern(reader: _Reader, layers: int) -> tuple[bool, ...]:
    step, dense = reader.count("decoder_sparse_step"), reader.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < layers for i in dense):
        reader.refuse("mlp_only_layers", f"must list layers from 0 to {layers - 1}")
        return (True,)
    return _shortest_cycle([i not in dense and (i + 1) % step == 0 for i in range(layers)])


def from_model(
    config: ModelConfig,
    dtype: str,
    raw: Mapping[str, Any] | None = None,
    family: str | None = None,
    special_ids: Mapping[str, int | None] | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config.json of a model, readable by transformers 4 and 5 alike.

    Args:
        config: the model.
        dtype: of the stored weights, in torch's spelling.
        raw: the config.json the model was imported with; its keys are kept where nothing changed.
        family: model_type; None = that of `raw`, or the first that computes what this model computes.
        special_ids: bos_token_id, eos_token_id, pad_token_id; without them `raw`'s, or null.

    Returns:
        The config, and notes on what it does not hold because only training reads it.

    Raises:
        ConversionError: no family, or not the asked one, computes what the model computes; names field and value.
    """
    if family is None and raw is not None and not obstacles(config, str(raw.get("model_type"))):
        family = str(raw["model_type"])
    chosen = require_family(config, family)
    if raw is None or raw.get("model_type") != chosen.name:
        ids: dict[str, Any] = dict.fromkeys(_SPECIAL_IDS) | dict(special_ids or {})
        head = {"architectures": [chosen.architecture], "model_type": chosen.name}
        return head | fields(config, chosen) | {"dtype": dtype, "torch_dtype": dtype} | ids, notes_on(
            config, chosen
        )
    out = _patched(config, chosen, raw)
    if dtype != "float32" or {"dtype", "torch_dtype"} & raw.keys():
        # A file that names no dtype means float32 to transformers 4.
        out |= {"dtype": dtype, "torch_dtype": dtype}
    out |= {key: value for key, value in (special_ids or {}).items() if value is not None}
    return out, notes_on(config, chosen)


def _patched(config: ModelConfig, family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the keys changed whose meaning changed."""
    new, old = fields(config, family), fields(to_model(raw).config, family)
    changed = {key for key in new.keys() | old.keys() if new.get(key) != old.get(key)}
    if changed & set(ROPE_KEYS):
        changed |= set(ROPE_KEYS)
    alias, key = family.alias or ("", "")
    changed |= {alias} if key in changed else set()
    out = {key: value for key, value in raw.items() if key not in changed}
    if alias in out:
        out[key] = out[alias]  # transformers 4 does not read the alias, and would take its default
    out |= legacy_rope(out) | {key: value for key, value in new.items() if key in changed}
    try:
        if fields(to_model(out).config, family) == new:
            return out
    except ConversionError:
        pass
    # A key that the file left to its class, or one that says the same twice, was tied to one that changed.
    return {key: value for key, value in out.items() if key in INERT or key in TRAINING} | {
        "architectures": [family.architecture],
        "model_type": family.name,
        **new,
    }
