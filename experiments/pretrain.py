"""Trains a preset on text and writes everything about it to a run directory.

    python -m experiments.pretrain quickstart --data.path book.txt --train.steps 200 --run-dir runs/book
    python -m experiments.pretrain quickstart --run-dir runs/book --train.steps 400 --resume

A run started in one framework goes on in the other: --resume takes the newest checkpoint of either.

The run directory holds config.json, env.json, tokenizer.json, metrics.jsonl, plots/, data/ (tokenised shards),
checkpoints/, bad_batches/ (batches whose update was skipped) and, with --profile, profile/. quickstart on two CPU
cores: about 6,000 tokens per second.
"""

import contextlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checkpoints import CHECKPOINTS
from experiments.cli import RunOptions, main_guard, need, parse_run, say
from experiments.handover import resume
from experiments.launch import join, launch, open_together
from jaxlm.checkpoint_files import preflight
from jaxlm.config import ConfigError, RunConfig
from jaxlm.count import active_param_count, flops_per_token, param_count
from jaxlm.data.corpus import open_corpus
from jaxlm.data.loader import LoaderSettings, eval_batches, make_loader
from jaxlm.data.run_data import RunData, is_prepared, open_run_data
from jaxlm.host_memory import keep_memory
from jaxlm.live_plots import LivePlots
from jaxlm.loop import Outputs, Result, fit
from jaxlm.memory import peak_memory, process_peak_memory
from jaxlm.metrics import Throughput, peak_flops
from jaxlm.reporter import Reporter, Sink, text_bytes_per_token
from jaxlm.run_dir import RunDir
from jaxlm.sinks import Sinks, check_sinks, open_sinks


@dataclass
class Trained:
    """A finished (or interrupted) run."""

    run: RunConfig
    directory: RunDir
    data: RunData
    engine: Any
    result: Result


def main(argv: list[str]) -> int:
    """Entry point."""
    others = join()
    options = parse_run(argv, "python -m experiments.pretrain", __doc__ or "")
    if options.launch.several and others is None:
        return launch("experiments.pretrain", argv, options.launch, options.framework, run_path(options))
    pretrain(options, others)
    if others is not None:
        others.leave()
    return 0


def run_path(options: RunOptions) -> Path:
    """The run directory."""
    return Path(options.run_dir or f"runs/{options.preset}")


def pretrain(options: RunOptions, others: Any | None = None) -> Trained:
    """Data, model, loop. Raises InputError before anything is trained when something does not fit.

    others: `jaxlm.distributed` in one of several processes. Process 0 writes what there is one of.
    """
    path = run_path(options)
    # Among several processes the parent has made logs/.
    is_new = not path.exists() or (others is not None and {p.name for p in path.iterdir()} <= {"logs"})
    run = options.run
    keep_memory()
    check_devices(run, options.framework)
    check_policy(run, options.framework)
    check_inputs(run)
    directory, run, resumed = open_together(path, run, options.resume, others)
    main = others is None or others.is_main()
    if options.resume and not resumed:
        say(f"{path} holds nothing to resume; starting fresh")
    try:
        with contextlib.nullcontext() if others is None else others.main_first("data"):
            data = open_run_data(run, directory, resumed or not main, say)
        ready = set_up(run, directory, data, options.framework, resumed, main)
    except BaseException:
        if is_new and main:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return train(run, directory, data, options.framework, ready, options.profile, main)


def check_inputs(run: RunConfig) -> None:
    """Refuses texts that are not there, and sinks whose library is missing, before anything is written or moved."""
    check_sinks(run.log)
    if not run.data.mixture and not is_prepared(run.data.path):
        open_corpus(run.data.path, run.data.column)


def check_policy(run: RunConfig, framework: str) -> None:
    """Refuses an optim.policy that does not fit the model, by the model's own parameter paths."""
    if not run.optim.policy:
        return
    if framework == "torch":
        import torch

        from torchref import optim
        from torchref.model import Decoder

        with torch.device("meta"):
            paths = [path for path, _ in Decoder(run.model, rngs=None).named_parameters()]
        optim.check_policy(run.optim, paths)
        return
    from jaxlm import optim as jax_optim
    from jaxlm.model import abstract_model

    jax_optim.check_policy(run.optim, abstract_model(run.model).shapes)


def check_devices(run: RunConfig, framework: str) -> None:
    """Refuses a mesh that the machine or the framework does not have."""
    if framework == "torch":
        need("torch")
        if run.mesh.size > 1:
            raise ConfigError(
                f"--framework torch runs on one device, but --mesh {run.mesh} asks for {run.mesh.size}"
            )
        return
    from jaxlm.distributed import require_all_devices
    from jaxlm.sharding import make_mesh

    require_all_devices(make_mesh(run.mesh))


@dataclass
class Ready:
    """What training starts from."""

    engine: Any
    loader: Any  # at the batch of the engine's next step
    validation: list[Any]  # batches of every validation
    best: float  # validation loss so far
    resume_step: int | None  # None = a fresh start


