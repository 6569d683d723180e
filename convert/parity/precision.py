"""What precision means in a comparison: pinned on both sides before anything is computed, written in every report."""

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import jax
import torch

UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}  # half a unit in the last place of 1
# XLA may keep float32 between two operations that the program rounds to bfloat16; PyTorch never does.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}


@contextlib.contextmanager
def pinned(dtype: str) -> Iterator[None]:
    """Highest products, no TF32, no reduced accumulation, float64 in jax where the comparison wants it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32)
    half = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        matmul.allow_bf16_reduced_precision_reduction = False
        matmul.allow_fp16_reduced_precision_reduction = False
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = half


def ledger(dtype: str) -> dict[str, Any]:
    """Dtypes, switches, versions and devices of both sides, as they are inside `pinned(dtype)`."""
    wide = "float64" if dtype == "float64" else "float32"
    shared = {
        "computation": dtype,
        "master_weights": wide,
        "norm": f"mean and root in {wide}, product in {dtype}",
        "softmax": wide,
        "scores": wide,
        "rope": f"one float64 table for both, rotation in {wide}",
        "router": wide,
        "loss": f"logits in {dtype}, logsumexp in {wide}",
        "gradient_norm": wide,
        "adamw_scalars": "float64 on the host",
        "oracle": "float64 on both sides" if dtype == "float64" else "float64 on the same rounded weights",
    }
    device = jax.devices()[0]
    jax_side = {
        "version": jax.__version__,
        "device": device.device_kind,
        "backend": device.platform,
        "x64": bool(jax.config.jax_enable_x64),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
        "excess_precision": False,
        "accumulation": f"{wide} (preferred_element_type of scores; XLA's own elsewhere)",
    }
    torch_side = {
        "version": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32),
        "bf16_reduced_precision_reduction": bool(
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "flush_denormal": False,
        "accumulation": wide,
    }
    machine = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    return shared | {"jax": jax_side, "torch": torch_side} | machine
