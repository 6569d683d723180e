"""Weight-only quantisation: int8, int4 and nf4. Twin: torchref/quant.py.

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
A product contracts over the last axis, the one that lies in memory one after the other. So both frameworks and
bitsandbytes hold the same bytes. The experts of a layer are one weight.

A weight is dequantised in float32 inside the call that uses it, and cast to the dtype of the activation. Gradients
flow through activations only; the backward pass dequantises again, so that between the passes there are codes alone.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxlm.config import ConfigError, InputError, ModelConfig, nearest
from jaxlm.grouped import EXPERT_HIDDEN, Activation, Backend, ExpertWeights
from jaxlm.layers import Backends, Linear, add_bias
from jaxlm.model import Abstract, Decoder, Params, Split, abstract_model, abstract_of, merge_model
from jaxlm.moe import Experts, apply_experts
from jaxlm.quant_host import block_absmax, pack, quantize_absmax, rounded
from jaxlm.shapes import Float, Int
from jaxlm.sharding import BATCH_AXES, current_mesh_shape

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
_SMALLEST = np.float32(1e-38)  # stands in for an absmax of zero in a quotient; bitsandbytes' choice


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


def dynamic_map(signed: bool = True) -> np.ndarray:
    """The dynamic 8-bit map, float32 [256], ascending: seven decades, each twice as fine as the one below.

    Source: arXiv:1511.04561, section 3; the midpoints of 2^i equal parts of [0.1, 1] times 10^(i-6), zero and one.
    Without a sign there is room for twice as many parts.
    """
    start, values = np.float32(0.1), [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        step, k = (np.float32(1) - start) / np.float32(parts), np.arange(parts + 1, dtype=np.float64)
        # In double, so that each point is rounded once, and from the nearer end.
        points = np.where(k < (parts + 1) // 2, start + step * k, 1 - step * (parts - k)).astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((points[:-1] + points[1:]) / np.float32(2))
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values))


def quantize_tensor(weight: Float[np.ndarray, "*W O I"], kind: str) -> Quantized:
    """Codes and scales of a weight in PyTorch's layout, on the host; taken in float32, whatever its dtype.

    Raises ConfigError on an unknown kind, InputError where a value is not finite.
    """
    _check_kind(kind)
    wide = np.ascontiguousarray(np.asarray(weight).astype(np.float32))
    absmax = np.abs(wide).max(-1) if kind == "int8" else block_absmax(wide.reshape(-1), BLOCK)
    if not np.isfinite(absmax).all():
        raise InputError("a weight holds NaN or infinity and cannot be quantised")
    if kind == "int8":
        scales = absmax / np.float32(127)
        return Quantized(rounded(wide, scales[..., None], 127).astype(np.int8), scales)
    if kind == "int4":
        scales = absmax / np.float32(7)
        return Quantized(
            pack(wide.reshape(-1), BLOCK, lambda w, at: rounded(w, scales[at, None], 7) + 8), scales
        )
    levels = np.asarray(NF4_LEVELS, np.float32)
    bounds = (levels[:-1] + levels[1:]) / np.float32(2)
    inverse = np.float32(1) / np.maximum(absmax, _SMALLEST)
    full = wide.size // BLOCK

    def codes(w: np.ndarray, at: np.ndarray) -> np.ndarray:
        scaled = w * inverse[at, None]
        if at[-1] == full:  # a last block that is not full is divided, not multiplied: another rounding
            scaled[-1] = w[-1] / np.maximum(absmax[full], _SMALLEST)
        found = np.zeros(scaled.shape, np.uint8)
        for bound in bounds:  # several times faster than a search
            found += scaled > bound
        return found

    packed = pack(wide.reshape(-1), BLOCK, codes)
    if wide.size % BLOCK:
        absmax[full] = max(absmax[full], _SMALLEST)
    return Quantized(packed, *quantize_absmax(absmax, dynamic_map(), NESTED_BLOCK))


def dequantize_tensor(stored: Quantized, kind: str, shape: tuple[int, ...]) -> Float[Array, "*W O I"]:
    """The float32 weight [..., out, in] that the codes stand for; the inverse of `quantize_tensor`."""
    _check_kind(kind)
    if kind == "int8":
        return jnp.asarray(stored.codes).astype(jnp.float32) * jnp.asarray(stored.scales)[..., None]
    n, blocks = math.prod(shape), len(stored.scales)
    scales = jnp.asarray(stored.scales) if kind == "int4" else dequantize_absmax(stored)
    # Both codes of a byte in one look-up: half as many, and nothing to shift.
    levels = np.asarray(INT4_LEVELS if kind == "int4" else NF4_LEVELS, np.float32)
    pairs = jnp.asarray(np.stack([levels.repeat(16), np.tile(levels, 16)], axis=1))
    values = pairs.at[jnp.asarray(stored.codes)].get(mode="promise_in_bounds").reshape(-1)
    values = jnp.pad(values[:n], (0, blocks * BLOCK - n)) if n != blocks * BLOCK else values
    return (values.reshape(blocks, BLOCK) * scales[:, None]).reshape(-1)[:n].reshape(shape)


def dequantize_absmax(stored: Quantized) -> Float[Array, " C"]:
    """The absmax of nf4's blocks, float32, from their 8-bit codes."""
    n = len(stored.scales)
    nested = jnp.broadcast_to(jnp.asarray(stored.nested)[:, None], (len(stored.nested), NESTED_BLOCK))
    nested = nested.reshape(-1)[:n]
    centred = jnp.asarray(dynamic_map())[jnp.asarray(stored.scales)] * nested
    # Changes nothing, since the map is within [-1, 1]; but a product that is clipped before it is added is rounded,
    # which the compiler would spare itself in a fused multiply-add.
    return jnp.clip(centred, -nested, nested) + stored.offset


