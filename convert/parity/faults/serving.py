"""Faults of decoding through the cache, and of jaxlm on a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from convert.parity.faults.fault import Fault
from jaxlm.sharding import BATCH_AXES, current_mesh_shape

KV_HEADS = 2  # of the self-test's model


def _one_slot_early(original: Any) -> Any:
    """A new token is written over the one before it."""

    def forward(self, x, rope, visibility, cache=None, key=None):
        if cache is not None and x.shape[1] == 1:
            visibility = visibility._replace(query_index=visibility.query_index - 1)
        return original(self, x, rope, visibility, cache, key)

    return forward


def _positions_one_late(original: Any) -> Any:
    """The first new token stands one position further than its prompt's end."""

    def prefill(model, prompts, slots):
        logits, state = original(model, prompts, slots)
        return logits, state._replace(positions=state.positions + 1)

    return prefill


def _padding_is_text(original: Any) -> Any:
    """The padding left of a short prompt has the prompt's segment."""

    def pad(prompts, longest, start, width):
        ids, positions, segments = original(prompts, longest, start, width)
        segments[:, : longest - start] = 1
        return ids, positions, segments

    return pad


def _segment_not_noted(original: Any) -> Any:
    """New tokens do not enter the cache's segments: they are taken for empty slots."""

    def visibility(query_index, segments, cache, shape):
        seen, cache = original(query_index, segments, cache, shape)
        if cache is not None and shape[1] == 1:
            cache.segment[:, cache.length] = 0
        return seen, cache

    return visibility


def _ring_too_small(original: Any) -> Any:
    """A windowed layer remembers one token less than its window."""

    def init_cache(config, *rest):
        windows = tuple(max(w - 1, 0) for w in config.windows)
        return original(dataclasses.replace(config, windows=windows), *rest)

    return init_cache


def _ring_a_slot_late(original: Any) -> Any:
    """Each slot of a window's ring is taken for the token of its neighbour."""
    return lambda length, slots: jnp.roll(original(length, slots), 1)


def _ring_forgets_early(original: Any) -> Any:
    """Of the ring, the oldest token is not seen any more."""

    def of_ring(visibility, index):
        seen = original(visibility, index)
        oldest = index == index.min()
        return seen._replace(key_segment=seen.key_segment.masked_fill(oldest, 0))

    return of_ring


def _padding_is_kept(original: Any) -> Any:
    """The cache counts a prompt's padding on the right as tokens."""

    def visibility(query_index, segments, cache, shape):
        seen, cache = original(query_index, segments, cache, shape)
        return (seen if cache is None else seen._replace(kept=shape[1])), cache

    return visibility


def _penalty_rewards(original: Any) -> Any:
    """The repetition penalty makes seen tokens likelier."""
    return lambda logits, seen, penalty: original(logits, seen, 1 / penalty)


def _tail_of_top_p(original: Any) -> Any:
    """1 - p is kept where p is meant."""
    return lambda logits, tail: original(logits, 1 - tail)


def _new_keys_not_turned(original: Any) -> Any:
    """Keys of single tokens enter the cache unrotated."""
    return lambda x, cos, sin: x if x.shape[1:3] == (1, KV_HEADS) else original(x, cos, sin)


def _one_token_sees_all(original: Any) -> Any:
    """A single new token sees every slot of the cache, written or not, and padding."""
    return lambda q, k, v, mask, bias: original(q, k, v, jnp.ones_like(mask), bias)


