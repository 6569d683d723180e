"""Faults of training: AdamW and the clip, the learning rate's schedule, accumulation over micro-batches."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import torch

import jaxlm.optim
import jaxlm.train
import torchref.optim
import torchref.train
from convert.parity.faults.fault import Fault


def own_update(rule: Callable[..., Any]) -> Callable[[Any], Any]:
    """jaxlm's AdamW with another rule for the change of a parameter: rule(config, path, p, m, v, scalars)."""

    def change(original: Any) -> Any:
        def scale_by_exact_adamw(config):
            made = original(config)

            def update(updates, state, params=None, **extra):
                assert params is not None
                _, state = made.update(updates, state, params, **extra)
                moved = {
                    path: rule(config, path, p, state.m[path], state.v[path], extra["scalars"])
                    for path, p in params.items()
                }
                return moved, state

            return optax.GradientTransformationExtraArgs(made.init, update)

        return scale_by_exact_adamw

    return change


def _decay(config: Any, path: str, p: Any, s: Any) -> Any:
    return s.decay * p if jaxlm.optim.decays(config, path) else 0


def _eps_in_root(config, path, p, m, v, s):
    return -s.step_size * m / jnp.sqrt(v / s.bias2_root**2 + config.eps) - _decay(config, path, p, s)


def _no_bias_correction(config, path, p, m, v, s):
    return -s.lr * m / (jnp.sqrt(v) + config.eps) - _decay(config, path, p, s)


def _decay_without_rate(config, path, p, m, v, s):
    step = -s.step_size * m / (jnp.sqrt(v) / s.bias2_root + config.eps)
    return step - _decay(config, path, p, s) / s.lr * 1e-3


def _betas_exchanged(original: Any) -> Any:
    return lambda config: original(dataclasses.replace(config, b1=config.b2, b2=config.b1))


def _eps_of(value: float) -> Callable[[Any], Any]:
    return lambda original: lambda config, model: original(dataclasses.replace(config, eps=value), model)


def _in_every_group(**settings: Any) -> Callable[[Any], Any]:
    """torch's AdamW with its groups' settings changed."""

    def change(original: Any) -> Any:
        def make_optimizer(config, model):
            optimizer = original(config, model)
            for group in optimizer.param_groups:
                group.update(settings)
            return optimizer

        return make_optimizer

    return change


def _everything_decays(original: Any) -> Any:
    return lambda config, path: True


def _one_step_ahead(original: Any) -> Any:
    """Bias corrections of step t + 1."""

    def scalars(config, step):
        now, later = original(config, step), original(config, step + 1)
        return now._replace(step_size=later.step_size / later.lr * now.lr, bias2_root=later.bias2_root)

    return scalars


def _scalars_in_float32(original: Any) -> Any:
    """What optax does by itself: corrections and learning rate in float32."""
    return lambda values, dtype: original(values, np.float32)


def _clip_without_eps(original: Any) -> Any:
    """optax's clip: limit / norm, nothing added to the norm."""
    return lambda norm, limit: jnp.minimum(1.0, limit / norm) if limit else jnp.ones_like(norm)


def _clip_each_tensor(original: Any) -> Any:
    def clip_by_global_norm(limit):
        def update(updates, state, params=None):
            scales = {
                k: jaxlm.optim.clip_scale(jaxlm.optim.global_norm(g), limit) for k, g in updates.items()
            }
            return {k: g * scales[k] for k, g in updates.items()}, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    return clip_by_global_norm


def _clip_forgotten(original: Any) -> Any:
    return lambda limit: optax.identity()


def _norm_in_float32(original: Any) -> Any:
    return lambda tree: original([x.float() for x in tree]).double()


def _warmup_from_zero(original: Any) -> Any:
    def learning_rate(config, step):
        return (
            config.lr * step / config.warmup_steps if step < config.warmup_steps else original(config, step)
        )

    return learning_rate


def _decayed(shape: Callable[[Any, int], float]) -> Callable[[Any], Any]:
    """The schedule with another decay after the warmup: shape(config, step) is the share of lr - min_lr left."""

    def change(original: Any) -> Any:
        def learning_rate(config, step):
            if step < config.warmup_steps:
                return original(config, step)
            return config.min_lr + (config.lr - config.min_lr) * shape(config, step)

        return learning_rate

    return change


