"""A model that learns to reckon, to say how, and to be brief about it: pretraining, LoRA SFT, DPO, in one command.

    python -m experiments.reasoning                   # about five minutes on two CPU cores; nothing is downloaded
    python -m experiments.reasoning --resume          # goes on where it was stopped
    python -m experiments.reasoning --seed 1 --run-dir runs/reasoning-1

A base model reads worked sums, plain text. An adapter then learns to answer questions with thoughts, and another one,
on the model with the first merged, to prefer short right replies, both of a pair written by the model itself. 700
unordered pairs of two-digit numbers occur in no stage. After each stage the model is asked for all of them, and for
three-digit sums that occur nowhere either; reasoning.json, plots/reasoning.png, samples.txt and replies/ tell.

base/, sft/ and dpo/ are run directories like any other and data/ holds what they learn from; their config.json say with
what settings experiments.pretrain, experiments.sft and experiments.dpo do the same again.
"""

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from convert.targets import open_target
from experiments.cli import RunOptions, main_guard, parse, say
from experiments.loading import load_model
from experiments.pretrain import pretrain
from experiments.reasoning_data import DataFolder, Sizes
from experiments.reasoning_exam import Model, examine, examine_base, preferences
from experiments.reasoning_report import Report, verdict
from experiments.tuning import tune
from experiments.tuning_options import DpoOptions, LoraOptions, SftOptions, TuneOptim, TuneTrain
from jaxlm.adapter_config import PROJECTIONS
from jaxlm.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, require, to_dict
from jaxlm.disk import replace_text
from jaxlm.json_file import read_object
from jaxlm.run_dir import RunDirError
from jaxlm.tune_config import DpoConfig

