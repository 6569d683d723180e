"""Faults of the conversion: exchanged, permuted, reshaped, rounded and lost tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

from convert.parity.faults.fault import Fault
from convert.rules import SAME, Rule, Transform

TRANSPOSED = r"(.*_proj|.*router|.*shared_gate|lm_head)\.weight"  # the rule that the faults below replace


def _swap(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def _reshape(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2])


def _with(*rules: Rule, instead_of: str) -> Callable[[Any], Any]:
    """The table with one rule replaced by others, which come first in it."""

    def change(original: tuple[Rule, ...]) -> tuple[Rule, ...]:
        kept = tuple(rule for rule in original if rule.source != instead_of)
        assert len(kept) == len(original) - 1, f"the table has no rule {instead_of!r}"
        return (*rules, *kept)

    return change


def _keys_and_values_exchanged(original: tuple[Rule, ...]) -> tuple[Rule, ...]:
    old = next(rule for rule in original if rule.source == TRANSPOSED)
    rest = Rule(r"(.*_proj(?<!k_proj)(?<!v_proj)|.*router|.*shared_gate|lm_head)\.weight", *_rest(old))
    crossed = [Rule(rf"(.*){a}_proj\.weight", rf"\1{b}_proj.weight", old.transform) for a, b in ("kv", "vk")]
    return (*crossed, rest, *(rule for rule in original if rule is not old))


def _rest(rule: Rule) -> tuple[str, Transform]:
    return rule.target, rule.transform


def _interleaved(x: np.ndarray) -> np.ndarray:
    """[in, N*H] -> [N*H, in], each head's rows from half-split to interleaved rotary pairs (H = 6)."""
    rows = _swap(x)
    return rows.reshape(-1, 2, 3, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _half_split(x: np.ndarray) -> np.ndarray:
    return _swap(x.reshape(-1, 3, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape))


def _queries_permuted(original: tuple[Rule, ...]) -> tuple[Rule, ...]:
    old = next(rule for rule in original if rule.source == TRANSPOSED)
    rest = Rule(r"(.*_proj(?<!q_proj)(?<!k_proj)|.*router|.*shared_gate|lm_head)\.weight", *_rest(old))
    moved = Rule(
        r"(.*\.(q|k)_proj)\.weight", r"\1.weight", Transform("interleave", _interleaved, _half_split)
    )
    return (moved, rest, *(rule for rule in original if rule is not old))


def _through_bfloat16(original: Any) -> Any:
    def from_jax(params):
        flat = original(params)
        return {path: value.astype(ml_dtypes.bfloat16).astype(value.dtype) for path, value in flat.items()}

    return from_jax


def _saved_in_float32(original: Any) -> Any:
    """The checkpoint is written in float32, and read back as what the model had."""

    def save_model(model, directory):
        dtype = next(model.parameters()).dtype
        return original(model.to(torch.float32).to(dtype), directory)

    return save_model


def _theta_not_stored(original: Any) -> Any:
    def load_model(directory):
        model = original(directory)
        model.config = dataclasses.replace(model.config, rope_theta=10_000.0)
        return model

    return load_model


def _bfloat16_widened(original: Any) -> Any:
    """numpy has no bfloat16, so the tensor travels as float32 and stays one."""

    def to_numpy(tensor):
        return original(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)

    return to_numpy


def _steps_start_anew(original: Any) -> Any:
    return lambda state: original(state)._replace(step=0)


def _second_moments_start_anew(original: Any) -> Any:
    def jax_moments(state):
        found = original(state)
        return found._replace(v={path: np.zeros_like(v) for path, v in found.v.items()})

    return jax_moments


EXPERTS = r"(.*\.experts\.)(gate_up|up|down)"
BIASES = r"(.*\.)?(bias|gate_up_bias|up_bias|down_bias|head_bias)"
REVERSED = Transform("reversed", lambda x: _swap(x)[::-1], lambda x: _swap(x)[::-1])

FAULTS = (
    # A rule with a right inverse comes back unharmed: only the computation shows that the tensor is another one.
    Fault(
        "keys and values exchanged",
        "conversion",
        "convert.native.RULES",
        _keys_and_values_exchanged,
        "activations",
        "attn.k",
    ),
    Fault(
        "reshaped instead of transposed",
        "conversion",
        "convert.native.RULES",
        _with(
            Rule(TRANSPOSED, r"\1.weight", Transform("reshape", _reshape, _reshape)), instead_of=TRANSPOSED
        ),
        "activations",
        "attn.q",
    ),
    Fault(
        "queries and keys permuted for interleaved pairs",
        "conversion",
        "convert.native.RULES",
        _queries_permuted,
        "activations",
        "attn.q",
    ),
    Fault(
        "experts in reverse order",
        "conversion",
        "convert.native.RULES",
        _with(Rule(EXPERTS, r"\1\2", REVERSED), instead_of=EXPERTS),
        "activations",
        "moe.combined",
    ),
    # Tensors are compared in the order of their names; the first matrix is the keys' projection.
    Fault(
        "a rule with a wrong inverse",
        "conversion",
        "convert.native.RULES",
        _with(Rule(TRANSPOSED, r"\1.weight", Transform("half", _swap, _reshape)), instead_of=TRANSPOSED),
        "tree",
        "attn.k_proj.weight",
    ),
    Fault(
        "biases start at zero in the twin",
        "conversion",
        "convert.native.RULES",
        _with(Rule(BIASES, r"\1\2", Transform("zero", np.zeros_like, lambda x: x)), instead_of=BIASES),
        "tree",
        "attn.k_proj.bias",
    ),
    Fault(
        "no rule for biases",
        "conversion",
        "convert.native.RULES",
        _with(instead_of=BIASES),
        "tree",
        "attn.k_proj.bias",
    ),
    Fault(
        "norm weights lose one: w - 1 on the way, w + 1 forgotten back",
        "conversion",
        "convert.native.RULES",
        _with(
            Rule(r"(.*norm)\.weight", r"\1.weight", Transform("offset", lambda x: x - 1, SAME.inverse)),
            instead_of=r"(.*norm)\.weight",
        ),
        "tree",
        "attn.k_norm.weight",
    ),
    Fault(
        "weights rounded to bfloat16 on the way",
        "conversion",
        "convert.native.from_jax",
        _through_bfloat16,
        "tree",
        "attn.k_norm.weight",
    ),
    Fault(
        "bfloat16 comes back as float32",
        "conversion",
        "convert.tree.to_numpy",
        _bfloat16_widened,
        "conversion",
        "attn.k_norm.weight",
    ),
    Fault(
        "files hold float32",
        "conversion",
        "torchref.checkpoint.save_model",
        _saved_in_float32,
        "conversion",
        "attn.k_norm.weight",
    ),
    Fault(
        "rope_theta is not stored",
        "conversion",
        "torchref.checkpoint.load_model",
        _theta_not_stored,
        "conversion",
        "config.json",
    ),
    # The parameters arrive: the first step's loss is right, its learning rate is that of step 0.
    Fault(
        "step count lost in the handover",
        "conversion",
        "convert.optstate.torch_moments",
        _steps_start_anew,
        "handover",
        "torch to jax.lr",
    ),
    # The first step after the handover moves wrongly, which the loss of the second tells.
    Fault(
        "second moments lost in the handover",
        "conversion",
        "convert.optstate.jax_moments",
        _second_moments_start_anew,
        "handover",
        "jax to torch.total_loss",
    ),
)
