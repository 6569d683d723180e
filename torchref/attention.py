"""Grouped-query attention: masks, a readable form, fast forms, the KV cache. Twin: jaxlm/attention.py.

    scores = q k^T / sqrt(H) (+ bias table);  out = softmax(scores where allowed) v

Query head n reads kv head n // G. Which query may see which key is said by `Visibility`; a query that may see no key
(padding) gives zeros. Source: arXiv:1706.03762, section 3.2; arXiv:2305.13245 (GQA).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxlm.config import ModelConfig
from torchref.layers import Backends, Linear, RMSNorm, apply_rope, dropout, init_std, make_param, upcast
from torchref.shapes import Bool, Float, Int


class Visibility(NamedTuple):
    """Which keys a query may see: its own segment's, not later than itself; segment 0 is padding."""

    query_index: Int[Tensor, " T"]  # slot of each query in the sequence
    key_index: Int[Tensor, " S"]  # slot of each key
    query_segment: Int[Tensor, "B T"] | None  # None: one segment, no padding
    key_segment: Int[Tensor, "B S"] | None
    kept: Int[Tensor, ""] | int | None = None  # columns that a cache keeps: not the padding on the right


class LayerCache(NamedTuple):
    """Keys and values of one layer, rotated already; what was not written yet is zero.

    Token t stands in slot t mod S. Under a window, S need not exceed the window: a ring, whose new tokens take the
    place of those that no query will see any more. Heads come before slots, as fused kernels take them.
    """

    k: Float[Tensor, "B K S H"]
    v: Float[Tensor, "B K S H"]


class KVCache(NamedTuple):
    """What decoding remembers: one LayerCache per block, the tokens' segments (0 = none or padding), tokens so far."""

    layers: tuple[LayerCache, ...]
    segment: Int[Tensor, "B S"]
    length: int


