"""What a gptoss model is: its configuration from a state dict's shapes and from cfg, and back; its names; its buffers.

Shapes come first: cfg must agree with them, and adds what they cannot tell. The file format is in convert/gptoss.py.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.rules import ConversionError, Shaped
from convert.tree import BFLOAT16
from jaxlm.config import ModelConfig, MoEConfig
from jaxlm.presets import PRESETS
from jaxlm.rope_table import rope_frequencies, rope_table
from jaxlm.tensor_file import Lazy

Shape = tuple[int, ...]

# Our field -> gptoss's own name for it first, then spellings of its derivatives.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocabulary_size", "vocab_size", "n_vocab"),
    "d_model": ("d_model", "n_embd", "embed_dim"),
    "n_layers": ("transformer_blocks", "n_layers", "num_layers", "n_layer", "n_blocks", "num_blocks"),
    "n_heads": ("num_heads", "n_heads", "n_head"),
    "n_kv_heads": ("num_kv_heads", "n_kv_heads", "n_kv_head"),
    "head_dim": ("head_dim",),
    "d_ff": ("d_ff", "hidden_dim", "ffn_dim"),
    "context": ("context_length", "max_seq_len", "context", "block_size"),
    "n_experts": ("num_experts", "n_experts"),
    "qkv_bias": ("qkv_bias",),
    "attn_bias_table": ("use_attention_bias",),
    "position": ("use_rope",),
    "n_active": ("top_k", "n_active", "num_experts_per_tok"),
    "capacity_factor": ("capacity_factor",),
    "balance_coef": ("aux_loss_coef", "aux_coef", "aux_loss_weight", "balance_coef"),
    "dropout": ("dropout", "dropout_rate", "drop_rate"),
    "rope_theta": ("rope_theta", "theta", "rope_base"),
    "norm_eps": ("norm_eps", "rms_norm_eps", "eps"),
}
ORIGINAL = PRESETS["gptoss-original"].config
BUFFER = re.compile(r"layers\.\d+\.gqa\.(cos|sin)_cached")


def config_of(cfg: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModelConfig:
    """The model of a state dict, its buffers included where there are any.

    What shapes cannot tell comes from cfg, else from the preset: top_k, dropout, the capacity factor, the weight of the
    balance loss, theta and eps.

    Raises:
        ConversionError: tensors without which sizes are unknown, and every key of cfg that contradicts a shape or
            cannot be used, a line each.
    """
    facts, problems = _sizes(cfg, shapes)
    if not problems:
        for field, (value, origin) in facts.items():
            problems += [
                f"cfg {key}={cfg[key]!r}, but {origin} says {value}"
                for key in SPELLINGS[field]
                if key in cfg and (type(cfg[key]) is not type(value) or cfg[key] != value)
            ]
    sizes: dict[str, Any] = {field: value for field, (value, _) in facts.items()}
    model, moe = ORIGINAL.model, ORIGINAL.model.moe
    told = {
        "n_active": _told(cfg, "n_active", int, moe.n_active, problems),
        "capacity_factor": _told(cfg, "capacity_factor", float, moe.capacity_factor, problems, none=0.0),
        "balance_coef": _told(cfg, "balance_coef", float, moe.balance_coef, problems),
    }
    rest = {
        "dropout": _told(cfg, "dropout", float, model.dropout, problems),
        "rope_theta": _told(cfg, "rope_theta", float, model.rope_theta, problems),
        "norm_eps": _told(cfg, "norm_eps", float, model.norm_eps, problems, none=model.norm_eps),
    }
    if cfg.get("use_rope", True) is not True:
        problems.append(f"cfg use_rope={cfg['use_rope']!r}: only rotary positions have a counterpart here")
    if problems:
        raise ConversionError("\n".join(problems))
    n_experts = sizes.pop("n_experts")
    experts = MoEConfig(n_experts, balance="layer_sum", expert_bias=True, **told)
    fixed: Any = {"mlp": "gelu_erf", "attn_out_bias": True, "head_bias": True}
    return ModelConfig(**sizes, **rest, **fixed, moe=experts)


def _sizes(
    cfg: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> tuple[dict[str, tuple[int | bool, str]], list[str]]:
    """Field -> (value, the tensor that says so), and what keeps a size from being known."""
    problems: list[str] = []

    def usual(pattern: str, axes: int, wanted: bool = True) -> tuple[str, Shape | None]:
        """The most frequent shape under a name, so that one misshapen tensor does not pass for the rule."""
        named = {n: s for n, s in shapes.items() if re.fullmatch(pattern, n) and len(s) == axes and all(s)}
        if not named:
            shown = pattern.replace(r"\d+", "*").replace("\\", "")
            if wanted:
                problems.append(f"{shown}: missing, no tensor of {axes} axes has this name")
            return shown, None
        shape = Counter(named.values()).most_common(1)[0][0]
        return next(name for name, s in named.items() if s == shape), shape

    layer, expert = r"layers\.\d+\.", r"layers\.\d+\.moe\.experts\.\d+\."
    embed, embed_shape = usual(r"embed\.weight", 2)
    q, q_shape = usual(layer + r"gqa\.W_q\.weight", 2)
    k, k_shape = usual(layer + r"gqa\.W_k\.weight", 2)
    router, router_shape = usual(layer + r"moe\.router\.W_r\.weight", 2)
    fc1, fc1_shape = usual(expert + r"fc1\.weight", 2)
    table, table_shape = usual(layer + r"gqa\.attention_bias", 4, wanted=False)
    cos, cos_shape = usual(layer + r"gqa\.cos_cached", 2, wanted=False)
    numbers = sorted({int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d{1,9})\.", name))})
    gap = next((i for i, n in enumerate(numbers) if i != n), None)
    if gap is not None:
        problems.append(f"layers.{gap}: missing, though layers.{numbers[-1]} is there")
    if not (embed_shape and q_shape and k_shape and router_shape and fc1_shape) or problems:
        return {}, problems
    if table_shape:
        n_heads, context = (table_shape[1], table), (table_shape[2], table)
    else:
        n_heads = (_first(cfg, "n_heads"), "cfg")
        context = (cos_shape[0], cos) if cos_shape else (_first(cfg, "context"), "cfg")
    for what, (count, _) in (("heads", n_heads), ("positions", context)):
        if type(count) is not int or count < 1:
            problems.append(f"the number of {what} is unknown: neither attention_bias nor cfg says it")
    if problems:
        return {}, problems
    head_dim, odd = divmod(q_shape[0], n_heads[0])
    if odd or not head_dim or k_shape[0] % head_dim or head_dim % 2:
        heads = f"{n_heads[0]} heads ({n_heads[1]})"
        problems.append(f"{q} makes {q_shape[0]} channels and {k} {k_shape[0]}: no even width for {heads}")
        return {}, problems
    return {
        "vocab_size": (embed_shape[0], embed),
        "d_model": (embed_shape[1], embed),
        "n_layers": (len(numbers), f"layers.{numbers[-1]}, the last layer,"),
        "n_heads": n_heads,
        "n_kv_heads": (k_shape[0] // head_dim, k),
        "head_dim": (head_dim, q),
        "d_ff": (fc1_shape[0], fc1),
        "context": context,
        "n_experts": (router_shape[0], router),
        "qkv_bias": (f"layers.{numbers[0]}.gqa.W_q.bias" in shapes, "W_q.bias, there or not,"),
        "attn_bias_table": (table_shape is not None, "attention_bias, there or not,"),
    }, problems


def _first(cfg: Mapping[str, Any], field: str) -> Any:
    return next((cfg[key] for key in SPELLINGS[field] if key in cfg), None)


def _told(
    cfg: Mapping[str, Any],
    field: str,
    kind: type[int] | type[float],
    default: float,
    problems: list[str],
    none: float | None = None,
) -> Any:
    """A number that no shape tells; `none` is what None means, where it means anything."""
    values: dict[str, float] = {}
    for key in (key for key in SPELLINGS[field] if key in cfg):
        value: Any = none if cfg[key] is None else cfg[key]
        if type(value) is kind or (kind is float and type(value) is int and abs(value) < 2**53):
            values[key] = kind(value)
        else:
            problems.append(f"cfg {key}={cfg[key]!r} must be of type {kind.__name__}")
    if len(set(values.values())) > 1:
        problems.append("cfg contradicts itself: " + ", ".join(f"{k}={v}" for k, v in values.items()))
    return next(iter(values.values()), default)


def rope_problems(config: ModelConfig, tensors: Mapping[str, Lazy], notes: list[str]) -> list[str]:
    """Buffers that are not jaxlm's table up to the rounding of float32, or of their own narrower dtype.

    [C, H] is the table twice, side by side; [C, H/2] is the table, its pairs taken as half-split, with a note.
    """
    buffers = {name: tensor for name, tensor in tensors.items() if BUFFER.fullmatch(name)}
    if not buffers:
        notes.append(f"no rotary buffers in the file: theta={config.rope_theta:g}, half-split, is assumed")
        return []
    C, H, half = config.context, config.head_dim, config.head_dim // 2
    cos, sin = rope_table(config)
    frequencies, _ = rope_frequencies(H, config.rope_theta, config.rope_scaling, C)
    # A frequency made in float32 is off by up to 12 roundings, and the position multiplies that.
    rounding = np.minimum(16 * 2.0**-24 * np.arange(C)[:, None] * frequencies, 0.5) + 2.0**-22
    problems = []
    for name, tensor in buffers.items():
        shape, table = tensor.shape, cos if name.endswith("cos_cached") else sin
        if shape[-2:] not in ((C, H), (C, half)) or set(shape[:-2]) - {1}:
            problems.append(f"{name}: got {shape}, expected {(C, H)} or {(C, half)}")
            continue
        narrow = {BFLOAT16: 2.0**-8, np.dtype(np.float16): 2.0**-11}.get(tensor.dtype, 0.0)
        values = tensor.read().reshape(shape[-2:]).astype(np.float64)
        parts = np.split(values, shape[-1] // half, axis=-1)
        if all(np.all(np.abs(part - table) <= rounding + narrow) for part in parts):
            if shape[-1] == half:
                notes.append(
                    f"{name}: {half} columns do not say which channels are pairs; half-split is assumed"
                )
        elif all(
            np.all(np.abs(values[:, i::2] - table) <= rounding + narrow) for i in (0, 1) if shape[-1] == H
        ):
            problems.append(f"{name}: pairs are (2i, 2i+1); gptoss and this model pair (i, i+{half})")
        else:
            problems.append(f"{name}: not the rotary table of theta={config.rope_theta:g}")
    return problems


def require_form(config: ModelConfig) -> None:
    """Raises ConversionError unless gptoss's own code builds this model, with every field that it has no word for."""
    moe, heads = config.moe, config.n_heads * config.head_dim
    wanted: list[tuple[str, Any, Any]] = [
        ("n_heads*head_dim", heads, config.d_model),
        ("rope_theta", config.rope_theta, ORIGINAL.model.rope_theta),
        ("norm_eps", config.norm_eps, ORIGINAL.model.norm_eps),
        ("position", config.position, "rope"),
        ("rope_scaling.kind", config.rope_scaling.kind, "none"),
        ("mlp", config.mlp, "gelu_erf"),
        ("attn_out_bias", config.attn_out_bias, True),
        ("head_bias", config.head_bias, True),
        ("qk_norm", config.qk_norm, False),
        ("tied", config.tied, False),
        ("windows", any(config.windows), False),
        ("moe.n_experts > 0", moe.n_experts > 0, True),
    ]
    if moe.n_experts:
        wanted += [
            ("moe.pattern", all(moe.pattern), True),
            ("moe.renormalize", moe.renormalize, True),
            ("moe.expert_bias", moe.expert_bias, True),
            ("moe.balance", moe.balance, "layer_sum"),
            ("moe.router_z_coef", moe.router_z_coef, 0.0),
            ("moe.shared_d_ff", moe.shared_d_ff, 0),
        ]
    problems = [f"{field}={value!r}: gptoss has {form!r}" for field, value, form in wanted if value != form]
    if problems:
        raise ConversionError("not a model that gptoss's code can build:\n" + "\n".join(problems))


