"""Trains a preset on text and writes everything about it to a run directory.

    python -m experiments.pretrain quickstart --data.path book.txt --train.steps 200 --run-dir runs/book
    python -m experiments.pretrain quickstart --run-dir runs/book --train.steps 400 --resume

A run started in one framework goes on in the other: --resume takes the newest checkpoint of either.

The run directory holds config.json, env.json, tokenizer.json, metrics.jsonl, plots/, data/ (tokenised shards) and
checkpoints/. quickstart on two CPU cores: about 6,000 tokens per second.
"""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cli import RunOptions, main_guard, need, parse_run, say
from experiments.handover import CHECKPOINTS, resume
from jaxlm.config import ConfigError, RunConfig
from jaxlm.count import active_param_count, flops_per_token, param_count
from jaxlm.data.corpus import Corpus, open_corpus
from jaxlm.data.loader import eval_batches, make_loader
from jaxlm.data.shards import TokenStore, open_shards, prepare
from jaxlm.loop import Result, fit
from jaxlm.metrics import JsonlSink, peak_flops
from jaxlm.run_dir import RunDir, open_run
from jaxlm.tokenizer import Tokenizer, open_tokenizer


@dataclass
class Prepared:
    """What a run trains on."""

    tokenizer: Tokenizer
    train: TokenStore
    val: TokenStore


@dataclass
class Trained:
    """A finished (or interrupted) run."""

    run: RunConfig
    directory: RunDir
    data: Prepared
    engine: Any
    result: Result


def main(argv: list[str]) -> int:
    """Entry point."""
    pretrain(parse_run(argv, "python -m experiments.pretrain", __doc__ or ""))
    return 0


def pretrain(options: RunOptions) -> Trained:
    """Data, model, loop. Raises InputError before anything is trained when something does not fit."""
    path = Path(options.run_dir or f"runs/{options.preset}")
    existed = path.exists()
    run = options.run
    check_devices(run, options.framework)
    corpus = open_corpus(run.data.path, run.data.column)
    directory, run, resumed = open_run(path, run, options.resume)
    if options.resume and not resumed:
        say(f"{path} holds nothing to resume; starting fresh")
    try:
        data = prepare_data(run, directory, corpus, resumed)
    except BaseException:
        if not existed:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return train(run, directory, data, options.framework, resumed)


def check_devices(run: RunConfig, framework: str) -> None:
    """Refuses a mesh that the machine or the framework does not have."""
    if framework == "torch":
        need("torch")
        if run.mesh.size > 1:
            raise ConfigError(
                f"--framework torch runs on one device, but --mesh {run.mesh} asks for {run.mesh.size}"
            )
        return
    from jaxlm.sharding import make_mesh

    make_mesh(run.mesh)


class TokenProgress:
    """A line every few seconds while text is tokenised."""

    INTERVAL = 5.0  # seconds

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, documents: int, tokens: int) -> None:
        if time.monotonic() - self._said >= self.INTERVAL:
            self._said = time.monotonic()
            say(f"tokenised {documents:,} documents, {tokens:,} tokens")


def prepare_data(run: RunConfig, directory: RunDir, corpus: Corpus, resumed: bool) -> Prepared:
    """Tokenizer and shards of a run; made once, verified afterwards."""
    stored = directory.tokenizer
    if resumed and stored.is_file():
        tokenizer = Tokenizer.load(stored)
    elif run.data.tokenizer == "train":
        say(f"training a byte-level BPE of {run.model.vocab_size} tokens on {corpus.description}")
        texts = (document.text for document in corpus.documents("train", run.data.val_fraction))
        tokenizer = Tokenizer.train(texts, run.model.vocab_size)
        if tokenizer.n_unused:
            say(
                f"the text fills {run.model.vocab_size - tokenizer.n_unused} tokens; {tokenizer.n_unused} stay unused"
            )
    else:
        tokenizer = open_tokenizer(run.data.tokenizer)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {run.data.tokenizer} has {tokenizer.vocab_size} tokens but model.vocab_size="
            f"{run.model.vocab_size}; set --model.vocab-size {tokenizer.vocab_size}"
        )
    if tokenizer.vocab_size < run.model.vocab_size:
        say(
            f"the vocabulary of {tokenizer.vocab_size} tokens is padded to model.vocab_size={run.model.vocab_size}"
        )
    if not stored.is_file():
        tokenizer.save(stored)
    out = Path(run.data.cache) if run.data.cache else directory.path / "data"
    prepare(corpus, tokenizer, out, run.data.val_fraction, run.train.seq_len + 1, progress=TokenProgress())
    stores = [open_shards(out / split, run.model.vocab_size) for split in ("train", "val")]
    say(f"data: {len(stores[0]):,} training and {len(stores[1]):,} validation tokens of {corpus.description}")
    return Prepared(tokenizer, *stores)


def train(run: RunConfig, directory: RunDir, data: Prepared, framework: str, resumed: bool) -> Trained:
    """The loop on prepared data."""
    engine = make_engine(run, directory, framework)
    directory.write_env([device_kind(framework)], run.train.seed)
    best, step, loader_state = math.inf, 0, None
    extra = resume(run, directory, engine, framework) if resumed else None
    if extra is not None:
        best, step, loader_state = extra["best"], engine.step, extra["loader"]
        say(f"resumed at step {step} of {run.train.steps}")
    else:
        if resumed:
            say(f"{directory.path} holds no checkpoint yet; starting at step 0")
        engine.initialise()
    if step >= run.train.steps:
        say(f"step {step} of {run.train.steps} is already done; raise --train.steps to go on")
    loader = make_loader(
        data.train,
        run.train.seq_len,
        run.train.batch_size,
        run.train.seed,
        run.data.shuffle,
        start_batch=step,
    )
    if loader_state is not None:
        loader.set_state(loader_state)
    flops = flops_per_token(run.model, run.train.seq_len)
    describe(run, engine, framework)
    validation = list(eval_batches(data.val, run.train.seq_len, run.train.batch_size, run.train.eval_batches))
    with JsonlSink(directory.metrics, resume_step=step if resumed else None) as sink:
        result = fit(
            run,
            engine,
            loader,
            validation,
            sink,
            flops_per_token=flops,
            peak_flops=device_peak(run, framework),
            best=best,
            on_checkpoint=plotter(directory) if run.train.plots else None,
        )
    if result.stopped_by:
        say(f"{result.stopped_by}: saved at step {result.step}; continue with --resume")
    elif step < run.train.steps:
        say(
            f"step {result.step}: training loss {result.loss:.4f}, validation loss {result.val_loss:.4f} "
            f"(best {result.best_val_loss:.4f}), {result.seconds:.0f} s, written to {directory.path}"
        )
    return Trained(run, directory, data, engine, result)


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


def device_kind(framework: str) -> str:
    """What the device is called."""
    if framework == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import jax

    return jax.devices()[0].device_kind


def plotter(directory: RunDir) -> Any:
    """Draws the run's figures, where matplotlib is installed."""

    def draw() -> None:
        from jaxlm.plots import plot_run

        plot_run(directory.path)

    return draw


if __name__ == "__main__":
    main_guard(main)
