"""Fine-tuning from a base model and data to a run directory; what experiments.sft and experiments.dpo share.

tuned = tune(SftOptions("runs/quickstart", data=("chats.jsonl",), lora=LoraOptions(rank=16)))
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from convert.adapters import keep_base, merged, open_adapter, write_run_adapter
from convert.run_contents import require_unchanged
from convert.targets import Target, load_params, open_target
from experiments.cli import say
from experiments.handover import resume
from experiments.pretrain import (
    Ready,
    check_devices,
    compiled_note,
    device_kind,
    device_memory,
    device_peak,
)
from experiments.tuning_answers import Answers, each
from experiments.tuning_data import TuneData, check_tokenizer, open_data, settings_of
from experiments.tuning_options import TuneOptions, check, run_of, seq_len
from experiments.tuning_reference import References, stored_references
from jaxlm import optim
from jaxlm.adapter_config import check_targets
from jaxlm.checkpoint_files import preflight
from jaxlm.count import flops_per_token, param_count
from jaxlm.data.chat_report import show
from jaxlm.data.tune_batches import TuneBatches, eval_tune_batches, make_tune_loader
from jaxlm.engine import JaxEngine, widen_if_needed
from jaxlm.estimate_lora import factor_count, matrix_shapes, tuning_flops_per_token
from jaxlm.finetune.lora import freeze
from jaxlm.host_memory import keep_memory
from jaxlm.live_plots import LivePlots
from jaxlm.loop import Outputs, Result, fit
from jaxlm.metrics import Throughput
from jaxlm.model import Params
from jaxlm.reporter import Reporter, Sink, tokens_per_step
from jaxlm.run_dir import RunDir, RunDirError, open_run
from jaxlm.sinks import check_sinks, open_sinks
from jaxlm.train import cast_params, frozen_shardings
from jaxlm.tune_config import TuneRun, load_run

ADAPTER = "adapter"  # folder of a run directory


@dataclass
class Tuned:
    """A finished (or interrupted) run."""

    run: TuneRun
    directory: RunDir
    data: TuneData
    engine: JaxEngine
    result: Result
    adapter: Path | None  # directory of the adapter; None without one, and where the run was interrupted


def tune(options: TuneOptions) -> Tuned:
    """Base, data, loop, adapter. Raises InputError before anything is trained when something does not fit."""
    check(options)
    check_sinks(options.log)
    keep_memory()
    path = options.path
    started = RunDir(path).holds_run()
    if started and not options.resume:
        raise RunDirError(f"{path} holds a run; continue it with --resume or choose another --run-dir")
    base = open_base(options)
    if (adapter := options.lora.adapter()) is not None:
        check_targets(adapter, matrix_shapes(base.config))  # before hours of reading
    data = open_data(options, base, seq_len(options, base.config))
    batches = TuneBatches(data.train, settings_of(options, seq_len(options, base.config)))
    stored = load_run(RunDir(path).config) if started and RunDir(path).config.is_file() else None
    run = run_of(options, base.config, batches.steps, stored)
    check_devices(run, "jax")
    if options.resume and not started:
        say(f"{path} holds nothing to resume; starting fresh")
    is_new = not path.exists()  # now: while data were read, another start may have taken it
    directory, opened, resumed = open_run(path, run, options.resume)
    assert isinstance(opened, TuneRun)
    try:
        describe(opened, base, data, batches)
        ready = set_up(options, opened, directory, base, data, resumed)
    except BaseException:
        if is_new:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return train(options, opened, directory, base, data, ready)


def open_base(options: TuneOptions) -> Target:
    """The model to start from; an adapter, that of a LoRA run too, is merged into it. Raises InputError."""
    base = open_target(options.target, options.checkpoint, optimizer=False)
    return merged(base, open_adapter(Path(options.adapter), base)) if options.adapter else base


def set_up(
    options: TuneOptions, run: TuneRun, directory: RunDir, base: Target, data: TuneData, resumed: bool
) -> Ready:
    """Engine and batches. Raises InputError where weights, disk or checkpoints cannot be used."""
    widen_if_needed(run)
    engine = JaxEngine(run, directory.checkpoints)
    optim.check_policy(run.optim, engine.task.shapes)
    rereads = run.tune.adapter is not None or run.tune.method == "dpo"
    if resumed and engine.candidates:
        check_tokenizer(directory, data)
        if rereads:
            require_unchanged(run, directory.path, base.config, base.contents.tensors)
    else:  # also where an earlier start was cut off before its first checkpoint
        keep_base(base, directory.path, data.chat.template, rereads)
    directory.write_env([device_kind("jax")], run.train.seed)
    settings = settings_of(options, run.train.seq_len)
    reference, extra = give_weights(run, directory, engine, base, data, resumed)
    loader = make_tune_loader(data.train, settings, engine.step, engine.rows, reference.train)
    if extra is not None:
        loader.set_state(extra["loader"])
    n = run.train.eval_batches * run.train.batch_size
    validation = list(eval_tune_batches(data.val, settings, n, None, reference.val))
    best = math.inf if extra is None else extra["best"]
    return Ready(engine, loader, validation, best, engine.step if resumed else None)


def give_weights(
    run: TuneRun, directory: RunDir, engine: JaxEngine, base: Target, data: TuneData, resumed: bool
) -> tuple[References, dict[str, Any] | None]:
    """Gives the engine what is frozen and what is trained; the reference's log-probabilities where they are stored.

    Also returns what a checkpoint had saved beside the state, None at a fresh start. Raises InputError.
    """
    adapter, reference = run.tune.adapter, References(None, None)
    if adapter is not None:
        places = None if engine.mesh is None else frozen_shardings(engine.mesh, engine.task)
        engine.freeze(freeze(run, base.contents.tensors, places))
    elif run.tune.method == "dpo" and run.tune.reference == "frozen":
        copies = cast_params(base_params(engine, base), jnp.dtype(run.train.dtype))
        engine.freeze({path: jnp.array(value, copy=True) for path, value in copies.items()})
    if run.tune.method == "dpo" and run.tune.reference == "stored":

        def weights() -> Params:
            return engine.frozen if adapter is not None else base_params(engine, base)

        reference = stored_references(run, directory, base, data, weights, engine.mesh)
    extra = resume(run, directory, engine, "jax") if resumed else None
    if extra is not None:
        say(f"resumed at step {engine.step} of {run.train.steps}")
    else:
        if resumed:
            say(f"{directory.path} holds no checkpoint yet; starting at step 0")
        engine.initialise(None if adapter is not None else base_params(engine, base))
    if engine.step >= run.train.steps:
        say(
            f"step {engine.step} of {run.train.steps} is already done; raise --epochs or --train.steps to go on"
        )
    else:
        preflight(engine.directory, engine.state_bytes, run.train.keep, len(engine.candidates), say)
    return reference, extra


def base_params(engine: JaxEngine, base: Target) -> Params:
    """The base's weights on the devices of the run."""
    return load_params(base.contents.tensors, base.config, engine.mesh)


