"""Optimizer state across the frameworks: the optax chain's moments <-> those of torchref's optimizer, bit for bit.

m, v and weights of one parameter have the same layout, so the table of convert.native moves all three; Muon's momentum
is an m without a v, and moments in 8 bits are codes in the parameter's layout with their absmax. optax keeps one step
count for everything, torch one per parameter: they must agree, or the state has no counterpart here.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh

from convert.guard_state import guard_to_jax, guard_to_torch
from convert.native import pairs, to_jax, to_torch
from convert.rules import SAME, ConversionError, Pair, convert
from convert.tree import Flat, from_jax, from_torch, load_torch, to_numpy, to_tensor
from jaxlm import optim, train
from jaxlm.config import ModelConfig, OptimConfig, RunConfig
from jaxlm.model import abstract_model
from jaxlm.moments8 import Moment8
from torchref import optim as twin_optim
from torchref import train as twin_train
from torchref.layers import Backends
from torchref.model import Decoder

_ADAMW = OptimConfig()
# Entry of a parameter in torch's optimizer -> m or v, and what follows the path where one moment is two arrays.
_SLOTS = {
    twin_optim.M: ("m", ""),
    f"{twin_optim.M}_codes": ("m", ".codes"),
    f"{twin_optim.M}_absmax": ("m", ".absmax"),
    twin_optim.MOMENTUM: ("m", ""),
    twin_optim.V: ("v", ""),
    f"{twin_optim.V}_codes": ("v", ".codes"),
    f"{twin_optim.V}_absmax": ("v", ".absmax"),
}


class AdamMoments(NamedTuple):
    """The optimizer's state as host arrays by parameter path, in one framework's names and layouts.

    A moment in 8 bits is two arrays, PATH.codes and PATH.absmax.
    """

    m: Flat  # running mean of the gradients, torch's exp_avg; Muon's momentum
    v: Flat  # running mean of their squares, torch's exp_avg_sq; none for Muon
    step: int  # optimizer steps done, skipped updates among them


def jax_moments(state: train.TrainState) -> AdamMoments:
    """The moments inside jaxlm's state, gathered on the host."""
    m, v = optim.moments(state.opt_state)
    return AdamMoments(_host(m), _host(v), int(state.step))


def torch_moments(state: twin_train.TrainState) -> AdamMoments:
    """The moments inside torchref's state; zeros before the first step, when torch has none.

    Raises:
        ConversionError: parameters whose step count is not the state's, or without all their moments, each by name.
    """
    expected = twin_optim.expected_state(state.model, state.optimizer)
    named = dict(state.model.named_parameters())
    entries: dict[str, Mapping[str, torch.Tensor]] = {
        path: state.optimizer.state.get(p, {}) for path, p in named.items()
    }
    updates, found = state.step - state.guard.skipped, AdamMoments({}, {}, state.step)
    fresh, problems = updates == 0 and not any(entries.values()), []
    for path, entry in entries.items():
        slots = [slot for slot in expected[path] if slot != "step"]
        if not fresh:
            problems += [f"{path}: no {slot}" for slot in ("step", *slots) if slot not in entry]
        if "step" in entry and float(entry["step"]) != updates:
            problems.append(f"{path}: step {float(entry['step']):g}, the run's is {updates}")
        for slot in slots if fresh else [slot for slot in slots if slot in entry]:
            which, suffix = _SLOTS[slot]
            value = torch.zeros_like(expected[path][slot], device="cpu") if fresh else entry[slot]
            getattr(found, which)[path + suffix] = to_numpy(value)
    if problems:
        raise ConversionError(
            f"the optimizer's state is not that of {len(named)} parameters after {state.step} steps:\n"
            + "\n".join(problems)
        )
    return found


def moments_to_torch(
    config: ModelConfig, moments: AdamMoments, settings: OptimConfig = _ADAMW
) -> AdamMoments:
    """jaxlm's moments in torchref's names and layouts. Raises ConversionError, as `train_state_to_torch`."""
    parts = _convert(config, settings, {"m": moments.m, "v": moments.v})
    return AdamMoments(**parts, step=moments.step)