def set_up(
    run: RunConfig, directory: RunDir, data: RunData, framework: str, resumed: bool, main: bool = True
) -> Ready:
    """Engine and batches. Raises InputError where data, disk or checkpoints cannot be used."""
    engine = make_engine(run, directory, framework)
    if main:
        directory.write_env([device_kind(framework)], run.train.seed)
    best, loader_state = begin(run, directory, engine, framework, resumed)
    step, settings = engine.step, LoaderSettings.of(run)
    loader = make_loader(data.train, settings, start_batch=step, rows=engine.rows)
    if loader_state is not None:
        loader.set_state(loader_state)
    describe(run, engine, framework)
    validation = list(eval_batches(data.val, settings, run.train.eval_batches))
    return Ready(engine, loader, validation, best, step if resumed else None)


def train(
    run: RunConfig,
    directory: RunDir,
    data: RunData,
    framework: str,
    ready: Ready,
    profile: bool = False,
    main: bool = True,
) -> Trained:
    """The loop. main: whether this process writes what there is one of."""
    engine, step = ready.engine, ready.engine.step
    plots = LivePlots(directory.path) if run.train.plots and main else None
    rejected = directory.path / "bad_batches"
    outputs = Outputs(
        rejected if engine.rows is None else rejected / f"rows_{engine.rows[0]}_to_{engine.rows[-1]}",
        directory.path / "profile" if profile and main else None,
        plots,
        compiled_note(directory, engine.compiled, main) if framework == "jax" else None,
    )
    sinks = open_sinks(run, directory, resume_step=ready.resume_step) if main else Sinks()
    with sinks as sink:
        report = reporter(run, data, framework, sink)
        result = fit(run, engine, ready.loader, ready.validation, report, ready.best, outputs)
    if plots is not None and not result.stopped_by:
        plots.close()
    if result.stopped_by:
        say(f"{result.stopped_by}: saved at step {result.step}; continue with --resume")
    elif step < run.train.steps:
        say(
            f"step {result.step}: training loss {result.loss:.4f}, validation loss {result.val_loss:.4f} "
            f"(best {result.best_val_loss:.4f}), {result.seconds:.0f} s, written to {directory.path}"
        )
    return Trained(run, directory, data, engine, result)


def compiled_note(directory: RunDir, compiled: Any, main: bool) -> Callable[[], str]:
    """What tells how long the compiler took and what was kept from before, and puts it into env.json as `compiled`."""

    def note() -> str:
        if main:
            with contextlib.suppress(OSError, ValueError):  # it is for the record only
                directory.add_to_env(compiled=compiled.record())
        return str(compiled)

    return note


def begin(
    run: RunConfig, directory: RunDir, engine: Any, framework: str, resumed: bool
) -> tuple[float, dict[str, Any] | None]:
    """Gives the engine its state, from a checkpoint or fresh; the best validation loss so far and the data position.

    Raises DiskFullError where not even one checkpoint would fit.
    """
    extra = resume(run, directory, engine, framework) if resumed else None
    if extra is not None:
        say(f"resumed at step {engine.step} of {run.train.steps}")
    else:
        if resumed:
            say(f"{directory.path} holds no checkpoint yet; starting at step 0")
        engine.initialise()
    if engine.step >= run.train.steps:
        say(f"step {engine.step} of {run.train.steps} is already done; raise --train.steps to go on")
    else:
        preflight(engine.directory, engine.state_bytes, run.train.keep, len(engine.candidates), say)
    return (math.inf, None) if extra is None else (extra["best"], extra["loader"])


def reporter(run: RunConfig, data: RunData, framework: str, sink: Sink) -> Reporter:
    """What turns a step's metrics into a line of the log."""
    return Reporter(
        run,
        sink,
        Throughput(run.train.batch_size * run.train.seq_len),
        flops_per_token(run.model, run.train.seq_len),
        device_peak(run, framework),
        text_bytes_per_token([store.meta for store in data.train], data.weights),
        device_memory(framework),
        text_bytes_per_token([store.meta for store in data.val], data.weights),
    )


def make_engine(run: RunConfig, directory: RunDir, framework: str) -> Any:
    """The framework's side of the loop."""
    if framework == "torch":
        from torchref.engine import TorchEngine

        return TorchEngine(run, directory.path / CHECKPOINTS["torch"])
    from jaxlm.engine import JaxEngine

    return JaxEngine(run, directory.path / CHECKPOINTS["jax"])


def describe(run: RunConfig, engine: Any, framework: str) -> None:
    """What is about to run, in one line."""
    total, active = param_count(run.model), active_param_count(run.model)
    active_note = f" ({active:,} active)" if active != total else ""
    steps, tokens = run.train.steps, run.train.steps * run.train.batch_size * run.train.seq_len
    mesh = f", mesh {run.mesh}" if run.mesh.size > 1 else ""
    say(
        f"{framework}: {total:,} parameters{active_note}, {steps} steps, {tokens:,} tokens, {run.train.dtype}{mesh}"
    )


def device_peak(run: RunConfig, framework: str) -> float | None:
    """FLOP/s of all devices of the run together, None where it is not known."""
    one = peak_flops(device_kind(framework), run.train.dtype)
    return None if one is None else one * run.mesh.size


def device_memory(framework: str) -> Callable[[], int]:
    """What tells the peak memory of the run's devices, in bytes."""
    if framework == "jax":
        return peak_memory
    import torch

    return torch.cuda.max_memory_allocated if torch.cuda.is_available() else process_peak_memory


def device_kind(framework: str) -> str:
    """What the device is called."""
    if framework == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import jax

    return jax.devices()[0].device_kind


if __name__ == "__main__":
    main_guard(main)
