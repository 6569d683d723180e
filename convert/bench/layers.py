"""Single layers, forward and backward: head and loss, a mixture of experts, attention."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax import Array
from torch import Tensor

from convert.bench import torch_parts
from convert.bench.cases import Case
from convert.bench.results import OURS
from convert.bench.side import Side
from convert.native import RULES
from convert.rules import TRANSPOSE, pair_up
from jaxlm.attention import Attention, Visibility
from jaxlm.config import ModelConfig, MoEConfig
from jaxlm.layers import Backends
from jaxlm.loss import chunked_token_loss
from jaxlm.model import merge_model, split_model
from jaxlm.moe import MoE
from torchref.attention import sdpa_attention
from torchref.layers import Backends as TorchBackends
from torchref.layers import activate
from torchref.moe import MoE as TorchMoE

SHOWN = 4  # entries of each result that stand in a trace, beside its norm


def make(case: Case, name: str) -> Side:
    """A side of a layer's case."""
    kind = case.name.partition("/")[0]
    ours, theirs = _MAKERS[kind]
    return ours(case) if name == OURS else theirs(case, name.partition(":")[2])


def jax_side(step: Callable[..., Any], *arguments: Any) -> Side:
    """A jitted function of fixed arguments; its results are the trace."""

    def run(n: int) -> None:
        out: Any = None
        for _ in range(n):
            out = step(*arguments)
        jax.block_until_ready(out)

    return Side(run, lambda: told(jax.tree.leaves(step(*arguments))))


def torch_side(step: Callable[[], list[Tensor]]) -> Side:
    """A function that gives fresh tensors."""

    def run(n: int) -> None:
        for _ in range(n):
            step()
        torch_parts.wait()

    return Side(run, lambda: told([x.detach() for x in step()]))


def told(results: list[Any]) -> list[float]:
    """Logarithm of the norm and first entries of each array, these over the typical entry: all of a size."""
    trace: list[float] = []
    for value in results:
        wide = value.float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
        norm = float(np.linalg.norm(wide.astype(np.float64)))
        typical = norm / max(1, wide.size) ** 0.5 or 1.0
        first = wide.ravel()[:SHOWN] if wide.ndim else []
        trace += [float(np.log(norm)) if norm > 0 else 0.0, *(float(x) / typical for x in first)]
    return trace


def normal(seed: int, shape: tuple[int, ...], std: float = 1.0) -> np.ndarray:
    """Random float32 numbers that both frameworks get."""
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(std)).astype(
        np.float32
    )


def leaf(x: np.ndarray, dtype: str) -> Tensor:
    """A tensor on the device that wants a gradient."""
    return torch.from_numpy(x).to(torch_parts.device(), getattr(torch, dtype)).requires_grad_()


# Head and loss.


def _head_inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    o = case.options
    targets = np.random.default_rng(3).integers(0, o["vocab"], (1, o["tokens"]), dtype=np.int32)
    mask = np.ones((1, o["tokens"]), np.float32)
    return normal(1, (1, o["tokens"], o["d"])), normal(2, (o["d"], o["vocab"]), 0.02), targets, mask


def _our_head(case: Case) -> Side:
    hidden, weight, targets, mask = _head_inputs(case)
    chunk = {"chunk_logits": case.options["chunk"] * case.options["vocab"]} if "chunk" in case.options else {}

    def loss(hidden: Array, weight: Array, targets: Array, mask: Array) -> Array:
        return chunked_token_loss(hidden, weight, None, targets, mask, **chunk).loss

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return jax_side(step, jnp.asarray(hidden, case.dtype), jnp.asarray(weight, case.dtype), targets, mask)


