"""Grouped-query attention: masks, a readable form, fast forms, the KV cache. Twin: torchref/attention.py.

    scores = q k^T / sqrt(H) (+ bias table);  out = softmax(scores where allowed) v

Query head n reads kv head n // G. Which query may see which key is said by `Visibility`; a query that may see no key
(padding) gives zeros. Source: arXiv:1706.03762, section 3.2; arXiv:2305.13245 (GQA).
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxlm.causal_attention import causal_attention
from jaxlm.config import ModelConfig
from jaxlm.layers import (
    Backends,
    Linear,
    RMSNorm,
    apply_rope,
    dropout,
    init_std,
    make_param,
    split_key,
    upcast,
)
from jaxlm.shapes import Bool, Float, Int
from jaxlm.sharding import BATCH_AXES, constrain, current_mesh_shape
from jaxlm.token_attention import token_attention

MASK_COLUMNS = 8  # a multiple of which a row of cuDNN's mask has: 16 bytes in half precision


class Visibility(NamedTuple):
    """Which keys a query may see: its own segment's, not later than itself; segment 0 is padding."""

    query_index: Int[Array, " T"]  # slot of each query in the sequence
    key_index: Int[Array, " S"]  # slot of each key
    query_segment: Int[Array, "B T"] | None  # None: one segment, no padding
    key_segment: Int[Array, "B S"] | None
    kept: Int[Array, ""] | int | None = None  # columns that a cache keeps: not the padding on the right


