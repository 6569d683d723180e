"""One framework, one dtype, one device, in a process of its own: logits, loss and gradients of one batch to a file.

    python -m convert.parity.worker jax float32 gpu CASE_DIR

CASE_DIR holds run.json (RunConfig), weights.safetensors (jaxlm names) and batch.npz; the result is
CASE_DIR/<framework>-<dtype>-<device>.npz. Separate processes keep the two frameworks from sharing a device's memory,
and x64, matmul precision and device from leaking from one comparison into the next.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(argv: list[str]) -> int:
    """Entry point."""
    framework, dtype, device, case = argv[0], argv[1], argv[2], Path(argv[3])
    if framework == "jax":
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if device == "gpu" else "cpu"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        os.environ["JAX_ENABLE_X64"] = "1" if dtype == "float64" else "0"
    run_one = {"jax": run_jax, "torch": run_torch}[framework]
    arrays: dict[str, Any] = run_one(case, dtype, device)
    np.savez(case / f"{framework}-{dtype}-{device}.npz", **arrays)
    return 0


def load_case(case: Path, dtype: str):
    """(run, weights by jaxlm path, batch) of a case, the run set to compute in `dtype` without dropout."""
    from safetensors.numpy import load_file

    from jaxlm.config import RunConfig, load

    run = load(RunConfig, case / "run.json")
    kept = "float64" if dtype == "float64" else "float32"
    train = dataclasses.replace(run.train, dtype=dtype, param_dtype=kept, accumulation=1)
    batch = dict(np.load(case / "batch.npz", allow_pickle=False))
    return dataclasses.replace(run, train=train), load_file(case / "weights.safetensors"), batch


def run_jax(case: Path, dtype: str, device: str) -> dict[str, np.ndarray]:
    """jaxlm's side; float32 products at highest precision."""
    import jax
    import jax.numpy as jnp

    from jaxlm.model import abstract_model, merge_model
    from jaxlm.train import cast_params, make_gradient_fn

    run, weights, batch = load_case(case, dtype)
    with jax.default_matmul_precision("highest" if dtype != "bfloat16" else "default"):
        params = {path: jnp.asarray(w, run.train.param_dtype) for path, w in weights.items()}
        graphdef = abstract_model(run.model).graphdef

        def logits(params, batch):
            model = merge_model(graphdef, cast_params(params, jnp.dtype(dtype)))
            return model(batch["inputs"], batch.get("positions"), batch.get("segments"))[0]

        out = jax.jit(logits)(params, batch)
        grads, metrics = jax.jit(make_gradient_fn(run))(params, batch)
    result = {f"grad:{path}": g for path, g in grads.items()} | {"logits": out, "loss": metrics["total_loss"]}
    return {
        name: np.asarray(value.astype(jnp.promote_types(value.dtype, jnp.float32)))
        for name, value in result.items()
    }


def run_torch(case: Path, dtype: str, device: str) -> dict[str, np.ndarray]:
    """torchref's side, gradients in jaxlm's names and layouts."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import torch

    from convert.native import build_torch, to_jax
    from convert.tree import to_numpy
    from torchref.train import cast_params, make_gradient_fn, place_batch

    run, weights, batch = load_case(case, dtype)
    torch.set_float32_matmul_precision("highest")
    place = "cuda" if device == "gpu" else "cpu"
    kept = getattr(torch, run.train.param_dtype)
    model = build_torch(run.model, weights).to(place, kept)
    placed = place_batch(batch, place)
    grads, metrics = make_gradient_fn(run)(model, placed)
    cast = cast_params(dict(model.named_parameters()), getattr(torch, dtype))
    arguments = (placed["inputs"], placed.get("positions"), placed.get("segments"))
    with torch.no_grad():
        out = torch.func.functional_call(model, cast, arguments)[0]
    wide = torch.promote_types(getattr(torch, dtype), torch.float32)
    flat = to_jax(run.model, {path: to_numpy(g) for path, g in grads.items()})
    result = {f"grad:{path}": g for path, g in flat.items()}
    return result | {"logits": to_numpy(out.to(wide)), "loss": to_numpy(metrics["total_loss"])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
