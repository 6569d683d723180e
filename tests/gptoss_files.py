"""gptoss for tests: its checkpoints made up of random numbers, and a transcription of its documented formulas.

The transcription reads tensors by gptoss's own names and uses nothing of this project.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from convert.stream import array
from convert.tree import to_numpy
from jaxlm.tensor_file import Planned

EPS = 1.1920929e-07
State = dict[str, Any]


class Sizes(NamedTuple):
    """A model in the legend's letters, C the context."""

    V: int = 61
    D: int = 24
    L: int = 2
    N: int = 6
    K: int = 2
    H: int = 4
    F: int = 20
    E: int = 5
    C: int = 16


SMALL = Sizes()  # D = N H, as gptoss's code has it
ODD = Sizes(L=1, H=6)  # D != N H, so that no projection is square
FULL = Sizes(200_019, 1_024, 12, 32, 8, 32, 2_048, 32, 2_048)
CFG = {  # of gptoss's own ModelConfig, for SMALL
    "d_model": 24,
    "dropout": 0.0,
    "context_length": 16,
    "vocabulary_size": 61,
    "num_heads": 6,
    "transformer_blocks": 2,
    "num_kv_heads": 2,
    "qkv_bias": False,
    "use_rope": True,
    "use_attention_bias": True,
    "d_ff": 20,
    "num_experts": 5,
    "top_k": 2,
    "aux_loss_coef": 0.01,
    "capacity_factor": 1.25,
}


def shapes_of(s: Sizes) -> dict[str, tuple[int, ...]]:
    """gptoss's parameters and buffers, as its state dict orders them: own tensors before those of children."""
    block = {
        "norm1.weight": (s.D,),
        "gqa.attention_bias": (1, s.N, s.C, s.C),
        "gqa.cos_cached": (s.C, s.H),
        "gqa.sin_cached": (s.C, s.H),
        "gqa.W_q.weight": (s.N * s.H, s.D),
        "gqa.W_k.weight": (s.K * s.H, s.D),
        "gqa.W_v.weight": (s.K * s.H, s.D),
        "gqa.out_proj.weight": (s.D, s.N * s.H),
        "gqa.out_proj.bias": (s.D,),
        "norm2.weight": (s.D,),
        "moe.router.W_r.weight": (s.E, s.D),
    }
    for e in range(s.E):
        block[f"moe.experts.{e}.fc1.weight"] = (s.F, s.D)
        block[f"moe.experts.{e}.fc1.bias"] = (s.F,)
        block[f"moe.experts.{e}.fc2.weight"] = (s.D, s.F)
        block[f"moe.experts.{e}.fc2.bias"] = (s.D,)
    layers = {f"layers.{i}.{name}": shape for i in range(s.L) for name, shape in block.items()}
    head = {"norm.weight": (s.D,), "out_head.weight": (s.V, s.D), "out_head.bias": (s.V,)}
    return {"embed.weight": (s.V, s.D)} | layers | head


def is_buffer(name: str) -> bool:
    """cos_cached and sin_cached."""
    return name.endswith("_cached")


def rope_buffers(s: Sizes, dtype: Any) -> dict[str, Any]:
    """[C, H] tables: every frequency twice, H/2 apart."""
    inv_freq = 1.0 / 10_000.0 ** (torch.arange(0, s.H, 2, dtype=dtype) / s.H)
    angles = torch.outer(torch.arange(s.C, dtype=dtype), inv_freq)
    return {"cos": torch.cat([angles, angles], -1).cos(), "sin": torch.cat([angles, angles], -1).sin()}


def state_dict(s: Sizes = SMALL, init: str = "fan_in", dtype: Any = torch.float32, seed: int = 0) -> State:
    """Random weights of gptoss; what starts as zero or one is random too."""
    rng, state = np.random.default_rng(seed), {}
    buffers = rope_buffers(s, torch.float64 if dtype == torch.float64 else torch.float32)
    for name, shape in shapes_of(s).items():
        noise = rng.standard_normal(shape)
        if is_buffer(name):
            state[name] = buffers[name[-10:-7]].to(dtype).clone()
            continue
        if "norm" in name:
            value = 1 + 0.1 * noise
        elif "bias" in name:
            value = 0.3 * noise
        else:
            value = noise * (
                0.02 if init == "normal" else 1.0 if name == "embed.weight" else shape[1] ** -0.5
            )
        state[name] = torch.from_numpy(value).to(dtype)
    return state


def adam_state(state: State, steps: int, dtype: Any, groups: int = 2) -> State:
    """What AdamW's state_dict holds after `steps` updates, with random moments; matrices first, then vectors."""
    rng = np.random.default_rng(1)
    named = {name: p for name, p in state.items() if not is_buffer(name)}
    wide = [n for n, p in named.items() if p.dim() >= 2]
    order = [wide, [n for n in named if n not in wide]] if groups == 2 else [list(named)]
    options = [
        {"params": [torch.nn.Parameter(named[n]) for n in names], "weight_decay": decay}
        for names, decay in zip(order, (0.1, 0.0), strict=False)
    ]
    optimizer = torch.optim.AdamW(options, lr=3e-4, betas=(0.9, 0.95), eps=1e-8)
    for group in optimizer.param_groups:
        for p in group["params"]:
            m = torch.from_numpy(rng.standard_normal(p.shape) * 1e-3).to(dtype)
            v = torch.from_numpy(rng.random(p.shape) * 1e-5).to(dtype)
            optimizer.state[p] = {"step": torch.tensor(float(steps)), "exp_avg": m, "exp_avg_sq": v}
    return optimizer.state_dict()


