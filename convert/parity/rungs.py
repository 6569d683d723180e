"""The rungs of one pair of decoders in float64: what is built, the forward pass, the loss, the gradients.

Each function answers one question and returns findings in the order in which a fault would spread, so that the first
that fails is the nearest to its cause. Optimizer, trajectory, decoding and meshes: steps.py and serving.py.
"""

import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import jaxlm.model
import jaxlm.optim
import torchref.optim
import torchref.train
from convert.native import build_torch, export_torch, import_torch, to_jax
from convert.parity.compare import Finding, compare, compare_all, compare_gradients
from convert.parity.inputs import Arrays, tied_routing, zero_gradients
from convert.parity.limits import limit
from convert.parity.sides import Side
from convert.tree import Flat, from_torch
from jaxlm.config import ModelConfig, RunConfig, to_dict

# Fields that change no number of a model with given weights; everything is compared without dropout.
INERT = ("init", "init_std", "dropout")
# Terms of the loss, the total last: it fails with any of them. The training step calls the cross-entropy the loss.
TERMS = {
    "loss": "cross_entropy",
    **{name: name for name in ("z", "balance", "router_z", "expert_load", "dropped", "total_loss")},
}
LARGEST_EXPORT = 2**31  # bytes of weights that the conversion rung still writes to files


@dataclass
class Pair:
    """Two decoders on one batch, and what was computed of them so far."""

    jax: Side
    torch: Side
    batch: Arrays
    case: str  # which weights
    seed: int = 0
    steps: int = 50
    notes: dict[str, Any] = field(default_factory=dict)  # by rung, for the report
    cache: dict[str, Any] = field(default_factory=dict)  # what several rungs share

    @property
    def run(self) -> RunConfig:
        """The run of the JAX side."""
        return self.jax.run

    @property
    def model(self) -> ModelConfig:
        """The decoder of the JAX side."""
        return self.jax.run.model

    @property
    def gradients(self) -> tuple[tuple[Flat, dict[str, Any]], tuple[Flat, dict[str, Any]]]:
        """Gradients and metrics of JAX and of PyTorch on the batch, computed once."""
        if "gradients" not in self.cache:
            self.cache["gradients"] = (self.jax.gradients(self.batch), self.torch.gradients(self.batch))
        return self.cache["gradients"]

    @property
    def zero(self) -> set[str]:
        """Parameters whose gradient is zero by mathematics."""
        return zero_gradients(self.model, self.batch["inputs"].shape[1])

    def counted(self, flat: Flat) -> Flat:
        """Without the tensors whose gradient is zero: an optimizer moves those by rounding alone."""
        return {path: value for path, value in flat.items() if path not in self.zero}


def config(pair: Pair) -> list[Finding]:
    """Every field of the two configurations that changes a number."""
    a, b = _fields(to_dict(pair.jax.run.model)), _fields(to_dict(pair.torch.run.model))
    findings = []
    for name in dict.fromkeys([*a, *b]):
        same = a.get(name) == b.get(name)
        detail = {} if same else {"jax": a.get(name), "torch": b.get(name)}
        findings.append(Finding(name, 0.0 if same else math.inf, limit("exact"), detail))
    return findings


def _fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _fields(value, f"{prefix}{name}.")
        elif prefix + name not in INERT:
            flat[prefix + name] = value
    return flat


def tree(pair: Pair) -> list[Finding]:
    """Names, shapes and values of the parameters, bit for bit after conversion."""
    return compare_all(pair.jax.weights(), pair.torch.weights(), limit("exact"))


def conversion(pair: Pair) -> list[Finding]:
    """Every weight there and back, in three dtypes, in memory and through files: the same bits."""
    weights, findings = pair.jax.weights(), []
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
        flat = {path: value.astype(dtype) for path, value in weights.items()}
        back = to_jax(pair.model, from_torch(build_torch(pair.model, flat)))
        findings += [_bits(path, flat[path], back.get(path)) for path in flat]
    if sum(value.nbytes for value in weights.values()) <= LARGEST_EXPORT:
        with tempfile.TemporaryDirectory() as folder:
            export_torch(pair.model, weights, Path(folder))
            model, params = import_torch(Path(folder))
        findings += [_bits(path, value, params.get(path)) for path, value in weights.items()]
        findings.append(Finding("config.json", 0.0 if model == pair.model else math.inf, limit("exact")))
    return findings


def _bits(path: str, a: np.ndarray, b: Any) -> Finding:
    b = None if b is None else np.asarray(b)
    if b is not None and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
        return Finding(path, 0.0, limit("exact"))
    if b is None or a.dtype != b.dtype:
        detail = {"sent": str(a.dtype), "came_back": "nothing" if b is None else str(b.dtype)}
        return Finding(path, math.inf, limit("exact"), detail)
    found = compare(path, a, b, limit("exact"))
    return found if not found.passed else Finding(path, math.inf, limit("exact"), {"differs": "in the bits"})


