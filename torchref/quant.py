"""Weight-only quantisation: int8, int4 and nf4. Twin: jaxlm/quant.py.

    int8   one scale per output channel: w = code * absmax/127, codes -127..127            8.0 bits a weight
    int4   blocks of 64 weights: w = (code - 8) * absmax/7, codes 1..15                    4.5
    nf4    blocks of 64 weights: w = level[code] * absmax, absmax itself in 8 bits         4.127

Quantised are the projections of attention and MLPs (the shared expert's too) and the experts. Embeddings, head (tied
or not), router, the shared expert's gate, norms and biases stay as they are, which is bitsandbytes' convention.

nf4 is QLoRA's (arXiv:2305.14314, section 3): the 16 quantiles of a normal distribution, and "double quantisation":
the absmax of the blocks, less their mean, are themselves quantised in blocks of 256 by the dynamic 8-bit map of
arXiv:1511.04561. Codes, absmax and values are bitsandbytes' to the bit, where bitsandbytes takes the mean with one
thread. int4 has the blocks of nf4, so that the two differ in their levels alone; half a bit pays for the scales.

Layout: everything is stored for the weight as PyTorch has it, [..., out, in], in C order; blocks are cut from the
flattened weight and cross rows where 64 does not divide `in`; two 4-bit codes share a byte, the first in the high half.
So both frameworks and bitsandbytes hold the same bytes. The experts of a layer are one weight.

A weight is dequantised in float32 inside the call that uses it, and cast to the dtype of the activation.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxlm.config import ConfigError, InputError, ModelConfig, nearest
from torchref.layers import Backends, Linear, activate, dropout
from torchref.model import Decoder
from torchref.moe import Experts
from torchref.shapes import Float, Int

Kind = Literal["int8", "int4", "nf4"]
KINDS: tuple[str, ...] = get_args(Kind)
BLOCK = 64  # weights with one absmax
NESTED_BLOCK = 256  # absmax values with one absmax of their own
# arXiv:2305.14314, appendix E: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
INT4_LEVELS = tuple(float(code - 8) for code in range(16))
_PROJECTION = re.compile(
    r"blocks\.\d+\.(attn\.[qkvo]_proj\.weight|(mlp|moe\.shared)\.(gate|up|down)_proj\.weight"
    r"|moe\.experts\.(gate_up|up|down))"
)
_SMALLEST = 1e-38  # stands in for an absmax of zero in a quotient; bitsandbytes' choice


class Quantized(NamedTuple):
    """What is stored of one weight; the last two are nf4's alone."""

    codes: Any  # int8 [..., out, in]; 4 bits: uint8 [ceil(n/2)] of the flattened weight
    scales: Any  # int8: float32 [..., out]; int4: float32 [blocks]; nf4: uint8 [blocks], places in the dynamic map
    nested: Any = None  # float32 [ceil(blocks/256)]: absmax of the centred absmax
    offset: Any = None  # float32 []: mean of the absmax


class WeightError(NamedTuple):
    """How well one quantised weight stands for the original."""

    path: str  # of the original, for example blocks.0.attn.q_proj.weight
    error: float  # ||quantised - original|| / ||original||, Frobenius; 0 where both are zero
    bytes_before: int
    bytes_after: int  # codes and scales


def is_quantized(path: str) -> bool:
    """Whether the weight of this path is one of those that are quantised."""
    return _PROJECTION.fullmatch(path) is not None


