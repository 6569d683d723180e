"""Optimizer state across the frameworks: the optax chain's AdamW moments <-> torch.optim.AdamW's, bit for bit.

m, v and weights of one parameter have the same layout, so the table of convert.native moves all three. optax keeps one
step count for everything, torch one per parameter: they must agree, or the state has no counterpart here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh

from convert.native import to_jax, to_torch
from convert.rules import ConversionError
from convert.tree import Flat, from_jax, from_torch, load_torch, to_numpy, to_tensor
from jaxlm import optim, train
from jaxlm.config import ModelConfig, RunConfig
from jaxlm.model import abstract_model
from torchref import optim as twin_optim
from torchref import train as twin_train
from torchref.layers import Backends
from torchref.model import Decoder


class AdamMoments(NamedTuple):
    """AdamW's state as host arrays: moments by parameter path, in one framework's names and layouts."""

    m: Flat  # running mean of the gradients, torch's exp_avg
    v: Flat  # running mean of their squares, torch's exp_avg_sq
    step: int  # optimizer steps done, the same for every parameter


def jax_moments(state: train.TrainState) -> AdamMoments:
    """The moments inside jaxlm's state, gathered on the host."""
    adam = optim.moments(state.opt_state)
    return AdamMoments(from_jax(adam.m), from_jax(adam.v), int(state.step))


def torch_moments(state: twin_train.TrainState) -> AdamMoments:
    """The moments inside torchref's state; zeros before the first step, when torch has none.

    Raises:
        ConversionError: parameters whose step count is not the state's, or without both moments, each by name.
    """
    named = dict(state.model.named_parameters())
    entries: dict[str, Mapping[str, torch.Tensor]] = {
        path: state.optimizer.state.get(p, {}) for path, p in named.items()
    }
    if state.step == 0 and not any(entries.values()):
        m, v = ({path: np.zeros_like(to_numpy(p)) for path, p in named.items()} for _ in "mv")
        return AdamMoments(m, v, 0)
    problems = []
    for path, entry in entries.items():
        problems += [f"{path}: no {slot}" for slot in ("step", "exp_avg", "exp_avg_sq") if slot not in entry]
        if "step" in entry and float(entry["step"]) != state.step:
            problems.append(f"{path}: step {float(entry['step']):g}, the run's is {state.step}")
    if problems:
        raise ConversionError(
            f"AdamW's state is not that of {len(named)} parameters after {state.step} steps:\n"
            + "\n".join(problems)
        )
    m, v = ({path: to_numpy(e[slot]) for path, e in entries.items()} for slot in ("exp_avg", "exp_avg_sq"))
    return AdamMoments(m, v, state.step)


def moments_to_torch(config: ModelConfig, moments: AdamMoments) -> AdamMoments:
    """jaxlm's moments in torchref's names and layouts. Raises ConversionError, as `train_state_to_torch`."""
    return AdamMoments(**_convert(config, {"m": moments.m, "v": moments.v}), step=moments.step)


def moments_to_jax(config: ModelConfig, moments: AdamMoments) -> AdamMoments:
    """torchref's moments in jaxlm's names and layouts. Raises ConversionError, as `train_state_to_jax`."""
    return AdamMoments(**_convert(config, {"m": moments.m, "v": moments.v}, inverse=True), step=moments.step)


def train_state_to_torch(
    run: RunConfig,
    state: train.TrainState,
    backends: Backends = Backends(),
    device: torch.device | str = "cpu",
) -> twin_train.TrainState:
    """jaxlm's state as the twin's, in tensors of its own: weights, m, v, step and seed, bit for bit.

    Raises:
        ConversionError: names every weight and moment that is missing, misshapen or not of this model.
    """
    moments = jax_moments(state)
    flat = _convert(run.model, {"weights": from_jax(state.params), "m": moments.m, "v": moments.v})
    with torch.device("meta"):
        model = Decoder(run.model, backends, rngs=None, remat=run.train.remat)
    load_torch(model, flat["weights"])
    model = model.to(device)
    optimizer = twin_optim.make_optimizer(run.optim, model)
    counter = device if optimizer.defaults["fused"] else "cpu"  # where torch itself keeps its step counts
    for path, p in model.named_parameters():
        optimizer.state[p] = {
            "step": torch.tensor(float(moments.step), device=counter),
            "exp_avg": to_tensor(flat["m"][path]).to(device),
            "exp_avg_sq": to_tensor(flat["v"][path]).to(device),
        }
    return twin_train.TrainState(moments.step, model, optimizer, int(state.seed))


def train_state_to_jax(
    run: RunConfig, state: twin_train.TrainState, mesh: Mesh | None = None
) -> train.TrainState:
    """The twin's state as jaxlm's, in arrays of its own, on a mesh or on one device: all of it bit for bit.

    Raises:
        ConversionError: names every weight and moment that is missing, misshapen or not of this model, and every
            parameter whose step count is not the run's; or the state is float64 and jax would narrow it.
    """
    moments = torch_moments(state)
    flat = _convert(
        run.model, {"weights": from_torch(state.model), "m": moments.m, "v": moments.v}, inverse=True
    )
    wide = any(value.dtype == np.float64 for part in flat.values() for value in part.values())
    if wide and not jax.config.jax_enable_x64:
        raise ConversionError("the state holds float64: set JAX_ENABLE_X64=1, or jax would narrow it")
    # Copies: jax may take over a host array as it is, and torch goes on writing to its own.
    weights, m, v = (
        {path: value.copy() for path, value in flat[name].items()} for name in ("weights", "m", "v")
    )
    links = jax.eval_shape(optim.make_optimizer(run.optim).init, weights)
    opt_state = tuple(optim.AdamState(m, v) if isinstance(s, optim.AdamState) else s for s in links)
    parts: Any = (np.asarray(moments.step, np.int32), weights, opt_state, np.asarray(state.seed, np.uint32))
    host = train.TrainState(*parts)
    if mesh is None:
        return jax.tree.map(jnp.asarray, host)
    return jax.device_put(host, train.state_shardings(run, mesh, abstract_model(run.model)))


def _convert(config: ModelConfig, parts: Mapping[str, Flat], inverse: bool = False) -> dict[str, Flat]:
    """Every part by the one table. Raises one ConversionError with the problems of all parts."""
    converted, problems = {}, []
    for name, flat in parts.items():
        try:
            converted[name] = to_jax(config, flat) if inverse else to_torch(config, flat)
        except ConversionError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ConversionError("\n".join(problems))
    return converted
