"""jaxlm <-> torchref: the same names; only [in, out] against [out, in] differs.

The same table pairs weights, gradients and optimizer moments; activations have equal names and layouts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from convert.rules import SAME, TRANSPOSE, ConversionError, Pair, Rule, convert, pair_up
from convert.tree import Flat, from_jax, from_torch, load_torch
from jaxlm.config import ModelConfig
from jaxlm.model import Params, abstract_model

if TYPE_CHECKING:
    from torchref.layers import Backends
    from torchref.model import Decoder

RULES: tuple[Rule, ...] = (
    Rule(r"(embed|pos_embed)\.weight", r"\1.weight", SAME),
    Rule(r"(.*norm)\.weight", r"\1.weight", SAME),
    Rule(r"(.*_proj|.*router|.*shared_gate|lm_head)\.weight", r"\1.weight", TRANSPOSE),
    Rule(r"(.*\.)?(bias|gate_up_bias|up_bias|down_bias|head_bias)", r"\1\2", SAME),
    Rule(r"(.*\.bias_table)", r"\1", SAME),
    Rule(r"(.*\.experts\.)(gate_up|up|down)", r"\1\2", TRANSPOSE),
)


def pairs(config: ModelConfig) -> list[Pair]:
    """The table applied to one model, whatever its size."""
    return pair_up(RULES, {path: tuple(s.shape) for path, s in abstract_model(config).shapes.items()})


def to_torch(config: ModelConfig, flat: Flat) -> Flat:
    """jaxlm's tensors (weights, gradients or moments) in torchref's names and layouts."""
    return convert(pairs(config), flat)


def to_jax(config: ModelConfig, flat: Flat) -> Flat:
    """torchref's tensors in jaxlm's names and layouts."""
    return convert(pairs(config), flat, inverse=True)


def build_torch(
    config: ModelConfig,
    params: Mapping[str, jax.Array | np.ndarray],
    backends: "Backends | None" = None,
) -> "Decoder":
    """The torch twin of jaxlm parameters, in their dtype."""
    import torch

    from torchref.layers import Backends
    from torchref.model import Decoder

    backends = backends or Backends()
    with torch.device("meta"):
        model = Decoder(config, backends, rngs=None, dtype=torch.float32)
    load_torch(model, to_torch(config, from_jax(params)))
    return model


def export_torch(config: ModelConfig, params: Mapping[str, jax.Array | np.ndarray], directory: Path) -> None:
    """Writes jaxlm parameters as a torchref checkpoint: model.safetensors and config.json."""
    from torchref.checkpoint import save_model

    save_model(build_torch(config, params), directory)


def import_torch(directory: Path) -> tuple[ModelConfig, Params]:
    """Reads a torchref checkpoint into jaxlm parameters."""
    from torchref.checkpoint import load_model

    model = load_model(directory)
    flat = to_jax(model.config, from_torch(model))
    if not jax.config.jax_enable_x64 and any(value.dtype == np.float64 for value in flat.values()):
        raise ConversionError(
            f"{directory} holds float64 weights: set JAX_ENABLE_X64=1, or jax would narrow them"
        )
    return model.config, {path: jnp.asarray(np.asarray(value)) for path, value in flat.items()}
