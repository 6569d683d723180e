"""What the entry points that run a trained model share: it is loaded in a precision, quantised if asked, and started
by the token that its texts start with.
"""

import contextlib
import copy
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from convert.targets import Target
from jaxlm.config import ConfigError

TargetPath = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
Framework = Literal["jax", "torch"]
Dtype = Literal["float32", "bfloat16", "float64"]
Quant = Literal["none", "int8", "int4", "nf4"]
Front = Literal["auto", "bos", "eos", "none"]


def print_any_name() -> None:
    """Standard output escapes what its encoding lacks, in names of files above all, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def check_place(path: Path, directory: bool) -> None:
    """Raises ConfigError where `path` cannot become a file, or a directory: before hours of work, not after."""
    if path.exists() and path.is_dir() != directory:
        raise ConfigError(f"--out {path} is {'a file' if directory else 'a directory'}")
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not above.is_dir() and above != path:
        raise ConfigError(f"--out {path}: {above} is a file")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"--out {path}: {above} may not be written to")


@contextlib.contextmanager
def precision(framework: Framework, dtype: Dtype) -> Iterator[None]:
    """float64 inside jax where it is computed in, and products as precise as dtype; to be entered before loading."""
    if framework == "torch":
        yield  # it computes in float64 as it is, and without TF32
        return
    import jax

    matmul = "default" if dtype == "bfloat16" else "highest"
    with (
        jax.enable_x64(dtype == "float64" or jax.config.jax_enable_x64),
        jax.default_matmul_precision(matmul),
    ):
        yield


def load_model(target: Target, framework: Framework, dtype: Dtype, quant: Quant = "none") -> Any:
    """The model of a target as its framework's functions take it (jaxlm.model.Split or torchref.model.Decoder).

    Norms and routers stay in the precision of the masters, as in training; quantised weights are those of the masters.
    The target's own weights stay as they are. Raises InputError where the weights cannot be read.
    """
    return _load_torch(target, dtype, quant) if framework == "torch" else _load_jax(target, dtype, quant)


def _load_jax(target: Target, dtype: Dtype, quant: Quant) -> Any:
    import jax

    from jaxlm.decode_form import for_decoding

    model = load_split(target, dtype, quant)
    return model if jax.default_backend() == "cpu" else for_decoding(model)


def load_split(target: Target, dtype: Dtype, quant: Quant) -> Any:
    """A model of jaxlm (jaxlm.model.Split) with the parameters' own names, before it is laid out for decoding."""
    import jax
    import jax.numpy as jnp

    from jaxlm.model import Split, abstract_model
    from jaxlm.train import cast_params

    tensors = target.contents.tensors
    wide = any(tensor.dtype == np.float64 for tensor in tensors.values())
    with jax.enable_x64(wide or jax.config.jax_enable_x64):
        if quant == "none":
            model = Split(abstract_model(target.config).graphdef, target.params)
        else:
            from jaxlm.quant import quantize_params

            model = quantize_params(target.config, tensors, quant)
        plain = {path: value for path, value in model.params.items() if path in tensors}
        cast = cast_params(plain, jnp.dtype(dtype))
        if dtype != "float64":  # what cast_params keeps wide is float64 at most in the files
            cast = {k: v.astype(jnp.float32) if v.dtype == jnp.float64 else v for k, v in cast.items()}
    return Split(model.graphdef, model.params | cast)


def _load_torch(target: Target, dtype: Dtype, quant: Quant) -> Any:
    import torch

    from torchref.train import cast_params

    decoder = target.decoder
    plain: dict[str, torch.Tensor] = dict(decoder.named_parameters())
    if quant != "none":
        from torchref.quant import quantize

        decoder = quantize(decoder, quant)
    cast = cast_params(plain, getattr(torch, dtype))
    if dtype != "float64":  # what cast_params keeps wide is float64 at most in the files
        cast = {k: v.float() if v.dtype == torch.float64 else v for k, v in cast.items()}
    # A copy that takes these in place of the parameters: deepcopy asks its memo first.
    weights = {id(plain[name]): torch.nn.Parameter(value.detach(), False) for name, value in cast.items()}
    return copy.deepcopy(decoder, weights)


def devices(framework: Framework) -> list[str]:
    """Where the model computes."""
    if framework == "torch":
        import torch

        return [torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"]
    import jax

    return [str(device) for device in jax.devices()]


def front_id(target: Target, front: Front) -> int | None:
    """The token that stands before a text.

    auto: bos where the model's files say that texts start with it, else the end of the document before (eos), as
    documents follow each other in training; None where there is neither. Raises ConfigError where the token that was
    asked for does not exist.
    """
    specials = target.specials
    bos, eos = specials.bos, specials.eos[0] if specials.eos else None
    if front == "auto":
        return bos if specials.adds_bos else bos if eos is None else eos
    if front == "none":
        return None
    found = bos if front == "bos" else eos
    if found is None:
        raise ConfigError(f"--front {front}: the model's tokenizer has no {front} token; use --front none")
    return found
