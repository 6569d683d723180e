"""Is what was written the model that was read? The forward and gradient rungs of the parity suite, on the result.

The source computes in JAX, from the weights that were read; the result is opened again from its files and computes in
PyTorch (an ONNX graph in onnxruntime). Both in float64.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert import stream, writers
from convert.fingerprint import trained_as
from convert.parity.limits import LIMITS
from convert.targets import Target, open_target
from jaxlm import model_dir
from jaxlm.config import ConfigError, ModelConfig
from jaxlm.tensor_file import Lazy

if TYPE_CHECKING:
    from convert.parity.results import Report

RUNGS = ("config", "tree", "activations", "loss", "gradients")
LENGTH = 131  # positions of the compared batch
COPIES = 8  # of the weights in float64 that the comparison holds at its height


def compare(
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    result: Path,
    dtype: np.dtype | None,
    seed: int = 0,
    names: tuple[str, str] = ("what was read", "what was written"),
) -> "Report":
    """The report on a directory that was just written; `dtype`: what the weights were rounded to."""
    from convert.parity.suite import Options, compare_decoders, decoder_run

    written = open_target(result)
    params = {
        path: stream.array(stream.cast({path: tensor}, _stored(dtype, written, path))[path])
        for path, tensor in tensors.items()
    }
    options = Options(rungs=RUNGS, seed=seed, length=LENGTH)
    run = decoder_run(trained_as(config, written.config))
    return compare_decoders(run, params, written.decoder.cpu(), options, *names)


def export_and_prove(target: Target, out: Path, seed: int = 0) -> "Report":
    """Writes a torchref checkpoint in the place of an older one, and compares what it holds with the target.

    Raises ConfigError where something else has the place.
    """
    if (
        out.exists()
        and not (out / "model.safetensors").is_file()
        and not (out.is_dir() and not any(out.iterdir()))
    ):
        raise ConfigError(f"{out} is there already and is no checkpoint; choose another name")
    with model_dir.staged(out, overwrite=True) as staging:
        written = writers.write_torch(target, staging, writers.Choices(optimizer=False), lambda n: None)
        model_dir.write_manifest(staging, "torch", written.tensors)
    names = ("what was trained", str(out))
    return compare(target.config, target.contents.tensors, out, None, seed, names)


def _stored(dtype: np.dtype | None, written: Target, path: str) -> np.dtype | None:
    """What a tensor was rounded to: `dtype`, unless the format keeps it wider, as GGUF does norms and routers."""
    found = written.contents.tensors.get(path)
    if dtype is None or found is None or found.dtype.itemsize <= dtype.itemsize:
        return dtype
    return found.dtype


def compare_onnx(target: Target, result: Path, seed: int = 0) -> tuple[bool, str]:
    """Logits of an ONNX graph against the twin in float64: whole, and through the cache; passed, and a line."""
    import torch

    from convert.onnx_decoder import OnnxDecoder

    config = target.config
    length = min(LENGTH, config.context)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, length))
    with torch.no_grad():
        expected = target.decoder.cpu().double()(torch.from_numpy(ids))[0].numpy()
    decoder = OnnxDecoder(result / "model.onnx")
    whole, _ = decoder.prefill(ids)
    cut = max(1, length - 16)
    part, cache = decoder.prefill(ids[:, :cut])
    parts = [part]
    for t in range(cut, length):
        part, cache = decoder.step(ids[:, t : t + 1], cache)
        parts.append(part)
    errors = [
        float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        for found in (whole, np.concatenate(parts, axis=1))
    ]
    limit = LIMITS["float32_onnx"].value
    passed = all(error <= limit for error in errors)
    verdict = "agree" if passed else "DISAGREE"
    return passed, (
        f"float64 PyTorch and onnxruntime {verdict}: prefill {errors[0]:.1e}, {length - cut} cached steps "
        f"{errors[1]:.1e}, limit {limit:.0e}"
    )
