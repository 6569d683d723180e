"""What a model is known by, so that an adapter is never joined to another one: its configuration, and a few values of
each of its weights.

The values are compared so that copies of a model in bfloat16 or float16 pass: a change is told from rounding by the
smallest of them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig, to_dict
from jaxlm.tensor_file import Lazy

PER_WEIGHT = 4  # values of a weight that are kept
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples spread evenly however many are taken
_RELATIVE = 2.0**-8  # a value rounded to bfloat16 twice, along two ways, is off by 2^-9 each time
_ABSOLUTE = 1e-7  # float16 has nothing finer than 6e-8
_COARSE = 1 / 200  # of a weight's largest value; eight bits with a sign are off by 1/254 of a block's


@dataclass(frozen=True)
class Sample:
    """Values of one weight, at the places that `places` names."""

    path: str
    values: tuple[float, ...]


def trained_as(config: ModelConfig, other: ModelConfig) -> ModelConfig:
    """The configuration with what says nothing about the forward pass taken from the other.

    Most formats have no place for what only training sees, for sizes that no layer has, or for how a cycle is spelled.
    """
    moe = {
        name: getattr(other.moe, name)
        for name in ("balance", "balance_coef", "router_z_coef", "capacity_factor")
    }
    same: dict[str, Any] = {name: getattr(other, name) for name in ("dropout", "init", "init_std")}
    layers = range(config.n_layers)
    if all(map(config.is_moe, layers)):
        same["d_ff"] = other.d_ff
    if [config.window(i) for i in layers] == [other.window(i) for i in layers]:
        same["windows"] = other.windows
    if config.moe.n_experts == other.moe.n_experts == 0:
        return dataclasses.replace(config, **same, moe=other.moe)
    moe["d_ff"] = other.moe.d_ff if config.expert_d_ff == other.expert_d_ff else config.expert_d_ff
    if [config.is_moe(i) for i in layers] == [other.is_moe(i) for i in layers]:
        moe["pattern"] = other.moe.pattern
    return dataclasses.replace(config, **same, moe=dataclasses.replace(config.moe, **moe))


def differences(found: ModelConfig, expected: ModelConfig) -> list[str]:
    """Fields in which two models compute differently, `n_layers is 2, expected 3` each."""
    alike = trained_as(expected, found)
    if found.position == "rope" and not found.attn_bias_table:  # no weight is as long as the context
        alike = dataclasses.replace(alike, context=found.context)
    a, b = _flat(to_dict(found)), _flat(to_dict(alike))
    return [f"{name} is {a[name]}, expected {b[name]}" for name in a if a[name] != b[name]]


def places(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Which values of a weight are kept: spread over all of it, the same for every weight of a shape."""
    size = math.prod(shape)
    flat = (int(size * (k * _GOLDEN % 1)) for k in range(1, PER_WEIGHT + 1))
    return [tuple(int(i) for i in np.unravel_index(place, shape)) for place in flat] if size else []


def sketch(tensors: Mapping[str, Lazy]) -> tuple[Sample, ...]:
    """A few values of every weight; reads no more than those where the format allows it."""
    return tuple(Sample(path, _values(tensor)) for path, tensor in tensors.items())


def mismatch(samples: tuple[Sample, ...], tensors: Mapping[str, Lazy], coarse: bool = False) -> str:
    """In which value these weights are others than those sampled, and in how many of all; '' = in none.

    coarse: the weights are stored in eight bits, and may be off as far as that rounding goes.
    """
    first, wrong, count = "", 0, 0
    for sample in samples:
        if sample.path not in tensors:
            return f"there is no {sample.path}"
        tensor = tensors[sample.path]
        slack = max(_ABSOLUTE, _COARSE * float(np.abs(tensor.read()).max()) if coarse else 0.0)
        for place, now, was in zip(places(tensor.shape), _values(tensor), sample.values, strict=False):
            count += 1
            if abs(now - was) <= max(slack, _RELATIVE * max(abs(now), abs(was))):
                continue
            wrong += 1
            at = ",".join(map(str, place))
            first = first or f"{sample.path}[{at}] is {now:.6g}, expected {was:.6g}"
    return f"{first} ({wrong} of {count} sampled values differ)" if wrong else ""


def _values(tensor: Lazy) -> tuple[float, ...]:
    """In six digits, which tell more than bfloat16 and float16 hold."""
    whole = None if tensor.take else tensor.read()
    found = []
    for place in places(tensor.shape):
        if tensor.take is not None:
            value = np.asarray(tensor.take(tuple(slice(i, i + 1) for i in place))).reshape(())
        else:
            assert whole is not None
            value = whole[place]
        found.append(float(f"{float(value):.6g}"))
    return tuple(found)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
