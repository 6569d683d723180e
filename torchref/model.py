"""The decoder. Twin: jaxlm/model.py. A block, in the letters of jaxlm's legend:

    x = x + attn(attn_norm(x));   x = x + mlp(mlp_norm(x))        [mlp or moe]

`Decoder.hidden` stops before the head, so that a loss can be taken without the logits of all tokens. Activations come
back by module path ("blocks.0.attn.q"), the same keys in both frameworks.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from jaxlm.config import ModelConfig
from jaxlm.rope_table import rope_table
from torchref.attention import Attention, KVCache, LayerCache, Visibility
from torchref.layers import MLP, Backends, Embed, Linear, RMSNorm, dropout, init_std, make_param
from torchref.moe import MoE
from torchref.shapes import Bool, Float, Int


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

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
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps, dtype=dtype)
        self.attn = Attention(config, layer, backends, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, dtype=dtype)
        moe = config.is_moe(layer)
        self.mlp = None if moe else MLP(config, config.d_ff, rngs=rngs, dtype=dtype)
        self.moe = MoE(config, backends, rngs=rngs, dtype=dtype) if moe else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: tuple[Tensor, Tensor] | None,
        visibility: Visibility,
        valid: Bool[Tensor, "B T"],
        train: bool,
        cache: LayerCache | None = None,
        key: torch.Generator | None = None,
        expert_ids: Int[Tensor, "B T A"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor], LayerCache | None]:
        """The block's output, its activations by relative name, and its cache with this call's keys and values."""
        acts = {"attn_norm": self.attn_norm(x)}
        attn_out, attn_acts, cache = self.attn(acts["attn_norm"], rope, visibility, cache, key)
        acts |= {f"attn.{name}": value for name, value in attn_acts.items()} | {"attn": attn_out}
        x = x + attn_out
        acts["mlp_norm"] = self.mlp_norm(x)
        if self.mlp is None:
            assert self.moe is not None
            mlp_out, moe_acts = self.moe(acts["mlp_norm"], valid, train, key, expert_ids)
            acts |= {f"moe.{name}": value for name, value in moe_acts.items()} | {"moe": mlp_out}
        else:
            mlp_out = acts["mlp"] = self.mlp(acts["mlp_norm"], key)
        return x + mlp_out, acts, cache


class Decoder(nn.Module):
    """Token ids -> hidden states -> logits."""

    def __init__(
        self,
        config: ModelConfig,
        backends: Backends = Backends(),
        *,
        rngs: torch.Generator | None,
        dtype: torch.dtype = torch.float32,
        remat: str = "none",
    ):
        super().__init__()
        D, V = config.d_model, config.vocab_size
        embed_std = _embed_std(config)
        self.embed = Embed(V, D, std=embed_std, rngs=rngs, dtype=dtype)
        learned = config.position == "learned"
        self.pos_embed = Embed(config.context, D, std=embed_std, rngs=rngs, dtype=dtype) if learned else None
        self.blocks = nn.ModuleList(
            [Block(config, i, backends, rngs=rngs, dtype=dtype) for i in range(config.n_layers)]
        )
        self.final_norm = RMSNorm(D, config.norm_eps, dtype=dtype)
        bias, std = config.head_bias, init_std(config, D)
        self.lm_head = None if config.tied else Linear(D, V, bias=bias, std=std, rngs=rngs, dtype=dtype)
        self.head_bias = make_param((V,), 0.0, rngs, dtype) if config.tied and bias else None
        self.config, self.remat = config, remat

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "#B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        cache: KVCache | None = None,
        train: bool = False,
        key: torch.Generator | None = None,
        expert_ids: Int[Tensor, "B T L A"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor], KVCache | None]:
        """The final norm's output, all activations by module path, and the cache after these tokens.

        positions: rotary or learned positions, default 0..T-1 after the cached ones. segments: documents of a packed
        row are 1, 2, ...; 0 is padding, which a cache forgets where it ends all rows; default one document. train: a
        capacity limit holds. key: dropout is drawn. expert_ids: a recorded routing to replay, by layer (dense layers'
        entries are not read): probabilities stay live, the choice is given (Megatron-Core's router replay;
        arXiv:2510.11370).
        """
        B, T = ids.shape
        start = 0 if cache is None else cache.length
        query_index = start + torch.arange(T, device=ids.device)
        if positions is None:
            positions = query_index[None]
        valid = torch.ones((B, T), dtype=torch.bool, device=ids.device) if segments is None else segments > 0
        visibility, cache = _visibility(query_index, segments, cache, (B, T))
        x = self.embed(ids)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        x = dropout(x, self.config.dropout, key)
        rope = self._rope(positions, x.dtype)
        acts, layers = {"embed": x}, []
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[i]
            chosen = None if expert_ids is None else expert_ids[:, :, i]
            arguments = (x, rope, visibility, valid, train, layer_cache, key, chosen)
            run = block if self.remat == "none" else _rematerialised(block, self.remat, key)
            x, block_acts, layer_cache = run(*arguments)
            acts |= {f"blocks.{i}.{name}": value for name, value in block_acts.items()} | {f"blocks.{i}": x}
            layers.append(layer_cache)
        acts["final_norm"] = x = self.final_norm(x)
        if cache is not None:
            assert visibility.kept is not None
            cache = cache._replace(layers=tuple(layers), length=cache.length + int(visibility.kept))
        return x, acts, cache

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "#B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        cache: KVCache | None = None,
        train: bool = False,
        key: torch.Generator | None = None,
        expert_ids: Int[Tensor, "B T L A"] | None = None,
    ) -> tuple[Float[Tensor, "B T V"], dict[str, Tensor], KVCache | None]:
        """Like `hidden`, with the head on top: logits in the dtype of the computation."""
        x, acts, cache = self.hidden(ids, positions, segments, cache, train, key, expert_ids)
        weight, bias = self.head()
        acts["logits"] = logits = x @ weight.to(x.dtype)
        if bias is not None:
            acts["logits"] = logits = logits + bias.to(x.dtype)
        return logits, acts, cache

    def head(self) -> tuple[Float[Tensor, "D V"], Float[Tensor, " V"] | None]:
        """The head's weight as [D, V] and its bias, for losses that never make all logits."""
        if self.lm_head is None:
            return self.embed.weight.T, self.head_bias
        return self.lm_head.weight.T, self.lm_head.bias

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.config.position != "rope":
            return None
        cos, sin = _rope_tensors(self.config, torch.promote_types(dtype, torch.float32), positions.device)
        return cos[positions], sin[positions]


