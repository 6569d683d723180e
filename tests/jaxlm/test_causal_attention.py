"""Causal attention by blocks, and the product with its own gradient, against the plain forms."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, quick_jit, relative_error, tiny
from tolerances import tolerance

import jaxlm.attention
import jaxlm.causal_attention
from jaxlm.attention import Visibility, allowed, fast_attention, init_cache
from jaxlm.causal_attention import causal_attention, spans
from jaxlm.matmul import matmul
from jaxlm.model import Decoder


def drawn(shape: tuple[int, ...], seed: int, dtype: Any = np.float64) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def mask_of(rows: int, length: int, window: int, packed: bool) -> Any:
    segments = None
    if packed:  # documents, then padding, of another length in every row; the last row is all padding
        ends = np.random.default_rng(7).integers(0, 4, (rows, length))
        segments = jnp.asarray(np.sort(ends)[:, ::-1].copy(), jnp.int32).at[-1].set(0)
    index = jnp.arange(length, dtype=jnp.int32)
    return allowed(Visibility(index, index, segments, segments), window)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_equal_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, x64: None, window: int, packed: bool
) -> None:
    """Output and all gradients in float64, over several blocks, the last of them shorter; no NaN in empty rows."""
    monkeypatch.setattr(jaxlm.causal_attention, "LEAST_BLOCK", 4)
    B, T, N, K, H = 3, 19, 6, 2, 4
    q, k, v, out_bar = (drawn((B, T, n, H), i) for i, n in enumerate((N, K, K, N)))
    mask = mask_of(B, T, window, packed)
    assert len(spans(T, window)) > 3

    def both(q: Any, k: Any, v: Any, mask: Any, out_bar: Any) -> Any:
        plain = jax.vjp(lambda q, k, v: fast_attention(q, k, v, mask, None, 0.0, None)[0], q, k, v)
        made = jax.vjp(lambda q, k, v: causal_attention(q, k, v, mask, window), q, k, v)
        return [(out, *back(out_bar)) for out, back in (made, plain)]

    made, plain = quick_jit(both)(q, k, v, mask, out_bar)
    names = ("out", "dq", "dk", "dv")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, made, plain, strict=True)}
    assert_close(errors, tolerance("f64"), "attention")


def test_spans_cover_what_is_visible_and_little_more() -> None:
    """Every visible key of every query lies in its block's span; half of the square is left out."""
    for length, window in ((1, 0), (128, 0), (129, 3), (500, 100), (2048, 0)):
        visible = np.asarray(mask_of(1, length, window, packed=False))[0]
        covered = np.zeros_like(visible)
        for span in spans(length, window):
            covered[span.start : span.stop, span.first_key : span.last_key] = True
        assert not (visible & ~covered).any()
    assert covered.mean() <= 0.625


@pytest.mark.parametrize("sizes", [(6, 10), (10, 6), (1, 3)])
@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 3, 5)])
def test_product_has_the_plain_gradients(x64: None, lead: tuple[int, ...], sizes: tuple[int, int]) -> None:
    """y, dx and dw in float64 for any number of leading axes, whichever factor is turned."""
    x, weight, dy = drawn((*lead, sizes[0]), 0), drawn(sizes, 1), drawn((*lead, sizes[1]), 2)
    plain, made = jax.vjp(lambda x, w: x @ w, x, weight), jax.vjp(matmul, x, weight)
    pairs = zip((made[0], *made[1](dy)), (plain[0], *plain[1](dy)), strict=True)
    assert_close(
        {str(i): relative_error(a, b) for i, (a, b) in enumerate(pairs)}, tolerance("f64"), "product"
    )


