"""Rotary positions in a Hugging Face config, in both forms that files have.

    transformers 4    "rope_theta": 50000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}
    transformers 5    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}

A reader of one form that meets the other takes its class's default theta and no scaling, in silence. So both are
written, and where a file holds both they have to say the same.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.config import ConfigError, ModelConfig, RopeScaling, from_dict

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
_COMMON = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "finetuned",
}  # finetuned: says who wrote it
_KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def read_rope(
    raw: Mapping[str, Any], default_theta: float, context: int
) -> tuple[float, RopeScaling, list[str]]:
    """Theta, the scaling, and what cannot be read, a line each.

    default_theta: the class's own, for a file that names none. context: `max_position_embeddings`, which stands in for
    a missing `original_max_position_embeddings`.
    """
    problems: list[str] = []
    theta = _number("rope_theta", raw.get("rope_theta"), problems, default_theta)
    readings: dict[str, tuple[float, RopeScaling]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        values = raw.get(key)
        if values is None or values == {}:
            continue
        if not isinstance(values, dict):
            problems.append(f"{key}={values!r} must be an object")
            continue
        mine: list[str] = []
        own_theta = _number(f"{key}.rope_theta", values.get("rope_theta"), mine, theta)
        scaling = _read_scaling(key, values, context, mine)
        if raw.get("rope_theta") is not None and own_theta != theta:
            mine.append(f"rope_theta={raw['rope_theta']} and {key}.rope_theta={own_theta} disagree")
        problems += mine
        readings[key] = (own_theta, scaling)
    if problems:
        return theta, RopeScaling(), problems
    if len(readings) == 2 and readings["rope_scaling"] != readings["rope_parameters"]:
        problems.append(
            f"rope_scaling={raw['rope_scaling']} and rope_parameters={raw['rope_parameters']} disagree"
        )
    theta, scaling = next(iter(readings.values()), (theta, RopeScaling()))
    return theta, scaling, problems


def _number(name: str, value: Any, problems: list[str], default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        problems.append(f"{name}={value!r} must be a number")
        return default
    return float(value)


def _read_scaling(key: str, values: Mapping[str, Any], context: int, problems: list[str]) -> RopeScaling:
    named = {str(values[name]) for name in ("rope_type", "type") if values.get(name) is not None} or {
        "default"
    }
    kind = min(named)
    if len(named) > 1:
        problems.append(f"{key}.rope_type={values['rope_type']!r} and {key}.type={values['type']!r} disagree")
        return RopeScaling()
    if kind not in _KNOWN:
        problems.append(f"{key}.rope_type={kind!r} is not supported; supported are {', '.join(_KNOWN)}")
        return RopeScaling()
    before = len(problems)
    for name, value in values.items():
        if name not in _COMMON | _KNOWN[kind] and value is not None:
            problems.append(f"{key}.{name}={value!r} is unknown for rope_type={kind!r}")
    if values.get("partial_rotary_factor") not in (None, 1):
        problems.append(
            f"{key}.partial_rotary_factor={values['partial_rotary_factor']!r} is not supported; heads are rotated whole"
        )
    if values.get("truncate", True) is not True:
        problems.append(f"{key}.truncate={values['truncate']!r} is not supported; only true is")

    def number(name: str, default: float | None = None) -> float:
        if default is None and values.get(name) is None:
            problems.append(f"{key}.{name}={values.get(name)!r} must be given for rope_type={kind!r}")
        return _number(f"{key}.{name}", values.get(name), problems, 1.0 if default is None else default)

    facts: dict[str, Any] = {} if kind == "default" else {"factor": number("factor")}
    if kind in ("llama3", "yarn"):
        facts["original_context"] = int(number("original_max_position_embeddings", context))
    if kind == "llama3":
        facts |= {name: number(name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        # transformers reads a zero as the default.
        facts |= {
            "beta_fast": number("beta_fast", 32.0) or 32.0,
            "beta_slow": number("beta_slow", 1.0) or 1.0,
        }
        facts["attention_factor"] = _attention_factor(key, values, facts["factor"], problems)
    if len(problems) > before:
        return RopeScaling()
    try:
        return from_dict(RopeScaling, {"kind": "none" if kind == "default" else kind} | facts)
    except ConfigError as error:
        problems.append(f"{key}={dict(values)}: {error}")
        return RopeScaling()


def _attention_factor(key: str, values: Mapping[str, Any], factor: float, problems: list[str]) -> float:
    """yarn's multiplier of cos and sin; 0 = automatic. `mscale` over `mscale_all_dim` is one that a file may give."""
    given = values.get("attention_factor")
    mscale, all_dim = (
        _number(f"{key}.{n}", values.get(n), problems, 0.0) for n in ("mscale", "mscale_all_dim")
    )
    if given is None:
        if not (mscale and all_dim) or factor <= 1:
            return 0.0
        return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * all_dim * math.log(factor) + 1.0)
    factor = _number(f"{key}.attention_factor", given, problems, 1.0)
    if factor <= 0:
        problems.append(f"{key}.attention_factor={given!r} must be positive")
    return factor


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Theta and scaling in both forms."""
    scaling = config.rope_scaling
    if scaling.kind == "none":
        parameters: dict[str, Any] = {"rope_type": "default"}
        return {
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "rope_parameters": parameters | {"rope_theta": config.rope_theta},
        }
    parameters = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        parameters |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor:
            parameters["attention_factor"] = scaling.attention_factor
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": parameters,
        "rope_parameters": parameters | {"rope_theta": config.rope_theta},
    }


def legacy_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a config in the form of transformers 5 lacks for a reader of version 4; nothing if it is in both forms."""
    parameters = raw.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    missing: dict[str, Any] = {}
    if raw.get("rope_theta") is None and "rope_theta" in parameters:
        missing["rope_theta"] = parameters["rope_theta"]
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not raw.get("rope_scaling") and kind != "default":
        missing["rope_scaling"] = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return missing
