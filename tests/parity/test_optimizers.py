"""Every optimizer and schedule in both frameworks: 50 float64 steps of the training step, and 8 bits to the bit."""

import dataclasses
import functools
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from helpers import (  # noqa: E402
    QUICK,
    assert_close,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from tolerances import tolerance  # noqa: E402

import jaxlm.guard  # noqa: E402
import jaxlm.moments8  # noqa: E402
import jaxlm.muon  # noqa: E402
import jaxlm.optim  # noqa: E402
import jaxlm.train  # noqa: E402
import torchref.guard  # noqa: E402
import torchref.moments8  # noqa: E402
import torchref.muon  # noqa: E402
import torchref.optim  # noqa: E402
import torchref.train  # noqa: E402
from convert.native import build_torch, to_jax  # noqa: E402
from convert.optstate import jax_moments, moments_to_jax, torch_moments  # noqa: E402
from convert.tree import from_jax, from_torch  # noqa: E402
from jaxlm.config import InputError, LogConfig, RunConfig  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from torchref.checkpoint import load_training, save_training  # noqa: E402

pytestmark = pytest.mark.torch

STEPS = 50
DENSE = tiny(n_layers=1, qkv_bias=True)
MOE = tiny({"expert_bias": True, "shared_d_ff": 12}, n_layers=1, tied=True)
WIDE = tiny(n_layers=1, d_model=64, d_ff=256)  # most of its weights are large enough for 8 bits
POLICY = (".*mlp.*:lr=0.3,decay=2", "embed.weight:decay=1,lr=2", r".*\.q_proj\.weight:optimizer=adamw")
BATCHES = [hard_batch(seed=s) for s in range(3)]


class Walk(NamedTuple):
    """Both frameworks at one step."""

    run: RunConfig
    jax: jaxlm.train.TrainState
    torch: torchref.train.TrainState


def a_run(model: Any, **optim: Any) -> RunConfig:
    """A clip that is active now and then, a warmup and a decay that ends before the steps do."""
    run = tiny_run(model, {"decay_steps": 45, "warmup_steps": 5, "clip_norm": 0.3} | optim, steps=STEPS)
    return dataclasses.replace(run, log=LogConfig(details=False))


def begin(run: RunConfig) -> Walk:
    """Random weights in both frameworks."""
    params = random_params(run.model)
    here = {path: jnp.asarray(p) for path, p in params.items()}
    ours = jaxlm.train.TrainState(
        jnp.zeros((), jnp.int32),
        here,
        jaxlm.optim.make_optimizer(run.optim).init(here),
        jnp.zeros((), jnp.uint32),
        jaxlm.guard.init_guard(run),
    )
    module = build_torch(run.model, params)
    optimizer = torchref.optim.make_optimizer(run.optim, module)
    return Walk(run, ours, torchref.train.TrainState(0, module, optimizer, 0, torchref.guard.init_guard(run)))


def compiled(run: RunConfig) -> Callable[..., Any]:
    """jaxlm's step, compiled quickly and once for all schedules: they reach it as numbers."""
    same = {"schedule": "cosine", "warmup_steps": 5, "decay_steps": 45}
    return _compiled(dataclasses.replace(run, optim=dataclasses.replace(run.optim, **same)))


@functools.lru_cache
def _compiled(run: RunConfig) -> Callable[..., Any]:
    numbers = jaxlm.optim.as_arrays(jaxlm.optim.scalars(run.optim, 0), np.float64)
    step = jaxlm.train.make_train_step(run, backends=Backends(experts="loop"))
    return step.lower(begin(run).jax, BATCHES[0], numbers).compile(QUICK)


def go(walk: Walk) -> Walk:
    """So many steps in both, every loss within the gate."""
    run, ours, theirs = walk
    other, scales = torchref.train.make_train_step(run), []
    step = compiled(run)
    for s in range(STEPS):
        batch = BATCHES[s % 3]
        numbers = jaxlm.optim.as_arrays(jaxlm.optim.scalars(run.optim, s), np.float64)
        ours, here = step(ours, jax.device_put(batch), numbers)
        theirs, there = other(theirs, torchref.train.place_batch(batch), torchref.optim.scalars(run.optim, s))
        assert relative_error(here["loss"], there["loss"].numpy()) <= tolerance("f64"), f"step {s}"
        assert relative_error(here["lr"], there["lr"].numpy()) <= tolerance("f64"), f"step {s}"
        scales.append(float(here["clip_scale"]))
    assert min(scales) < 1
    return Walk(run, ours, theirs)


def assert_together(walk: Walk) -> None:
    """Parameters and moments within the gate, codes of 8 bits equal."""
    run, ours, theirs = walk
    limit = tolerance("f64_state")
    assert_close(
        tree_errors(from_jax(ours.params), to_jax(run.model, from_torch(theirs.model))), limit, "weights"
    )
    here, there = jax_moments(ours), moments_to_jax(run.model, torch_moments(theirs), run.optim)
    for name in ("m", "v"):
        a, b = getattr(here, name), getattr(there, name)
        assert_close(tree_errors(a, b), limit, name)
        codes = [path for path in a if path.endswith(".codes")]
        assert all(np.array_equal(a[path], b[path]) for path in codes)
        assert bool(codes) == (run.optim.optimizer == "adamw8bit")


CASES = {
    "muon": (DENSE, {"optimizer": "muon"}),
    "muon on experts": (MOE, {"optimizer": "muon", "muon_scale": "original", "muon_nesterov": False}),
    "bfloat16 moments": (DENSE, {"moment_dtype": "bfloat16"}),
    "muon with a policy": (DENSE, {"optimizer": "muon", "policy": POLICY, "muon_steps": 4}),
    "8 bits": (WIDE, {"optimizer": "adamw8bit"}),
    "bfloat16 momentum on experts": (MOE, {"optimizer": "muon", "moment_dtype": "bfloat16"}),
}
SLOW = {"muon", "muon with a policy", "bfloat16 momentum on experts"}  # what the others say of another model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def test_fifty_steps_in_both_frameworks(name: str, x64: None) -> None:
    """Losses, weights and moments of a dense and of a MoE decoder."""
    model, optim = CASES[name]
    walk = begin(a_run(model, **optim))
    before = from_jax(walk.jax.params)
    walk = go(walk)
    assert_together(walk)
    moved = tree_errors(from_jax(walk.jax.params), before)
    assert min(moved.values()) > 1e-3, "a parameter stands still"


def test_fifty_steps_under_every_schedule(x64: None) -> None:
    """Losses, rates, weights and moments; and no two schedules are one."""
    ends = set()
    for schedule in ("cosine", "linear", "wsd", "constant"):
        walk = go(begin(a_run(DENSE, schedule=schedule)))
        assert_together(walk)
        ends.add(np.asarray(walk.jax.params["lm_head.weight"]).tobytes())
    assert len(ends) == 4


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(16, 512), (80, 96), (5000,), (3, 40, 72)])
def test_eight_bits_are_equal_in_both_frameworks(shape: tuple[int, ...], signed: bool) -> None:
    """Codes, absmax and values, for weights that jaxlm keeps the other way round."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 0, shape)).astype(np.float32)
    x = x if signed else np.abs(x)
    theirs = torchref.moments8.quantize(torch.from_numpy(x), signed)
    there = [*theirs, torchref.moments8.dequantize(theirs, signed)]
    transposed = x.ndim > 1

    def both_ways(x: jax.Array) -> tuple[jax.Array, ...]:
        made = jaxlm.moments8.quantize(x, signed, transposed)
        return *made, jaxlm.moments8.dequantize(made, signed, transposed)

    ours = quick_jit(both_ways)(x.swapaxes(-1, -2) if transposed else x)
    for a, b in zip(ours, there, strict=True):
        a = np.asarray(a)
        np.testing.assert_array_equal(a.swapaxes(-1, -2) if transposed and a.ndim > 1 else a, b.numpy())
    fresh = torchref.moments8.zeros(shape)
    assert [x.shape for x in fresh] == [x.shape for x in theirs] and not fresh.codes.any()


def test_the_written_out_adamw_is_torchs(x64: None) -> None:
    """A rate of its own for one bias sends every parameter to PolicyOptimizer; a factor of one changes nothing."""
    run = a_run(DENSE)
    walks = [begin(run), begin(run)]
    plain, own = (walk.torch for walk in walks)
    own = own._replace(optimizer=_by_policy(own))
    assert isinstance(plain.optimizer, torch.optim.AdamW)
    step = torchref.train.make_train_step(run)
    for s in range(STEPS):
        for i, state in enumerate((plain, own)):
            numbers = torchref.optim.scalars(run.optim, s)
            moved, _ = step(state, torchref.train.place_batch(BATCHES[s % 3]), numbers)
            plain, own = (moved, own) if i == 0 else (plain, moved)
    assert_close(tree_errors(from_torch(own.model), from_torch(plain.model)), tolerance("f64_state"))


def _by_policy(state: torchref.train.TrainState) -> torchref.optim.PolicyOptimizer:
    """An optimizer with the same groups."""
    named = {id(p): path for path, p in state.model.named_parameters()}
    groups = [
        {
            "params": group["params"],
            "names": [named[id(p)] for p in group["params"]],
            "optimizer": "adamw",
            "lr_factor": 1.0,
            "weight_decay": group["weight_decay"],
        }
        for group in state.optimizer.param_groups
    ]
    return torchref.optim.PolicyOptimizer(groups, a_run(DENSE).optim)


@pytest.mark.parametrize("steps", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_bits_learn_as_wide_moments_do(steps: int, x64: None) -> None:
    """From the same weights, on few batches that are learned by heart: every loss within a percent of AdamW's."""
    losses: dict[str, list[float]] = {"adamw": [], "adamw8bit": []}
    for optimizer, found in losses.items():
        run = a_run(WIDE, optimizer=optimizer, decay_steps=steps, schedule="linear")
        step, state = compiled(run), begin(run).jax
        for s in range(steps):
            numbers = jaxlm.optim.as_arrays(jaxlm.optim.scalars(run.optim, s), np.float64)
            state, metrics = step(state, jax.device_put(BATCHES[s % 3]), numbers)
            found.append(float(metrics["loss"]))
    wide, narrow = (np.asarray(found) for found in losses.values())
    assert wide[-3:].mean() < 0.8 * wide[:3].mean(), "nothing was learned"
    assert np.abs(narrow / wide - 1).max() <= tolerance("eight_bit_loss")
    assert np.any(narrow != wide)


