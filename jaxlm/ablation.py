"""Runs the variants of an ablation and compares them, layer by layer, with the first.

All start from the same weights where shapes agree, train on the same batches and are validated on the same ones. What
differs is looked at twice: the baseline's weights computed the variant's way (numerics: what the variant does to one
forward pass), and the variant's own weights beside the baseline's (training: where it has led to).
"""

import hashlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ConfigError, RunConfig
from jaxlm.data.loader import LoaderSettings, eval_batches, make_loader
from jaxlm.data.shards import TokenStore
from jaxlm.guard import init_guard
from jaxlm.layers import Backends
from jaxlm.layerwise import (
    Arrays,
    Batch,
    activations,
    fixed_batch,
    layer_distances,
    layer_errors,
    rerouted,
    validation_loss,
)
from jaxlm.loop import DivergedError
from jaxlm.metrics import Progress
from jaxlm.model import Params, Split, abstract_model, init_params
from jaxlm.optim import as_arrays, make_optimizer, scalars
from jaxlm.quant import errors, quantize
from jaxlm.train import TrainState, cast_params, make_train_step, place_batch
from jaxlm.variants import Variant


class Trained(NamedTuple):
    """One training, from its initial weights to its last step or to the first loss that was not finite."""

    params: Arrays  # master weights at the end, on the host
    losses: list[float]  # of every step, in nats per token
    diverged_at: int | None  # step (from 1) whose loss was not finite
    step_seconds: float  # median, its result waited for
    compile_seconds: float
    temporary_bytes: int | None  # beside state and batch, as the compiler says
    batches_sha256: str  # of the inputs and targets that were trained on, in order
    started_alike: int  # tensors that began as the baseline's


class Start(NamedTuple):
    """Where all begin."""

    params: Arrays  # the baseline's initial weights
    run: RunConfig  # that they were drawn for


class Outcome(NamedTuple):
    """What is known of one variant. Errors and distances are relative Frobenius norms against the baseline."""

    trained: Trained | None  # None where stored weights were looked at
    trained_as: int  # number of the variant whose training this is; its own unless another trains alike
    val_loss: float  # nats per token, computed the variant's way; NaN after a divergence
    weight_bytes: int  # as served: cast to the dtype of the computation, quantised if asked
    activations: (
        dict[str, float] | None
    )  # the baseline's weights, the variant's way; None where shapes differ
    rerouted: (
        dict[str, float] | None
    )  # share of the experts that the same weights choose otherwise, by MoE layer
    weight_errors: dict[str, float]  # of the baseline's quantised weights by path; {} without quantisation
    distances: (
        dict[str, float] | None
    )  # own weights from the baseline's, by layer; None where nothing was trained


def check_device(variants: Sequence[Variant]) -> None:
    """Raises ConfigError where a variant asks for what this machine has not."""
    if any(v.attention == "cudnn" for v in variants) and jax.default_backend() != "gpu":
        raise ConfigError(
            f"--vary attention=cudnn needs a CUDA device; this machine has {jax.default_backend()}"
        )


def wide(variants: Sequence[Variant]) -> bool:
    """Whether any variant needs jax to compute in float64."""
    return any("float64" in (v.run.train.dtype, v.run.train.param_dtype) for v in variants)


def validation_batches(variants: Sequence[Variant], store: TokenStore) -> list[Batch]:
    """The batches that every variant is validated on: the baseline's rows, as long as the shortest variant's."""
    run = variants[0].run
    settings = replace(LoaderSettings.of(run), seq_len=min(v.run.train.seq_len for v in variants))
    return list(eval_batches([store], settings, run.train.eval_batches))