def init(pair: Pair) -> list[Finding]:
    """Fresh weights of both frameworks: mean, spread and shape of the distribution, and the optimizer's start."""
    run = pair.run
    ours = {k: np.asarray(v) for k, v in jaxlm.model.init_params(run.model, pair.seed).items()}
    state = torchref.train.init_state(run)
    theirs = to_jax(run.model, from_torch(state.model))
    findings = []
    for path, a in ours.items():
        findings.append(distribution(path, a, theirs[path]))
    zeros = jaxlm.optim.wide_moments(jaxlm.optim.make_optimizer(run.optim).init(ours))
    for slot, tree in zeros._asdict().items():
        start = max(float(jnp.max(jnp.abs(x))) for x in tree.values())
        findings.append(Finding(slot, start, limit("exact")))
    begun = len(torchref.optim.moments(state.model, state.optimizer).m)
    return [*findings, Finding("torch state before the first step", float(begun), limit("exact"))]


def distribution(path: str, a: np.ndarray, b: np.ndarray) -> Finding:
    """Difference of mean, standard deviation and kurtosis in standard errors; constants must be equal."""
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    if a.shape != b.shape:
        return Finding(path, math.inf, limit("init_sigmas"), {"jax": a.size, "torch": b.size})
    if a.std() == 0 or b.std() == 0 or a.size < 16:
        same = a.size < 16 or (np.array_equal(a, b))
        return Finding(path, 0.0 if same else math.inf, limit("init_sigmas"), {} if same else _moments(a, b))
    n, spread = a.size, math.hypot(a.std(), b.std())
    # Standard errors of the difference of two samples from one normal distribution.
    sigmas = [abs(a.mean() - b.mean()) / (spread / math.sqrt(n))]
    sigmas.append(abs(a.std() - b.std()) / (spread / math.sqrt(2 * n)))
    if n >= 2_000:
        sigmas.append(abs(_kurtosis(a) - _kurtosis(b)) / math.sqrt(48 / n))
    value = float(max(sigmas))
    return Finding(path, value, limit("init_sigmas"), {} if value <= limit("init_sigmas") else _moments(a, b))


def _moments(a: np.ndarray, b: np.ndarray) -> dict[str, str]:
    return {
        side: f"mean {x.mean():.3e}, std {x.std():.4e}, largest {np.abs(x).max():.3e}"
        for side, x in (("jax", a), ("torch", b))
    }


def _kurtosis(x: np.ndarray) -> float:
    z = (x - x.mean()) / x.std()
    return float(np.mean(z**4))


def rope(pair: Pair) -> list[Finding]:
    """cos and sin as the two decoders take them for the batch's positions."""
    positions = np.arange(pair.model.context, dtype=np.int32)[None]
    found = compare_all(pair.jax.rope(positions), pair.torch.rope(positions), limit("exact"))
    return found or [Finding("no rotary positions", 0.0, limit("exact"))]


def activations(pair: Pair) -> list[Finding]:
    """Every activation by module path, in the order of the forward pass; chosen experts exactly.

    Scores exist in the explicit form of attention only; the form that training runs is compared by its logits.
    """
    ours, theirs = pair.jax.activations(pair.batch), pair.torch.activations(pair.batch)
    usual = pair.torch.activations(pair.batch, explicit=False)["logits"]
    exact = [name for name in ours if name.endswith((".expert_ids", ".kept"))]
    findings = [
        compare(name, ours[name], theirs[name], limit("exact" if name in exact else "float64"))
        if name in ours and name in theirs
        else Finding(name, math.inf, limit("exact"), {"missing": "torch" if name in ours else "jax"})
        for name in dict.fromkeys([*ours, *theirs])
    ]
    return [*findings, compare("logits of the fused attention", ours["logits"], usual, limit("float64"))]


def ties(pair: Pair) -> list[Finding]:
    """The chosen experts where every token ties: the lowest indices, in both frameworks."""
    short = {name: value[:, :24] for name, value in pair.batch.items()}
    sides = [side.replaced(tied_routing(pair.model, side.weights())) for side in (pair.jax, pair.torch)]
    ours, theirs = (side.activations(short) for side in sides)
    names = [name for name in ours if name.endswith("expert_ids")]
    return [compare(name, ours[name], theirs[name], limit("exact")) for name in names]


def loss(pair: Pair) -> list[Finding]:
    """Cross-entropy, z-losses, balance loss, their weighted total, and the load of the experts."""
    (_, ours), (_, theirs) = pair.gradients
    return compare_all(_named(ours), _named(theirs), limit("float64"), TERMS.values())


def _named(metrics: dict[str, Any]) -> dict[str, Any]:
    return {TERMS.get(name, name): value for name, value in metrics.items()}


