"""Says what a training run or decoding needs before anyone rents a GPU: memory, time, tokens, disk, collectives.

    python -m experiments.plan astragpt-7b --device h200 --mesh fsdp=8 --batch 16 --seq 2048 --train.accumulation 1
    python -m experiments.plan astragpt-7b --lora.rank 16 --quant nf4 --mesh data=2 --device l4 --train.remat block
    python -m experiments.plan gptoss --mesh fsdp=2,expert=4 --batch 64 --tokens 10e9 --mfu 0.35
    python -m experiments.plan astragpt-7b --decode --quant nf4 --slots 2048    (--decode --help lists its options)

By arithmetic at first. Where jax's CUDA compiler plugin is installed (jax-cuda13-plugin and jax-cuda13-pjrt of jax's
version, with --no-deps; no GPU is needed), the real step is compiled for the device, and the compiler's own figures
stand beside. --batch and --seq are short for --train.batch-size and --train.seq-len.
"""

import importlib.metadata
import math
import os
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from experiments.tuning_options import LoraOptions
from jaxlm.cli import main_guard, parse
from jaxlm.config import ConfigError, ModelConfig, RunConfig, require
from jaxlm.count import active_param_count, param_count
from jaxlm.estimate import USABLE, Budget, Device, Memory, budget, device, expected_collectives, memory
from jaxlm.estimate_lora import factor_count, tuned_budget, tuned_memory
from jaxlm.presets import PRESETS, preset
from jaxlm.tune_config import Quant, TuneConfig, TuneRun

SHORT = {"--batch": "--train.batch-size", "--seq": "--train.seq-len"}
COMPILED_FOR = ("h200", "h100", "a100-80", "a100-40", "rtx4090", "l4")


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan for training."""

    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # the run
    device: str = "h200"  # h200, h100, h100-pcie, b200, a100-80, a100-40, l40s, l4, rtx4090
    mfu: float = 0.4  # model FLOP utilisation that times are reckoned with
    tokens: float = 0.0  # tokens of the run; 0 = train.steps batches
    compile: Literal["auto", "yes", "no"] = "auto"  # compile the step; auto = where the plugin is there
    lora: LoraOptions = field(default_factory=LoraOptions)  # train an adapter of a frozen base alone
    quant: Quant = "none"  # of the frozen base; none = train.dtype

    @property
    def planned(self) -> TuneRun:
        """The run as one that fine-tunes packed conversations, where there is an adapter. Raises ConfigError."""
        tune = TuneConfig("sft", "the preset", adapter=self.lora.adapter(), quant=self.quant)
        return TuneRun.of(self.run, tune)


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
    name, options = _options(argv)
    tunes = options.lora != LoraOptions() or options.quant != "none"
    run, on = options.planned if tunes else options.run, device(options.device)
    require(math.isfinite(options.tokens), f"tokens={options.tokens} must be a finite number")
    tokens = int(options.tokens) or run.train.steps * run.train.batch_size * run.train.seq_len
    fits = _tell(name, run, options, on, tokens)
    wanted = options.compile == "yes" or (options.compile == "auto" and _has_compiler(options.device))
    return 0 if (_tell_compiled(run, options.device, on) if wanted else fits) else 1


def _options(argv: list[str]) -> tuple[str, PlanOptions]:
    """The preset's name and what the command line makes of it. Raises ConfigError."""
    names, prog = ", ".join(PRESETS), "python -m experiments.plan"
    words = [_long(word) for word in argv]
    wants_help = bool({"-h", "--help"} & set(words))
    if words and not words[0].startswith("-"):
        name, words = words[0], words[1:]
    elif wants_help:
        name = "quickstart"
    else:
        raise ConfigError(f"name a preset first: {prog} PRESET …; presets are {names}")
    about = f"{__doc__}\n\nPRESET is one of {names}.\nDefaults shown below are those of {name}."
    return name, parse(PlanOptions, words, f"{prog} PRESET", about, PlanOptions(preset(name)))


def _long(word: str) -> str:
    key, equals, value = word.partition("=")
    return SHORT.get(key, key) + equals + value


def _has_compiler(name: str) -> bool:
    """Whether the step can be compiled for the device here; jax is not imported for the answer."""
    try:
        found = [importlib.metadata.version(each) for each in ("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax")]
    except importlib.metadata.PackageNotFoundError:
        return False
    return len(set(found)) == 1 and name in COMPILED_FOR


