"""Two modules on one call: their activations, loss, gradients and AdamW steps, told in JAX's names and layouts."""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import jaxlm.optim
import torchref.optim
from convert.parity.compare import norm
from convert.parity.limits import limit
from convert.parity.recording import WHOLE, Record, leaves, module_of, record_torch, recording
from convert.parity.sides import Optimized, Programs
from convert.parity.steps import K
from convert.rules import SAME, Pair, Rule, Transform, convert
from convert.tree import Flat, from_jax, from_torch, to_numpy, to_tensor
from jaxlm.config import InputError, OptimConfig
from jaxlm.model import Split, merge_model

Inputs = Sequence[Any] | Mapping[str, Any]
Loss = Callable[[Any], Any]
Decays = Callable[[str, tuple[int, ...]], bool]


class Call(NamedTuple):
    """The arguments of one call: arrays by name, "input[0]" or "input[mask]", and what is no array beside them."""

    arrays: dict[str, Any]
    others: dict[str, Any]

    @classmethod
    def of(cls, inputs: Inputs) -> "Call":
        """Positional from a sequence, by name from a mapping; floats widened to double."""
        if not isinstance(inputs, Mapping | list | tuple):
            raise InputError(
                f"inputs is a {type(inputs).__name__}; give a list of arrays, or a dict by argument name"
            )
        parts = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
        named: dict[str, Any] = {f"<input>[{key}]": value for key, value in parts}
        plain = {k: x for k, x in named.items() if isinstance(x, bool | int | float | str | None)}
        return cls({k: _wide(x) for k, x in named.items() if k not in plain}, plain)

    def arguments(self, arrays: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments with these arrays in the places of its own."""
        named = {k.removeprefix("<input>[")[:-1]: v for k, v in {**self.others, **arrays}.items()}
        args = [named[k] for k in sorted((k for k in named if k.isdigit()), key=int)]
        return args, {k: v for k, v in named.items() if not k.isdigit()}

    def perturbed(self, step: int) -> dict[str, Any]:
        """Arrays of a later step: floats with a tenth of their spread as noise, integers with rows exchanged."""

        def moved(x: np.ndarray) -> np.ndarray:
            rng = np.random.default_rng(step)  # of each array anew: ids and their positions move together
            if not step or not x.ndim or x.dtype.kind == "b":
                return x
            if x.dtype.kind in "iu":
                return x[rng.permutation(len(x))]
            return x + 0.1 * x.std() * rng.standard_normal(x.shape)

        return {name: moved(x) for name, x in self.arrays.items()}


def _wide(x: Any) -> np.ndarray:
    x = to_numpy(x) if isinstance(x, torch.Tensor) else np.asarray(x)
    return x if x.dtype.kind in "iub" else x.astype(np.float64)


def widen(model: nnx.Module) -> list[str]:
    """Makes a module compute in double where flax's attribute `dtype` would narrow it; nnx.Embed always has one.

    Returns the paths that had asked for something narrower.
    """
    narrow = [
        (path, part)
        for path, part in nnx.iter_modules(model)
        if getattr(part, "dtype", None) is not None and jnp.issubdtype(part.dtype, jnp.floating)
    ]
    for _, part in narrow:
        part.dtype = jnp.float64
    return [".".join(map(str, path)) for path, _ in narrow]


@dataclass
class Two:
    """Both modules on one call, and what was computed of them so far. Everything is in JAX's names and layouts."""

    split: Split  # of the JAX module, parameters in double
    module: torch.nn.Module
    pairs: list[Pair]
    layers: Sequence[Rule]
    call: Call
    loss: tuple[Loss, Loss] | None
    optim: OptimConfig | None
    decays: Decays
    steps: int
    programs: Programs = field(default_factory=Programs)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def model(self, params: Any) -> nnx.Module:
        """The JAX module in evaluation mode; cheap, meant to run inside jit."""
        model = merge_model(self.split.graphdef, params)
        model.eval()
        widen(model)
        return model

    @cached_property
    def partners(self) -> dict[str, str]:
        """Module path here -> there, as far as the rules of the parameters tell: the same depth, one answer only."""
        found: dict[str, set[str]] = {}
        for pair in self.pairs:
            here, there = pair.path.split(".")[:-1], pair.other.split(".")[:-1]
            if here and there:
                found.setdefault(".".join(here), set()).add(".".join(there))
            if len(here) == len(there):
                for depth in range(1, len(here)):
                    found.setdefault(".".join(here[:depth]), set()).add(".".join(there[:depth]))
        return {path: others.pop() for path, others in found.items() if len(others) == 1}

    def partner(self, name: str) -> tuple[str, Transform]:
        """The name there of an activation, input or output, and the layout; "" where it is not to be compared."""
        path = module_of(name)
        rest = name[len(path) :]
        hits = [(rule, match) for rule in self.layers if (match := re.fullmatch(rule.source, path))]
        if len(hits) > 1:
            raise InputError(f"{path}: {len(hits)} rules of layers match, expected at most one")
        if hits:
            target = hits[0][1].expand(hits[0][0].target)
            return (target + rest if target else ""), hits[0][0].transform
        return self.partners.get(path, path) + rest, SAME

    def torch_arguments(self, arrays: Mapping[str, np.ndarray]) -> tuple[list[Any], dict[str, Any]]:
        """The call in torch's layout; integers as torch indexes with them."""
        tensors = {name: to_tensor(self.partner(name)[1](x)) for name, x in arrays.items()}
        wide = {
            k: x if x.is_floating_point() or x.dtype == torch.bool else x.long() for k, x in tensors.items()
        }
        return self.call.arguments(wide)

    @cached_property
    def records(self) -> tuple[Record, Record]:
        """All submodules' outputs of both sides, as numpy."""
        order: list[str] = []

        def forward(params: Any, arrays: Any) -> Record:
            model = self.model(params)
            args, kwargs = self.call.arguments(arrays)
            with recording(model) as record:
                model(*args, **kwargs)
            order[:] = record.outputs  # a dict comes back from jit in the order of its keys
            return record

        found = self.programs("record", forward, self.split.params, self.call.arrays)
        outputs = {name: np.asarray(found.outputs[name]) for name in order}
        ours = Record(outputs, {k: [np.asarray(x) for x in xs] for k, xs in found.inputs.items()})
        args, kwargs = self.torch_arguments(self.call.arrays)
        return ours, record_torch(self.module, args, kwargs)

    @cached_property
    def cotangents(self) -> dict[str, np.ndarray]:
        """One fixed random array for each floating output."""
        rng, ours = np.random.default_rng(0), self.records[0].outputs
        whole = {name: x for name, x in ours.items() if module_of(name) == WHOLE}
        return {k: rng.standard_normal(x.shape) for k, x in whole.items() if x.dtype.kind == "f"}

    def jax_loss(self, params: Any, arrays: Any) -> Any:
        """The loss of JAX's outputs; by default their inner product with the cotangents."""
        args, kwargs = self.call.arguments(arrays)
        result: Any = self.model(params)(*args, **kwargs)
        if self.loss:
            return self.loss[0](result)
        found = leaves(WHOLE, result)
        return sum((jnp.vdot(c, found[k]) for k, c in self.cotangents.items()), jnp.zeros(()))

    def torch_loss(self, module: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
        """The loss of torch's outputs."""
        args, kwargs = self.torch_arguments(arrays)
        result = module(*args, **kwargs)
        if self.loss:
            return self.loss[1](result)
        found, terms = leaves(WHOLE, result), []
        for name, c in self.cotangents.items():
            other, layout = self.partner(name)
            terms.append((to_tensor(layout(c)) * found[other or name]).sum())
        return torch.stack(terms).sum()

    @cached_property
    def gradients(self) -> tuple[tuple[Any, Flat], tuple[Any, Flat]]:
        """Loss and gradients of both sides."""
        value, grads = self.programs(
            "gradients", jax.value_and_grad(self.jax_loss), self.split.params, self.call.arrays
        )
        loss, found = _torch_gradients(self.module, partial(self.torch_loss, arrays=self.call.arrays))
        return (np.asarray(value), from_jax(grads)), (to_numpy(loss), self.here(found))

    def here(self, flat: Flat) -> Flat:
        """Torch's tensors in JAX's names and layouts."""
        return convert(self.pairs, flat, inverse=True)

    @cached_property
    def zero(self) -> set[str]:
        """Parameters whose gradient is zero but for rounding on both sides: an optimizer moves them by rounding."""
        (_, ours), (_, theirs) = self.gradients
        whole = max(math.sqrt(sum(norm(g) ** 2 for g in side.values())) for side in (ours, theirs))
        bound = limit("float64_zero") * whole
        return {k for k in ours if max(norm(ours[k]), norm(theirs[k])) <= bound}

    @cached_property
    def order(self) -> list[str]:
        """Parameters as the backward pass meets them: those of the module that ran last come first."""
        ran = {module_of(name): i for i, name in enumerate(self.records[0].outputs)}
        return sorted(self.split.params, key=lambda p: -ran.get(p.rpartition(".")[0] or WHOLE, len(ran)))

    @cached_property
    def course(self) -> "Course":
        """Both trajectories, over one order of perturbed inputs."""
        optim = self.optim or self._small_steps()
        marks = {1, min(K, self.steps), self.steps}
        return Course(_jax_steps(self, optim, marks), _torch_steps(self, optim, marks))

    def _small_steps(self) -> OptimConfig:
        """Warmup, decay to the end, a clip that is active at the start, a rate at which no model turns chaotic."""
        whole = math.sqrt(sum(norm(g) ** 2 for g in self.gradients[0][1].values()))
        return OptimConfig(
            lr=1e-3, min_lr=1e-4, warmup_steps=2, decay_steps=max(self.steps, 3), clip_norm=0.7 * whole
        )


class Way(NamedTuple):
    """One side's trajectory: losses and clipped norms of every step, the optimizer at the marked ones."""

    losses: list[float]
    norms: list[float]
    at: dict[int, Optimized]


class Course(NamedTuple):
    """The trajectories of both sides."""

    ours: Way
    theirs: Way


def _torch_gradients(module: torch.nn.Module, loss: Callable[[Any], Any]) -> tuple[torch.Tensor, Flat]:
    named = dict(module.named_parameters())
    value = loss(module)
    found = torch.autograd.grad(value, list(named.values()), materialize_grads=True, allow_unused=True)
    return value.detach(), {path: to_numpy(g) for path, g in zip(named, found, strict=True)}


def _jax_steps(two: Two, optim: OptimConfig, marks: set[int]) -> Way:
    links = [jaxlm.optim.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    shapes = {path: value.shape for path, value in two.split.params.items()}
    adamw = jaxlm.optim.scale_by_exact_adamw(optim, lambda _, path: two.decays(path, shapes[path]))
    optimizer = optax.chain(*links, adamw)

    def step(params: Any, state: Any, arrays: Any, scalars: Any) -> tuple[Any, ...]:
        loss, grads = jax.value_and_grad(two.jax_loss)(params, arrays)
        updates, state = optimizer.update(grads, state, params, scalars=scalars)
        return optax.apply_updates(params, updates), state, loss, jaxlm.optim.global_norm(grads)

    params: Any = two.split.params
    state, way = optimizer.init(params), Way([], [], {0: Optimized(from_jax(params), {}, {}, 0)})
    for s in range(two.steps):
        scalars = jaxlm.optim.as_arrays(jaxlm.optim.scalars(optim, s), np.float64)
        params, state, loss, whole = two.programs("step", step, params, state, two.call.perturbed(s), scalars)
        way.losses.append(float(loss))
        way.norms.append(float(whole))
        if s + 1 in marks:
            m, v = jaxlm.optim.moments(state)
            way.at[s + 1] = Optimized(from_jax(params), from_jax(m), from_jax(v), s + 1)
    return way


def _torch_steps(two: Two, optim: OptimConfig, marks: set[int]) -> Way:
    module = copy.deepcopy(two.module)
    named = dict(module.named_parameters())
    here = {pair.other: (pair.path, pair.shape) for pair in two.pairs}
    optimizer = torchref.optim.make_optimizer(optim, module, lambda _, path: two.decays(*here[path]))
    way = Way([], [], {0: Optimized(_copied(two, from_torch(module)), {}, {}, 0)})
    for s in range(two.steps):
        loss, grads = _torch_gradients(module, partial(two.torch_loss, arrays=two.call.perturbed(s)))
        whole = torchref.optim.global_norm([to_tensor(g) for g in grads.values()])
        scale = torchref.optim.clip_scale(whole, optim.clip_norm)
        for path, parameter in named.items():
            parameter.grad = to_tensor(grads[path]) * scale
        for group in optimizer.param_groups:
            group["lr"] = torchref.optim.learning_rate(optim, s)
        optimizer.step()
        way.losses.append(float(loss))
        way.norms.append(float(whole))
        if s + 1 in marks:
            m, v = (
                _copied(two, {k: to_numpy(x) for k, x in slot.items()})
                for slot in torchref.optim.moments(module, optimizer)
            )
            way.at[s + 1] = Optimized(_copied(two, from_torch(module)), m, v, s + 1)
    return way


def _copied(two: Two, flat: Flat) -> Flat:
    return {path: value.copy() for path, value in two.here(flat).items()}