def dynamic_map(signed: bool = True) -> Float[Tensor, " C"]:
    """The dynamic 8-bit map, float32 [256], ascending: seven decades, each twice as fine as the one below.

    Source: arXiv:1511.04561, section 3; the midpoints of 2^i equal parts of [0.1, 1] times 10^(i-6), zero and one.
    Without a sign there is room for twice as many parts.
    """
    start, values = torch.tensor(0.1), [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        step, k = ((1 - start) / parts).double(), torch.arange(parts + 1, dtype=torch.float64)
        # In double, so that each point is rounded once, and from the nearer end.
        points = torch.where(k < (parts + 1) // 2, start + step * k, 1 - step * (parts - k)).float()
        middles = torch.tensor(10.0 ** (i - 6)) * ((points[:-1] + points[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def quantize_tensor(weight: Float[Tensor, "*W O I"], kind: str) -> Quantized:
    """Codes and scales of a weight, where the weight is; taken in float32, whatever its dtype.

    Raises ConfigError on an unknown kind, InputError where a value is not finite.
    """
    _check_kind(kind)
    wide = weight.detach().float()
    if not wide.isfinite().all():
        raise InputError("a weight holds NaN or infinity and cannot be quantised")
    if kind == "int8":
        scales = wide.abs().amax(-1) / 127
        return Quantized(_rounded(wide, scales[..., None], 127).to(torch.int8), scales)
    flat = wide.flatten()
    absmax = _absmax(flat, BLOCK)
    rows = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    if kind == "int4":
        scales = absmax / 7
        return Quantized(_pack(_rounded(rows, scales[:, None], 7) + 8, flat.numel()), scales)
    levels = torch.tensor(NF4_LEVELS, device=wide.device)
    scaled = rows * (1 / absmax.clamp(min=_SMALLEST))[:, None]
    if flat.numel() % BLOCK:  # a last block that is not full is divided, not multiplied: another rounding
        absmax[-1] = absmax[-1].clamp(min=_SMALLEST)
        scaled[-1] = rows[-1] / absmax[-1]
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return Quantized(_pack(codes, flat.numel()), *_quantize_absmax(absmax))


def dequantize_tensor(stored: Quantized, kind: str, shape: tuple[int, ...]) -> Float[Tensor, "*W O I"]:
    """The float32 weight [..., out, in] that the codes stand for; the inverse of `quantize_tensor`."""
    _check_kind(kind)
    if kind == "int8":
        return stored.codes.float() * stored.scales[..., None]
    n = math.prod(shape)
    scales = stored.scales if kind == "int4" else dequantize_absmax(stored)
    levels = torch.tensor(INT4_LEVELS if kind == "int4" else NF4_LEVELS, device=stored.codes.device)
    codes = torch.stack([stored.codes >> 4, stored.codes & 15], dim=-1).flatten()[:n]
    values = F.pad(levels[codes.int()], (0, -n % BLOCK)).view(-1, BLOCK)
    return (values * scales[:, None]).flatten()[:n].view(shape)


def dequantize_absmax(stored: Quantized) -> Float[Tensor, " C"]:
    """The absmax of nf4's blocks, float32, from their 8-bit codes."""
    nested = stored.nested.repeat_interleave(NESTED_BLOCK)[: len(stored.scales)]
    return dynamic_map().to(nested.device)[stored.scales.int()] * nested + stored.offset


class QuantWeight(nn.Module):
    """One quantised weight; called with an activation, it gives the weight in its dtype."""

    def __init__(self, shape: tuple[int, ...], kind: str, stored: Quantized):
        super().__init__()
        self.shape, self.kind = shape, kind
        for name, part in stored._asdict().items():
            setattr(self, name, None if part is None else nn.Parameter(part, requires_grad=False))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        stored = Quantized(self.codes, self.scales, self.nested, self.offset)
        return dequantize_tensor(stored, self.kind, self.shape).to(x.dtype)


class QuantLinear(nn.Module):
    """`Linear` on a quantised weight [out, in]: x @ weight.T (+ bias)."""

    def __init__(self, weight: QuantWeight, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return F.linear(x, self.weight(x), None if self.bias is None else self.bias.to(x.dtype))


class QuantExperts(nn.Module):
    """`Experts` on quantised weights: gate_up [E, 2F, D] or up [E, F, D], and down [E, D, F]. For one device."""

    def __init__(self, experts: Experts, up: QuantWeight, down: QuantWeight):
        super().__init__()
        gated = experts.up is None
        self.gate_up, self.up = (up, None) if gated else (None, up)
        self.gate_up_bias, self.up_bias = experts.gate_up_bias, experts.up_bias
        self.down, self.down_bias = down, experts.down_bias
        self.kind, self.rate, self.backend = experts.kind, experts.rate, experts.backend

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        ids: Int[Tensor, "B T A"],
        weights: Float[Tensor, "B T A"],
        key: torch.Generator | None = None,
    ) -> Float[Tensor, "B T D"]:
        """sum_a weights[a] * MLP_{ids[a]}(x), one expert after the other over the tokens that chose it."""
        up, up_bias = (self.gate_up, self.gate_up_bias) if self.up is None else (self.up, self.up_bias)
        assert up is not None
        up_EUD, down_EDF = up(x), self.down(x)
        x_PD, ids_PA, weights_PA = x.reshape(-1, x.shape[-1]), ids.flatten(0, 1), weights.flatten(0, 1)
        out_PD = torch.zeros_like(x_PD)
        for expert in range(len(down_EDF)):
            token, slot = (ids_PA == expert).nonzero(as_tuple=True)
            up_b, down_b = (None if b is None else b[expert].to(x.dtype) for b in (up_bias, self.down_bias))
            hidden = F.linear(x_PD[token], up_EUD[expert], up_b)
            gate, value = hidden.chunk(2, dim=-1) if self.kind == "swiglu" else (hidden, None)
            hidden = dropout(activate(self.kind, gate, value), self.rate, key)
            y = F.linear(hidden, down_EDF[expert], down_b) * weights_PA[token, slot, None]
            out_PD = out_PD.index_add(0, token, y)
        return out_PD.view_as(x)


def quantize(model: Decoder, kind: str) -> Decoder:
    """The model with its projections and experts quantised, as a new Decoder that shares everything else.

    Works tensor by tensor. Raises ConfigError on an unknown kind or a model that is quantised already, InputError on
    weights that are not finite.
    """
    _check_kind(kind)
    tensors = dict(model.named_parameters())
    if not any(map(is_quantized, tensors)):
        raise ConfigError("the model has no weights to quantise; is it quantised already?")
    blocks: Any = model.blocks
    moe = next((block.moe for block in blocks if block.moe is not None), None)
    backends = Backends(blocks[0].attn.backend, "auto" if moe is None else moe.experts.backend)
    quantized = abstract_quantized(model.config, kind, backends)
    quantized.remat = model.remat
    return _fill(quantized, tensors, kind, None).train(model.training)


def quantize_params(
    config: ModelConfig,
    tensors: Mapping[str, Any],
    kind: str,
    backends: Backends = Backends(),
    dtype: torch.dtype | None = None,
) -> Decoder:
    """`quantize` for a model that never was in memory: one tensor is read, quantised, placed and let go at a time.

    tensors: by torchref's paths and in its layout [out, in], tensors or what has a `read()` that gives one. dtype: of
    everything that is not quantised; None = as it is stored.
    Raises ConfigError on an unknown kind, InputError where the tensors are not the model's or not finite.
    """
    _check_kind(kind)
    with torch.device("meta"):
        plain = Decoder(config, backends, rngs=None)
    expected = {path: tuple(value.shape) for path, value in plain.named_parameters()}
    wrong = [f"{path} is missing" for path in expected.keys() - tensors.keys()]
    wrong += [f"{path} is not the model's" for path in tensors.keys() - expected.keys()]
    wrong += [
        f"{path} is {tuple(tensors[path].shape)}, not {expected[path]}"
        for path in expected.keys() & tensors.keys()
        if tuple(tensors[path].shape) != expected[path]
    ]
    if wrong:
        raise InputError(f"these tensors are not of this configuration: {'; '.join(sorted(wrong)[:5])}")
    return _fill(abstract_quantized(config, kind, backends), tensors, kind, dtype)


def abstract_quantized(
    config: ModelConfig, kind: str, backends: Backends = Backends(), dtype: torch.dtype = torch.float32
) -> Decoder:
    """The quantised decoder on the meta device, whatever its size; dtype: of what is not quantised."""
    _check_kind(kind)
    with torch.device("meta"):
        return _replace(Decoder(config, backends, rngs=None, dtype=dtype), kind)


def errors(model: Decoder, quantized: Decoder) -> list[WeightError]:
    """The error and the size of every quantised weight, in the order of the model's parameters."""
    found = []
    for path, weight in model.named_parameters():
        if not is_quantized(path):
            continue
        module: Any = quantized.get_submodule(path)
        stored = Quantized(*(getattr(module, name) for name in Quantized._fields))
        value = dequantize_tensor(stored, module.kind, module.shape)
        original = weight.detach().double()
        norm = float(original.norm())
        error = float((value.double() - original).norm()) / norm if norm else 0.0
        after = sum(part.nbytes for part in stored if part is not None)
        found.append(WeightError(path, error, weight.nbytes, after))
    return found


def _replace(decoder: Decoder, kind: str) -> Decoder:
    """The decoder with quantised modules that hold nothing yet."""

    def empty(weight: nn.Parameter) -> QuantWeight:
        return QuantWeight(tuple(weight.shape), kind, _zeros(tuple(weight.shape), kind))

    block: Any
    for block in decoder.blocks:
        shared = None if block.moe is None else block.moe.shared
        for owner in (block.attn, block.mlp, shared):
            for name, child in () if owner is None else list(owner.named_children()):
                if isinstance(child, Linear):
                    setattr(owner, name, QuantLinear(empty(child.weight), child.bias))
        if block.moe is not None:
            experts = block.moe.experts
            up = experts.gate_up if experts.up is None else experts.up
            block.moe.experts = QuantExperts(experts, empty(up), empty(experts.down))
    return decoder


def _zeros(shape: tuple[int, ...], kind: str) -> Quantized:
    n = math.prod(shape)
    if kind == "int8":
        return Quantized(torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[:-1]))
    codes, blocks = torch.zeros(-(-n // 2), dtype=torch.uint8), -(-n // BLOCK)
    if kind == "int4":
        return Quantized(codes, torch.zeros(blocks))
    nested = torch.zeros(-(-blocks // NESTED_BLOCK))
    return Quantized(codes, torch.zeros(blocks, dtype=torch.uint8), nested, torch.zeros(()))


def _fill(decoder: Decoder, tensors: Mapping[str, Any], kind: str, dtype: torch.dtype | None) -> Decoder:
    """Puts the tensors into a quantised decoder without memory, one after the other."""
    for path, tensor in tensors.items():
        value = tensor.read() if hasattr(tensor, "read") else tensor
        if not is_quantized(path):
            kept = value if dtype is None else value.detach().to(dtype)
            _set(decoder, path, kept)
            continue
        try:
            stored = quantize_tensor(value, kind)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        for name, part in stored._asdict().items():
            if part is not None:
                _set(decoder, f"{path}.{name}", part)
    return decoder


def _set(decoder: Decoder, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    setattr(decoder.get_submodule(owner), name, parameter)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} must be one of {', '.join(KINDS)}{nearest(kind, KINDS)}")


def _absmax(flat: Tensor, block: int) -> Tensor:
    """Largest magnitude of each block of a flat tensor; the last block may be shorter."""
    return F.pad(flat.abs(), (0, -flat.numel() % block)).view(-1, block).amax(-1)


def _rounded(weight: Tensor, scales: Tensor, largest: int) -> Tensor:
    """weight/scale to the nearest integer, half to even; zero where the scale is."""
    return (weight / scales.where(scales != 0, 1)).round().clamp(-largest, largest)


def _pack(codes: Tensor, n: int) -> Tensor:
    """The first n codes, two a byte, the first in the high half."""
    pairs = codes.to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1])[: -(-n // 2)].clone()


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: places in the dynamic map [blocks], absmax of their blocks, and the mean taken off."""
    device, absmax = absmax.device, absmax.cpu()  # the order of the mean is that of the CPU
    offset = _mean(absmax)
    if not offset.isfinite():
        raise InputError("the largest weights are too large for float32 to hold the sum of")
    centred, table = absmax - offset, dynamic_map().double()
    nested = _absmax(centred, NESTED_BLOCK)
    scaled = centred * (1 / nested).repeat_interleave(NESTED_BLOCK)[: len(centred)]
    # bitsandbytes rounds to one of 65,536 points first and looks up the place nearest to that.
    halves = (scaled.clamp(-1, 1) + 1) * 0.5
    points = (halves.double() * 65535 + 0.5).float().floor()
    places = torch.bucketize(points.double() / 65535 * 2 - 1, (table[:-1] + table[1:]) / 2)
    # A block of equal absmax has nothing left to say; bitsandbytes gives it the first place.
    places[(nested == 0).repeat_interleave(NESTED_BLOCK)[: len(centred)]] = 0
    return places.to(device, torch.uint8), nested.to(device), offset.to(device)


def _mean(values: Tensor) -> Tensor:
    """float32 mean, added in the order of PyTorch's CPU kernel of eight lanes on one thread, as bitsandbytes does.

    `values.mean()` itself would add in an order that depends on the number of threads. Four rows of lanes are added
    side by side in a cascade: sums of `step` rows, of `step` such sums, and so on, three times.
    """
    lanes = 8 if len(values) >= 8 else 1
    vectors = values[: len(values) // lanes * lanes].view(-1, lanes)
    rows = vectors[: len(vectors) // 4 * 4].reshape(-1, 4, lanes)
    step = 1 << max(4, (len(rows) - 1).bit_length() // 4 if len(rows) > 1 else 0)
    level, parts = rows, []
    for _ in range(3):
        whole = len(level) // step * step
        parts.append(_in_order(level[whole:]))
        level = _in_order(level[:whole].reshape(-1, step, 4, lanes).transpose(0, 1))
    four = _in_order(torch.stack([*parts, _in_order(level)]))
    four[0] = _in_order(torch.cat([four[:1], vectors[len(rows) * 4 :]]))
    return _in_order(torch.cat([values[vectors.numel() :], _in_order(four)])) / len(values)


def _in_order(values: Tensor) -> Tensor:
    """Sum over the first axis, one after the other."""
    total = torch.zeros(values.shape[1:])
    for value in values:
        total = total + value
    return total
