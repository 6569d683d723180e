"""Fused attention: what the kernel is asked for is our own mask, in every dtype; and when it is asked.

cuDNN runs on a GPU alone. Here the same call runs with jax's plain implementation behind it, whose meaning of causal,
window and mask the kernel shares; tests/jaxlm/test_h200.py reads the compiled call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import tolerance

from jaxlm.attention import (
    Visibility,
    _widest_fused_head,
    allowed,
    choose_attention,
    cudnn_attention,
    fast_attention,
)
from jaxlm.config import MeshConfig
from jaxlm.sharding import batch_sharding, make_mesh

B, N, K, H = 4, 6, 2, 8
# Packed documents; padding on the right, as of windows; on the left and between; one row of nothing else.
ROWS = (
    [1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4],
    [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2],
    [0] * 13,
)


def draw(T: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)  # type: ignore[return-value]


def fused(window: int, segments: jax.Array | None) -> Callable[..., jax.Array]:
    """The call that cuDNN gets, without cuDNN, as a function of q, k and v."""
    return lambda q, k, v: cudnn_attention(q, k, v, window, segments, implementation="xla")


def plain(q: jax.Array, k: jax.Array, v: jax.Array, window: int, segments: jax.Array | None) -> jax.Array:
    """Our own form, which is checked against the one that is written out head by head."""
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    mask = allowed(Visibility(index, index, segments, segments), window)
    return fast_attention(q, k, v, mask, None, 0.0, None)[0]


@pytest.mark.parametrize(
    "T, window, packed",
    [(13, 0, False), (13, 3, False), (13, 0, True), (13, 3, True), (8, 1, True), (8, 40, True)],
)
def test_output_and_gradients_are_those_of_the_plain_form(T: int, window: int, packed: bool) -> None:
    """Lengths that the mask pads and not, every placement of padding, windows of all kinds; padding is zero."""
    q, k, v, gradient = draw(T, "float32")
    segments = jnp.asarray([row[:T] for row in ROWS], jnp.int32) if packed else None

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        made, pull = jax.vjp(fused(window, segments), q, k, v)
        wanted, expected = jax.vjp(lambda q, k, v: plain(q, k, v, window, segments), q, k, v)
        return (made, *pull(gradient)), (wanted, *expected(gradient))

    found, right = jax.tree.map(np.asarray, both(q, k, v))
    for one, other in zip(found, right, strict=True):
        assert np.max(np.abs(one - other)) <= tolerance("f32_attention") * np.max(np.abs(other))
    if segments is not None:
        assert not np.any(found[0][np.asarray(segments) == 0])


def test_what_is_masked_has_no_weight_in_half_precision() -> None:
    """Values of other documents, however large, do not reach an output or a gradient; and nothing is NaN."""
    q, k, v, gradient = draw(13, "bfloat16")
    segments = jnp.asarray(ROWS, jnp.int32)
    other = jnp.asarray(segments == 1)[:, :, None, None]

    @jax.jit
    def run(k: jax.Array, v: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(fused(0, segments), q, k, v)
        parts = (out, *pull(jnp.where(other, 0, gradient)))
        return [jnp.where(other, 0, x) for x in parts]

    before, after = run(k, v), run(jnp.where(other, 30 * k, k), jnp.where(other, 30 * v, v))
    for one, two in zip(before, after, strict=True):
        assert jnp.isfinite(one).all() and jnp.array_equal(one, two)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mesh_changes_nothing(packed: bool) -> None:
    """Rows over data and heads over tensor, mask included."""
    q, k, v, gradient = draw(13, "float32")
    segments = jnp.asarray(ROWS, jnp.int32) if packed else None

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(fused(3, segments), q, k, v)
        return out, *pull(gradient)

    alone = jax.jit(run)(q, k, v)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        together = jax.jit(run)(*(jax.device_put(x, batch_sharding(mesh)) for x in (q, k, v)))
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=10 * tolerance("f32_attention"))


def test_cudnn_is_chosen_where_it_is_exact() -> None:
    """Half precision, heads of a multiple of 8 up to 256, nothing but causality, window and segments."""
    half = jax.ShapeDtypeStruct((B, 16, N, 64), jnp.bfloat16)

    def chosen(requested: str = "cudnn", plain: bool = True, **changes: object) -> str:
        q = jnp.zeros(**({"shape": half.shape, "dtype": half.dtype} | changes))  # type: ignore[arg-type]
        return choose_attention(requested, q, plain)

    assert chosen() == chosen(dtype=jnp.float16) == "cudnn"
    assert chosen(plain=False) == chosen(dtype=jnp.float32) == "xla"
    assert chosen(shape=(B, 16, N, 20)) == chosen(shape=(B, 16, N, 264)) == "xla"
    assert chosen(shape=(B, 16, N, 256)) == "cudnn"
    assert chosen("xla") == "xla" and chosen("readable") == "readable"
    assert _widest_fused_head() == 0 and chosen("auto") == "xla"  # no GPU here
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        assert chosen() == "xla" and chosen(shape=(8, 16, N, 64)) == "cudnn"