def checkpoint(
    s: Sizes = SMALL, dtype: Any = torch.float32, moments: bool = False, cfg: State | None = None, **how: Any
) -> State:
    """The content of a file of gptoss."""
    state = state_dict(s, dtype=dtype, **how)
    optimizer = adam_state(state, 7, dtype) if moments else {"state": {}, "param_groups": []}
    told = CFG | {"transformer_blocks": s.L} | (cfg or {})
    return {"step": 7, "model": state, "optimizer": optimizer, "val_loss": 2.5, "cfg": told}


def save(tmp_path: Path, content: Any, name: str = "latest.pt") -> Path:
    """A file of torch.save."""
    torch.save(content, tmp_path / name)
    return tmp_path / name


def bits(flat: dict[str, Any]) -> dict[str, bytes]:
    """Shape, dtype and every bit of each tensor."""
    arrays = {k: to_numpy(x) if isinstance(x, torch.Tensor) else np.asarray(x) for k, x in flat.items()}
    return {k: repr((x.shape, str(x.dtype))).encode() + x.tobytes() for k, x in arrays.items()}


def loaded(source: Any) -> dict[str, np.ndarray]:
    """All tensors of a source, in memory."""
    plans: dict[str, Planned] = source.tensors
    return {path: array(plan) for path, plan in plans.items()}


# The transcription.


def rms_norm(x: Any, weight: Any) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Half-split: channel i turns with channel i + H/2, which is what a [C, H] table of two equal halves says."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attention(w: Callable[[str], Any], x: Any, s: Sizes, buffers: State) -> Any:
    """softmax(q k / sqrt(H) + bias[rows S-T..S], causal) v, then the output projection with its bias."""
    B, T, _ = x.shape
    q, k, v = (
        (x @ w(f"gqa.W_{name}.weight").T).view(B, T, heads, s.H).transpose(1, 2)
        for name, heads in (("q", s.N), ("k", s.K), ("v", s.K))
    )
    q, k = (rotate(y, buffers["cos"][:T], buffers["sin"][:T]) for y in (q, k))
    k, v = (y.repeat_interleave(s.N // s.K, dim=1) for y in (k, v))
    scores = q @ k.mT / math.sqrt(s.H) + w("gqa.attention_bias")[:, :, :T, :T]
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    heads = scores.softmax(-1) @ v
    out = heads.transpose(1, 2).reshape(B, T, s.N * s.H)
    return out @ w("gqa.out_proj.weight").T + w("gqa.out_proj.bias")


def experts(w: Callable[[str], Any], x: Any, s: Sizes, capacity: int | None) -> tuple[Any, Any]:
    """Two experts a token, weights renormalised, exact GELU; and 0.01 E sum f P of this layer."""
    flat = x.reshape(-1, s.D)
    probs = (flat @ w("moe.router.W_r.weight").T).softmax(-1)
    top, ids = probs.topk(2, -1)
    weights = top / top.sum(-1, keepdim=True)
    chosen = torch.zeros_like(probs).scatter(1, ids, 1.0)
    combine = torch.zeros_like(probs).scatter(1, ids, weights)
    if capacity is not None:
        combine = combine * (chosen.cumsum(0) <= capacity)
    out = torch.zeros_like(flat)
    for e in range(s.E):
        up, up_bias, down, down_bias = (
            w(f"moe.experts.{e}.{name}") for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        )
        hidden = flat @ up.T + up_bias
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        out = out + combine[:, e, None] * (hidden @ down.T + down_bias)
    return out.view_as(x), 0.01 * s.E * (chosen.mean(0) * probs.mean(0)).sum()


def documented(state: State, ids: Any, s: Sizes, train: bool = False) -> tuple[Any, Any]:
    """gptoss's uncached forward, dropout off: logits and the balance term summed over layers; float64."""
    buffers = rope_buffers(s, torch.float64)
    capacity = int(1.25 * ids.numel() / s.E) if train else None
    x, balance = state["embed.weight"][ids], torch.zeros((), dtype=torch.float64)
    for i in range(s.L):

        def w(name: str, i: int = i) -> Any:
            return state[f"layers.{i}.{name}"]

        x = x + attention(w, rms_norm(x, w("norm1.weight")), s, buffers)
        out, term = experts(w, rms_norm(x, w("norm2.weight")), s, capacity)
        x, balance = x + out, balance + term
    return rms_norm(x, state["norm.weight"]) @ state["out_head.weight"].T + state["out_head.bias"], balance
