"""What fine-tuning is told on the command line, and the run that this makes of a base model and its data.

Defaults and where they come from. Three epochs of 16 sequences, LoRA of rank 16 and alpha twice that with 2e-4: the
recipe of AstraGPT-7B's card. All weights with 2e-5: what most published recipes for 7B models use. Cosine to a tenth,
AdamW with (0.9, 0.95): InstructGPT's (arXiv:2203.02155, appendix C). No weight decay: runs are short, and it would
pull towards zero, not towards the base. DPO one epoch, a tenth of it warmup, with 5e-7, and ten times that for an
adapter: Zephyr's (arXiv:2310.16944). Blocks are recomputed in the backward pass: memory is what fine-tuning lacks.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from experiments.cli import parse
from jaxlm.adapter_config import PROJECTIONS, AdapterConfig
from jaxlm.config import (
    ConfigError,
    DataConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    require,
)
from jaxlm.tune_config import ChatConfig, DpoConfig, Quant, TuneConfig, TuneRun

LONGEST = 2048  # tokens of a sequence where nothing else is said
FLOOR = 0.1  # of the learning rate, at the end of its decay
ONE_DEVICE = MeshConfig()
Files = tuple[str, ...]
Options = TypeVar("Options", bound="TuneOptions")


@dataclass(frozen=True)
class TuneOptim(OptimConfig):
    """Optimizer and schedule of fine-tuning. Numbers below are checked when what they stand for is known."""

    lr: float = 0.0  # peak learning rate; 0 = by method: sft 2e-5, LoRA 2e-4; dpo 5e-7, LoRA 5e-6
    min_lr: float = -1.0  # learning rate at the end of the decay; -1 = a tenth of lr
    warmup_steps: int = -1  # linear warmup; -1 = --warmup-ratio of the steps
    weight_decay: float = 0.0  # decoupled, times the learning rate

    def __post_init__(self) -> None:
        pass  # `resolved` makes an OptimConfig, which checks


@dataclass(frozen=True)
class TuneTrain(TrainConfig):
    """The loop of fine-tuning."""

    steps: int = 0  # optimizer steps; 0 = those of --epochs
    batch_size: int = 16  # sequences (of dpo: pairs) per optimizer step, over all devices
    seq_len: int = 0  # T, tokens per sequence; 0 = the model's context, at most 2,048
    remat: Literal["none", "dots", "block"] = "block"  # recompute: all but matmuls; whole blocks

    def __post_init__(self) -> None:
        pass  # `resolved` makes a TrainConfig, which checks


@dataclass(frozen=True)
class LoraOptions:
    """A low-rank adapter on a frozen base."""

    rank: int = 0  # R; 0 = no adapter: all weights are trained
    alpha: float = 0.0  # numerator of the scale; 0 = twice the rank
    dropout: float = 0.0  # of the adapter's input, while training
    targets: tuple[str, ...] = PROJECTIONS  # regular expressions over whole paths of weights
    rslora: bool = False  # scale = alpha / sqrt(R) instead of alpha / R

    def adapter(self) -> AdapterConfig | None:
        """What the run keeps of it. Raises ConfigError where there is no rank but something else."""
        if self.rank == 0:
            changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
            if changed:
                raise ConfigError(f"--lora.{changed[0]} needs an adapter: set --lora.rank, for example 16")
            return None
        return AdapterConfig(
            self.rank, self.alpha or 2.0 * self.rank, self.dropout, self.rslora, self.targets
        )


@dataclass(frozen=True)
class TuneOptions:
    """Options of every kind of fine-tuning."""

    method: ClassVar[Literal["sft", "dpo"]]
    rates: ClassVar[tuple[float, float]]  # learning rate of all weights, and of an adapter

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]  # model to start from
    checkpoint: Literal["latest", "best"] = "latest"  # of a TARGET that is a run
    adapter: str = ""  # an adapter (ours or peft's) that is merged into TARGET before anything is trained
    data: Files = ()  # files, folders, globs of jsonl or parquet, or hf:NAME
    val: Files = ()  # likewise, to validate on; left out = --val-fraction of the data
    val_fraction: float = 0.05  # share of the conversations held out where there is no --val
    epochs: float = 3.0  # passes over the data
    warmup_ratio: float = 0.03  # share of the steps with a growing learning rate
    lora: LoraOptions = field(default_factory=LoraOptions)  # a low-rank adapter on a frozen base
    quant: Quant = "none"  # of the frozen base under an adapter (QLoRA: nf4); none = --train.dtype
    chat: Annotated[ChatConfig, tyro.conf.FlagConversionOff] = field(
        default_factory=ChatConfig
    )  # conversations
    optim: Annotated[TuneOptim, tyro.conf.FlagConversionOff] = field(default_factory=TuneOptim)  # optimizer
    train: Annotated[TuneTrain, tyro.conf.FlagConversionOff] = field(default_factory=TuneTrain)  # the loop
    mesh: MeshConfig = ONE_DEVICE  # devices per axis, for example data=4
    log: Annotated[LogConfig, tyro.conf.FlagConversionOff] = field(
        default_factory=LogConfig
    )  # where metrics go
    samples: int = 3  # held-out prompts that are answered at every validation; 0 = none
    sample_tokens: int = 64  # tokens of such an answer at most
    run_dir: str = ""  # where everything is written; '' = runs/TARGET-METHOD
    resume: bool = False  # continue from the newest checkpoint of the run directory, or start fresh
    profile: bool = False  # write a profiler's trace of steps 10 to 13 to profile/ of the run directory

    @property
    def path(self) -> Path:
        """The run directory."""
        target = Path(self.target)
        name = target.stem if target.is_file() else target.resolve().name
        return Path(self.run_dir or f"runs/{name}-{self.method}")

    @property
    def preferences(self) -> DpoConfig:
        """Of dpo; for others the defaults, which nothing reads."""
        return DpoConfig()


@dataclass(frozen=True)
class SftOptions(TuneOptions):
    """Options of supervised fine-tuning."""

    method: ClassVar[Literal["sft", "dpo"]] = "sft"
    rates: ClassVar[tuple[float, float]] = (2e-5, 2e-4)


@dataclass(frozen=True)
class DpoOptions(TuneOptions):
    """Options of direct preference optimisation."""

    method: ClassVar[Literal["sft", "dpo"]] = "dpo"
    rates: ClassVar[tuple[float, float]] = (5e-7, 5e-6)

    epochs: float = 1.0  # passes over the data
    warmup_ratio: float = 0.1  # share of the steps with a growing learning rate
    dpo: DpoConfig = field(default_factory=DpoConfig)  # loss and reference

    @property
    def preferences(self) -> DpoConfig:
        """What the run keeps of --dpo."""
        return self.dpo


def parse_options(kind: type[Options], argv: list[str], prog: str, description: str) -> Options:
    """`TARGET --data FILE … --lora.rank 16` -> options. Raises ConfigError."""
    return parse(kind, argv, prog, description)


def check(options: TuneOptions) -> None:
    """Raises ConfigError on what cannot work whatever the model and the data are."""
    require(bool(options.data), "name what to learn from: --data FILE …")
    require(0 < options.val_fraction < 1, f"--val-fraction {options.val_fraction} must be between 0 and 1")
    require(options.train.steps >= 0, f"--train.steps {options.train.steps} must be positive")
    require(
        math.isfinite(options.epochs) and options.epochs > 0, f"--epochs {options.epochs} must be positive"
    )
    require(0 <= options.warmup_ratio <= 1, f"--warmup-ratio {options.warmup_ratio} must be between 0 and 1")
    require(options.train.batch_size > 0, f"--train.batch-size {options.train.batch_size} must be positive")
    for name in ("samples", "sample_tokens"):
        value = getattr(options, name)
        require(value >= 0, f"--{name.replace('_', '-')} {value} must not be negative")
    options.lora.adapter()


def seq_len(options: TuneOptions, model: ModelConfig) -> int:
    """T of the run. Raises ConfigError where it exceeds the context."""
    length = options.train.seq_len or min(model.context, LONGEST)
    require(
        0 < length <= model.context,
        f"--train.seq-len {length} must be positive and within the model's context of {model.context}",
    )
    return length


def run_of(
    options: TuneOptions,
    model: ModelConfig,
    steps_of: Callable[[float], int],
    stored: RunConfig | None = None,
) -> TuneRun:
    """The whole run.

    Args:
        options: what was said.
        model: of the base.
        steps_of: epochs -> optimizer steps.
        stored: the run that is continued; its warmup stays, however many steps there are now.

    Raises:
        ConfigError: some value cannot work, or does not fit another.
    """
    steps = options.train.steps or steps_of(options.epochs)
    train = _as(TrainConfig, options.train, steps=steps, seq_len=seq_len(options, model))
    adapter = options.lora.adapter()
    lr = options.optim.lr or options.rates[adapter is not None]
    warmup = options.optim.warmup_steps
    if warmup == -1:
        warmup = stored.optim.warmup_steps if stored else math.ceil(options.warmup_ratio * steps)
    floor = FLOOR * lr if options.optim.min_lr == -1 else options.optim.min_lr
    optim = _as(OptimConfig, options.optim, lr=lr, min_lr=floor, warmup_steps=warmup)
    tune = TuneConfig(
        options.method,
        options.target,
        options.checkpoint,
        options.data,
        options.val,
        0.0 if options.train.steps else options.epochs,
        options.chat,
        adapter,
        options.quant,
        options.preferences,
    )
    data = DataConfig(val_fraction=options.val_fraction)
    return TuneRun(model, data, optim, train, options.mesh, options.log, tune=tune)


C = TypeVar("C")


def _as(kind: type[C], given: Any, **values: Any) -> C:
    """The same fields as a configuration that is checked."""
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**({name: getattr(given, name) for name in names} | values))