def _cosine_from_step_zero(config: Any, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.decay_steps)))


def _cosine_without_end(config: Any, step: int) -> float:
    done = (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(config: Any, step: int) -> float:
    return max(0.0, 1 - (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))


def _min_lr_ignored(original: Any) -> Any:
    return lambda config, step: original(dataclasses.replace(config, min_lr=0.0), step)


def _rate_in_float32(original: Any) -> Any:
    return lambda config, step: float(np.float32(original(config, step)))


def _rate_of_the_next_step(original: Any) -> Any:
    """The scheduler moves before the optimizer does."""

    def make_train_step(run, *rest):
        step = original(run, *rest)
        return lambda state, batch, scalars: step(
            state, batch, torchref.optim.scalars(run.optim, state.step + 1)
        )

    return make_train_step


def _own_counts(module: Any, mean: bool) -> Callable[[Any], Any]:
    """Each micro-batch divided by its own tokens: the mean of micro-means, or their sum."""

    def change(original: Any) -> Any:
        def loss_and_metrics(*args):
            *rest, batch, counts, train, key = args
            own, M = module.batch_counts(batch, counts.microbatches), counts.microbatches if mean else 1
            own = own._replace(loss_tokens=own.loss_tokens * M, valid_tokens=own.valid_tokens * M)
            return original(*rest, batch, own, train, key)

        return loss_and_metrics

    return change


def _balance_not_averaged(original: Any) -> Any:
    def total_loss(*args):
        *rest, counts = args
        return original(*rest, counts._replace(microbatches=1))

    return total_loss


def _contiguous_rows(original: Any) -> Any:
    """Micro-batch m holds rows m B/M to (m + 1) B/M instead of m, m + M, ..."""

    def make_gradient_fn(run, *rest):
        gradients, M = original(run, *rest), run.train.accumulation

        def reordered(params, batch, *others):
            moved = {
                k: jnp.swapaxes(v.reshape(M, -1, *v.shape[1:]), 0, 1).reshape(v.shape)
                for k, v in batch.items()
            }
            return gradients(params, moved, *others)

        return reordered

    return make_gradient_fn


def _torch_loop(parts: Callable[[int], range], sums: bool) -> Callable[[Any], Any]:
    """The reference's accumulation loop over other micro-batches, or keeping only the newest gradient."""

    def change(original: Any) -> Any:
        def make_gradient_fn(run, *rest):
            M = run.train.accumulation

            def gradients(decoder, batch, key=None):
                batch = batch | {"loss_mask": batch["loss_mask"].double()}
                counts = torchref.train.batch_counts(batch, M)
                params = dict(decoder.named_parameters())
                grads, metrics = {}, {}
                for m in parts(M):
                    rows = {k: v[m::M] for k, v in batch.items()}
                    total, part = torchref.train.loss_and_metrics(
                        run, decoder, params, rows, counts, True, key
                    )
                    found = torch.autograd.grad(total, list(params.values()))
                    for path, g in zip(params, found, strict=True):
                        grads[path] = grads[path] + g if sums and path in grads else g
                    for name, value in part.items():
                        metrics[name] = metrics.get(name, 0) + value.detach()
                return grads, metrics

            return gradients

        return make_gradient_fn

    return change


def _last_lost(M: int) -> range:
    return range(max(1, M - 1))


JAX_ADAMW, TORCH_ADAMW = "jaxlm.optim.scale_by_exact_adamw", "torchref.optim.make_optimizer"
JAX_RATE, TORCH_RATE = "jaxlm.optim.learning_rate", "torchref.optim.learning_rate"
JAX_GRADIENTS, TORCH_GRADIENTS = "jaxlm.train.make_gradient_fn", "torchref.train.make_gradient_fn"

_TABLE = (
    # What AdamW keeps comes before what it does with it: m, v, then the change of the parameters.
    ("b1 and b2 exchanged", "optimizer", JAX_ADAMW, _betas_exchanged, "update", "m"),
    ("eps inside the root", "optimizer", JAX_ADAMW, own_update(_eps_in_root), "update", "delta"),
    ("no bias correction", "optimizer", JAX_ADAMW, own_update(_no_bias_correction), "update", "delta"),
    (
        "decay not times the learning rate",
        "optimizer",
        JAX_ADAMW,
        own_update(_decay_without_rate),
        "update",
        "delta",
    ),
    (
        "corrections of the next step",
        "optimizer",
        "jaxlm.optim.scalars",
        _one_step_ahead,
        "schedule",
        "step_size",
    ),
    ("scalars in float32", "optimizer", "jaxlm.optim.as_arrays", _scalars_in_float32, "update", "delta"),
    (
        "coupled weight decay",
        "optimizer",
        TORCH_ADAMW,
        _in_every_group(decoupled_weight_decay=False),
        "update",
        "m",
    ),
    # It takes some steps until a second moment falls; by then other parameters have made other gradients, m first.
    ("AMSGrad", "optimizer", TORCH_ADAMW, _in_every_group(amsgrad=True), "updates", "m"),
    ("eps 1e-6", "optimizer", TORCH_ADAMW, _eps_of(1e-6), "update", "delta"),
    ("norms and biases decay", "optimizer", "torchref.optim.decays", _everything_decays, "update", "delta"),
    (
        "clip without 1e-6",
        "optimizer",
        "jaxlm.optim.clip_scale",
        _clip_without_eps,
        "clip",
        "clip_scale active",
    ),
    (
        "gradient norm in float32",
        "optimizer",
        "torchref.optim.global_norm",
        _norm_in_float32,
        "clip",
        "grad_norm",
    ),
    (
        "each tensor clipped alone",
        "optimizer",
        "jaxlm.optim.clip_by_global_norm",
        _clip_each_tensor,
        "update",
        "m",
    ),
    ("gradients not clipped", "optimizer", "jaxlm.optim.clip_by_global_norm", _clip_forgotten, "update", "m"),
    ("warmup from zero", "schedule", JAX_RATE, _warmup_from_zero, "schedule", "lr"),
    ("cosine counts the warmup", "schedule", TORCH_RATE, _decayed(_cosine_from_step_zero), "schedule", "lr"),
    (
        "cosine rises again after the end",
        "schedule",
        TORCH_RATE,
        _decayed(_cosine_without_end),
        "schedule",
        "lr",
    ),
    ("linear decay", "schedule", JAX_RATE, _decayed(_linear), "schedule", "lr"),
    ("min_lr ignored", "schedule", JAX_RATE, _min_lr_ignored, "schedule", "lr"),
    ("learning rate in float32", "schedule", TORCH_RATE, _rate_in_float32, "schedule", "lr"),
    # The schedule is right and read a step too early: the optimizer's first change shows it.
    (
        "learning rate of the next step",
        "schedule",
        "torchref.train.make_train_step",
        _rate_of_the_next_step,
        "update",
        "delta",
    ),
    (
        "mean of the micro-batches' means",
        "accumulation",
        "torchref.train.loss_and_metrics",
        _own_counts(torchref.train, mean=True),
        "accumulation",
        "torch.cross_entropy",
    ),
    (
        "sum of the micro-batches' means",
        "accumulation",
        "jaxlm.train.loss_and_metrics",
        _own_counts(jaxlm.train, mean=False),
        "accumulation",
        "jax.cross_entropy",
    ),
    (
        "balance loss not averaged",
        "accumulation",
        "jaxlm.train.total_loss",
        _balance_not_averaged,
        "accumulation",
        "balance",
    ),
    # Sums over tokens do not care which rows go together; a product of means does.
    ("contiguous micro-batches", "accumulation", JAX_GRADIENTS, _contiguous_rows, "accumulation", "balance"),
    (
        "last micro-batch lost",
        "accumulation",
        TORCH_GRADIENTS,
        _torch_loop(_last_lost, sums=True),
        "accumulation",
        "torch.cross_entropy",
    ),
    (
        "gradient of the last micro-batch only",
        "accumulation",
        TORCH_GRADIENTS,
        _torch_loop(range, sums=False),
        "accumulation",
        "lm_head.weight",
    ),
)
FAULTS = tuple(Fault(*row) for row in _TABLE)