class LayerCache(NamedTuple):
    """Keys and values of one layer, rotated already; what was not written yet is zero.

    Token t stands in slot t mod S. Under a window, S need not exceed the window: a ring, whose new tokens take the
    place of those that no query will see any more. Heads come before slots, so that a step multiplies what it finds.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


class KVCache(NamedTuple):
    """What decoding remembers: one LayerCache per block, the tokens' segments (0 = none or padding), tokens so far."""

    layers: tuple[LayerCache, ...]
    segment: Int[Array, "B S"]
    length: Int[Array, ""]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `slots` tokens of `batch` sequences; a windowed layer has no more slots than its window."""
    layers = []
    for i in range(config.n_layers):
        window = config.window(i)
        shape = (batch, config.n_kv_heads, min(slots, window) if window else slots, config.head_dim)
        layers.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return KVCache(tuple(layers), jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def remember(
    cache: LayerCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], visibility: Visibility
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"], Visibility, LayerCache]:
    """Keys and values that T new tokens may see, which ones they are, and the cache with the new ones written.

    visibility: of the new tokens in a cache that forgets nothing.
    """
    new = LayerCache(*(x.swapaxes(1, 2).astype(old.dtype) for x, old in zip((k, v), cache)))
    S, T = cache.k.shape[2], k.shape[1]
    start = visibility.query_index[0]
    ring = visibility.key_index.shape[0] != S
    if T == 1 or not ring:
        # In a ring, the token that is overwritten left the window of the new one.
        write = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=start % S if ring else start, axis=2
        )
        seen = cache = LayerCache(*(write(old, x) for old, x in zip(cache, new)))
        visibility = _of_ring(visibility, _ring_index(start + 1, S)) if ring else visibility
    else:
        # Several new tokens: the first still see what the last will have overwritten.
        seen = LayerCache(*(jnp.concatenate([old, x], axis=2) for old, x in zip(cache, new)))
        index = _ring_index(start + (T if visibility.kept is None else visibility.kept), S)
        source, taken = jnp.clip(index - start, 0, T - 1), (index >= start)[:, None]
        cache = LayerCache(*(jnp.where(taken, x[:, :, source], old) for old, x in zip(cache, new)))
        seen_index = jnp.concatenate([_ring_index(start, S), visibility.query_index])
        visibility = _of_ring(visibility, seen_index)
    return seen.k.swapaxes(1, 2), seen.v.swapaxes(1, 2), visibility, cache


def _ring_index(length: Int[Array, ""], slots: int) -> Int[Array, " S"]:
    """Which of `length` tokens each slot of a ring holds: the newest t with t mod S = slot; negative = none."""
    last = length - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots


def _of_ring(visibility: Visibility, index: Int[Array, " S"]) -> Visibility:
    """Visibility of the tokens `index` among all; segment 0 where there is none."""
    segment = None
    if visibility.key_segment is not None:
        segment = jnp.where(index >= 0, visibility.key_segment[:, jnp.maximum(index, 0)], 0)
    return visibility._replace(key_index=index, key_segment=segment)


def allowed(visibility: Visibility, window: int) -> Bool[Array, "#B T S"]:
    """The boolean mask: causal, the last `window` positions only (0 = all), equal and non-zero segments."""
    distance = visibility.query_index[:, None] - visibility.key_index[None, :]
    mask = distance >= 0
    if window:
        mask &= distance < window
    mask = mask[None]
    if visibility.query_segment is not None and visibility.key_segment is not None:
        query, key = visibility.query_segment[:, :, None], visibility.key_segment[:, None, :]
        mask = mask & (query == key) & (query > 0)
    return mask


def masked_softmax(scores: Float[Array, "*B T S"], mask: Bool[Array, "*M T S"]) -> Float[Array, "*B T S"]:
    """Softmax over the allowed keys, upcast; a row without any is zero, not NaN and not uniform."""
    scores = jnp.where(mask, upcast(scores), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), jax.lax.stop_gradient(top), 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def readable_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "N T S"] | None,
    rate: float,
    key: Array | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """One head at a time, as the equation is written; also the scores, -inf where not allowed."""
    group = q.shape[2] // k.shape[2]
    heads, scores = [], []
    for head, head_key in enumerate(split_key(key, q.shape[2])):
        q_BTH, k_BSH, v_BSH = q[:, :, head], k[:, :, head // group], v[:, :, head // group]
        scores_BTS = upcast(q_BTH) @ upcast(k_BSH).mT / q.shape[3] ** 0.5
        if bias is not None:
            scores_BTS += upcast(bias[head])
        scores.append(jnp.where(mask, scores_BTS, -jnp.inf))
        weights_BTS = masked_softmax(scores_BTS, mask).astype(v.dtype)
        heads.append(dropout(weights_BTS, rate, head_key) @ v_BSH)
    return jnp.stack(heads, axis=2), jnp.stack(scores, axis=1)


def fast_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "N T S"] | None,
    rate: float,
    key: Array | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """All heads in two products; q, k, v in their dtype, scores (-inf where not allowed) and softmax upcast."""
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    scores = _scores(q, k, mask, bias)
    weights = dropout(masked_softmax(scores, mask[:, None]).astype(v.dtype), rate, key)
    out_BKPH = jnp.matmul(weights.reshape(B, K, -1, S), v.swapaxes(1, 2))
    return out_BKPH.reshape(B, N, T, H).swapaxes(1, 2), scores


def _scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "N T S"] | None = None,
) -> Float[Array, "B N T S"]:
    """q k^T / sqrt(H) (+ bias), upcast; -inf where not allowed."""
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # A kv head's group of queries are the rows of one product: no head of k or v is repeated, nor a cache turned.
    q_BKPH = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.matmul(q_BKPH, k.transpose(0, 2, 3, 1), preferred_element_type=wide) / H**0.5
    scores = scores.reshape(B, N, T, S)
    return jnp.where(mask[:, None], scores if bias is None else scores + upcast(bias), -jnp.inf)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window: int,
    segments: Int[Array, "B T"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """cuDNN's fused kernel: causal, optionally windowed, of packed or padded rows; per shard under a mesh.

    Segments become a mask [B, 1, T, T] that all heads and layers share. With it the window is part of the mask: cuDNN
    before 9.10.2 takes no window beside one. Padding sees padding, so that every row has a key, and values of zero
    there: its output and gradients are zero, and no second copy of the output is kept.
    implementation: `xla` makes the same call without cuDNN, on any platform and in any dtype.
    """
    length, mask = q.shape[1], None
    span = (window - 1, 0) if window and segments is None else None
    if segments is not None:
        v = jnp.where((segments > 0)[:, :, None, None], v, 0)
        if short := -length % MASK_COLUMNS:
            q, k, v = (jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) for x in (q, k, v))
        mask = _same_segment(jnp.pad(segments, ((0, 0), (0, short))), window)

    def local(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, local_window_size=span, implementation=implementation
        )

    if current_mesh_shape():
        heads = PartitionSpec(BATCH_AXES, None, "tensor", None)
        rows = None if mask is None else PartitionSpec(BATCH_AXES)
        local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(q, k, v, mask)[:, :length]


def _same_segment(segments: Int[Array, "B T"], window: int) -> Bool[Array, "B 1 T T"]:
    """Keys of the query's segment, within the window; what is later than the query is left to the kernel."""
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    if window:
        index = jnp.arange(segments.shape[1], dtype=jnp.int32)
        mask &= (index[:, None] - index[None, :]) < window
    return constrain(mask, ("batch", None, None, None))


