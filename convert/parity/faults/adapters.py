"""Faults of low-rank adapters and of the frozen base under them, plain or quantised."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import jaxlm.finetune.lora
from convert.parity.faults.fault import Fault, Rewrite


def _root_of_rank(original: Any) -> Any:
    """alpha / sqrt(R) where alpha / R is meant."""

    def plan(adapter, *rest):
        return {
            path: low._replace(scale=low.scale * math.sqrt(low.rank))
            for path, low in original(adapter, *rest).items()
        }

    return plan


def _adapter_as(**settings: Any) -> Callable[[Any], Any]:
    """torchref attaches another adapter."""

    def change(original: Any) -> Any:
        def adapt(decoder, adapter, **options):
            return original(decoder, dataclasses.replace(adapter, **settings), **options)

        return adapt

    return change


def _same_alpha_for_all(original: Any) -> Any:
    """The overrides' ranks without their alphas."""

    def adapt(decoder, adapter, **options):
        overrides = tuple(dataclasses.replace(o, alpha=adapter.alpha) for o in adapter.overrides)
        return original(decoder, dataclasses.replace(adapter, overrides=overrides), **options)

    return adapt


def _keys_and_values_exchanged(original: Any) -> Any:
    """The factors of k_proj work in v_proj, and v_proj's in k_proj."""

    def in_tree(frozen, factors):
        turned = {"k_proj": "v_proj", "v_proj": "k_proj"}
        moved = {re.sub("[kv]_proj", lambda m: turned[m[0]], path): x for path, x in factors.items()}
        return original(frozen, moved)

    return in_tree


def _torch_linear(change_factors: Callable[[Any, Any, Any], tuple[Any, Any, Any]]) -> Callable[[Any], Any]:
    """torchref's adapted projection with (x, a, b) changed: the base sees x as it is."""

    def change(original: Any) -> Any:
        def forward(self, x):
            weight: Any = self.weight
            base: Any = weight.base(x) if callable(weight.base) else weight.base
            into, a, b = change_factors(x, weight.lora_a, weight.lora_b)
            return F.linear(x, base, self.bias) + weight.scale * F.linear(F.linear(into, a), b)

        return forward

    return change


