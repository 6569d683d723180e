"""Low-rank adapters (LoRA, arXiv:2106.09685) on a frozen base, in plain PyTorch. Twin: jaxlm/finetune/lora.py.

    projections          y = x W^T (+ bias) + scale * (dropout(x) a^T) b^T;  router: likewise, without dropout
    experts, lm_head     W + scale * b a in W's place, formed by each call; no dropout

Layouts are PyTorch's: a [R, in], b [out, R]; of stacked experts a [E, R, in], b [E, out, R].

Names: an adapted weight is a module `LoraWeight` with the parameters `base` (frozen; quantised: `base.codes`, ...),
`lora_a` and `lora_b`. So `named_parameters` gives `blocks.0.attn.q_proj.weight.base`, `….weight.lora_a` and
`….weight.lora_b`: a parameter's name without the word `base` is the canonical one, which jaxlm's has too.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxlm.adapter_config import FACTORS, AdapterConfig, check_targets, factor_shapes
from jaxlm.config import ConfigError
from jaxlm.tune_config import TuneRun
from torchref.layers import Linear, dropout, upcast
from torchref.model import Decoder
from torchref.quant import Quantized, QuantLinear, QuantWeight, quantize
from torchref.shapes import Float
from torchref.train import KEPT_WIDE, Params

_HEAD = "lm_head.weight"
_DROPPED = ("_proj.weight", "shared_gate.weight")  # their adapters have dropout


class LoraWeight(nn.Module):
    """A frozen weight and its factors. `weight[...]`: W + scale * b a [..., out, in], in W's dtype.

    `weight[e]` is that of one expert. Of a quantised one `weight(x)` is that of all, in x's dtype.
    """

    def __init__(
        self, base: nn.Parameter | QuantWeight, lora_a: nn.Parameter, lora_b: nn.Parameter, scale: float
    ):
        super().__init__()
        self.base, self.lora_a, self.lora_b, self.scale = base, lora_a, lora_b, scale

    def __getitem__(self, index: Any) -> Float[Tensor, "*W O I"]:
        assert not isinstance(self.base, QuantWeight)
        return self._added(self.base[index], self.lora_a[index], self.lora_b[index])

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*W O I"]:
        assert isinstance(self.base, QuantWeight)
        return self._added(self.base(x), self.lora_a, self.lora_b)

    def _added(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        delta = b.to(weight.dtype) @ a.to(weight.dtype)
        return (upcast(weight) + self.scale * upcast(delta)).to(weight.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.base.shape)

    @property
    def T(self) -> Float[Tensor, "I O"]:
        """The transposed weight, as a head is asked for it."""
        return self[...].T


class LoraLinear(nn.Module):
    """`Linear` or `QuantLinear` with an adapter: x W^T (+ bias) + scale * (dropout(x) a^T) b^T.

    Nothing is dropped without a `key`, a generator.
    """

    key: torch.Generator | None = None

    def __init__(self, linear: Linear | QuantLinear, rate: float):
        super().__init__()
        self.weight, self.bias, self.rate = linear.weight, linear.bias, rate

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        weight: Any = self.weight
        base = weight.base(x) if isinstance(weight.base, QuantWeight) else weight.base.to(x.dtype)
        inner = F.linear(dropout(x, self.rate, self.key), weight.lora_a.to(x.dtype))
        low = F.linear(inner, weight.lora_b.to(x.dtype))
        y = F.linear(x, base, None if self.bias is None else self.bias.to(x.dtype))
        return (upcast(y) + weight.scale * upcast(low)).to(x.dtype)


def adapt(
    decoder: Decoder, adapter: AdapterConfig, *, rngs: torch.Generator | None, dtype: torch.dtype
) -> Decoder:
    """The decoder itself with fresh factors in `dtype`: a uniform within 1/sqrt(in), b zero. All else is frozen.

    Source: Kaiming's bound with sqrt(5), which peft takes. Raises ConfigError where the targets match no weight, or
    there is dropout for an adapter that has none.
    """
    weights = _weights(decoder)
    check_targets(adapter, weights)
    chosen = [path for path in weights if adapter.adapts(path)]
    undropped = [path for path in chosen if not path.endswith(_DROPPED)]
    if adapter.dropout and undropped:
        raise ConfigError(
            f"lora.dropout={adapter.dropout}: the adapter of {undropped[0]} has no dropout; set it to 0, or leave "
            "that weight out of --lora.targets"
        )
    decoder.requires_grad_(False)
    for path in chosen:
        owner, name = _owner(decoder, path), path.rpartition(".")[2]
        base: Any = getattr(owner, name)
        a, b = _fresh(tuple(base.shape), adapter.rank_alpha(path)[0], rngs, dtype, _device(base))
        delattr(owner, name)
        setattr(owner, name, LoraWeight(base, a, b, adapter.scale(path)))
        if isinstance(owner, (Linear, QuantLinear)) and path != _HEAD:
            above = path.rpartition(".")[0]
            setattr(_owner(decoder, above), above.rpartition(".")[2], LoraLinear(owner, adapter.dropout))
    return decoder


def set_key(decoder: Decoder, key: torch.Generator | None) -> None:
    """From now on the adapters of a decoder draw their dropout from `key`; None = they drop nothing."""
    for module in decoder.modules():
        if isinstance(module, LoraLinear):
            module.key = key


def freeze(run: TuneRun, decoder: Decoder) -> Decoder:
    """The base of a run's adapter: quantised, else in the dtype of the computation, norms and router in the masters'.

    The decoder is used up; unless it is quantised, it is what comes back.
    """
    compute, master = getattr(torch, run.train.dtype), getattr(torch, run.train.param_dtype)
    frozen = decoder if run.tune.quant == "none" else quantize(decoder, run.tune.quant)
    for path, parameter in frozen.named_parameters():
        parameter.requires_grad_(False)
        if path.rpartition(".")[2] not in Quantized._fields:
            parameter.data = parameter.data.to(master if path.endswith(KEPT_WIDE) else compute)
    return frozen


def merge(params: Params, factors: Params, adapter: AdapterConfig) -> Params:
    """W + scale * b a for every adapted weight, in W's dtype; the others are the same tensors.

    All by canonical names. Products and sums are upcast. Raises ConfigError where a factor's weight is not there.
    """
    return _merged(params, factors, adapter, 1.0)


def unmerge(params: Params, factors: Params, adapter: AdapterConfig) -> Params:
    """The weights before `merge`, but for the rounding of two sums."""
    return _merged(params, factors, adapter, -1.0)


def _weights(decoder: Decoder) -> dict[str, None]:
    """Canonical paths of all weights, quantised or not."""
    ends = tuple(f".{name}" for name in Quantized._fields)
    return {(p.rpartition(".")[0] if p.endswith(ends) else p): None for p, _ in decoder.named_parameters()}


def _owner(decoder: Decoder, path: str) -> Any:
    """The module that has what a path names: of blocks.0.attn.q_proj.weight, q_proj."""
    return decoder.get_submodule(path.rpartition(".")[0])


def _device(base: Any) -> torch.device:
    stored: Any = base.codes if isinstance(base, QuantWeight) else base
    return stored.device


def _fresh(
    shape: tuple[int, ...],
    rank: int,
    rngs: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[nn.Parameter, nn.Parameter]:
    *experts, outer, inner = shape
    shape_a, shape_b = factor_shapes((*experts, inner, outer), rank)
    a = torch.rand(shape_a, generator=rngs, dtype=dtype).mul(2).sub(1).div(math.sqrt(inner))
    b = torch.zeros(shape_b, dtype=dtype)
    made = (nn.Parameter(factor.mT.contiguous().to(device)) for factor in (a, b))
    return next(made), next(made)


def _merged(
    params: Mapping[str, Tensor], factors: Mapping[str, Tensor], adapter: AdapterConfig, sign: float
) -> Params:
    result = dict(params)
    for path in sorted({path.rpartition(".")[0] for path in factors}):
        if path not in params:
            raise ConfigError(f"{path} is no weight of this base: an adapter cannot be merged into it")
        weight, a, b = params[path], factors[f"{path}.{FACTORS[0]}"], factors[f"{path}.{FACTORS[1]}"]
        wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
        delta = b.to(wide) @ a.to(wide)
        result[path] = (weight.to(wide) + sign * adapter.scale(path) * delta).to(weight.dtype)
    return result