STAGES = ("base", "sft", "dpo")
LENGTH = 128  # tokens of a training sequence, and of a question at most
WORDS = 320  # ids that bytes, special tokens and the words of the texts take
HEAD = r"lm_head\.weight"  # adapted too: the base has never had to write what opens and ends a thought
MODEL = ModelConfig(
    vocab_size=336,
    d_model=128,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    d_ff=384,
    context=256,
    rope_theta=10_000.0,
    norm_eps=1e-5,
)


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each stage."""

    base: int = 1400  # of 2,048 tokens
    sft: int = 500  # of 2,048 tokens, some of them padding
    dpo: int = 50  # of 16 pairs

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value > 0, f"steps.{name}={value} must be positive")


@dataclass(frozen=True)
class ReasoningOptions:
    """Options of the whole way."""

    run_dir: str = "runs/reasoning"  # where everything is written
    resume: bool = False  # go on with what is there; stages that were examined are not done again
    seed: int = 0  # of everything: what is held out, texts, weights, replies
    sizes: Sizes = field(default_factory=Sizes)  # how much of everything
    steps: Steps = field(default_factory=Steps)  # how long each stage trains
    model: Annotated[ModelConfig, tyro.conf.FlagConversionOff] = MODEL  # the decoder

    @property
    def path(self) -> Path:
        """The directory of the whole."""
        return Path(self.run_dir)


def main(argv: list[str]) -> int:
    """Entry point; exit code 1 where the stages do not come to what they should."""
    options = parse(ReasoningOptions, argv, "python -m experiments.reasoning", __doc__ or "")
    report = reasoning(options)
    if report is None:
        return 0
    lines, reached = verdict(report)
    print("\n" + "\n".join(lines))
    print(
        f"\neverything is in {options.path}: reasoning.json, plots/, samples.txt, replies/, data/, base/, sft/, dpo/"
    )
    return 0 if reached else 1


def reasoning(options: ReasoningOptions) -> Report | None:
    """All stages that are not done yet; None where one was interrupted. Raises InputError."""
    check(options)
    data = DataFolder(options.path / "data", options.sizes, options.seed)
    report = begin(options)
    data.make(options.model.vocab_size)
    for stage, learn in zip(STAGES, (learn_base, learn_sft, learn_dpo)):
        if report.has(stage):
            say(f"{stage} is done already")
            continue
        say(f"--- {stage}")
        data.check()
        started = time.perf_counter()
        if not learn(options, data):
            return None
        trained = time.perf_counter()
        marks, replies = take_exam(options, data, stage)
        seconds = {"train_seconds": trained - started, "exam_seconds": time.perf_counter() - trained}
        facts = {"seed": options.seed, "texts_without_held_out_sums": data.check()}
        report.add(stage, marks | seconds, facts, replies)
    report.draw()
    return report


def check(options: ReasoningOptions) -> None:
    """Raises ConfigError on a decoder that these texts do not fit, before anything is written."""
    model, longest = options.model, options.sizes.reply_tokens
    require(options.seed >= 0, f"--seed {options.seed} must not be negative")
    require(model.vocab_size >= WORDS, f"--model.vocab-size {model.vocab_size} must be at least {WORDS}")
    require(
        model.context >= LENGTH + longest,
        f"--model.context {model.context} must be at least {LENGTH + longest}: {longest} are of a reply",
    )


def begin(options: ReasoningOptions) -> Report:
    """The report of a new directory, or of one that goes on with the same options. Raises InputError."""
    path, told = options.path, to_dict(options)
    told = {name: value for name, value in told.items() if name not in ("run_dir", "resume")}
    kept = path / "options.json"
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if not options.resume:
                raise RunDirError(
                    f"{path} is there already; continue it with --resume or choose another --run-dir"
                )
            if not kept.is_file():
                raise RunDirError(
                    f"{path} cannot be resumed: {kept.name} is missing; choose another --run-dir"
                )
            if (stored := read_object(kept)) != told:
                changed = next(name for name in told if stored.get(name) != told[name])
                raise RunDirError(f"{path} was begun with another --{changed}; choose another --run-dir")
        path.mkdir(parents=True, exist_ok=True)
        replace_text(kept, json.dumps(told, indent=1) + "\n")
    except ValueError as error:
        if isinstance(error, RunDirError):
            raise
        raise RunDirError(f"{kept} is damaged: {error}; choose another --run-dir") from None
    except OSError as error:
        raise RunDirError(f"{path} cannot be used: {error.strerror}; choose another --run-dir") from None
    return Report(path)


def learn_base(options: ReasoningOptions, data: DataFolder) -> bool:
    """Pretraining on worked sums, every document by itself; whether it went to its end."""
    texts = DataConfig(
        str(data.documents), tokenizer=str(data.tokenizer_file), val_fraction=0.02, packing=True
    )
    optim = OptimConfig("muon", lr=4e-3, min_lr=2e-4, warmup_steps=min(30, options.steps.base))
    train = TrainConfig(options.steps.base, 16, LENGTH, seed=options.seed, eval_batches=8, plots=False)
    directory = options.path / "base"
    run = RunConfig(options.model, texts, optim, train)
    done = pretrain(RunOptions(run, str(directory), resume=directory.exists(), preset="reasoning"))
    return not done.result.stopped_by


def learn_sft(options: ReasoningOptions, data: DataFolder) -> bool:
    """An adapter learns to answer with a thought; whether it went to its end."""
    directory = options.path / "sft"
    done = tune(
        SftOptions(
            str(options.path / "base"),
            data=(str(data.conversations),),
            val_fraction=0.05,
            lora=LoraOptions(16, targets=(*PROJECTIONS, HEAD)),
            optim=TuneOptim(lr=2e-3),
            train=loop(options, options.steps.sft),
            run_dir=str(directory),
            resume=directory.exists(),
        )
    )
    return not done.result.stopped_by


def learn_dpo(options: ReasoningOptions, data: DataFolder) -> bool:
    """The model's own replies in pairs, and an adapter that learns what to prefer; whether it went to its end."""
    if not data.preferences.is_file():
        say(f"{options.sizes.asked:,} questions, {options.sizes.samples} replies to each")
        pairs = preferences(
            open_model(options, data, "sft"), data.asked(), options.sizes.samples, options.seed
        )
        data.keep_preferences(pairs)
        data.check()
    directory = options.path / "dpo"
    done = tune(
        DpoOptions(
            str(options.path / "sft"),
            checkpoint="best",
            data=(str(data.preferences),),
            val_fraction=0.1,
            lora=LoraOptions(16),
            optim=TuneOptim(lr=1.2e-4),
            train=loop(options, options.steps.dpo),
            dpo=DpoConfig(beta=0.5),
            run_dir=str(directory),
            resume=directory.exists(),
        )
    )
    return not done.result.stopped_by


def loop(options: ReasoningOptions, steps: int) -> TuneTrain:
    """How an adapter is trained."""
    every = max(1, steps // 4)
    return TuneTrain(
        steps, 16, LENGTH, remat="none", seed=options.seed, eval_every=every, eval_batches=8, plots=False
    )


def open_model(options: ReasoningOptions, data: DataFolder, stage: str) -> Model:
    """What came of a stage: of the base its end, of an adapter its best checkpoint, merged."""
    target = open_target(options.path / stage, "latest" if stage == "base" else "best", optimizer=False)
    return Model(load_model(target, "jax", "float32"), data.tokenizer, options.sizes.reply_tokens)


def take_exam(options: ReasoningOptions, data: DataFolder, stage: str) -> tuple[dict[str, Any], list[Any]]:
    """A stage's marks and replies."""
    model = open_model(options, data, stage)
    small, large = data.exam()
    say(f"{stage} is asked for {len(small):,} held-out sums and {len(large):,} of three digits")
    marks, replies = examine(model, small, large)
    if stage == "base":
        marks |= examine_base(model, small)
    return marks, list(zip((*small, *large), replies, strict=True))


if __name__ == "__main__":
    main_guard(main)