class QuantWeight(nnx.Module):
    """One quantised weight; called with an activation, it gives the weight in its dtype."""

    def __init__(self, shape: tuple[int, ...], kind: str, stored: Quantized):
        self.shape, self.kind = shape, kind
        self.codes, self.scales = nnx.Param(stored.codes), nnx.Param(stored.scales)
        self.nested = None if stored.nested is None else nnx.Param(stored.nested)
        self.offset = None if stored.offset is None else nnx.Param(stored.offset)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "*W O I"]:
        return _dequantized(self.kind, self.shape, x, self._parts())

    def product(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """x @ weight.T. On a mesh each device multiplies its own rows with a weight of its own."""
        return _product(self.kind, self.shape, x, self._parts())

    def _parts(self) -> Quantized:
        parts = (self.codes, self.scales, self.nested, self.offset)
        return Quantized(*(None if part is None else part[...] for part in parts))


def _dequantized(kind: str, shape: tuple[int, ...], x: Array, stored: Quantized) -> Array:
    return dequantize_tensor(_after(x, stored), kind, shape).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(kind: str, shape: tuple[int, int], x: Array, stored: Quantized) -> Array:
    return _product_forward(kind, shape, x, stored)[0]


def _product_forward(
    kind: str, shape: tuple[int, int], x: Array, stored: Quantized
) -> tuple[Array, Quantized]:
    def multiply(x: Array, stored: Quantized) -> Array:
        weight = _dequantized(kind, shape, x, stored)
        if x.size == x.shape[-1]:
            return lax.platform_dependent(x, weight, cuda=_one_row, default=_rows)
        return _rows(x, weight)

    return _by_rows(multiply, x, stored), stored


def _product_backward(kind: str, shape: tuple[int, int], stored: Quantized, dy: Array) -> tuple[Array, None]:
    def multiply(dy: Array, stored: Quantized) -> Array:
        return dy @ _dequantized(kind, shape, dy, stored)

    return _by_rows(multiply, dy, stored), None


_product.defvjp(_product_forward, _product_backward)


def _by_rows(function: Callable[[Array, Any], Array], x: Array, whole: Any) -> Array:
    """`function` of each device's rows and of what every device has whole; all at once without a mesh."""
    ways = math.prod(current_mesh_shape().get(name, 1) for name in BATCH_AXES)
    if ways == 1 or x.shape[0] % ways:
        return function(x, whole)
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(function, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)(
        x, whole
    )


class QuantLinear(nnx.Module):
    """`Linear` on a quantised weight [out, in]: x @ weight.T (+ bias)."""

    def __init__(self, weight: QuantWeight, bias: nnx.Param | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = self.weight.product(x)
        return y if self.bias is None else add_bias(y, self.bias[...])


def _rows(x: Float[Array, "*B I"], weight: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    return jnp.einsum("...i,oi->...o", x, weight)


def _one_row(x: Float[Array, "*B I"], weight: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """The same as a sum, of which XLA's GPU compiler makes one kernel with the dequantisation; for the kernel of a
    product it writes the whole weight to memory first.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(x[..., None, :].astype(wide) * weight.astype(wide), axis=-1).astype(x.dtype)


class QuantExperts(nnx.Module):
    """`Experts` on quantised weights: gate_up [E, 2F, D] or up [E, F, D], and down [E, D, F].

    On a mesh every device has all experts and takes its own rows through them. Of the forward pass the hidden layer is
    kept for the backward pass, of the weights their codes.
    """

    def __init__(self, experts: Experts, up: QuantWeight, down: QuantWeight):
        gated = experts.up is None
        self.gate_up, self.up = (up, None) if gated else (None, up)
        self.gate_up_bias, self.up_bias = experts.gate_up_bias, experts.up_bias
        self.down, self.down_bias = down, experts.down_bias
        self.kind: Activation = experts.kind
        self.rate = experts.rate
        self.backend: Backend = experts.backend

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ids: Int[Array, "B T A"],
        weights: Float[Array, "B T A"],
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """sum_a weights[a] * MLP_{ids[a]}(x)."""
        graphdef, state = nnx.split(self)

        def run(x: Array, ids: Array, weights: Array, state: Any, key: Array | None) -> Array:
            return nnx.merge(graphdef, state).local(x, ids, weights, key)

        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(EXPERT_HIDDEN))
        ways = math.prod(current_mesh_shape().get(name, 1) for name in BATCH_AXES)
        if ways > 1 and x.shape[0] % ways == 0:
            rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
            run = jax.shard_map(
                functools.partial(_own_key, run),
                in_specs=(rows, rows, rows, whole, whole),
                out_specs=rows,
                check_vma=False,
            )
        return run(x, ids, weights, state, key)

    def local(self, x: Array, ids: Array, weights: Array, key: Array | None = None) -> Array:
        """The tokens of one device."""
        up, up_bias = (self.gate_up, self.gate_up_bias) if self.up is None else (self.up, self.up_bias)
        assert up is not None

        def cast(bias: nnx.Param | None) -> Array | None:
            return None if bias is None else bias[...].astype(x.dtype)

        stacked = ExpertWeights(up(x).mT, cast(up_bias), self.down(x).mT, cast(self.down_bias))
        return apply_experts(self, x, ids, weights, stacked, key)


def _own_key(
    run: Callable[..., Array], x: Array, ids: Array, weights: Array, state: Any, key: Array | None
) -> Array:
    """Every device drops out by itself."""
    if key is not None:
        for axis in BATCH_AXES:
            key = jax.random.fold_in(key, lax.axis_index(axis))
    return run(x, ids, weights, state, key)


def quantize(model: Split, kind: str) -> Split:
    """The model with its projections and experts quantised, as a new Split; everything that takes a Split takes it.

    Works tensor by tensor. Raises ConfigError on an unknown kind or a model that is quantised already, InputError on
    weights that are not finite.
    """
    _check_kind(kind)
    if not any(map(is_quantized, model.params)):
        raise ConfigError("the model has no weights to quantise; is it quantised already?")

    def decoder() -> Decoder:
        empty = {path: jnp.zeros(value.shape, value.dtype) for path, value in model.params.items()}
        return merge_model(model.graphdef, empty)

    return Split(
        abstract_of(lambda: quantized_modules(decoder(), kind)).graphdef, _quantized(model.params, kind, None)
    )


def quantize_params(
    config: ModelConfig,
    tensors: Mapping[str, Any],
    kind: str,
    backends: Backends = Backends(),
    dtype: DTypeLike | None = None,
) -> Split:
    """`quantize` for a model that never was in memory: one tensor is read, quantised, placed and let go at a time.

    tensors: by jaxlm's paths and in its layout [in, out], arrays or what has a `read()` that gives one
    (`tensor_file.Lazy`). dtype: of everything that is not quantised; None = as it is stored.
    Raises ConfigError on an unknown kind, InputError where the tensors are not the model's or not finite.
    """
    _check_kind(kind)
    check_tensors(config, tensors)
    graphdef = abstract_quantized(config, kind, backends).graphdef
    return Split(graphdef, _quantized(tensors, kind, dtype))


def check_tensors(config: ModelConfig, tensors: Mapping[str, Any]) -> None:
    """Raises InputError where tensors, by path, are not those of a model of this configuration."""
    expected = {path: shape.shape for path, shape in abstract_model(config).shapes.items()}
    wrong = [f"{path} is missing" for path in expected.keys() - tensors.keys()]
    wrong += [f"{path} is not the model's" for path in tensors.keys() - expected.keys()]
    wrong += [
        f"{path} is {tuple(tensors[path].shape)}, not {expected[path]}"
        for path in expected.keys() & tensors.keys()
        if tuple(tensors[path].shape) != expected[path]
    ]
    if wrong:
        raise InputError(f"these tensors are not of this configuration: {'; '.join(sorted(wrong)[:5])}")


def quantize_weight(path: str, value: Any, kind: str) -> Params:
    """The parameters that hold a weight [in, out] once it is quantised: `path.codes`, `path.scales`, ...

    Raises InputError, with its name, where it is not finite.
    """
    try:
        stored = quantize_tensor(np.asarray(value).swapaxes(-1, -2), kind)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return {
        f"{path}.{name}": jnp.asarray(part) for name, part in stored._asdict().items() if part is not None
    }


def abstract_quantized(
    config: ModelConfig, kind: str, backends: Backends = Backends(), dtype: DTypeLike = jnp.float32
) -> Abstract:
    """The quantised decoder for its shapes only, whatever its size; dtype: of what is not quantised. Not sharded."""
    _check_kind(kind)
    return abstract_of(
        lambda: quantized_modules(Decoder(config, backends, rngs=nnx.Rngs(params=0), dtype=dtype), kind)
    )


def errors(model: Split, quantized: Split) -> list[WeightError]:
    """The error and the size of every quantised weight, in the order of the model's parameters."""
    found, values = [], jax.jit(dequantize_tensor, static_argnums=(1, 2))
    for path in filter(is_quantized, model.params):
        weight, stored = model.params[path], _stored(quantized.params, path)
        original = np.asarray(weight).swapaxes(-1, -2).astype(np.float64)
        value = np.asarray(values(stored, _kind(stored), original.shape), np.float64)
        norm = float(np.linalg.norm(original))
        error = float(np.linalg.norm(value - original)) / norm if norm else 0.0
        after = sum(part.nbytes for part in stored if part is not None)
        found.append(WeightError(path, error, weight.nbytes, after))
    return found


def quantized_modules(decoder: Decoder, kind: str) -> Decoder:
    """The decoder itself, its projections and experts made quantised ones that hold zeros."""

    def empty(weight: nnx.Param | None) -> QuantWeight:
        assert weight is not None
        *leading, n_in, n_out = weight.shape
        shape = (*leading, n_out, n_in)
        return QuantWeight(shape, kind, _zeros(shape, kind))

    for block in decoder.blocks:
        shared = None if block.moe is None else block.moe.shared
        for owner in (block.attn, block.mlp, shared):
            for name, child in () if owner is None else list(vars(owner).items()):
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
        return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
    codes, blocks = jnp.zeros(-(-n // 2), jnp.uint8), -(-n // BLOCK)
    if kind == "int4":
        return Quantized(codes, jnp.zeros(blocks, jnp.float32))
    nested = jnp.zeros(-(-blocks // NESTED_BLOCK), jnp.float32)
    return Quantized(codes, jnp.zeros(blocks, jnp.uint8), nested, jnp.zeros((), jnp.float32))


def _quantized(tensors: Mapping[str, Any], kind: str, dtype: DTypeLike | None) -> Params:
    """Parameters by path, one tensor after the other, so that one at a time is whole on the host."""
    params: Params = {}
    for path, tensor in tensors.items():
        value = tensor.read() if hasattr(tensor, "read") else tensor
        if not is_quantized(path):
            kept = jnp.asarray(value, value.dtype if dtype is None else dtype)
            # Never the pages of a file.
            params[path] = kept if value is tensor else jnp.array(kept, copy=True).block_until_ready()
            continue
        params |= quantize_weight(path, value, kind)
    return params


def _after(x: Array, stored: Quantized) -> Quantized:
    """The same codes, which to the compiler depend on x.

    So it can neither take a weight out of a loop over tokens, nor make it before its layer is reached: one layer's
    weights exist at a time. An optimization_barrier says the same, but XLA drops it on CPU before it orders the work;
    that no number differs from itself and equals itself, it does not know.
    """
    first = lax.index_in_dim(x.reshape(-1), 0, keepdims=False)
    never = (first != first) & (first == first)

    def tied(part: Array) -> Array:
        return part | never.astype(part.dtype) if jnp.issubdtype(part.dtype, jnp.integer) else part

    return stored._replace(codes=tied(stored.codes), scales=tied(stored.scales))


def _stored(params: Params, path: str) -> Quantized:
    return Quantized(*(params.get(f"{path}.{name}") for name in Quantized._fields))


def _kind(stored: Quantized) -> str:
    return "nf4" if stored.offset is not None else "int8" if stored.codes.dtype == jnp.int8 else "int4"


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} must be one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
