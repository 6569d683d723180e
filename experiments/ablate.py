"""Swaps parts of a run one against the other, and shows what each swap does to speed, loss and every layer.

    python -m experiments.ablate quickstart-dense --vary attention=readable,xla,dtype=float32,bfloat16 --steps 30
    python -m experiments.ablate runs/mine --vary optim.lr=1e-3,3e-3,optimizer=adamw,adam --steps 100
    python -m experiments.ablate runs/mine --vary quant=none,int8,int4,nf4 --steps 0   (its weights as they are)

--vary AXIS=VALUE,VALUE,AXIS=VALUE,…: the full product runs, all variants from the same weights on the same batches; the
first value of each axis together is the baseline. An axis with one value sets it for all. AXIS is one of

    attention   readable, xla, cudnn, auto          experts     loop, blocks, batched, pallas, auto
    dtype       float32, bfloat16, float64          quant       none, int8, int4, nf4 (of the trained weights)
    optimizer   adamw, adam (weight decay off)

or any field of the configuration, such as optim.lr or model.rope_theta. The table goes to standard output; --out gets
ablation.json, ablation.md and ablation.png.
"""

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from convert.targets import Target, open_target
from experiments.ablation_report import REPORT, describe, show, write
from experiments.cli import main_guard, parse, say
from experiments.pretrain import device_kind
from jaxlm.config import ConfigError, MeshConfig, RunConfig, TrainConfig, nearest
from jaxlm.data.loader import count_windows
from jaxlm.data.run_data import RunData, open_run_data
from jaxlm.data.shards import open_shards
from jaxlm.host_memory import keep_memory
from jaxlm.presets import PRESETS, preset
from jaxlm.run_dir import RunDir, environment
from jaxlm.tune_config import TuneRun
from jaxlm.variants import Variant, make_variants, parse_axes

if TYPE_CHECKING:
    from jaxlm.ablation import Outcome


@dataclass(frozen=True)
class AblateOptions:
    """Options of an ablation."""

    base: Annotated[str, tyro.conf.Positional]  # preset or run; with --steps 0 also a model
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # AXIS=VALUE,VALUE,AXIS=…; may stand several times
    steps: int | None = None  # of each training; left out = the configuration's; 0 = look at stored weights
    data_path: Annotated[str, tyro.conf.arg(name="data.path")] = ""  # text; '' = as configured
    checkpoint: Literal["latest", "best"] = "latest"  # of a run, with --steps 0
    max_variants: int = 16  # refuse a larger product
    out: str = ""  # directory of the results; '' = runs/ablation-BASE


class Base(NamedTuple):
    """What is varied."""

    run: RunConfig
    target: Target | None  # None for a preset


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(AblateOptions, argv, "python -m experiments.ablate", __doc__ or "")
    keep_memory()
    base = open_base(options)
    axes = parse_axes(options.vary)
    variants = make_variants(base.run, axes, options.max_variants, trains=options.steps != 0)
    out = directory_of(options)
    made = not out.exists()
    try:  # before hours have passed
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another --out") from None
    try:
        outcomes, facts = measure(options, base, variants)
    except BaseException:
        if made:
            shutil.rmtree(out, ignore_errors=True)
        raise
    report = describe(dataclasses.asdict(options), axes, variants, outcomes) | facts
    show(report)
    write(out, report)
    return 0