@torch.compiler.assume_constant_result  # numpy's part of it cannot be traced, nor need it be
def _rope_tensors(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return _made_rope_tensors(config, dtype, device)


@functools.lru_cache(maxsize=16)
def _made_rope_tensors(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The shared table on a device, made once; never an inference tensor, since training may meet it later."""
    with torch.inference_mode(False):
        cos, sin = (torch.tensor(table, dtype=dtype, device=device) for table in rope_table(config))
    return cos, sin


def _embed_std(config: ModelConfig) -> float:
    """normal: init_std; fan_in: a lookup has a fan-in of one, a tied table is also a projection from D."""
    if config.init == "normal":
        return config.init_std
    return config.d_model**-0.5 if config.tied else 1.0


def _rematerialised(block: nn.Module, remat: str, key: torch.Generator | None) -> Callable[..., Any]:
    """The block as a function whose activations are recomputed in the backward pass, all but what `remat` keeps."""
    start = None if key is None else key.get_state()
    calls = itertools.count()

    def run(*arguments: Any) -> Any:
        if key is None or start is None or next(calls) == 0:
            return block(*arguments)
        now = key.get_state()
        key.set_state(start)  # the same dropout as in the forward pass
        try:
            return block(*arguments)
        finally:
            key.set_state(now)

    keep = functools.partial(create_selective_checkpoint_contexts, list(_KEPT_OPS))
    options: dict[str, Any] = {"context_fn": keep} if remat == "dots" else {}
    return lambda *arguments: checkpoint(run, *arguments, use_reentrant=False, **options)


# Products of activations with weights, and fused attention; scores, which are batched products, are made again.
_KEPT_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def _visibility(
    query_index: Tensor, segments: Tensor | None, cache: KVCache | None, shape: tuple[int, int]
) -> tuple[Visibility, KVCache | None]:
    if cache is None:
        return Visibility(query_index, query_index, segments, segments), None
    device = query_index.device
    kept = shape[1]
    if segments is None:
        segments = torch.ones(shape, dtype=torch.long, device=device)
    else:
        filled = (segments > 0).any(0).nonzero()
        kept = int(filled[-1]) + 1 if len(filled) else 0
    cache.segment[:, cache.length : cache.length + shape[1]] = segments
    slots = torch.arange(cache.segment.shape[1], device=device)
    return Visibility(query_index, slots, segments, cache.segment, kept), cache