def _one_token_by_groups(original: Any) -> Any:
    """A single token's query heads are dealt out to the kv heads one by one, although neighbours share one."""

    def token_attention(q, k, v, mask, bias):
        rows, _, heads, width = q.shape
        dealt = q.reshape(rows, 1, heads // KV_HEADS, KV_HEADS, width).swapaxes(2, 3).reshape(q.shape)
        return original(dealt, k, v, mask, bias)

    return token_attention


def _cache_in_float32(original: Any) -> Any:
    return lambda config, batch, slots, dtype: original(config, batch, slots, jnp.float32)


def _noise_of_another_row(original: Any) -> Any:
    def choose(logits, noise=None):
        return original(logits, None if noise is None else noise.roll(1, 0))

    return choose


def _temperature_inverted(original: Any) -> Any:
    return lambda logits, temperature: original(logits, 1 / temperature)


def _noise_of_the_step_before(original: Any) -> Any:
    return lambda logits, history, draws, step, rules: original(
        logits, history, draws, jnp.maximum(step - 1, 0), rules
    )


def _island(first: Callable[..., Any], local_ids: Callable[..., Any], collect: Callable[..., Any]) -> Any:
    """jaxlm's expert parallelism with one part exchanged.

    first(per_device): this device's first expert; local_ids(ids, first, per_device): which of its own experts, or
    `per_device` for nobody's; collect(out): the sum over devices of what each computed, own rows only.
    """

    def change(original: Any) -> Any:
        def over_mesh(local, x, ids, weights, stacked, key):
            per_device = stacked.down.shape[0] // current_mesh_shape()["expert"]

            def island(x, ids, weights, stacked):
                x, ids, weights = (
                    jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, ids, weights)
                )
                ids = local_ids(ids, first(per_device), per_device)
                return collect(local(x, ids, weights, stacked, None))

            rows = PartitionSpec(BATCH_AXES)
            specs = (rows, rows, rows, jax.tree.map(lambda _: PartitionSpec("expert"), stacked))
            made = jax.shard_map(island, in_specs=specs, out_specs=rows, check_vma=False)
            return made(x, ids, weights, stacked)

        return over_mesh

    return change


def _first(per_device: int) -> Any:
    return jax.lax.axis_index("expert") * per_device


def _first_of_wrong_axis(per_device: int) -> Any:
    return jax.lax.axis_index("fsdp") * per_device


def _own_ids(ids: Any, first: Any, per_device: int) -> Any:
    return jnp.where((ids >= first) & (ids < first + per_device), ids - first, per_device)


def _foreign_ids_too(ids: Any, first: Any, per_device: int) -> Any:
    """Experts of other devices are computed here as well, by ours."""
    return (ids - first) % per_device


def _dealt_round(ids: Any, first: Any, per_device: int) -> Any:
    """Experts are dealt out one by one, although each device holds neighbours."""
    devices = current_mesh_shape()["expert"]
    mine = ids % devices == first // per_device
    return jnp.where(mine, ids // devices, per_device)


def summed(out: Any) -> Any:
    """Sum over the devices of `expert`, each keeping its own rows."""
    return jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)


def _averaged(out: Any) -> Any:
    return summed(out) / jax.lax.axis_size("expert")


def _own_part_only(out: Any) -> Any:
    """Each device keeps what its own experts made: nothing is summed."""
    rows = out.shape[0] // jax.lax.axis_size("expert")
    return jax.lax.dynamic_slice_in_dim(out, jax.lax.axis_index("expert") * rows, rows)


def island_by(collect: Callable[..., Any]) -> Callable[[Any], Any]:
    """The right expert parallelism, collected in another way."""
    return _island(_first, _own_ids, collect)