def choose_attention(requested: str, q: Float[Array, "B T N H"], plain: bool) -> str:
    """`auto` takes cuDNN where it is present, and that and `cudnn` take it where it is exact; else XLA.

    plain: every query sees the keys up to itself, of its segment or all, without dropout or bias. cuDNN is exact then,
    in half precision, for heads of a multiple of 8 up to 256 (128 before Hopper) and rows that the mesh divides.
    """
    if requested not in ("auto", "cudnn"):
        return requested
    widest = 256 if requested == "cudnn" else _widest_fused_head()
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[3] % 8 == 0 and q.shape[3] <= widest
    shape = current_mesh_shape()
    ways = math.prod(shape.get(axis, 1) for axis in BATCH_AXES)
    return "cudnn" if plain and half and fits and q.shape[0] % ways == 0 else "xla"


def _widest_fused_head() -> int:
    """Widest head that cuDNN's kernel takes on this machine's first device; 0 where that is no GPU since Ampere."""
    if jax.default_backend() != "gpu":
        return 0
    major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return 0
    return 256 if int(major) >= 9 else 128


class Attention(nnx.Module):
    """Projections, rotary positions and attention of one block."""

    def __init__(
        self, config: ModelConfig, layer: int, backends: Backends, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        D, N, K, H = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        std, qkv = init_std(config, D), config.qkv_bias
        self.q_proj = Linear(D, N * H, bias=qkv, std=std, axes=("embed", "heads"), rngs=rngs, dtype=dtype)
        self.k_proj = Linear(D, K * H, bias=qkv, std=std, axes=("embed", "kv_heads"), rngs=rngs, dtype=dtype)
        self.v_proj = Linear(D, K * H, bias=qkv, std=std, axes=("embed", "kv_heads"), rngs=rngs, dtype=dtype)
        std = init_std(config, N * H, residual=True)
        out_bias = config.attn_out_bias
        self.o_proj = Linear(
            N * H, D, bias=out_bias, std=std, axes=("heads", "embed"), rngs=rngs, dtype=dtype
        )
        self.q_norm = RMSNorm(H, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.norm_eps, dtype=dtype) if config.qk_norm else None
        table = (1, N, config.context, config.context)
        table_axes = (None, "heads", "embed", None)
        self.bias_table = make_param(table, table_axes, 0.0, rngs, dtype) if config.attn_bias_table else None
        self.n_heads, self.n_kv_heads, self.head_dim = N, K, H
        self.window, self.rate, self.backend = config.window(layer), config.dropout, backends.attention

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array] | None,
        visibility: Visibility,
        cache: LayerCache | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], LayerCache | None]:
        """The block's attention output, its activations by relative name, and the cache with k and v written."""
        B, T, _ = x.shape
        q_BTNH = self.q_proj(x).reshape(B, T, self.n_heads, self.head_dim)
        k_BTKH = self.k_proj(x).reshape(B, T, self.n_kv_heads, self.head_dim)
        v_BTKH = self.v_proj(x).reshape(B, T, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if rope is not None:
            q_BTNH, k_BTKH = apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope)
        q_BTNH = constrain(q_BTNH, ("batch", None, "heads", None))
        k_BTKH = constrain(k_BTKH, ("batch", None, "kv_heads", None))
        v_BTKH = constrain(v_BTKH, ("batch", None, "kv_heads", None))
        acts = {"q": q_BTNH, "k": k_BTKH, "v": v_BTKH}
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if cache is not None:
            k_BSKH, v_BSKH, visibility, cache = remember(cache, k_BTKH, v_BTKH, visibility)
        out_BTNH, scores = self.attend(q_BTNH, k_BSKH, v_BSKH, visibility, cached=cache is not None, key=key)
        acts |= {"heads": out_BTNH} if scores is None else {"scores": scores, "heads": out_BTNH}
        return self.o_proj(out_BTNH.reshape(B, T, -1)), acts, cache

    def attend(
        self, q: Array, k: Array, v: Array, visibility: Visibility, cached: bool, key: Array | None = None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"] | None]:
        """Dispatches to the implementation; all give the same result, and the scores where they exist."""
        dropping = key is not None and self.rate > 0
        plain = not cached and self.bias_table is None and not dropping
        backend = choose_attention(self.backend, q, plain)
        if backend == "cudnn":
            return cudnn_attention(q, k, v, self.window, visibility.query_segment), None
        bias = None
        if self.bias_table is not None:
            rows, columns = visibility.query_index[:, None], visibility.key_index[None, :]
            bias = self.bias_table[...][0][:, rows, columns]
        mask = allowed(visibility, self.window)
        if backend == "xla" and plain:
            return causal_attention(q, k, v, mask, self.window), _scores(q, k, mask)
        if backend == "xla" and cached and q.shape[1] == 1 and not dropping:
            return token_attention(q, k, v, mask, bias)
        form = readable_attention if backend == "readable" else fast_attention
        return form(q, k, v, mask, bias, self.rate, key)
