"""The suite: opens a pair, climbs the rungs in order, and reports where two models part, if they do.

    report = compare_decoders(run, params)                 # jaxlm against the twin built from its own weights
    report = compare_decoders(run, params, module=other)   # against a torch decoder from elsewhere
    report.passed, report.divergence

A rung that raises has failed: the error is its finding. Nothing here knows what a fault might be.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from convert.parity import lowprec, rungs, serving, steps, tuning
from convert.parity.ask import Guard, ask
from convert.parity.compare import Finding
from convert.parity.inputs import (
    POSITIONS,
    blind_spots,
    hard_batch,
    hard_length,
    random_params,
    without_dropout,
)
from convert.parity.precision import ledger, pinned
from convert.parity.results import ORDER, Report, Rung
from convert.parity.rungs import Pair
from convert.parity.sides import JaxSide, Programs, TorchSide
from jaxlm.config import InputError, ModelConfig, RunConfig, TrainConfig
from jaxlm.model import abstract_model
from torchref.model import Decoder as TorchDecoder

Progress = Callable[[str], None]
ONCE = (
    "config",
    "conversion",
    "init",
    "rope",
    "ties",
    "accumulation",
    "clip",
    "schedule",
)  # weights do not matter
OPTIMIZER = ("update", "updates", "trajectory", "handover")
DECODING = {"decoding": serving.decoding, "greedy": serving.greedy, "sampling": serving.sampling}


@dataclass(frozen=True)
class Options:
    """How a comparison is made."""

    dtype: str = "float64"
    rungs: tuple[str, ...] = ()  # those to climb; () = all
    steps: int = 50  # of the trajectory
    seed: int = 0
    length: int = 0  # positions of the hard batch; 0 = 515, or what the context allows
    step_length: int = 0  # positions of a trajectory's batches; 0 = as the hard batch
    first_failure: bool = False  # stop at the first rung that fails
    limits: Literal["fixed", "adaptive"] = "fixed"  # adaptive: for random models, see ask
    inits: tuple[str, ...] = ("normal", "fan_in")  # of weights that are drawn

    def __post_init__(self) -> None:
        for name in self.rungs:
            if name not in ORDER:
                raise InputError(f"unknown rung {name!r}; rungs are {', '.join(ORDER)}")
        if self.dtype not in ("float64", "float32", "bfloat16"):
            raise InputError(f"dtype={self.dtype!r} must be float64, float32 or bfloat16")
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be at least 1")

    def wants(self, name: str) -> bool:
        """Whether a rung is to be climbed."""
        return not self.rungs or name in self.rungs


def compare_decoders(
    run: RunConfig,
    params: Mapping[str, Any] | None = None,
    module: TorchDecoder | None = None,
    options: Options = Options(),
    target: str = "jaxlm",
    against: str = "its twin",
    progress: Progress = lambda text: None,
) -> Report:
    """Climbs all rungs. `params`: jaxlm's weights; None draws them at both initialisations, as a preset has none.

    module: the torch decoder to compare with, in its own configuration; None builds the twin of the weights.
    Raises InputError where the options make no sense; a comparison that fails is a report that has not passed.
    """
    started = time.perf_counter()
    with pinned(options.dtype):
        report = Report(target, against, options.dtype, ledger(options.dtype))
        run = hardened(run, options)
        report.blind_spots = blind_spots(run.model)
        report.inputs = _describe(run, options)
        for rung in _climb(run, params, module, options, report, progress):
            report.rungs.append(rung)
            if options.first_failure and not rung.passed:
                break
    report.rungs.sort(key=lambda rung: ORDER.index(rung.name))
    report.seconds = time.perf_counter() - started
    return report


def decoder_run(model: ModelConfig) -> RunConfig:
    """A run around a bare decoder, with the settings that every run starts from."""
    return RunConfig(model=model, train=TrainConfig(seq_len=min(TrainConfig().seq_len, model.context)))


def hardened(run: RunConfig, options: Options) -> RunConfig:
    """The run in the precision of the comparison, without dropout and mesh, with every term of the loss switched on."""
    model = without_dropout(run.model)
    if model.moe.n_experts:
        moe = dataclasses.replace(model.moe, router_z_coef=model.moe.router_z_coef or 1e-3)
        model = dataclasses.replace(model, moe=moe)
    kept = "float64" if options.dtype == "float64" else "float32"
    length = options.step_length or batch_length(model, options)
    train = dataclasses.replace(
        run.train, dtype=options.dtype, param_dtype=kept, accumulation=1, batch_size=2, seq_len=length
    )
    optim = dataclasses.replace(
        run.optim,
        z_loss_coef=run.optim.z_loss_coef or 1e-4,
        decay_steps=run.optim.decay_steps or max(run.train.steps, run.optim.warmup_steps),
    )
    return RunConfig(model=model, optim=optim, train=train)


def batch_length(model: ModelConfig, options: Options) -> int:
    """Positions of a hard batch, never past the context."""
    return hard_length(model.context, options.length or POSITIONS)


def _describe(run: RunConfig, options: Options) -> dict[str, Any]:
    length = batch_length(run.model, options)
    return {
        "batch": f"4 x {length}: full, left-padded, packed from three documents, right-padded; ragged loss mask",
        "trajectory_batch": f"{run.train.batch_size} x {run.train.seq_len}, four batches in turn: rows full, "
        "left-padded, packed, right-padded",
        "seed": options.seed,
        "steps": options.steps,
        "router_z_coef": run.model.moe.router_z_coef if run.model.moe.n_experts else None,
        "z_loss_coef": run.optim.z_loss_coef,
    }


def _climb(
    run: RunConfig,
    params: Mapping[str, Any] | None,
    module: TorchDecoder | None,
    options: Options,
    report: Report,
    progress: Progress,
) -> Iterator[Rung]:
    """The rungs one after the other; each case of weights has its own forward and backward pass."""
    pairs = []
    programs = Programs()
    batch = hard_batch(4, batch_length(run.model, options), run.model.vocab_size, seed=options.seed)
    for case, weights in cases(run, params, options.seed, options.inits).items():
        made = Guard("tree", case)
        with made:
            ours = JaxSide(run, weights, programs)
            theirs = TorchSide.twin(run, ours.weights())
            if module is not None:
                theirs = TorchSide(dataclasses.replace(run, model=_other_model(run, module)), module)
            pairs.append(Pair(ours, theirs, batch, case, options.seed, options.steps))
        if made.findings:
            yield made.rung()
    if not pairs:
        return
    report.zero_gradients = sorted(pairs[0].zero)
    if options.dtype != "float64":
        yield from lowprec.climb(pairs, options, report, progress)
        return
    for name, question in rungs.RUNGS.items():
        if not options.wants(name) or (name == "ties" and not run.model.moe.n_experts):
            continue
        for pair in pairs[:1] if name in ONCE else pairs:
            progress(f"{name} [{pair.case}]")
            yield ask(name, pair.case if name not in ONCE else "", question, pair, options.limits)
    yield from _optimizer(pairs[0], options, report, progress)
    for name, question in DECODING.items():
        if options.wants(name):
            progress(name)
            yield ask(name, pairs[-1].case, question, pairs[-1], options.limits)
    if options.wants("mesh"):
        progress("mesh")
        yield ask("mesh", pairs[0].case, serving.mesh, pairs[0], options.limits)
    for name, question in tuning.RUNGS.items():
        if options.wants(name):
            progress(name)
            yield ask(name, pairs[-1].case, question, pairs[-1], options.limits)


def cases(
    run: RunConfig, params: Mapping[str, Any] | None, seed: int, inits: tuple[str, ...]
) -> dict[str, Mapping[str, Any]]:
    """The weights that are compared: the given ones, or a draw at each initialisation."""
    if params is not None:
        return {"given": params}
    shapes = {path: tuple(s.shape) for path, s in abstract_model(run.model).shapes.items()}
    dtype = run.train.param_dtype
    drawn = {}
    for init in inits:
        wide = random_params(run.model, shapes, seed, init)
        drawn[init] = {path: value.astype(dtype) for path, value in wide.items()}
    return drawn


def _other_model(run: RunConfig, module: TorchDecoder) -> Any:
    """The other side's own configuration, with the terms of the loss switched on as in ours."""
    model = without_dropout(module.config)
    if model.moe.n_experts:
        coef = model.moe.router_z_coef or run.model.moe.router_z_coef
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, router_z_coef=coef))
    return model


def _optimizer(pair: Pair, options: Options, report: Report, progress: Progress) -> Iterator[Rung]:
    """One trajectory serves the rungs `update`, `updates` and `trajectory`; `handover` continues its first steps."""
    wanted = [name for name in OPTIMIZER if options.wants(name)]
    if not wanted:
        return
    total = (
        options.steps
        if "trajectory" in wanted
        else 1
        if wanted == ["update"]
        else min(steps.K, options.steps)
    )
    guard = Guard(wanted[0], pair.case)
    with guard:
        made = steps.courses(pair, total, progress)
        report.curves |= {
            f"loss_{name}": [step.metrics["loss"] for step in way.steps]
            for name, way in (("jax", made.jax), ("torch", made.torch))
        }
    if guard.findings:
        yield guard.rung()
        return
    questions: dict[str, Callable[[Pair], list[Finding]]] = {
        "update": lambda pair: steps.updates(pair, total, 1),
        "updates": lambda pair: steps.updates(pair, total, min(steps.K, total)),
        "trajectory": lambda pair: steps.trajectory(pair, total),
        "handover": lambda pair: steps.handover(pair, total),
    }
    for name in wanted:
        progress(name)
        yield ask(name, pair.case, questions[name], pair, options.limits)
