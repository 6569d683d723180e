"""Says what a training step needs on H200s before anyone rents one, by compiling it for them, without a GPU.

    python -m experiments.plan gptoss --train.batch-size 16 --train.accumulation 1
    python -m experiments.plan gptoss --mesh fsdp=2,expert=2

Needs jax's CUDA compiler plugin (jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, installed with --no-deps).
"""

import os
import sys

from experiments.cli import main_guard, parse_run
from jaxlm.count import active_param_count, flops_per_token, param_count


def main(argv: list[str]) -> int:
    """Entry point; exit code 1 when the step does not fit."""
    options = parse_run(argv, "python -m experiments.plan", __doc__ or "")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"], os.environ["JAX_PLATFORMS"] = "1", "cuda,cpu"
    assert "jax" not in sys.modules, "jax was imported before its platforms were set"
    from jaxlm.plan import H200_BYTES, compile_step

    run = options.run
    print(
        f"{options.preset}: {param_count(run.model):,} parameters, {active_param_count(run.model):,} active"
    )
    print(f"{flops_per_token(run.model, run.train.seq_len) / 1e9:.3f} GFLOP per token in training")
    compiled = compile_step(run)
    tokens = run.train.batch_size * run.train.seq_len
    print(
        f"{run.mesh.size} x H200 (mesh {run.mesh}), {tokens:,} tokens per step, {run.train.accumulation} micro-batches:"
    )
    print(f"  peak      {compiled.peak_bytes / 1e9:7.1f} GB of {H200_BYTES / 1e9:.0f} per device")
    print(f"  state     {compiled.state_bytes / 1e9:7.1f} GB (weights and moments, divided evenly)")
    print(f"  temporary {compiled.temporary_bytes / 1e9:7.1f} GB")
    print("  collectives: " + (", ".join(f"{k} {n}" for k, n in compiled.collectives.items() if n) or "none"))
    return 0 if compiled.peak_bytes <= H200_BYTES else 1


if __name__ == "__main__":
    main_guard(main)