@pytest.mark.parametrize("name", ["muon on experts", "8 bits"])
def test_the_reference_saves_and_restores_every_state(name: str, tmp_path: Path, x64: None) -> None:
    """Bit for bit through optimizer.safetensors; another optimizer's file is refused in one line."""
    model, optim = CASES[name]
    run = a_run(model, **optim)
    state, step = begin(run).torch, torchref.train.make_train_step(run)
    for s in range(2):
        state, _ = step(state, torchref.train.place_batch(BATCHES[s]), torchref.optim.scalars(run.optim, s))
    save_training(state, tmp_path, {})
    back, _ = load_training(torchref.train.init_state(run), tmp_path)

    def told(state: Any) -> dict[str, Any]:
        tensors = torchref.optim.state_tensors(state.model, state.optimizer)
        counts = {k: float(state.optimizer.state[p]["step"]) for k, p in state.model.named_parameters()}
        return {k: (str(x.dtype), x.tolist()) for k, x in tensors.items()} | counts

    assert told(back) == told(state)
    with pytest.raises(InputError, match="tensors of the optimizer do not fit, first ") as caught:
        load_training(torchref.train.init_state(a_run(model)), tmp_path)
    assert "\n" not in str(caught.value)


SHAPES = {
    "embed.weight": (9, 6),
    "blocks.0.attn.q_proj.weight": (6, 12),
    "blocks.0.mlp.down_proj.weight": (256, 20),
    "blocks.0.moe.experts.gate_up": (2, 6, 16),
    "final_norm.weight": (6,),
}