def _rows_twice(original: Any) -> Any:
    """Every device reads the first half of the batch."""

    def place_batch(batch, mesh=None):
        if mesh is None:
            return original(batch)
        half = {k: v[: len(v) // 2] for k, v in batch.items()}
        return original({k: np.concatenate([v, v]) for k, v in half.items()}, mesh)

    return place_batch


def _gradients_summed(original: Any) -> Any:
    """Gradients summed over the devices that split the batch, where their mean is meant."""

    def make_gradient_fn(run, *rest):
        gradients = original(run, *rest)

        def over_devices(params, batch, *others):
            grads, metrics = gradients(params, batch, *others)
            shape = current_mesh_shape()
            ways = int(np.prod([shape[axis] for axis in BATCH_AXES])) if shape else 1
            return {k: g * ways for k, g in grads.items()}, metrics

        return over_devices

    return make_gradient_fn


def _mean_of_device_means(original: Any) -> Any:
    """Each device divides by its own tokens, and the means are averaged."""

    def chunked_token_loss(hidden, weight, bias, targets, mask, **options):
        shape = current_mesh_shape()
        if shape:
            ways = int(np.prod([shape[axis] for axis in BATCH_AXES]))
            per_device = jnp.sum(mask.reshape(ways, -1, mask.shape[1]), axis=(1, 2), keepdims=True)
            share = jnp.sum(mask) / (ways * jnp.maximum(per_device, 1))
            mask = (mask.reshape(ways, -1, mask.shape[1]) * share).reshape(mask.shape)
        return original(hidden, weight, bias, targets, mask, **options)

    return chunked_token_loss


EXPERTS = "jaxlm.moe._over_mesh"

_TABLE = (
    # A step through the cache against the same framework without one: the report says whose cache it is.
    (
        "a new token overwrites the one before",
        "cache",
        "torchref.attention.Attention.forward",
        _one_slot_early,
        "decoding",
        "torch.step",
    ),
    (
        "new positions one too far",
        "cache",
        "jaxlm.cached.prefill",
        _positions_one_late,
        "decoding",
        "jax.step",
    ),
    ("left padding is seen", "cache", "jaxlm.cached._pad", _padding_is_text, "decoding", "jax.prefill"),
    (
        "one token's attention sees empty slots",
        "cache",
        "jaxlm.attention.token_attention",
        _one_token_sees_all,
        "decoding",
        "jax.step",
    ),
    (
        "one token's query heads dealt round",
        "layout",
        "jaxlm.attention.token_attention",
        _one_token_by_groups,
        "decoding",
        "jax.step",
    ),
    (
        "segment of new tokens not noted",
        "cache",
        "torchref.model._visibility",
        _segment_not_noted,
        "decoding",
        "torch.step",
    ),
    (
        "ring a slot smaller than the window",
        "cache",
        "jaxlm.cached.init_cache",
        _ring_too_small,
        "decoding",
        "jax.step",
    ),
    (
        "ring read a slot late",
        "cache",
        "jaxlm.attention._ring_index",
        _ring_a_slot_late,
        "decoding",
        "jax.step",
    ),
    (
        "oldest token of the ring not seen",
        "cache",
        "torchref.attention._of_ring",
        _ring_forgets_early,
        "decoding",
        "torch.step",
    ),
    (
        "padding of a prompt kept in the cache",
        "cache",
        "jaxlm.model._visibility",
        _padding_is_kept,
        "decoding",
        "jax.prefill",
    ),
    (
        "repetition penalty inverted",
        "cache",
        "jaxlm.logits.repetition_penalty",
        _penalty_rewards,
        "sampling",
        "tokens",
    ),
    ("top-p keeps the tail", "cache", "torchref.logits.keep_top_p", _tail_of_top_p, "sampling", "tokens"),
    (
        "new keys cached unrotated",
        "cache",
        "torchref.attention.apply_rope",
        _new_keys_not_turned,
        "decoding",
        "torch.step",
    ),
    ("cache in float32", "cache", "jaxlm.cached.init_cache", _cache_in_float32, "decoding", "jax.prefill"),
    (
        "noise of another row",
        "cache",
        "torchref.generate.choose",
        _noise_of_another_row,
        "sampling",
        "tokens",
    ),
    (
        "noise of the step before",
        "cache",
        "jaxlm.generate._pick",
        _noise_of_the_step_before,
        "sampling",
        "tokens",
    ),
    (
        "logits times the temperature",
        "cache",
        "jaxlm.logits.scale_by_temperature",
        _temperature_inverted,
        "sampling",
        "tokens",
    ),
    # The loss on a mesh is compared before the gradients, and a wrong forward pass changes it.
    (
        "experts numbered along the wrong axis",
        "sharding",
        EXPERTS,
        _island(_first_of_wrong_axis, _own_ids, summed),
        "mesh",
        "total_loss",
    ),
    (
        "experts of other devices computed here too",
        "sharding",
        EXPERTS,
        _island(_first, _foreign_ids_too, summed),
        "mesh",
        "total_loss",
    ),
    (
        "experts dealt out in turn, held in blocks",
        "sharding",
        EXPERTS,
        _island(_first, _dealt_round, summed),
        "mesh",
        "total_loss",
    ),
    ("devices averaged instead of summed", "sharding", EXPERTS, island_by(_averaged), "mesh", "total_loss"),
    ("sum over devices forgotten", "sharding", EXPERTS, island_by(_own_part_only), "mesh", "total_loss"),
    (
        "every device reads the same rows",
        "sharding",
        "jaxlm.train.place_batch",
        _rows_twice,
        "mesh",
        "total_loss",
    ),
    (
        "mean of the devices' means",
        "sharding",
        "jaxlm.train.chunked_token_loss",
        _mean_of_device_means,
        "mesh",
        "total_loss",
    ),
    # Its loss is right; of the gradients the head's comes first, and a tensor outside the blocks has no path.
    (
        "gradients summed over the devices",
        "sharding",
        "jaxlm.train.make_gradient_fn",
        _gradients_summed,
        "mesh",
        "gradients",
    ),
)
FAULTS = tuple(Fault(*row) for row in _TABLE)
