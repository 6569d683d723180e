"""Says what a training step or decoding needs on H200s before anyone rents one, by compiling it without a GPU.

    python -m experiments.plan gptoss --train.batch-size 16 --train.accumulation 1
    python -m experiments.plan gptoss --mesh fsdp=2,expert=2
    python -m experiments.plan astragpt-7b --decode --quant nf4 --slots 2048    (--decode --help lists its options)

Needs jax's CUDA compiler plugin (jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, installed with --no-deps).
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from experiments.cli import main_guard, parse, parse_run
from jaxlm.config import ConfigError, ModelConfig
from jaxlm.count import active_param_count, flops_per_token, param_count
from jaxlm.presets import PRESETS, preset


@dataclass(frozen=True)
class DecodeOptions:
    """Options of --decode."""

    model: Annotated[ModelConfig, tyro.conf.FlagConversionOff]  # the decoder
    quant: Literal["none", "int8", "int4", "nf4"] = "none"  # how weights are held; none = bfloat16
    slots: int | None = None  # tokens that the cache of a row holds; left out = 2048, or the model's context
    batch: int = 1  # rows decoded together


def main(argv: list[str]) -> int:
    """Entry point; exit code 1 when the step does not fit."""
    if "--decode" in argv:
        return _decode([word for word in argv if word != "--decode"])
    options = parse_run(argv, "python -m experiments.plan", __doc__ or "")
    _platforms()
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


def _decode(argv: list[str]) -> int:
    """Memory of decoding on one H200; exit code 1 when it does not fit."""
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    if not name and not {"-h", "--help"} & set(argv):
        raise ConfigError(f"name a preset first: PRESET --decode; presets are {', '.join(PRESETS)}")
    default = DecodeOptions(preset(name or "quickstart").model)
    usage = "python -m experiments.plan PRESET --decode"
    options = parse(DecodeOptions, argv[1:] if name else argv, usage, __doc__ or "", default)
    _platforms()
    from jaxlm.plan import H200_BYTES, compile_decode

    quant = None if options.quant == "none" else options.quant
    slots = min(2048, options.model.context) if options.slots is None else options.slots
    compiled = compile_decode(options.model, quant, slots, options.batch)
    print(f"{name}: {param_count(options.model):,} parameters, {active_param_count(options.model):,} active")
    print(
        f"decoding on one H200: {options.batch} rows, {slots:,} slots, bfloat16"
        + ("" if quant is None else f", weights in {quant}")
    )
    print(f"  peak      {compiled.peak_bytes / 1e9:7.2f} GB of {H200_BYTES / 1e9:.0f}")
    print(f"  arguments {compiled.argument_bytes / 1e9:7.2f} GB", end=" ")
    print(f"(weights {compiled.weight_bytes / 1e9:.2f}, cache {compiled.cache_bytes / 1e9:.2f})")
    print(f"  temporary {compiled.temporary_bytes / 1e9:7.2f} GB")
    return 0 if compiled.peak_bytes <= H200_BYTES else 1


def _platforms() -> None:
    """Lets jax compile for a GPU that is not there; must run before jax is imported."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"], os.environ["JAX_PLATFORMS"] = "1", "cuda,cpu"
    assert "jax" not in sys.modules, "jax was imported before its platforms were set"


if __name__ == "__main__":
    main_guard(main)
