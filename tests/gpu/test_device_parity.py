"""On a CUDA device: jaxlm and torchref, each in its own process, against torchref in float64 on the CPU.

One-sided: jaxlm may be at most R times as far from float64 as torch is, and never further than an absolute cap.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tolerances import tolerance

pytestmark = pytest.mark.gpu

CASES = {
    "dense": {},
    "moe": {"moe": {"n_experts": 8, "n_active": 2, "d_ff": 64}},
}


def _write_case(directory: Path, changes: dict) -> None:
    from safetensors.numpy import save_file

    from jaxlm.config import ModelConfig, RunConfig, TrainConfig, from_dict, save

    model = dict(
        vocab_size=512,
        d_model=128,
        n_layers=3,
        n_heads=8,
        n_kv_heads=2,
        head_dim=32,
        d_ff=192,
        context=512,
        rope_theta=50_000.0,
        norm_eps=3e-6,
        init="fan_in",
    )
    config = from_dict(ModelConfig, model | changes)
    save(RunConfig(config, train=TrainConfig(batch_size=4, seq_len=320)), directory / "run.json")
    rng = np.random.default_rng(0)
    weights = _random_weights(config, rng)
    save_file(weights, directory / "weights.safetensors")
    ids = rng.integers(0, config.vocab_size, (4, 321), dtype=np.int32)
    mask = np.ones((4, 320), np.float32)
    np.savez(directory / "batch.npz", inputs=ids[:, :-1], targets=ids[:, 1:], loss_mask=mask)


def _random_weights(config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    import torch

    from convert.native import to_jax
    from convert.tree import from_torch
    from torchref.model import Decoder

    model = Decoder(config, rngs=torch.Generator().manual_seed(0))
    return {path: np.ascontiguousarray(w) for path, w in to_jax(config, from_torch(model)).items()}


def _run(directory: Path, framework: str, dtype: str, device: str) -> dict[str, np.ndarray]:
    command = [sys.executable, "-m", "convert.parity.worker", framework, dtype, device, str(directory)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(directory / f"{framework}-{dtype}-{device}.npz", allow_pickle=False))


def _whole(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative errors of the logits, the loss and the whole gradient of `a` against `b`."""
    names = [k for k in b if k.startswith("grad:")]
    top = np.sqrt(sum(np.sum((a[k].astype(np.float64) - b[k]) ** 2) for k in names))
    scale = np.sqrt(sum(np.sum(b[k].astype(np.float64) ** 2) for k in names))
    logits = np.linalg.norm(a["logits"].astype(np.float64) - b["logits"]) / np.linalg.norm(b["logits"])
    return {
        "logits": float(logits),
        "gradient": float(top / scale),
        "loss": float(abs(a["loss"] - b["loss"]) / b["loss"]),
    }


def check(directory: Path, case: str, dtype: str, device: str) -> None:
    """Both frameworks on `device` against the float64 oracle on the CPU."""
    _write_case(directory, CASES[case])
    oracle = _run(directory, "torch", "float64", "cpu")
    e_jax = _whole(_run(directory, "jax", dtype, device), oracle)
    e_torch = _whole(_run(directory, "torch", dtype, device), oracle)
    print(f"{case} {dtype} on {device}: jax {e_jax}, torch {e_torch}")
    # A flipped route hits one framework and not the other, so in bfloat16 only the cap holds for experts.
    ratio = np.inf if case == "moe" and dtype == "bfloat16" else tolerance(f"device_{dtype}_ratio")
    cap = tolerance(f"device_{case}_{dtype}_cap")
    for name in ("logits", "gradient"):
        assert e_jax[name] <= cap, f"{name}: jaxlm is {e_jax[name]:.1e} from float64, allowed {cap:.0e}"
        assert e_jax[name] <= ratio * e_torch[name], (
            f"{name}: jaxlm {e_jax[name]:.1e}, torch {e_torch[name]:.1e}"
        )
    assert e_jax["loss"] <= cap


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", list(CASES))
def test_device_is_as_close_to_float64_as_torch(tmp_path: Path, case: str, dtype: str) -> None:
    """On the card neither framework may be much further from float64 than the other."""
    check(tmp_path, case, dtype, "gpu")