def gradients(pair: Pair) -> list[Finding]:
    """Every parameter's gradient, in the order of the backward pass."""
    (ours, _), (theirs, _) = pair.gradients
    order = backward_order(ours)
    zero = limit("float64_zero")
    return compare_gradients(ours, theirs, limit("float64"), order, pair.zero, zero)


def accumulation(pair: Pair) -> list[Finding]:
    """Two micro-batches: loss terms and gradients in both frameworks, and what may not differ from the full batch."""
    rows = len(pair.batch["inputs"]) // 2 * 2
    short = min(pair.batch["inputs"].shape[1], 96)
    batch = {name: value[:rows, :short] for name, value in pair.batch.items()}
    (ours, ours_terms), (theirs, theirs_terms) = (s.gradients(batch, 2) for s in (pair.jax, pair.torch))
    _, whole = pair.torch.gradients(batch)
    findings = []
    # A capacity limit counts the tokens of a micro-batch: what it drops is not what the full batch drops.
    limited = pair.model.moe.n_experts > 0 and pair.model.moe.capacity_factor > 0
    for name, split in () if limited else (("jax", ours_terms), ("torch", theirs_terms)):
        # The balance loss is a product of means: micro-batches are not the full batch, by definition.
        for term in ("loss", "z", "router_z"):
            findings.append(
                compare(f"{name}.{TERMS.get(term, term)}", split[term], whole[term], limit("float64"))
            )
    findings += compare_all(_named(ours_terms), _named(theirs_terms), limit("float64"), TERMS.values())
    zero = limit("float64_zero")
    return findings + compare_gradients(ours, theirs, limit("float64"), backward_order(ours), pair.zero, zero)


def clip(pair: Pair) -> list[Finding]:
    """Norm of the whole gradient and the clip's factor: off, active, inactive."""
    (ours, _), (theirs, _) = pair.gradients
    a = jaxlm.optim.global_norm({k: jnp.asarray(g) for k, g in ours.items()})
    b = torchref.optim.global_norm([torch.from_numpy(np.array(g)) for g in theirs.values()])
    findings = [compare("grad_norm", a, b, limit("float64"))]
    for name, share in (("off", 0.0), ("active", 0.5), ("inactive", 2.0)):
        bound = share * float(b)
        ours_scale, theirs_scale = jaxlm.optim.clip_scale(a, bound), torchref.optim.clip_scale(b, bound)
        findings.append(compare(f"clip_scale {name}", ours_scale, theirs_scale.numpy(), limit("float64")))
    return findings


def schedule(pair: Pair) -> list[Finding]:
    """Learning rate and AdamW's scalars at the corners of every schedule, as the host computes them."""
    optim = pair.run.optim
    w, end = optim.warmup_steps, max(optim.decay_steps, optim.warmup_steps + 1)
    late = round((1 - optim.wsd_decay) * end)
    corners = sorted({0, 1, max(w - 1, 0), w, w + 1, (w + end) // 2, late, late + 1, end - 1, end, end + 5})
    findings = []
    for step in corners:
        ours, theirs = jaxlm.optim.scalars(optim, step), torchref.optim.scalars(optim, step)
        for name in ours._fields:
            a, b = getattr(ours, name), getattr(theirs, name)
            findings.append(compare(f"{name}:step {step}", a, b, limit("float64_scalar"), floor=1e-300))
    return findings


def backward_order(paths: Any) -> list[str]:
    """Parameters as the backward pass meets them: head first, embedding last."""
    inside = (
        *("moe.shared_gate", "moe.shared.down_proj", "moe.shared.up_proj", "moe.shared.gate_proj"),
        *("moe.experts.down_bias", "moe.experts.down", "moe.experts.gate_up_bias", "moe.experts.up_bias"),
        *("moe.experts.gate_up", "moe.experts.up", "moe.router"),
        *("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "mlp_norm"),
        *("attn.o_proj", "attn.bias_table", "attn.v_proj", "attn.q_norm", "attn.k_norm"),
        *("attn.q_proj", "attn.k_proj", "attn_norm"),
    )

    def key(path: str) -> tuple[int, int, int, str]:
        if path.startswith("blocks."):
            _, layer, rest = path.split(".", 2)
            name = re.sub(r"(\.weight|\.bias)?(\.lora_[ab])?$", "", rest)
            return 2, -int(layer), inside.index(name) if name in inside else len(inside), path
        stage = 0 if path.startswith(("lm_head", "head_bias")) else 1 if path.startswith("final_norm") else 3
        return stage, 0, 0, path

    return sorted(paths, key=key)


RUNGS: dict[str, Callable[[Pair], list[Finding]]] = {
    "config": config,
    "tree": tree,
    "conversion": conversion,
    "init": init,
    "rope": rope,
    "activations": activations,
    "ties": ties,
    "loss": loss,
    "gradients": gradients,
    "accumulation": accumulation,
    "clip": clip,
    "schedule": schedule,
}