def open_base(options: AblateOptions) -> Base:
    """The configuration that is varied, and where it comes from. Raises InputError where it is none."""
    if options.steps is not None and options.steps < 0:
        raise ConfigError(f"--steps {options.steps} must not be negative; 0 = look at stored weights")
    name, target = options.base, None
    if name in PRESETS:
        if options.steps == 0:
            raise ConfigError(
                f"the preset {name} has no weights to look at: --steps 0 needs a run or a model"
            )
        run = preset(name)
    elif Path(name).exists():
        target = open_target(name, options.checkpoint, optimizer=False)
        if target.run is None and options.steps != 0:
            raise ConfigError(
                f"{name} is a model, which does not say how to train it: give it --steps 0, or a run"
            )
        if isinstance(target.run, TuneRun) and options.steps != 0:
            raise ConfigError(
                f"{name} is a run of fine-tuning, and ablations train on text: give it --steps 0, or a run of "
                "experiments.pretrain"
            )
        length = min(TrainConfig().seq_len, target.config.context)
        plain = RunConfig(target.config, train=TrainConfig(seq_len=length))
        run = plain if target.run is None or isinstance(target.run, TuneRun) else target.run
    else:
        raise ConfigError(
            f"{name!r} is neither a preset{nearest(name, PRESETS)} nor a path; presets are {', '.join(PRESETS)}"
        )
    if options.steps:
        if run.optim.decay_steps == run.train.steps:  # the length of the run, not a choice
            run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, decay_steps=0))
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=options.steps))
    if options.data_path:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, path=options.data_path, mixture=()))
    return Base(dataclasses.replace(run, mesh=MeshConfig()), target)


def directory_of(options: AblateOptions) -> Path:
    """Where results go. Raises ConfigError where there are some already."""
    out = Path(options.out or f"runs/ablation-{Path(options.base).resolve().name}")
    if (out / REPORT).exists():
        raise ConfigError(f"{out} holds an ablation; choose another --out")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another --out")
    return out


def measure(
    options: AblateOptions, base: Base, variants: list[Variant]
) -> tuple[list["Outcome"], dict[str, Any]]:
    """Runs everything; the outcomes, and what they were measured on."""
    import jax

    from jaxlm.ablation import check_device, run_variants, validation_batches, wide
    from jaxlm.layerwise import fingerprint, fixed_batch

    check_device(variants)
    run, weights = variants[0].run, None
    stored = base.target.contents.tensors if base.target is not None and options.steps == 0 else {}
    needs_64 = wide(variants) or any(tensor.dtype == "float64" for tensor in stored.values())
    with (
        tempfile.TemporaryDirectory(prefix="jaxlm-ablation-") as folder,
        jax.enable_x64(needs_64 or jax.config.jax_enable_x64),
    ):
        data = texts(base, run, Path(folder))
        for variant in variants if options.steps != 0 else ():
            count_windows(data.train[0], variant.run.train.seq_len)  # refuses texts that are too short
        if options.steps == 0:
            assert base.target is not None
            weights = base.target.params
        validation = validation_batches(variants, data.val[0])
        outcomes = run_variants(variants, validation, data.train[0], weights, say)
        rows, columns = fixed_batch(validation[0], run.model.vocab_size)["inputs"].shape
        facts = {
            "data": {
                "path": run.data.path,
                "tokenizer": data.tokenizer.fingerprint(),
                "train_tokens": len(data.train[0]),
                "val_tokens": len(data.val[0]),
                "validation_batches": len(validation),
                "validation_sha256": fingerprint(validation),
                "compared_tokens": [int(rows), int(columns)],
            },
            "environment": environment([device_kind("jax")], run.train.seed),
        }
    return outcomes, facts


def texts(base: Base, run: RunConfig, folder: Path) -> RunData:
    """Tokenizer and shards: a run's own where it is varied on its own texts, else made anew in a folder."""
    if run.data.mixture:
        raise ConfigError("an ablation trains on one text, not on a mixture; give --data-path")
    if base.target is None:
        return open_run_data(run, RunDir(folder), False, say)
    shards = Path(run.data.cache or base.target.path / "data")
    if base.target.run is not None and run.data == base.target.run.data and shards.is_dir():
        train, val = (open_shards(shards / split, run.model.vocab_size) for split in ("train", "val"))
        return RunData(base.target.tokenizer, (train,), (val,), (1.0,), (run.data.path,))
    base.target.tokenizer.save(RunDir(folder).tokenizer)
    return open_run_data(run, RunDir(folder), True, say)


if __name__ == "__main__":
    main_guard(main)