def moments_to_jax(config: ModelConfig, moments: AdamMoments, settings: OptimConfig = _ADAMW) -> AdamMoments:
    """torchref's moments in jaxlm's names and layouts. Raises ConversionError, as `train_state_to_jax`."""
    parts = _convert(config, settings, {"m": moments.m, "v": moments.v}, inverse=True)
    return AdamMoments(**parts, step=moments.step)


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
    parts = {"weights": from_jax(state.params), "m": moments.m, "v": moments.v}
    flat = _convert(run.model, run.optim, parts)
    with torch.device("meta"):
        model = Decoder(run.model, backends, rngs=None, remat=run.train.remat)
    load_torch(model, flat["weights"])
    model = model.to(device)
    optimizer = twin_optim.make_optimizer(run.optim, model)
    counter = device if optimizer.defaults["fused"] else "cpu"  # where torch itself keeps its step counts
    guard = guard_to_torch(state.guard)
    named = dict(model.named_parameters())
    for path, slots in twin_optim.expected_state(model, optimizer).items():
        entry = {"step": torch.tensor(float(moments.step - guard.skipped), device=counter)}
        for slot in slots:
            if slot != "step":
                which, suffix = _SLOTS[slot]
                entry[slot] = to_tensor(flat[which][path + suffix]).to(device)
        optimizer.state[named[path]] = entry
    return twin_train.TrainState(moments.step, model, optimizer, int(state.seed), guard)


def train_state_to_jax(
    run: RunConfig, state: twin_train.TrainState, mesh: Mesh | None = None
) -> train.TrainState:
    """The twin's state as jaxlm's, in arrays of its own, on a mesh or on one device: all of it bit for bit.

    Raises:
        ConversionError: names every weight and moment that is missing, misshapen or not of this model, and every
            parameter whose step count is not the run's; or the state is float64 and jax would narrow it.
    """
    moments = torch_moments(state)
    parts = {"weights": from_torch(state.model), "m": moments.m, "v": moments.v}
    flat = _convert(run.model, run.optim, parts, inverse=True)
    wide = any(value.dtype == np.float64 for part in flat.values() for value in part.values())
    if wide and not jax.config.jax_enable_x64:
        raise ConversionError("the state holds float64: set JAX_ENABLE_X64=1, or jax would narrow it")
    # Copies: jax may take over a host array as it is, and torch goes on writing to its own.
    weights, m, v = (
        {path: value.copy() for path, value in flat[name].items()} for name in ("weights", "m", "v")
    )
    links = jax.eval_shape(optim.make_optimizer(run.optim).init, weights)
    opt_state = tuple(_filled(link, m, v) for link in links)
    step, seed = np.asarray(moments.step, np.int32), np.asarray(state.seed, np.uint32)
    made: Any = (step, weights, opt_state, seed, guard_to_jax(state.guard))
    host = train.TrainState(*made)
    if mesh is None:
        return jax.tree.map(jnp.asarray, host)
    return jax.device_put(host, train.state_shardings(run, mesh))


def _host(slot: Mapping[str, Any]) -> Flat:
    found: Flat = {}
    for path, moment in slot.items():
        if isinstance(moment, Moment8):
            found |= {f"{path}.{name}": np.asarray(part) for name, part in moment._asdict().items()}
        else:
            found[path] = np.asarray(moment)
    return found


def _filled(link: Any, m: Flat, v: Flat) -> Any:
    """A link's state with these moments in the places of its shapes."""

    def slot(shapes: Mapping[str, Any], values: Flat) -> dict[str, Any]:
        return {
            path: Moment8(*(values[f"{path}.{name}"] for name in shape._fields))
            if isinstance(shape, Moment8)
            else values[path]
            for path, shape in shapes.items()
        }

    if isinstance(link, optim.AdamState):
        return optim.AdamState(slot(link.m, m), slot(link.v, v))
    return optim.MuonState(slot(link.momentum, m)) if isinstance(link, optim.MuonState) else link


def _moment_pairs(config: ModelConfig, settings: OptimConfig) -> Iterator[tuple[str, list[Pair]]]:
    """The table of the weights applied to m and to v, whatever the model's size."""
    state = jax.eval_shape(optim.make_optimizer(settings).init, abstract_model(config).shapes)
    for slot, kept in optim.moments(state)._asdict().items():
        found = []
        for pair in pairs(config):
            moment = kept.get(pair.path)
            if isinstance(moment, Moment8):
                rows = tuple(moment.absmax.shape)
                one = SAME if len(rows) == 1 else pair.transform
                absmax = Pair(f"{pair.path}.absmax", rows, f"{pair.other}.absmax", one)
                codes = dataclasses.replace(pair, path=f"{pair.path}.codes", other=f"{pair.other}.codes")
                found += [codes, dataclasses.replace(absmax, index=tuple(slice(None) for _ in rows))]
            elif moment is not None:
                found.append(pair)
        yield slot, found


def _convert(
    config: ModelConfig, settings: OptimConfig, parts: Mapping[str, Flat], inverse: bool = False
) -> dict[str, Flat]:
    """Every part by the one table. Raises one ConversionError with the problems of all parts."""
    converted, problems, tables = {}, [], dict(_moment_pairs(config, settings))
    for name, flat in parts.items():
        try:
            if name in tables:
                converted[name] = convert(tables[name], flat, inverse)
            else:
                converted[name] = to_jax(config, flat) if inverse else to_torch(config, flat)
        except ConversionError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ConversionError("\n".join(problems))
    return converted
