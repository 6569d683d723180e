"""A model laid out for decoding on a GPU: the weight of every projection as [out, in], to be read row by row.

With one row of activations a product reads each weight once, and XLA makes a reduction of it. Over the columns of a
weight [in, out] it writes all products to memory and sums them in a second kernel: three times the traffic. Over rows
it is one kernel, and k and v, or gate and up, share one. What the model computes is the same, up to rounding.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxlm.grouped import Activation, Backend, ExpertWeights
from jaxlm.layers import Linear, add_bias
from jaxlm.model import Abstract, Decoder, Params, Split, abstract_of, merge_model
from jaxlm.moe import Experts, apply_experts
from jaxlm.quant import is_quantized
from jaxlm.shapes import Float, Int


class RowLinear(nnx.Module):
    """`Linear` on a weight [out, in]: x @ weight.T (+ bias)."""

    def __init__(self, linear: Linear):
        self.weight, self.bias = nnx.Param(linear.weight[...].mT), linear.bias

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


class RowExperts(nnx.Module):
    """`Experts` on weights [E, 2F, D] (gate_up) or [E, F, D] (up), and [E, D, F] (down). For one device."""

    def __init__(self, experts: Experts):
        def turned(weight: nnx.Param | None) -> nnx.Param | None:
            return None if weight is None else nnx.Param(weight[...].mT)

        self.gate_up, self.up = turned(experts.gate_up), turned(experts.up)
        self.gate_up_bias, self.up_bias = experts.gate_up_bias, experts.up_bias
        self.down, self.down_bias = turned(experts.down), experts.down_bias
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
        up, up_bias = (self.gate_up, self.gate_up_bias) if self.up is None else (self.up, self.up_bias)

        def cast(weight: nnx.Param | None) -> Array | None:
            return None if weight is None else weight[...].astype(x.dtype)

        up_EUD, down_EDF = cast(up), cast(self.down)
        assert up_EUD is not None and down_EDF is not None
        stacked = ExpertWeights(up_EUD.mT, cast(up_bias), down_EDF.mT, cast(self.down_bias))
        return apply_experts(self, x, ids, weights, stacked, key)


def for_decoding(model: Split) -> Split:
    """The model laid out for decoding, as a new Split; everything that takes a Split for inference takes it.

    Tensor by tensor, on one device. Quantised weights have this layout already and stay as they are.
    """
    shapes = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in model.params.items()}
    turned: Params = {p: _turn(value) if is_quantized(p) else value for p, value in model.params.items()}
    return Split(abstract_for_decoding(model.graphdef, shapes).graphdef, turned)


def abstract_for_decoding(graphdef: nnx.GraphDef, shapes: dict[str, jax.ShapeDtypeStruct]) -> Abstract:
    """`for_decoding` of a model without memory, by the shapes of its parameters."""

    def make() -> Decoder:
        empty = {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}
        return _replace(merge_model(graphdef, empty))

    return abstract_of(make)


def _replace(decoder: Decoder) -> Decoder:
    for block in decoder.blocks:
        shared = None if block.moe is None else block.moe.shared
        for owner in (block.attn, block.mlp, shared):
            for name, child in () if owner is None else list(vars(owner).items()):
                if isinstance(child, Linear):
                    setattr(owner, name, RowLinear(child))
        if block.moe is not None and isinstance(block.moe.experts, Experts):
            block.moe.experts = RowExperts(block.moe.experts)
    return decoder


@jax.jit
def _turn(weight: Array) -> Array:
    return weight.mT
