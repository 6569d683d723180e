"""The decoder. Twin: torchref/model.py. A block, in the letters of the package legend:

    x = x + attn(attn_norm(x));   x = x + mlp(mlp_norm(x))        [mlp or moe]

`Decoder.hidden` stops before the head, so that a loss can be taken without the logits of all tokens. Activations come
back by module path ("blocks.0.attn.q"), the same keys in both frameworks; under jit, what is not used costs nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxlm.attention import Attention, KVCache, LayerCache, Visibility
from jaxlm.config import ModelConfig
from jaxlm.grouped import EXPERT_HIDDEN
from jaxlm.layers import (
    MLP,
    Backends,
    Embed,
    Linear,
    RMSNorm,
    add_bias,
    dropout,
    init_std,
    make_param,
    split_key,
)
from jaxlm.moe import ROUTING, MoE
from jaxlm.rope_table import rope_table
from jaxlm.shapes import Bool, Float, Int
from jaxlm.sharding import constrain

Params = dict[str, Array]


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: int, backends: Backends, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps, dtype=dtype)
        self.attn = Attention(config, layer, backends, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, dtype=dtype)
        moe = config.is_moe(layer)
        self.mlp = None if moe else MLP(config, config.d_ff, rngs=rngs, dtype=dtype)
        self.moe = MoE(config, backends, rngs=rngs, dtype=dtype) if moe else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array] | None,
        visibility: Visibility,
        valid: Bool[Array, "B T"],
        train: bool,
        cache: LayerCache | None = None,
        key: Array | None = None,
        expert_ids: Int[Array, "B T A"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], LayerCache | None]:
        """The block's output, its activations by relative name, and its cache with this call's keys and values."""
        attn_key, mlp_key = split_key(key, 2)
        acts = {"attn_norm": self.attn_norm(x)}
        attn_out, attn_acts, cache = self.attn(acts["attn_norm"], rope, visibility, cache, attn_key)
        acts |= {f"attn.{name}": value for name, value in attn_acts.items()} | {"attn": attn_out}
        x = constrain(x + attn_out, ("batch", None, None))
        acts["mlp_norm"] = self.mlp_norm(x)
        if self.mlp is None:
            assert self.moe is not None
            mlp_out, moe_acts = self.moe(acts["mlp_norm"], valid, train, mlp_key, expert_ids)
            acts |= {f"moe.{name}": value for name, value in moe_acts.items()} | {"moe": mlp_out}
        else:
            mlp_out = acts["mlp"] = self.mlp(acts["mlp_norm"], mlp_key)
        return constrain(x + mlp_out, ("batch", None, None)), acts, cache


class Decoder(nnx.Module):
    """Token ids -> hidden states -> logits."""

    def __init__(
        self,
        config: ModelConfig,
        backends: Backends = Backends(),
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
    ):
        D, V = config.d_model, config.vocab_size
        embed_std = _embed_std(config)
        self.embed = Embed(V, D, std=embed_std, axes=("vocab", "embed"), rngs=rngs, dtype=dtype)
        learned = config.position == "learned"
        position_axes = (None, "embed")
        self.pos_embed = (
            Embed(config.context, D, std=embed_std, axes=position_axes, rngs=rngs, dtype=dtype)
            if learned
            else None
        )
        self.blocks = nnx.List(
            [Block(config, i, backends, rngs=rngs, dtype=dtype) for i in range(config.n_layers)]
        )
        self.final_norm = RMSNorm(D, config.norm_eps, dtype=dtype)
        bias, std = config.head_bias, init_std(config, D)
        axes = ("embed", "vocab")
        self.lm_head = (
            None if config.tied else Linear(D, V, bias=bias, std=std, axes=axes, rngs=rngs, dtype=dtype)
        )
        self.head_bias = make_param((V,), ("vocab",), 0.0, rngs, dtype) if config.tied and bias else None
        self.config, self.remat = config, remat

    def hidden(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        train: bool = False,
        key: Array | None = None,
        expert_ids: Int[Array, "B T L A"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], KVCache | None]:
        """The final norm's output, all activations by module path, and the cache after these tokens.

        positions: rotary or learned positions, default 0..T-1 after the cached ones. segments: documents of a packed
        row are 1, 2, ...; 0 is padding, which a cache forgets where it ends all rows; default one document. train: a
        capacity limit holds. key: dropout is drawn. expert_ids: a recorded routing to replay, by layer (dense layers'
        entries are not read): probabilities stay live, the choice is given (Megatron-Core's router replay;
        arXiv:2510.11370).
        """
        B, T = ids.shape
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        query_index = start + jnp.arange(T, dtype=jnp.int32)
        if positions is None:
            positions = query_index[None]
        valid = jnp.ones((B, T), bool) if segments is None else segments > 0
        visibility, cache = _visibility(query_index, segments, cache, (B, T))
        keys = split_key(key, len(self.blocks) + 1)
        x = self.embed(ids)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        x = constrain(dropout(x, self.config.dropout, keys[-1]), ("batch", None, None))
        rope = self._rope(positions, x.dtype)
        acts, layers = {"embed": x}, []
        for i, block in enumerate(self.blocks):
            run = block if self.remat == "none" else _rematerialised(block, self.remat)
            layer_cache = None if cache is None else cache.layers[i]
            chosen = None if expert_ids is None else expert_ids[:, :, i]
            x, block_acts, layer_cache = run(x, rope, visibility, valid, train, layer_cache, keys[i], chosen)
            acts |= {f"blocks.{i}.{name}": value for name, value in block_acts.items()} | {f"blocks.{i}": x}
            layers.append(layer_cache)
        acts["final_norm"] = x = self.final_norm(x)
        if cache is not None:
            assert visibility.kept is not None
            cache = cache._replace(layers=tuple(layers), length=cache.length + visibility.kept)
        return x, acts, cache

    def __call__(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        train: bool = False,
        key: Array | None = None,
        expert_ids: Int[Array, "B T L A"] | None = None,
    ) -> tuple[Float[Array, "B T V"], dict[str, Array], KVCache | None]:
        """Like `hidden`, with the head on top: logits in the dtype of the computation."""
        x, acts, cache = self.hidden(ids, positions, segments, cache, train, key, expert_ids)
        weight, bias = self.head()
        acts["logits"] = logits = x @ weight.astype(x.dtype)
        if bias is not None:
            acts["logits"] = logits = add_bias(logits, bias)
        return logits, acts, cache

    def head(self) -> tuple[Float[Array, "D V"], Float[Array, " V"] | None]:
        """The head's weight (the embedding's transpose if tied) and bias, for losses that never make all logits."""
        if self.lm_head is None:
            return self.embed.weight[...].T, None if self.head_bias is None else self.head_bias[...]
        return self.lm_head.weight[...], None if self.lm_head.bias is None else self.lm_head.bias[...]

    def _rope(self, positions: Array, dtype: DTypeLike) -> tuple[Array, Array] | None:
        if self.config.position != "rope":
            return None
        wide = jnp.promote_types(dtype, jnp.float32)
        cos, sin = (jnp.asarray(table, wide)[positions] for table in rope_table(self.config))
        return cos, sin


def _embed_std(config: ModelConfig) -> float:
    """normal: init_std; fan_in: a lookup has a fan-in of one, a tied table is also a projection from D."""
    if config.init == "normal":
        return config.init_std
    return config.d_model**-0.5 if config.tied else 1.0


def _visibility(
    query_index: Array, segments: Array | None, cache: KVCache | None, shape: tuple[int, int]
) -> tuple[Visibility, KVCache | None]:
    if cache is None:
        return Visibility(query_index, query_index, segments, segments), None
    kept: Array | int = shape[1]
    if segments is None:
        segments = jnp.ones(shape, jnp.int32)
    else:
        columns = jnp.arange(1, shape[1] + 1, dtype=jnp.int32)
        kept = jnp.max(jnp.where(jnp.any(segments > 0, axis=0), columns, 0))
    known = jax.lax.dynamic_update_slice_in_dim(cache.segment, segments, cache.length, axis=1)
    slots = jnp.arange(known.shape[1], dtype=jnp.int32)
    return Visibility(query_index, slots, segments, known, kept), cache._replace(segment=known)


def _rematerialised(block: Block, remat: str) -> Callable[..., Any]:
    """The block as a function whose activations are recomputed in the backward pass, all but what `remat` keeps."""
    graphdef, state = nnx.split(block)

    def run(state, x, rope, visibility, valid, train, *rest):
        return nnx.merge(graphdef, state)(x, rope, visibility, valid, train, *rest)

    policy = _keeps_dots if remat == "dots" else _KEPT_ROUTING
    checkpointed = jax.checkpoint(run, static_argnums=(5,), policy=policy)
    return lambda *args: checkpointed(state, *args)


_POLICIES = jax.checkpoint_policies
# A routing is kept even where all else is recomputed: other roundings must not send a token to other experts.
_KEPT_ROUTING = _POLICIES.save_only_these_names(ROUTING)
_KEPT_NAMES = _POLICIES.save_only_these_names(ROUTING, EXPERT_HIDDEN)
_CUDNN = (
    "dot_product_attention_fwd_wrapper"  # jax's primitive: output and softmax sums, which its gradient reads
)


def _keeps_dots(primitive: Any, *shapes: Any, **parameters: Any) -> Any:
    """Products of activations with weights, fused attention, experts' hidden layers: what is expensive to make again.

    Scores, whose products have batch dimensions, are made again.
    """
    if primitive.name == _CUDNN or _POLICIES.dots_with_no_batch_dims_saveable(
        primitive, *shapes, **parameters
    ):
        return True
    return _KEPT_NAMES(primitive, *shapes, **parameters)


class Split(NamedTuple):
    """A model taken apart: what is static, and its parameters as a flat dict by dotted path."""

    graphdef: nnx.GraphDef
    params: Params


def split_model(model: nnx.Module) -> Split:
    """NNX module -> (graphdef, {"blocks.0.attn.q_proj.weight": array, ...}). Any NNX module with only Params."""
    graphdef, state = nnx.split(model, nnx.Param)
    return Split(graphdef, {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)})


def merge_model(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The inverse of `split_model`; cheap, meant to run inside jit."""
    leaves = {tuple(int(p) if p.isdigit() else p for p in path.split(".")): v for path, v in params.items()}
    return nnx.merge(
        graphdef, nnx.from_flat_state({path: nnx.Param(value) for path, value in leaves.items()})
    )


class Abstract(NamedTuple):
    """A model without memory: graphdef, shapes and logical axes of every parameter."""

    graphdef: nnx.GraphDef
    shapes: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[str | None, ...]]


def abstract_model(
    config: ModelConfig,
    backends: Backends = Backends(),
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
) -> Abstract:
    """Builds the decoder for its shapes only, whatever its size."""
    return abstract_of(lambda: Decoder(config, backends, rngs=nnx.Rngs(params=0), dtype=dtype, remat=remat))


def abstract_of(make: Callable[[], nnx.Module]) -> Abstract:
    """What `make` builds, for its shapes only; a parameter that names no axes has none."""
    graphdef, state = nnx.split(nnx.eval_shape(make), nnx.Param)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    axes = {path: leaf.get_metadata().get("axes", (None,) * len(leaf.shape)) for path, leaf in flat.items()}
    return Abstract(graphdef, shapes, axes)


def init_params(config: ModelConfig, seed: int, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh parameters, a pure function of the seed; call it under jit to create them sharded."""
    return split_model(Decoder(config, rngs=nnx.Rngs(params=seed), dtype=dtype)).params
