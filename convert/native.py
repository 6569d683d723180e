"""jaxlm <-> torchref: the same names; only [in, out] against [out, in] differs.

The same table pairs weights, gradients and optimizer moments, another one those of low-rank factors; activations have
equal names and layouts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from convert.peft_adapter import require
from convert.rules import SAME, TRANSPOSE, ConversionError, Pair, Rule, convert, pair_up
from convert.tree import Flat, from_jax, from_torch, load_torch, to_tensor
from jaxlm.adapter_config import AdapterConfig
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
ADAPTER_RULES: tuple[Rule, ...] = (Rule(r"(.*\.lora_[ab])", r"\1", TRANSPOSE),)


def pairs(config: ModelConfig) -> list[Pair]:
    """The table applied to one model, whatever its size."""
    return pair_up(RULES, {path: tuple(s.shape) for path, s in abstract_model(config).shapes.items()})


def to_torch(config: ModelConfig, flat: Flat) -> Flat:
    """jaxlm's tensors (weights, gradients or moments) in torchref's names and layouts."""
    return convert(pairs(config), flat)


def to_jax(config: ModelConfig, flat: Flat) -> Flat:
    """torchref's tensors in jaxlm's names and layouts."""
    return convert(pairs(config), flat, inverse=True)


def adapter_to_torch(factors: Mapping[str, jax.Array | np.ndarray]) -> Flat:
    """Low-rank factors (or their gradients or moments) in torchref's layouts: a [R, in], b [out, R], of experts with
    [E] before them.
    """
    return _across(factors, inverse=False)


def adapter_to_jax(factors: Flat) -> Flat:
    """The inverse of `adapter_to_torch`."""
    return _across(factors, inverse=True)


def _across(factors: Mapping[str, jax.Array | np.ndarray], inverse: bool) -> Flat:
    arrays = from_jax(factors)
    shapes = {path: tuple(TRANSPOSE.view(x).shape if inverse else x.shape) for path, x in arrays.items()}
    return convert(pair_up(ADAPTER_RULES, shapes), arrays, inverse)


def build_adapted(
    config: ModelConfig,
    params: Mapping[str, jax.Array | np.ndarray],
    factors: Mapping[str, jax.Array | np.ndarray],
    adapter: AdapterConfig,
    backends: "Backends | None" = None,
) -> "Decoder":
    """The torch twin of jaxlm parameters with an adapter on them, in their dtypes; the factors alone are trained.

    Raises ConversionError where the factors are not those that the adapter has on this model.
    """
    from torchref.finetune.lora import adapt

    require(from_jax(factors), adapter, {path: tuple(x.shape) for path, x in params.items()})
    tensors = {name: to_tensor(x) for name, x in adapter_to_torch(factors).items()}
    dtype = next(iter(tensors.values())).dtype
    model = adapt(build_torch(config, params, backends), adapter, rngs=None, dtype=dtype)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected and not any(name in tensors for name in missing), unexpected
    return model


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
