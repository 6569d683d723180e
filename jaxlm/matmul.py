"""The product of activations with a weight, with gradients in forms that XLA compiles well on CPU.

    y = x w;    dx = dy w^T;    dw = x^T dy

Left to itself, XLA's CPU compiler transposes the larger operand of dw, together with the chain of operations that made
it, and computes products of half-precision operands in float32 unless both lie row by row and the result is float32
(measured: half the speed, and a sixth where the gradient is left to autodiff). Here the smaller operand is transposed,
by itself. On other platforms the gradients are the plain ones.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.shapes import Float


@jax.custom_vjp
def matmul(x: Float[Array, "*B I"], weight: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x @ weight, both in the same dtype, which the result has; products are summed in float32 at least."""
    return x @ weight


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ weight, (x, weight)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return jax.lax.platform_dependent(*saved, dy, cpu=_gradients_on_cpu, default=_gradients)


matmul.defvjp(_forward, _backward)


def _gradients(x: Array, weight: Array, dy: Array) -> tuple[Array, Array]:
    return jax.vjp(jnp.matmul, x, weight)[1](dy)


def _gradients_on_cpu(x: Array, weight: Array, dy: Array) -> tuple[Array, Array]:
    (inner, outer), dtype = weight.shape, x.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    rows = math.prod(x.shape[:-1])
    flat_x, flat_dy = x.reshape(rows, inner), dy.reshape(rows, outer)
    dx = jax.lax.dot_general(flat_dy, weight, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    if inner <= outer:
        dw = jnp.matmul(_turned(x), flat_dy, preferred_element_type=wide)
    else:
        dw = jax.lax.optimization_barrier(jnp.matmul(_turned(dy), flat_x, preferred_element_type=wide)).T
    return dx.astype(dtype).reshape(x.shape), dw.astype(dtype)


def _turned(x: Float[Array, "*B I"]) -> Float[Array, "I M"]:
    """[I, M] with the rows of x as columns, which lie row by row; barred from being merged into the product."""
    inner = x.shape[-1]
    rows = x.shape[-2] if x.ndim > 1 else 1
    turned = jnp.moveaxis(x.reshape(math.prod(x.shape[:-2]), rows, inner), -1, 0)
    return jax.lax.optimization_barrier(turned).reshape(inner, math.prod(x.shape[:-1]))