class Node(torch.nn.Module):
    """Parameters by dotted path, without a model."""

    def add(self, path: str, value: np.ndarray) -> None:
        """Puts one where its path says."""
        here, *deeper = path.split(".", 1)
        if not deeper:
            self.register_parameter(here, torch.nn.Parameter(torch.from_numpy(value)))
            return
        if here not in self._modules:
            self.add_module(here, Node())
        self.get_submodule(here).add(deeper[0], value)


def apart(**optim: Any) -> float:
    """Largest relative difference of a parameter after three updates of the optimizers alone."""
    config = a_run(DENSE, clip_norm=0.0, **optim).optim
    rng = np.random.default_rng(0)
    params, *steps = ({k: rng.standard_normal(s) for k, s in SHAPES.items()} for _ in range(4))

    def there(path: str, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.swapaxes(-1, -2)) if x.ndim > 1 and path != "embed.weight" else x.copy()

    module = Node()
    for path, p in params.items():
        module.add(path, there(path, p))
    optimizer, chain = torchref.optim.make_optimizer(config, module), jaxlm.optim.make_optimizer(config)
    state, update = chain.init(params), quick_jit(chain.update)
    for s, grads in enumerate(steps):
        numbers = jaxlm.optim.as_arrays(jaxlm.optim.scalars(config, s), np.float64)
        changes, state = update(grads, state, params, scalars=numbers)
        params = {path: p + changes[path] for path, p in params.items()}
        for group in optimizer.param_groups:
            group["lr"] = torchref.optim.learning_rate(config, s)
        for path, p in module.named_parameters():
            p.grad = torch.from_numpy(there(path, grads[path]))
        optimizer.step()
    ends = {path: there(path, np.asarray(p)) for path, p in params.items()}
    return max(tree_errors({k: p.detach().numpy() for k, p in module.named_parameters()}, ends).values())


