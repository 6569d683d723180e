"""What the two frameworks are compared on: batches, prompts and weights that leave a fault no place to hide.

No framework draws anything here: numpy does, and both get the same numbers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig, RunConfig

Arrays = dict[str, np.ndarray]
POSITIONS = 515  # length of a hard batch where the context allows: over 512, and not a multiple of 8


def hard_length(context: int, wanted: int = POSITIONS) -> int:
    """The longest length up to `wanted` and `context` that is not a multiple of 8."""
    length = min(wanted, context)
    return length - 1 if length % 8 == 0 else length


def hard_batch(rows: int, length: int, vocab: int, seed: int = 0, first: int = 0) -> Arrays:
    """Unequal rows: one full, one padded on the left, one packed from three documents, one padded on the right.

    Padding has segment 0; positions restart with every document; the loss mask is ragged and 0 on padding. Row r of
    a larger batch is of kind (first + r) mod 4, with other lengths. Arrays [rows, length] as the training step takes
    them.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    for r in range(rows):
        cut = 3 + (5 * (r // 4) + r) % (length // 2) if length < 100 else length // 5 + 7 * r
        kind = (first + r) % 4
        if kind == 1:
            segments[r, :cut] = 0
        elif kind == 2:
            segments[r, cut:] = 2
            segments[r, cut + max(4, length // 3) :] = 3
        elif kind == 3:
            segments[r, length - cut :] = 0
    starts = np.concatenate([np.ones((rows, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(length)
    positions = (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)
    mask = ((rng.random((rows, length)) < 0.7) & (segments > 0)).astype(np.float32)
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_mask": mask,
        "segments": segments,
        "positions": positions,
    }


def prompts(config: ModelConfig, seed: int = 0, new_tokens: int = 6) -> list[list[int]]:
    """Four prompts of unequal lengths, with room to answer; equal ones under a bias table, which is indexed by slot."""
    room = config.context - new_tokens
    lengths = [min(n, max(1, room)) for n in (21, 5, 13, 1)]
    if config.attn_bias_table:
        lengths = [min(9, max(1, room))] * 4
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]


def random_params(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int = 0,
    init: str | None = None,
    dtype: Any = np.float64,
) -> Arrays:
    """Parameters of jaxlm (names and shapes) drawn by numpy, as wide as `init` says.

    What starts as zero or one is random too, or a lost bias and a forgotten norm weight would not show.
    """
    rng, init = np.random.default_rng(seed), config.init if init is None else init
    params = {}
    for path, shape in sorted(shapes.items()):
        noise = rng.standard_normal(shape)
        if path.endswith("norm.weight"):
            value = 1 + 0.1 * noise
        elif "bias" in path:
            value = 0.1 * noise
        elif init == "normal":
            value = config.init_std * noise
        elif path.startswith("embed") and not config.tied:
            value = noise
        else:
            value = noise / math.sqrt(shape[-1] if "embed" in path else shape[-2])
        params[path] = value.astype(dtype)
    return params


def perturbed(params: Mapping[str, np.ndarray], unit: float, seed: int = 0) -> Arrays:
    """The weights times 1 + unit * (a sign drawn by chance), in double: what rounding them may do."""
    rng = np.random.default_rng(seed)
    return {
        path: np.asarray(p, np.float64) * (1 + unit * rng.choice([-1.0, 1.0], np.shape(p)))
        for path, p in params.items()
    }


def next_to(params: Mapping[str, np.ndarray], seed: int) -> Arrays:
    """Every weight moved by one unit in the last place, up or down by chance."""
    rng = np.random.default_rng(seed)
    return {
        path: np.nextafter(p, np.where(rng.random(p.shape) < 0.5, -np.inf, np.inf).astype(p.dtype))
        for path, p in params.items()
    }


def tied_routing(config: ModelConfig, params: Mapping[str, np.ndarray]) -> Arrays:
    """The weights with routers whose logits are exactly zero for all experts but the last: every token ties."""
    changed = dict(params)
    for layer in range(config.n_layers):
        path = f"blocks.{layer}.moe.router.weight"
        if path in changed:
            router = np.array(changed[path])
            router[:, :-1] = 0
            changed[path] = router
    return changed


def zero_gradients(config: ModelConfig, batch_length: int) -> set[str]:
    """Parameters whose gradient the configuration proves to be zero; rounding alone makes them anything else.

    A key bias without rotation and norm adds the same score to all keys of a query. Under a window of one position (or
    in sequences of one) the softmax has a single entry, whatever the query and key. A router whose one chosen
    probability is renormalised to one has no gradient but that of the balance and z-losses.
    """
    zero = set()
    for i in range(config.n_layers):
        block, one_key = f"blocks.{i}.", config.window(i) == 1 or batch_length == 1
        if one_key:
            names = ["q_proj.weight", "k_proj.weight"]
            names += ["q_proj.bias", "k_proj.bias"] if config.qkv_bias else []
            names += ["q_norm.weight", "k_norm.weight"] if config.qk_norm else []
            names += ["bias_table"] if config.attn_bias_table else []
            zero |= {f"{block}attn.{name}" for name in names}
        if config.qkv_bias and config.position == "learned" and not config.qk_norm:
            zero.add(f"{block}attn.k_proj.bias")
        moe = config.moe
        balance_free = moe.balance == "none" or moe.balance_coef == 0 or moe.n_active == moe.n_experts
        constant = moe.n_active == 1 and (moe.renormalize or moe.n_experts == 1)
        if config.is_moe(i) and constant and balance_free and moe.router_z_coef == 0:
            zero.add(f"{block}moe.router.weight")
    return zero


def blind_spots(config: ModelConfig) -> list[str]:
    """What this configuration cannot show, one line each: faults that another configuration would reveal."""
    spots = []
    if config.position == "rope" and config.rope_theta == 10_000:
        spots.append("rope_theta is 10000, the default of most libraries: a lost theta would not show")
    if config.norm_eps in (1e-5, 1e-6):
        spots.append(
            f"norm_eps is {config.norm_eps:g}, a default of many libraries: a lost eps would not show"
        )
    if config.n_heads * config.head_dim == config.d_model:
        spots.append(
            "q_proj is square (n_heads * head_dim = d_model): a missing transpose has a fitting shape"
        )
    if config.n_heads // config.n_kv_heads == config.n_kv_heads and config.n_kv_heads > 1:
        spots.append(
            "as many kv heads as query heads in a group: exchanging the two axes has a fitting shape"
        )
    if config.n_kv_heads in (1, config.n_heads):
        spots.append("n_kv_heads is 1 or n_heads: the order of query heads in a group does not matter")
    if config.context < 512:
        spots.append(f"the context is {config.context}: nothing is compared past it")
    if config.moe.n_experts and config.moe.balance_coef == 0:
        spots.append("moe.balance_coef is 0: the balance loss moves no weight")
    return spots


def without_dropout(config: ModelConfig) -> ModelConfig:
    """Dropout draws different noise in the two frameworks, so everything is compared without it."""
    return dataclasses.replace(config, dropout=0.0)


def shrunk(run: RunConfig) -> RunConfig:
    """The same architecture and options at small sizes, its proportions kept hard (D != N*H, G != K)."""
    model = run.model
    group = model.n_heads // model.n_kv_heads
    kv_heads = model.n_kv_heads if model.n_kv_heads <= 2 else 2 if group != 2 else 3
    sizes = {
        "vocab_size": min(model.vocab_size, 512),
        "d_model": min(model.d_model, 56),
        "n_layers": min(model.n_layers, max(3, len(model.windows), len(model.moe.pattern))),
        "n_heads": group * kv_heads,
        "n_kv_heads": kv_heads,
        "head_dim": min(model.head_dim, 12),
        "d_ff": min(model.d_ff, 80),
        "context": min(model.context, 640),
        "windows": tuple(min(w, 100) for w in model.windows),
    }
    if model.moe.n_experts:
        small = {"n_experts": min(model.moe.n_experts, 8), "d_ff": min(model.moe.d_ff, 40)}
        small["shared_d_ff"] = min(model.moe.shared_d_ff, 24)
        active = min(model.moe.n_active, max(1, small["n_experts"] - 1))
        sizes["moe"] = dataclasses.replace(model.moe, n_active=active, **small)
    train = dataclasses.replace(run.train, seq_len=min(run.train.seq_len, sizes["context"]))
    return dataclasses.replace(run, model=dataclasses.replace(model, **sizes), train=train)