def train(
    options: TuneOptions, run: TuneRun, directory: RunDir, base: Target, data: TuneData, ready: Ready
) -> Tuned:
    """The loop, and what is written at its end."""
    engine, step = ready.engine, ready.engine.step
    plots = LivePlots(directory.path) if run.train.plots else None
    answers = Answers(run, engine, directory, data, options.samples, options.sample_tokens, base.specials.eos)
    outputs = Outputs(
        directory.path / "bad_batches",
        directory.path / "profile" if options.profile else None,
        each(answers, plots),
        compiled_note(directory, engine.compiled, True),
    )
    with open_sinks(run, directory, resume_step=ready.resume_step) as sink:
        result = fit(run, engine, ready.loader, ready.validation, reporter(run, sink), ready.best, outputs)
    if plots is not None and not result.stopped_by:
        plots.close()
    if result.stopped_by:
        say(f"{result.stopped_by}: saved at step {result.step}; continue with --resume")
        return Tuned(run, directory, data, engine, result, None)
    if step < run.train.steps:
        say(
            f"step {result.step}: training loss {result.loss:.4f}, validation loss {result.val_loss:.4f} "
            f"(best {result.best_val_loss:.4f}), {result.seconds:.0f} s, written to {directory.path}"
        )
    return Tuned(run, directory, data, engine, result, finish(run, directory, engine, base))


def finish(run: TuneRun, directory: RunDir, engine: JaxEngine, base: Target) -> Path | None:
    """Writes the adapter of the best checkpoint, and says how the result is exported; the adapter's directory."""
    adapter = None
    if run.tune.adapter is not None:
        adapter = directory.path / ADAPTER
        engine.restore("best")
        write_run_adapter(run, {path: np.asarray(x) for path, x in engine.params.items()}, base, adapter)
        say(f"the adapter of the best validation loss is in {adapter}")
        say(
            f"as peft opens it: python -m convert export {directory.path} --to peft ADAPTER --checkpoint best"
        )
    what = "as transformers opens it" + (", merged" if adapter is not None else "")
    say(f"{what}: python -m convert export {directory.path} --to hf MODEL --checkpoint best")
    return adapter


def reporter(run: TuneRun, sink: Sink) -> Reporter:
    """What turns a step's metrics into a line of the log. Tokens are places of a batch, padding among them."""
    return Reporter(
        run,
        sink,
        Throughput(tokens_per_step(run)),
        flops_per_place(run),
        device_peak(run, "jax"),
        None,
        device_memory("jax"),
    )


def flops_per_place(run: TuneRun) -> float:
    """Model FLOPs of a step per place of its batch.

    The reference of dpo, where it is not stored, reads both sequences of a pair once more, forward alone: a third of
    what training all weights takes.
    """
    flops = tuning_flops_per_token(run)
    if run.tune.method != "dpo":
        return flops
    forward = flops_per_token(run.model, run.train.seq_len) / 3
    return flops + (0.0 if run.tune.reference == "stored" else forward)


def describe(run: TuneRun, base: Target, data: TuneData, batches: TuneBatches) -> None:
    """What is about to run: base, data with an example, what is trained, how long."""
    train, adapter, total = run.train, run.tune.adapter, param_count(run.model)
    say(f"base: {base.path}, {total:,} parameters, context {run.model.context:,}")
    show(data.chat.tokenizer, data.train, data.read, console=Console(stderr=True))
    say(f"{len(data.train):,} {data.read.what} to train on, {len(data.val):,} to validate on")
    if data.read_val is not None:
        say("\n".join(f"--val: {line}" for line in data.read_val.lines()))
    if adapter is None:
        say(f"trained: all {total:,} parameters")
    else:
        factors = factor_count(run.model, adapter)
        form = train.dtype if run.tune.quant == "none" else f"{run.tune.quant} and {train.dtype}"
        share = f"{factors / total:.2%} as many as the base has"
        say(f"trained: {factors:,} parameters of an adapter, {share}; frozen: {total:,} in {form}")
    mesh = f", mesh {run.mesh}" if run.mesh.size > 1 else ""
    say(
        f"{train.steps:,} steps of {train.batch_size} x {train.seq_len} tokens ({batches.filled:.0%} filled), "
        f"{batches.batches_per_epoch:,} an epoch, learning rate {run.optim.lr:g}, {train.dtype}{mesh}"
    )