EIGHT, NARROW = {"optimizer": "adamw8bit"}, {"moment_dtype": "bfloat16"}
MUON = {"optimizer": "muon", "muon_scale": "original"}
FAULTS: dict[str, tuple[dict[str, Any], str, Callable[[Any], Any]]] = {
    "another coefficient": (MUON, "jaxlm.muon.COEFFICIENTS", lambda old: (*old[:2], 2.0316)),
    "gate and up as one": (MUON, "jaxlm.muon.direction", lambda old: lambda c, g, m, halves: old(c, g, m, 1)),
    "in and out exchanged": (MUON, "jaxlm.muon.update_scale", lambda old: lambda k, i, o: old(k, o, i)),
    "iteration in float32": (
        MUON,
        "jaxlm.muon.orthogonalize",
        lambda old: lambda x, steps: old(x.astype(jnp.float32), steps),
    ),
    "Nesterov forgotten": (
        MUON,
        "torchref.muon.direction",
        lambda old: lambda c, *rest: old(dataclasses.replace(c, muon_nesterov=False), *rest),
    ),
    "Muon without decay": (MUON, "torchref.optim.decays", lambda old: lambda config, path: False),
    "v with a sign": (
        EIGHT,
        "jaxlm.optim._kept",
        lambda old: lambda m, b, path, signed: old(m, b, path, True),
    ),
    "blocks along the outputs": (EIGHT, "jaxlm.optim._transposed", lambda old: lambda path: False),
    "the wrong half of the points": (EIGHT, "torchref.moments8.POINTS", lambda old: old // 2),
    "moments never rounded": (
        NARROW,
        "jaxlm.optim._no_moment",
        lambda old: lambda config, plan, path, p: jnp.zeros(p.shape, p.dtype),
    ),
    "moments cut, not rounded": (
        NARROW,
        "torchref.optim._to_bfloat16",
        lambda old: lambda x: (x.view(torch.int64) & -(2**45)).view(torch.float64).to(torch.bfloat16),
    ),
}


@pytest.mark.parametrize("optim", [MUON, EIGHT, NARROW], ids=["muon", "8 bits", "bfloat16"])
def test_the_optimizers_alone_agree(optim: dict[str, Any], x64: None) -> None:
    """Three updates of a few parameters, without a model around them."""
    assert apart(**optim) <= tolerance("f64_state")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str, x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above goes red on each of them."""
    optim, target, change = FAULTS[name]
    monkeypatch.setattr(target, change(pkgutil.resolve_name(target)))
    for cached in (jaxlm.moments8._places, torchref.moments8._places):
        cached.cache_clear()
    try:
        assert apart(**optim) > tolerance("f64_state")
    finally:
        for cached in (jaxlm.moments8._places, torchref.moments8._places):
            cached.cache_clear()