def _dropped(x: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
    return F.dropout(x, 0.1), a, b


def _reversed(x: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
    return x, a, b.flip(1)


def _rounded(x: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
    return x, a.float().double(), b.float().double()


def _only_b_learns(x: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
    return x, a.detach(), b


def _one_weight(original: Any) -> Any:
    """W + scale b a as one weight."""

    def forward(self, x):
        weight: Any = self.weight
        base: Any = weight.base(x) if callable(weight.base) else weight.base
        return F.linear(x, base + weight.scale * weight.lora_b @ weight.lora_a, self.bias)

    return forward


def _experts(move: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any], Any]:
    """jaxlm's stacked weights with other factors: move(a, b)."""

    def change(original: Any) -> Any:
        def added(self, weight):
            a, b = self.lora_a[...], self.lora_b[...]
            a, b = move(a, b) if weight.ndim == 3 else (a, b)
            return weight + self.scale * (a @ b)

        return added

    return change


def _scale_on_a(original: Any) -> Any:
    return lambda self, weight: weight + (self.scale * self.lora_a[...]) @ self.lora_b[...]


def _halves_exchanged(a: Any, b: Any) -> tuple[Any, Any]:
    """Gate and up of b exchanged; gate_up is what is much wider than its input."""
    return a, jnp.roll(b, b.shape[-1] // 2, -1) if b.shape[-1] > 1.5 * a.shape[-2] else b


def _first_experts(a: Any, b: Any) -> tuple[Any, Any]:
    return jnp.broadcast_to(a[:1], a.shape), jnp.broadcast_to(b[:1], b.shape)


def _small_b(original: Any) -> Any:
    """Both factors are drawn."""
    return lambda run: {k: v + 1e-3 * k.endswith("lora_b") for k, v in original(run).items()}


def _normal_a(original: Any) -> Any:
    """a from a normal distribution with the spread that a weight has."""

    def fresh(shape, *rest):
        a, b = original(shape, *rest)
        with torch.no_grad():
            a.normal_(std=1 / math.sqrt(shape[-1]))
        return a, b

    return fresh


def _norms_learn(original: Any) -> Any:
    """The norms of the base are left out of the freezing."""

    def adapt(decoder, adapter, **options):
        made = original(decoder, adapter, **options)
        for path, p in made.named_parameters():
            if path.endswith("norm.weight"):
                p.requires_grad_(True)
        return made

    return adapt


def _base_decays(original: Any) -> Any:
    """Weight decay goes over everything, what is frozen too."""

    def make_train_step(run, *rest):
        step = original(run, *rest)

        def stepped(state, batch, scalars):
            state, metrics = step(state, batch, scalars)
            with torch.no_grad():
                for p in state.model.parameters():
                    if not p.requires_grad and p.is_floating_point():
                        p.mul_(1 - scalars.decay)
            return state, metrics

        return stepped

    return make_train_step


def _factors_do_not_decay(original: Any) -> Any:
    def treatment(config, path):
        plan = original(config, path)
        return plan._replace(decay=0.0) if "lora_" in path else plan

    return treatment


def _without_scale(original: Any) -> Any:
    return lambda params, factors, adapter: original(
        params, factors, dataclasses.replace(adapter, alpha=float(adapter.rank))
    )


def _added_again(original: Any) -> Any:
    """What is to be taken off is added a second time."""
    return jaxlm.finetune.lora.merge


def _another_level(original: Any) -> Any:
    return (*original[:5], original[5] - 0.01, *original[6:])


def _without_offset(original: Any) -> Any:
    """The absmax without the mean that was taken off."""
    return lambda stored: original(stored) - stored.offset


def _low_half_first(original: Any) -> Any:
    def pack(codes, n):
        packed = original(codes, n)
        return packed << 4 | packed >> 4

    return pack


def _blocks_of_columns(original: Any) -> Any:
    """Blocks are cut from the weight as it lies here, [in, out]."""
    return lambda path, value, kind: original(path, np.asarray(value).swapaxes(-1, -2), kind)


def _mean_forgotten(original: Any) -> Any:
    """Nothing is taken off the absmax before it is quantised."""
    return lambda values: torch.zeros(())


def _no_gradient_through_codes(original: Any) -> Any:
    """The backward pass of a product with a quantised weight gives nothing."""
    return lambda kind, shape, x, stored: original(kind, shape, jax.lax.stop_gradient(x), stored)


JAX, TORCH = "jaxlm.finetune.lora", "torchref.finetune.lora"
FORWARD = f"{TORCH}.LoraLinear.forward"

_ADAPTERS = (
    # Of what follows from a projection, RoPE's result is the first that is compared.
    ("scale alpha / sqrt(R)", f"{JAX}._plan", _root_of_rank, "lora", "attn.q"),
    (
        "rank-stabilised scale lost",
        f"{TORCH}.adapt",
        _adapter_as(rslora=False),
        "lora",
        "attn.q",
    ),
    ("one alpha for all", f"{TORCH}.adapt", _same_alpha_for_all, "lora", "attn"),
    ("k's and v's adapters exchanged", f"{JAX}._in_tree", _keys_and_values_exchanged, "lora", "attn.k"),
    ("ranks of b in reverse", FORWARD, _torch_linear(_reversed), "lora", "attn.q"),
    ("dropout left on", FORWARD, _torch_linear(_dropped), "lora", "attn.q"),
    ("factors in float32", FORWARD, _torch_linear(_rounded), "lora", "attn.q"),
    ("only b learns", FORWARD, _torch_linear(_only_b_learns), "lora", "mlp.down_proj.weight.lora_a"),
    (
        "gate and up of an expert's b exchanged",
        f"{JAX}.LoraWeight._added",
        _experts(_halves_exchanged),
        "lora",
        "moe.combined",
    ),
    (
        "one adapter for all experts",
        f"{JAX}.LoraWeight._added",
        _experts(_first_experts),
        "lora",
        "moe.combined",
    ),
    (
        "down_proj not adapted",
        f"{TORCH}.adapt",
        _adapter_as(targets=(r".*_proj\.weight(?<!down_proj\.weight)", r".*experts\..*")),
        "lora_init",
        "mlp.down_proj.weight.lora_a",
    ),
    ("b does not start at zero", "jaxlm.finetune.sft.init_factors", _small_b, "lora_init", "start"),
    ("a from a normal distribution", f"{TORCH}._fresh", _normal_a, "lora_init", "start"),
    ("norms not frozen", f"{TORCH}.adapt", _norms_learn, "lora_init", "attn.k_norm.weight"),
    ("base decays", "torchref.train.make_train_step", _base_decays, "lora_updates", "balance"),
    ("factors do not decay", "torchref.optim.treatment", _factors_do_not_decay, "lora_updates", "delta"),
    ("merged without scale", f"{TORCH}.merge", _without_scale, "lora", "merged"),
    ("merged a second time", f"{JAX}.unmerge", _added_again, "lora", "unmerged in jax"),
)
_QUANTISED = (
    ("a level of nf4 moved", "jaxlm.quant.NF4_LEVELS", _another_level, "base"),
    ("mean of the absmax lost", "torchref.quant.dequantize_absmax", _without_offset, "cross_entropy"),
    ("low half of a byte first", "torchref.quant._pack", _low_half_first, "base"),
    ("blocks cut from columns", f"{JAX}.quantize_weight", _blocks_of_columns, "base"),
    ("absmax not centred", "torchref.quant._mean", _mean_forgotten, "base"),
    (
        "no gradient through codes",
        "jaxlm.quant._product",
        _no_gradient_through_codes,
        "mlp.up_proj.weight.lora_a",
    ),
)
CLIMBED = ("lora_init", "lora", "lora_updates", "lora_nf4")
FAULTS = (
    *(
        Fault(name, "adapters", at, change, rung, operation, rungs=CLIMBED if ".finetune." in at else ())
        for name, at, change, rung, operation in _ADAPTERS
    ),
    *(
        Fault(name, "quantised base", target, change, "lora_nf4", operation, rungs=("lora_nf4",))
        for name, target, change, operation in _QUANTISED
    ),
)
REWRITES = (
    Rewrite("base and adapter as one weight", FORWARD, _one_weight, rungs=CLIMBED),
    Rewrite("a thrice, b a third", FORWARD, _torch_linear(lambda x, a, b: (x, 3 * a, b / 3)), rungs=CLIMBED),
    Rewrite("experts' scale on a", f"{JAX}.LoraWeight._added", _scale_on_a, rungs=CLIMBED),
)