def _their_head(case: Case, how: str) -> Side:
    hidden, weight, targets, mask = _head_inputs(case)
    x, w = leaf(hidden, case.dtype), leaf(np.ascontiguousarray(weight.T), case.dtype)
    y = torch.from_numpy(targets).to(x.device, torch.long)
    m = torch.from_numpy(mask).to(x.device)

    def full(x: Tensor, w: Tensor) -> Tensor:
        logits = (x @ w.T).float()
        return (torch.nn.functional.cross_entropy(logits[0], y[0], reduction="none") * m[0]).sum()

    def fused(x: Tensor, w: Tensor) -> Tensor:
        chunk = min(torch_parts.HEAD_CHUNK, max(256, torch_parts.FULL_LOGITS // 2 // w.shape[0]))
        chunk = torch_parts.HEAD_CHUNK if x.is_cuda else chunk
        total: Any = torch_parts.FusedHead.apply(x[0], w, y[0], m[0], chunk)
        return total

    loss = torch.compile(full, dynamic=False) if how == "full" else fused

    def step() -> list[Tensor]:
        x.grad = w.grad = None
        total = loss(x, w)
        total.backward()
        assert x.grad is not None and w.grad is not None
        return [total, x.grad, w.grad.T]

    return torch_side(step)


# Mixture of experts.


def _moe_config(case: Case) -> ModelConfig:
    o = case.options
    mixture = MoEConfig(n_experts=o["e"], n_active=o["a"], d_ff=o["f"])
    return ModelConfig(
        vocab_size=256,
        d_model=o["d"],
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=o["d"],
        d_ff=o["f"],
        context=64,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        moe=mixture,
    )


def _moe_weights(case: Case) -> tuple[Any, dict[str, Array], np.ndarray, np.ndarray]:
    config, o = _moe_config(case), case.options
    backends: Any = Backends(experts=o.get("backend", "auto"))
    graphdef, params = split_model(MoE(config, backends, rngs=nnx.Rngs(params=0), dtype=jnp.float32))
    return graphdef, params, normal(1, (1, o["n"], o["d"])), normal(2, (1, o["n"], o["d"]))


def _our_moe(case: Case) -> Side:
    graphdef, params, x, seen = _moe_weights(case)
    valid = jnp.ones(x.shape[:2], bool)

    def loss(params: Mapping[str, Array], x: Array, seen: Array) -> Array:
        out, _ = merge_model(graphdef, dict(params))(x, valid, True)
        return jnp.sum((out * seen).astype(jnp.float32))

    half = {k: v if "router" in k else v.astype(case.dtype) for k, v in params.items()}

    @jax.jit
    def step(params: Mapping[str, Array], x: Array, seen: Array) -> Any:
        d_params, d_x = jax.grad(loss, (0, 1))(params, x, seen)
        return [d_x, *(d_params[k] for k in sorted(d_params))]

    return jax_side(step, half, jnp.asarray(x, case.dtype), jnp.asarray(seen, case.dtype))


def _their_moe(case: Case, how: str) -> Side:
    _, params, x_np, seen_np = _moe_weights(case)
    words = set(how.split("-"))
    experts: Any = "grouped" if "grouped" in words else "loop"
    with torch.device("meta"):
        layer = TorchMoE(_moe_config(case), TorchBackends(experts=experts), rngs=None, dtype=torch.float32)
    dtype = getattr(torch, case.dtype)
    state = {}
    for pair in pair_up(RULES, {f"moe.{k}": tuple(v.shape) for k, v in params.items()}):
        value = torch_parts.to_torch(params[pair.path.removeprefix("moe.")])
        value = value if "router" in pair.path else value.to(dtype)
        state[pair.other.removeprefix("moe.")] = (
            value.mT.contiguous() if pair.transform is TRANSPOSE else value
        )
    layer.load_state_dict(state, strict=True, assign=True)
    x = leaf(x_np, case.dtype)
    seen = torch.from_numpy(seen_np).to(x.device, dtype)
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if "batched" in words:
        layer.experts.forward = lambda x, ids, weights, key=None: _batched(layer.experts, x, ids, weights)
    forward: Callable[..., Any] = torch.compile(layer, dynamic=False) if "compile" in words else layer
    names = sorted(dict(layer.named_parameters()))
    weights = dict(layer.named_parameters())

    def step() -> list[Tensor]:
        out, _ = forward(x, valid, True)
        total = (out * seen).float().sum()
        d_x, *grads = torch.autograd.grad(total, [x, *(weights[k] for k in names)])
        return [d_x, *(g.mT for g in grads)]

    return torch_side(step)


def _batched(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, in two batched products: E/A times the work, no sorting."""
    rows = x.flatten(0, 1)
    hidden = torch.matmul(rows[None], experts.gate_up.to(x.dtype).mT)
    gate, up = hidden.chunk(2, dim=-1)
    out = torch.matmul(activate("swiglu", gate, up), experts.down.to(x.dtype).mT)
    share = torch.zeros(rows.shape[0], len(experts.down), dtype=x.dtype, device=x.device)
    share = share.scatter(1, ids.flatten(0, 1), weights.flatten(0, 1))
    return torch.einsum("epd,pe->pd", out, share).view_as(x)


# Attention.


def _attention_inputs(case: Case) -> list[np.ndarray]:
    o = case.options
    queries, keys = (o["b"], o["t"], o["heads"], o["h"]), (o["b"], o["t"], o["kv"], o["h"])
    return [normal(i, shape) for i, shape in enumerate((queries, keys, keys, queries))]


def _our_attention(case: Case) -> Side:
    o = case.options
    config = ModelConfig(
        vocab_size=256,
        d_model=8,
        n_layers=1,
        n_heads=o["heads"],
        n_kv_heads=o["kv"],
        head_dim=o["h"],
        d_ff=8,
        context=o["t"],
        rope_theta=10_000.0,
        norm_eps=1e-5,
    )
    layer = Attention(config, 0, Backends(), rngs=nnx.Rngs(params=0), dtype=jnp.dtype(case.dtype))
    index = jnp.arange(o["t"], dtype=jnp.int32)

    def loss(q: Array, k: Array, v: Array, seen: Array) -> Array:
        out, _ = layer.attend(q, k, v, Visibility(index, index, None, None), cached=False)
        return jnp.sum((out * seen).astype(jnp.float32))

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    return jax_side(step, *(jnp.asarray(x, case.dtype) for x in _attention_inputs(case)))


def _their_attention(case: Case, how: str) -> Side:
    *leaves, seen_np = _attention_inputs(case)
    q, k, v = (leaf(x, case.dtype) for x in leaves)
    seen = torch.from_numpy(seen_np).to(q.device, q.dtype)

    def step() -> list[Tensor]:
        with _kernel(how):
            total = (sdpa_attention(q, k, v, None) * seen).float().sum()
            return list(torch.autograd.grad(total, [q, k, v]))

    return torch_side(step)


def _kernel(how: str) -> Any:
    """The kernel of a name on CUDA; what torch takes by itself elsewhere."""
    if torch_parts.device().type != "cuda" or how == "sdpa":
        return torch_parts.attention_kernels()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel({"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[how])


_MAKERS: dict[str, tuple[Callable[[Case], Side], Callable[[Case, str], Side]]] = {
    "head": (_our_head, _their_head),
    "moe_layer": (_our_moe, _their_moe),
    "attention": (_our_attention, _their_attention),
}