def init_cache(
    config: ModelConfig, batch: int, slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> KVCache:
    """An empty cache for `slots` tokens of `batch` sequences; a windowed layer has no more slots than its window."""
    layers = []
    for i in range(config.n_layers):
        window = config.window(i)
        shape = (batch, config.n_kv_heads, min(slots, window) if window else slots, config.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        layers.append(LayerCache(k, v))
    return KVCache(tuple(layers), torch.zeros((batch, slots), dtype=torch.long, device=device), 0)


def remember(
    cache: LayerCache, k: Float[Tensor, "B T K H"], v: Float[Tensor, "B T K H"], visibility: Visibility
) -> tuple[Float[Tensor, "B S K H"], Float[Tensor, "B S K H"], Visibility, LayerCache]:
    """Keys and values that T new tokens may see, which ones they are, and the cache with the new ones written.

    visibility: of the new tokens in a cache that forgets nothing.
    """
    new = LayerCache(*(x.transpose(1, 2).to(old.dtype) for x, old in zip((k, v), cache)))
    S, T, device = cache.k.shape[2], k.shape[1], k.device
    start = int(visibility.query_index[0])
    ring = visibility.key_index.shape[0] != S
    if T == 1 or not ring:
        # In a ring, the token that is overwritten left the window of the new one.
        first = start % S if ring else start
        for old, x in zip(cache, new):
            old[:, :, first : first + T] = x
        seen = cache
        visibility = _of_ring(visibility, _ring_index(start + 1, S, device)) if ring else visibility
    else:
        # Several new tokens: the first still see what the last will have overwritten.
        seen = LayerCache(*(torch.cat([old, x], dim=2) for old, x in zip(cache, new)))
        kept = T if visibility.kept is None else int(visibility.kept)
        newest = torch.arange(max(kept - S, 0), kept, device=device)
        for old, x in zip(cache, new):
            old[:, :, (start + newest) % S] = x[:, :, newest]
        seen_index = torch.cat([_ring_index(start, S, device), visibility.query_index])
        visibility = _of_ring(visibility, seen_index)
    return seen.k.transpose(1, 2), seen.v.transpose(1, 2), visibility, cache


def _ring_index(length: int, slots: int, device: torch.device) -> Int[Tensor, " S"]:
    """Which of `length` tokens each slot of a ring holds: the newest t with t mod S = slot; negative = none."""
    last = length - 1
    return last - (last - torch.arange(slots, device=device)) % slots


def _of_ring(visibility: Visibility, index: Int[Tensor, " S"]) -> Visibility:
    """Visibility of the tokens `index` among all; segment 0 where there is none."""
    segment = None
    if visibility.key_segment is not None:
        segment = visibility.key_segment[:, index.clamp(min=0)].masked_fill(index < 0, 0)
    return visibility._replace(key_index=index, key_segment=segment)


def allowed(visibility: Visibility, window: int) -> Bool[Tensor, "#B T S"]:
    """The boolean mask: causal, the last `window` positions only (0 = all), equal and non-zero segments."""
    distance = visibility.query_index[:, None] - visibility.key_index[None, :]
    mask = distance >= 0
    if window:
        mask = mask & (distance < window)
    mask = mask[None]
    if visibility.query_segment is not None and visibility.key_segment is not None:
        query, key = visibility.query_segment[:, :, None], visibility.key_segment[:, None, :]
        mask = mask & (query == key) & (query > 0)
    return mask


def masked_softmax(scores: Float[Tensor, "*B T S"], mask: Bool[Tensor, "*M T S"]) -> Float[Tensor, "*B T S"]:
    """Softmax over the allowed keys, upcast; a row without any is zero, not NaN and not uniform."""
    scores = upcast(scores).masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(~top.isfinite(), 0))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def readable_attention(
    q: Float[Tensor, "B T N H"],
    k: Float[Tensor, "B S K H"],
    v: Float[Tensor, "B S K H"],
    mask: Bool[Tensor, "#B T S"],
    bias: Float[Tensor, "N T S"] | None,
    rate: float,
    key: torch.Generator | None,
) -> tuple[Float[Tensor, "B T N H"], Float[Tensor, "B N T S"]]:
    """One head at a time, as the equation is written; also the scores, -inf where not allowed."""
    group = q.shape[2] // k.shape[2]
    heads, scores = [], []
    for head in range(q.shape[2]):
        q_BTH, k_BSH, v_BSH = q[:, :, head], k[:, :, head // group], v[:, :, head // group]
        scores_BTS = upcast(q_BTH) @ upcast(k_BSH).mT / q.shape[3] ** 0.5
        if bias is not None:
            scores_BTS = scores_BTS + upcast(bias[head])
        scores.append(scores_BTS.masked_fill(~mask, -torch.inf))
        weights_BTS = masked_softmax(scores_BTS, mask).to(v.dtype)
        heads.append(dropout(weights_BTS, rate, key) @ v_BSH)
    return torch.stack(heads, dim=2), torch.stack(scores, dim=1)


def fast_attention(
    q: Float[Tensor, "B T N H"],
    k: Float[Tensor, "B S K H"],
    v: Float[Tensor, "B S K H"],
    mask: Bool[Tensor, "#B T S"],
    bias: Float[Tensor, "N T S"] | None,
    rate: float,
    key: torch.Generator | None,
) -> tuple[Float[Tensor, "B T N H"], Float[Tensor, "B N T S"]]:
    """All heads in two contractions; scores (-inf where not allowed) and softmax upcast."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q_BTKGH = q.reshape(B, T, K, N // K, H)
    scores = torch.einsum("BTKGH,BSKH->BKGTS", upcast(q_BTKGH), upcast(k)) / H**0.5
    if bias is not None:
        scores = scores + upcast(bias.reshape(1, K, N // K, *bias.shape[1:]))
    mask = mask[:, None, None]
    weights = masked_softmax(scores, mask).to(v.dtype)
    out = torch.einsum("BKGTS,BSKH->BTKGH", dropout(weights, rate, key), v).reshape(B, T, N, H)
    return out, scores.masked_fill(~mask, -torch.inf).reshape(B, N, T, -1)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused kernel; without a mask, plain causal attention. A row that may see nothing gives zeros."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def choose_attention(requested: str, q: Tensor, plain: bool) -> str:
    """`auto` takes the fused kernel where it is exact: no bias table, no dropout."""
    if requested != "auto":
        return requested
    return "sdpa" if plain else "explicit"


class Attention(nn.Module):
    """Projections, rotary positions and attention of one block."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        backends: Backends,
        *,
        rngs: torch.Generator | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        D, N, K, H = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        std, qkv = init_std(config, D), config.qkv_bias
        self.q_proj = Linear(D, N * H, bias=qkv, std=std, rngs=rngs, dtype=dtype)
        self.k_proj = Linear(D, K * H, bias=qkv, std=std, rngs=rngs, dtype=dtype)
        self.v_proj = Linear(D, K * H, bias=qkv, std=std, rngs=rngs, dtype=dtype)
        std = init_std(config, N * H, residual=True)
        self.o_proj = Linear(N * H, D, bias=config.attn_out_bias, std=std, rngs=rngs, dtype=dtype)
        self.q_norm = RMSNorm(H, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.norm_eps, dtype=dtype) if config.qk_norm else None
        table = (1, N, config.context, config.context)
        self.bias_table = make_param(table, 0.0, rngs, dtype) if config.attn_bias_table else None
        self.n_heads, self.n_kv_heads, self.head_dim = N, K, H
        self.window, self.rate, self.backend = config.window(layer), config.dropout, backends.attention

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: tuple[Tensor, Tensor] | None,
        visibility: Visibility,
        cache: LayerCache | None = None,
        key: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor], LayerCache | None]:
        """The block's attention output, its activations by relative name, and the cache with k and v written."""
        B, T, _ = x.shape
        q_BTNH = self.q_proj(x).view(B, T, self.n_heads, self.head_dim)
        k_BTKH = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        v_BTKH = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if rope is not None:
            q_BTNH, k_BTKH = apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope)
        acts = {"q": q_BTNH, "k": k_BTKH, "v": v_BTKH}
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if cache is not None:
            k_BSKH, v_BSKH, visibility, cache = remember(cache, k_BTKH, v_BTKH, visibility)
        out_BTNH, scores = self.attend(q_BTNH, k_BSKH, v_BSKH, visibility, cached=cache is not None, key=key)
        acts |= {"heads": out_BTNH} if scores is None else {"scores": scores, "heads": out_BTNH}
        return self.o_proj(out_BTNH.reshape(B, T, -1)), acts, cache

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        cached: bool,
        key: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "B T N H"], Float[Tensor, "B N T S"] | None]:
        """Dispatches to the implementation; all give the same result, and the scores where they exist."""
        dropping = key is not None and self.rate > 0
        backend = choose_attention(self.backend, q, plain=self.bias_table is None and not dropping)
        causal_only = not cached and visibility.query_segment is None and not self.window
        if backend == "sdpa":
            mask = None if causal_only else allowed(visibility, self.window)
            return sdpa_attention(q, k, v, mask), None
        bias = None
        if self.bias_table is not None:
            rows, columns = visibility.query_index[:, None], visibility.key_index[None, :]
            bias = self.bias_table[0][:, rows, columns]
        mask = allowed(visibility, self.window)
        form = readable_attention if backend == "readable" else fast_attention
        return form(q, k, v, mask, bias, self.rate, key)