def names_of(config: ModelConfig) -> list[str]:
    """gptoss's state dict in its own order, buffers included: what a module owns, then its children."""
    names = ["embed.weight"]
    kinds = ("weight", "bias") if config.qkv_bias else ("weight",)
    for i in range(config.n_layers):
        table = ["attention_bias"] if config.attn_bias_table else []
        gqa = [*table, "cos_cached", "sin_cached", *(f"W_{x}.{kind}" for x in "qkv" for kind in kinds)]
        experts = [
            f"moe.experts.{e}.{fc}.{kind}"
            for e in range(config.moe.n_experts)
            for fc in ("fc1", "fc2")
            for kind in ("weight", "bias")
        ]
        gqa = [f"gqa.{name}" for name in (*gqa, "out_proj.weight", "out_proj.bias")]
        block = ["norm1.weight", *gqa, "norm2.weight", "moe.router.W_r.weight", *experts]
        names += [f"layers.{i}.{name}" for name in block]
    return [*names, "norm.weight", "out_head.weight", "out_head.bias"]


def cfg_of(config: ModelConfig) -> dict[str, Any]:
    """The configuration in gptoss's own words, all its fields and no others."""
    moe = config.moe
    fields = ("d_model", "dropout", "context", "vocab_size", "n_heads", "n_layers", "n_kv_heads", "qkv_bias")
    cfg: dict[str, Any] = {SPELLINGS[field][0]: getattr(config, field) for field in fields}
    cfg |= {"use_rope": True, "use_attention_bias": config.attn_bias_table, "d_ff": config.expert_d_ff}
    cfg |= {"num_experts": moe.n_experts, "top_k": moe.n_active, "aux_loss_coef": moe.balance_coef}
    return cfg | {"capacity_factor": moe.capacity_factor or None}


def decay_groups(tensors: Mapping[str, Shaped]) -> list[list[str]]:
    """gptoss's two parameter groups: weight decay on every tensor of two or more dimensions, none on the others."""
    matrices = [name for name, tensor in tensors.items() if len(tensor.shape) >= 2]
    return [matrices, [name for name, tensor in tensors.items() if len(tensor.shape) < 2]]