def _tell(name: str, run: RunConfig, options: PlanOptions, on: Device, tokens: int) -> bool:
    """Prints what arithmetic says; whether the step fits."""
    one, cost, train = _memory(run), _budget(run, on, options.mfu, tokens), run.train
    fits = one.peak <= USABLE * on.memory
    print(
        f"{name} on {run.mesh.size} x {options.device} (mesh {run.mesh}), {cost.tokens_per_step:,} tokens per step "
        f"in {train.accumulation} micro-batches, {train.dtype}, remat {train.remat}"
    )
    print(f"  parameters   {param_count(run.model):,}, {active_param_count(run.model):,} active")
    each = cost.flops_per_token / 1e9
    if isinstance(run, TuneRun) and run.tune.adapter is not None:
        base = run.train.dtype if run.tune.quant == "none" else run.tune.quant
        print(
            f"  trained      {factor_count(run.model, run.tune.adapter):,} of an adapter; the base is {base}"
        )
        parts = "forward and backward"
    else:
        parts = f"forward {each / 3:.3f}, backward {2 * each / 3:.3f}"
    print(f"  compute      {each:.3f} GFLOP per token: {parts} (causal)")
    print(
        f"  memory       {_gb(one.peak)} of {on.memory / 1e9:.0f} GB per device: "
        + ("fits" if fits else f"does NOT fit ({USABLE:.0%} is usable)")
    )
    for label, size in (
        ("weights", one.weights),
        ("moments", one.moments),
        ("gradients", one.gradients),
        (f"{train.dtype} copy", one.copies),
        ("activations", one.activations),
        ("logits", one.logits),
    ):
        print(f"    {label:<18}{_gb(size)}")
    print(
        f"    at the last block's gradient {_gb(one.backward)}, at the update {_gb(one.update)}, besides the state"
    )
    if cost.tokens_per_second is None or cost.hours is None:
        print(f"  time         not known in {train.dtype}: the peak of {options.device} is that of bfloat16")
    else:
        print(
            f"  time         {cost.tokens_per_second:,.0f} tokens/s at {options.mfu:.0%} MFU, "
            f"{cost.hours:,.1f} hours for {tokens:,} tokens"
        )
    if not isinstance(run, TuneRun):
        sparse, billions = " active" if run.model.moe.n_experts else "", cost.optimal_tokens / 1e9
        print(f"  optimum      {billions:,.1f} G tokens: 20 per{sparse} parameter (arXiv:2203.15556)")
    print(
        f"  disk         {_gb(cost.disk)}: {train.keep} newest checkpoints and the best, {_gb(cost.checkpoint)} each; "
        "one more while it is written"
    )
    expected = expected_collectives(run)
    print("  collectives  " + ("none" if not expected else ""))
    for kind, reason in expected.items():
        print(f"    {kind:<20}{reason}")
    return fits


def _tell_compiled(run: RunConfig, name: str, on: Device) -> bool:
    """Prints what the compiler says of the step; whether it fits."""
    _platforms()
    from jaxlm.plan import compile_step

    found = compile_step(run, name)
    fits = found.peak_bytes <= USABLE * on.memory
    expected = expected_collectives(run)
    unexpected = [kind for kind, n in found.collectives.items() if n and kind not in expected]
    print(
        f"  compiled     {_gb(found.peak_bytes)} per device: "
        + ("fits" if fits else "does NOT fit")
        + f"; the estimate is off by {_memory(run).peak / found.peak_bytes - 1:+.1%}"
    )
    print(f"    state             {_gb(found.state_bytes)}, {_gb(found.argument_bytes)} with the batch")
    print(f"    temporary         {_gb(found.temporary_bytes)}")
    print(
        "    collectives       "
        + (", ".join(f"{k} {n}" for k, n in found.collectives.items() if n) or "none")
    )
    if unexpected:
        print(f"    not expected      {', '.join(unexpected)}")
    return fits


def _memory(run: RunConfig) -> Memory:
    return tuned_memory(run) if isinstance(run, TuneRun) else memory(run)


def _budget(run: RunConfig, on: Device, mfu: float, tokens: int) -> Budget:
    return tuned_budget(run, on, mfu, tokens) if isinstance(run, TuneRun) else budget(run, on, mfu, tokens)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


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
    # A program of a GPU that is not there cannot be read back.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    assert "jax" not in sys.modules, "jax was imported before its platforms were set"


if __name__ == "__main__":
    main_guard(main)