def run_variants(
    variants: Sequence[Variant],
    validation: Sequence[Batch],
    store: TokenStore | None,
    weights: Params | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Trains what needs training, once for variants that train alike, and compares all with the first.

    Args:
        variants: of one ablation, baseline first.
        validation: batches all are validated on; the first one is also the fixed batch of the layers' errors.
        store: tokens to train on; not read where there are weights.
        weights: stored weights to look at instead of training.
        tell: gets a line as each training, or look at stored weights, starts.

    Raises:
        DivergedError: the baseline's loss is not finite, so that there is nothing to compare with.
        ConfigError: weights do not fit a variant's model.
    """
    for variant in variants if weights is not None else ():
        if not fits(variant, weights or {}):
            raise ConfigError(f"--vary {variant.label}: the stored weights have other shapes than this model")
    groups: dict[str, list[int]] = {}
    for i, variant in enumerate(variants):
        groups.setdefault(variant.training if weights is None else "", []).append(i)
    start = None if weights is not None else Start(_fresh(variants[0].run), variants[0].run)
    baseline = _Baseline(variants[0], fixed_batch(validation[0], variants[0].run.model.vocab_size))
    outcomes: dict[int, Outcome] = {}
    for number, members in enumerate(groups.values(), 1):
        first, trained = variants[members[0]], None
        if start is not None:
            assert store is not None
            tell(f"training {number} of {len(groups)}: {first.label}")
            trained = train_variant(first, start, store)
        params = weights if trained is None else trained.params
        assert params is not None
        baseline.adopt(params, trained)
        for i in members:
            if trained is None:
                tell(f"looking at {i + 1} of {len(variants)}: {variants[i].label}")
            outcomes[i] = baseline.compare(variants[i], params, validation, trained, members[0])
    return [outcomes[i] for i in range(len(variants))]


def _fresh(run: RunConfig) -> Arrays:
    dtype = jnp.dtype(run.train.param_dtype)
    return jax.device_get(jax.jit(lambda: init_params(run.model, run.train.seed, dtype))())


def initial_weights(run: RunConfig, start: Start) -> tuple[Arrays, int]:
    """The baseline's initial weights where path and shape agree, else the run's own; and how many agreed.

    A run of another seed or initialisation draws all of its own.
    """
    shapes = {path: s.shape for path, s in abstract_model(run.model).shapes.items()}
    alike = {
        path
        for path, shape in shapes.items()
        if path in start.params and np.shape(start.params[path]) == shape
    }
    if _drawing(run) != _drawing(start.run):
        alike = set()
    own = {} if len(alike) == len(shapes) else _fresh(run)
    return {path: start.params[path] if path in alike else own[path] for path in shapes}, len(alike)


def _drawing(run: RunConfig) -> tuple[Any, ...]:
    return run.train.seed, run.model.init, run.model.init_std


def train_variant(variant: Variant, start: Start, store: TokenStore) -> Trained:
    """One training from the shared initial weights; shows its progress on standard error."""
    run, settings = variant.run, variant.run.train
    dtype = jnp.dtype(settings.param_dtype)
    begun, alike = initial_weights(run, start)
    params = {path: jnp.array(value, dtype) for path, value in begun.items()}
    opt_state = make_optimizer(run.optim).init(params)
    seed = jnp.asarray(settings.seed, jnp.uint32)
    state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, seed, init_guard(run))
    jitted = make_train_step(run, None, Backends(variant.attention, variant.experts))
    losses, seconds, digest = [], [], hashlib.sha256()
    compiled, compile_seconds, diverged = None, 0.0, None
    loader = make_loader([store], LoaderSettings.of(run))
    try:
        with Progress(settings.steps) as bar:
            for step, batch in enumerate(itertools.islice(loader, settings.steps)):
                digest.update(batch["inputs"].tobytes() + batch["targets"].tobytes())
                values = as_arrays(scalars(run.optim, step), dtype)
                if compiled is None:
                    began = time.perf_counter()
                    compiled = jitted.lower(state, place_batch(batch), values).compile()
                    compile_seconds = time.perf_counter() - began
                began = time.perf_counter()
                state, metrics = compiled(state, place_batch(batch), values)
                losses.append(float(metrics["loss"]))
                seconds.append(time.perf_counter() - began)
                rate = settings.batch_size * settings.seq_len / seconds[-1]
                bar.update(step + 1, {"loss": losses[-1], "tokens_per_second": rate})
                if not math.isfinite(losses[-1]):
                    diverged = step + 1
                    bar.message(f"the loss is {losses[-1]} at step {diverged}: this variant ends here")
                    break
    finally:
        loader.close()
    memory = compiled.memory_analysis() if compiled is not None else None
    return Trained(
        jax.device_get(state.params),
        losses,
        diverged,
        statistics.median(seconds),
        compile_seconds,
        None if memory is None else int(memory.temp_size_in_bytes),
        digest.hexdigest(),
        alike,
    )


def serve(variant: Variant, params: Mapping[str, Any]) -> Split:
    """Weights as the variant computes with them: quantised from the masters, the rest cast as in training."""
    backends = Backends(variant.attention, variant.experts)
    plain = {path: jnp.asarray(value) for path, value in params.items()}
    model = Split(abstract_model(variant.run.model, backends).graphdef, plain)
    if variant.quant != "none":
        model = quantize(model, variant.quant)
    kept = {path: value for path, value in model.params.items() if path in plain}
    return Split(model.graphdef, model.params | cast_params(kept, jnp.dtype(variant.run.train.dtype)))


class _Baseline:
    """The first variant's weights and activations, which all are compared with."""

    def __init__(self, variant: Variant, batch: Batch):
        self.variant, self.batch = variant, batch
        self.valid = batch["loss_mask"] > 0
        self.params: Mapping[str, Any] | None = None

    def adopt(self, params: Mapping[str, Any], trained: Trained | None) -> None:
        """The first weights that come are the baseline's."""
        if self.params is not None:
            return
        if trained is not None and trained.diverged_at is not None:
            raise DivergedError(
                f"the baseline's loss is {trained.losses[-1]} at step {trained.diverged_at}; lower optim.lr, or put "
                "another value of the axes first"
            )
        self.params = params
        served = serve(self.variant, params)
        self.acts = activations(served, self.batch["inputs"], self.variant.run.train.dtype)

    def compare(
        self,
        variant: Variant,
        params: Mapping[str, Any],
        validation: Sequence[Batch],
        trained: Trained | None,
        trained_as: int,
    ) -> Outcome:
        """Everything that is known of one variant."""
        assert self.params is not None
        diverged = trained is not None and trained.diverged_at is not None
        dtype = variant.run.train.dtype
        served = None if diverged else serve(variant, params)
        loss = math.nan if served is None else validation_loss(served, validation, dtype)
        size = 0 if served is None else sum(value.nbytes for value in served.params.values())
        found, moved, rounded = None, None, {}
        if fits(variant, self.params):
            ours = serve(variant, self.params) if served is None or params is not self.params else served
            acts = activations(ours, self.batch["inputs"], dtype)
            found = layer_errors(acts, self.acts, self.valid)
            moved = rerouted(acts, self.acts, self.valid)
            if variant.quant != "none":
                masters = {path: jnp.asarray(value) for path, value in self.params.items()}
                rounded = {e.path: e.error for e in errors(Split(ours.graphdef, masters), ours)}
        apart = None if trained is None or diverged else layer_distances(params, self.params)
        return Outcome(trained, trained_as, loss, size, found, moved, rounded, apart)


def fits(variant: Variant, params: Mapping[str, Any]) -> bool:
    """Whether weights have the paths and shapes of a variant's model."""
    shapes = {path: s.shape for path, s in abstract_model(variant.run.model).shapes.items()}
    return shapes == {path: np.shape(value) for path, value in params.items()}
