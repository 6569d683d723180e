"""A model beside another one, layer by layer: how far activations and weights are apart, and what it is worth.

Errors and distances are relative Frobenius norms, in float64: ||found - reference|| / ||reference||.
"""

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.loss import chunked_token_loss
from jaxlm.model import Params, Split, merge_model

Arrays = Mapping[str, np.ndarray]
Batch = dict[str, np.ndarray]
COMPARED_LOGITS = 1 << 26  # elements of the fixed batch's logits
COMPARED_TOKENS = (64, 2048)  # fewest and most of the fixed batch
_COMPARED = re.compile(r"embed|blocks\.\d+(\.(attn|mlp|moe))?|final_norm|logits")
_CHOICES = re.compile(r"(blocks\.\d+\.moe)\.expert_ids")


def validation_loss(model: Split, batches: Iterable[Batch], dtype: str) -> float:
    """Mean cross-entropy in nats per token over all batches, summed in double on the host."""
    with _products(dtype):
        sums = [_losses(model.graphdef)(model.params, batch) for batch in batches]
    return sum(float(total) for total, _ in sums) / sum(float(tokens) for _, tokens in sums)


def activations(model: Split, inputs: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """What the modules give for ids [B, T], by path: embed, blocks.i.attn, blocks.i.mlp|moe, blocks.i, …, logits.

    And blocks.i.moe.expert_ids [B, T, A], which `layer_errors` leaves to `rerouted`.
    """
    with _products(dtype):
        found = jax.device_get(_activations(model.graphdef)(model.params, inputs))
    return {name: found[name] for name in sorted(found, key=_place)}


def fixed_batch(batch: Batch, vocab_size: int) -> Batch:
    """The rows and columns of a batch that layers are compared on: all, unless their logits would be too many."""
    fewest, most = COMPARED_TOKENS
    tokens = min(max(COMPARED_LOGITS // vocab_size, fewest), most)
    columns = min(batch["inputs"].shape[1], tokens)
    return {name: value[: max(1, tokens // columns), :columns] for name, value in batch.items()}


def fingerprint(batches: Iterable[Batch]) -> str:
    """SHA-256 of the inputs and targets of some batches, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["inputs"].tobytes() + batch["targets"].tobytes())
    return digest.hexdigest()


def layer_errors(found: Arrays, reference: Arrays, valid: np.ndarray) -> dict[str, float]:
    """||found - reference|| / ||reference|| of every module's activations over the valid tokens [B, T]."""
    names = [name for name in reference if _COMPARED.fullmatch(name)]
    return {name: _relative(found[name][valid], reference[name][valid]) for name in names}


def rerouted(found: Arrays, reference: Arrays, valid: np.ndarray) -> dict[str, float]:
    """Share of the valid tokens' choices of an expert that the reference did not make, by MoE layer."""
    shares = {}
    for name in reference:
        if layer := _CHOICES.fullmatch(name):
            chosen, known = found[name][valid][:, :, None], reference[name][valid][:, None, :]
            shares[layer[1]] = 1 - float((chosen == known).any(-1).mean())
    return shares


def layer_distances(params: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """||params - reference|| / ||reference|| by layer (a norm belongs to what it stands before), and of `all`.

    Layers whose tensors differ in shape are left out, of `all` too.
    """
    layers: dict[str, list[str]] = {}
    for path in reference:
        layers.setdefault(_layer(path, reference), []).append(path)
    layers = {layer: layers[layer] for layer in sorted(layers, key=_place)}
    agreeing = {
        layer: paths
        for layer, paths in layers.items()
        if all(path in params and np.shape(params[path]) == np.shape(reference[path]) for path in paths)
    }
    agreeing["all"] = list(itertools.chain.from_iterable(agreeing.values()))

    def flat(source: Mapping[str, Any], paths: list[str]) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(np.asarray(source[p], np.float64).ravel() for p in paths)])

    return {
        layer: _relative(flat(params, paths), flat(reference, paths)) for layer, paths in agreeing.items()
    }


def _layer(path: str, paths: Iterable[str]) -> str:
    block = re.match(r"(blocks\.\d+\.)(attn|mlp|moe)", path)
    if block is None:
        return path.partition(".")[0]
    moe = block[2] == "mlp" and f"{block[1]}moe.router.weight" in paths
    return block[1] + ("moe" if moe else block[2])


def _place(name: str) -> tuple[int, int, str]:
    """Sorts modules as they are computed: a block's parts before what the block gives."""
    block = re.match(r"blocks\.(\d+)\.?(.*)", name)
    if block is None:
        return (0 if "embed" in name else 2), 0, name
    return 1, int(block[1]), block[2] or "~"


def _relative(found: np.ndarray, reference: np.ndarray) -> float:
    wide = reference.astype(np.float64)
    off, size = float(np.linalg.norm(found.astype(np.float64) - wide)), float(np.linalg.norm(wide))
    return 0.0 if off == 0 else off / size if size else math.inf


def _products(dtype: str) -> Any:
    """Matrix products as precise as the dtype: on some devices float32 is not, unless asked for."""
    return jax.default_matmul_precision("default" if dtype == "bfloat16" else "highest")


@functools.lru_cache(maxsize=16)
def _activations(graphdef: Any) -> Callable[..., dict[str, Array]]:
    def run(params: Params, inputs: Array) -> dict[str, Array]:
        _, acts, _ = merge_model(graphdef, params)(inputs)
        return {
            name: value
            for name, value in acts.items()
            if _COMPARED.fullmatch(name) or _CHOICES.fullmatch(name)
        }

    return jax.jit(run)


@functools.lru_cache(maxsize=16)
def _losses(graphdef: Any) -> Callable[..., tuple[Array, Array]]:
    def run(params: Params, batch: dict[str, Array]) -> tuple[Array, Array]:
        decoder = merge_model(graphdef, params)
        hidden, _, _ = decoder.hidden(batch["inputs"], batch.get("positions"), batch.get("segments"))
        weight, bias = decoder.head()
        tokens = chunked_token_loss(hidden, weight, bias, batch["targets"], batch["loss_mask"])
        return tokens.cross_entropy, jnp.sum(batch["loss_mask"])

    return jax.jit(run)