@pytest.mark.parametrize("shape", [(1, 9, 1, 1, 8), (2, 130, 2, 2, 8)])
def test_half_precision_runs_whatever_the_shape(shape: tuple[int, int, int, int, int]) -> None:
    """XLA's CPU backend has no kernel for a half-precision product with a turned factor: none may come to be."""
    B, T, K, G, H = shape
    q, k, v = (drawn((B, T, n, H), i, jnp.bfloat16) for i, n in enumerate((K * G, K, K)))
    mask, weight = mask_of(B, T, 0, packed=False), drawn((H, 3), 5, jnp.bfloat16)

    def loss(q: Any, k: Any, v: Any, weight: Any) -> Any:
        return jnp.sum(matmul(causal_attention(q, k, v, mask, 0), weight).astype(jnp.float32))

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, weight)
    wide = quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(
        *(x.astype(jnp.float32) for x in (q, k, v, weight))
    )
    scale = max(float(jnp.linalg.norm(b)) for b in wide)
    for a, b in zip(found, wide, strict=True):
        assert float(jnp.linalg.norm(a.astype(jnp.float32) - b)) <= tolerance("bf16_attention") * scale


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 1.0), ("float16", 1.0), ("float16", 1e-3)])
def test_half_precision_attention_is_as_close_to_float64_as_the_plain_form(
    dtype: str, size: float, x64: None
) -> None:
    """Output and gradients, nearly uniform weights over 600 keys; small gradients too, as float16 has them."""
    B, T, N, H = 1, 600, 2, 8
    half = [(drawn((B, T, N, H), i) * scale).astype(dtype) for i, scale in enumerate((2, 2, 1))]
    out_bar, mask = (drawn((B, T, N, H), 5) * size).astype(dtype), mask_of(B, T, 0, packed=False)

    def made(form: Any, dtype: str) -> list[Any]:
        def run(*given: Any) -> Any:
            out, back = jax.vjp(form, *(x.astype(dtype) for x in given[:3]))
            return [x.astype(jnp.float64) for x in (out, *back(given[3].astype(dtype)))]

        return quick_jit(run)(*half, out_bar)

    def plain(q: Any, k: Any, v: Any) -> Any:
        return fast_attention(q, k, v, mask, None, 0.0, None)[0]

    want = made(plain, "float64")
    ours, theirs = (
        [float(relative_error(a, b)) for a, b in zip(made(form, dtype), want, strict=True)]
        for form in (lambda q, k, v: causal_attention(q, k, v, mask, 0), plain)
    )
    assert all(a <= tolerance("half_attention") * b for a, b in zip(ours, theirs, strict=True)), (
        ours,
        theirs,
    )


def test_a_layer_takes_the_forms_that_know_its_window_and_single_tokens(monkeypatch: Any) -> None:
    """Without, results are right and slow: a window costs all keys, a step of decoding turns the cache."""
    module, seen = jaxlm.attention, []
    whole, single = module.causal_attention, module.token_attention
    monkeypatch.setattr(module, "causal_attention", lambda *a: (seen.append(a[4]), whole(*a))[1])
    monkeypatch.setattr(module, "token_attention", lambda *a: (seen.append("token"), single(*a))[1])
    config = tiny(windows=(0, 5))
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    ids = jnp.zeros((1, 9), jnp.int32)
    jax.eval_shape(lambda ids: model.hidden(ids)[0], ids)
    jax.eval_shape(lambda ids: model.hidden(ids, cache=init_cache(config, 1, 9, jnp.float32))[0], ids[:, :1])
    assert seen == [0, 5, "token", "token"]


def test_gradients_of_a_product_turn_the_narrow_factor_only() -> None:
    """Compiled for the CPU: no transpose of the wide factor, no branch left of the choice by platform."""
    x, weight = jnp.ones((4, 16, 8)), jnp.ones((8, 96))
    text = jax.jit(jax.grad(lambda x, w: matmul(x, w).sum() ** 2, argnums=(0, 1))).lower(x, weight).compile()
    entry = text.as_text()
    turned = [math.prod(map(int, d.split(","))) for d in re.findall(r"f32\[([\d,]+)\]\S* transpose\(", entry)]
    assert max(turned, default=0) <= x.size, turned
    assert "conditional(" not in entry
