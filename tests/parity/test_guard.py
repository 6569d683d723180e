"""The guard and the vitals of both frameworks: the same verdicts, scales and numbers, step by step, on any mesh."""

import math
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from helpers import (  # noqa: E402
    QUICK,
    assert_close,
    float64,
    hard_batch,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from tolerances import tolerance  # noqa: E402

from convert.guard_state import guard_to_jax, guard_to_torch  # noqa: E402
from convert.native import build_torch, to_jax  # noqa: E402
from convert.tree import from_torch  # noqa: E402
from jaxlm import guard, optim, train  # noqa: E402
from jaxlm.config import MeshConfig, RunConfig  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from jaxlm.sharding import make_mesh  # noqa: E402
from torchref import guard as twin_guard  # noqa: E402
from torchref import optim as twin_optim  # noqa: E402
from torchref import train as twin  # noqa: E402

pytestmark = pytest.mark.torch

STEPS, BAD = 20, (2, 9, 10)
MODEL = tiny({"pattern": (False, True), "router_z_coef": 1e-2, "shared_d_ff": 12}, n_heads=4, windows=(0, 7))
LOOP = Backends(experts="loop")


def run_config(mesh: str = "") -> RunConfig:
    """Two micro-batches, and a guard so strict that some ordinary batches are spikes to it."""
    settings = {"batch_size": 16, "accumulation": 2, "spike_z": 1.7, "spike_window": 6}
    return tiny_run(MODEL, mesh=MeshConfig.parse(mesh), **settings)


def batch_of(step: int, rows: int = 16) -> dict[str, np.ndarray]:
    """A hard batch; some are not a number."""
    batch = hard_batch(rows, seed=step)
    if step in BAD:
        batch["loss_mask"][3, 4] = np.nan
    return batch


class Course(NamedTuple):
    """The metrics of every step, and where it ended."""

    metrics: list[dict[str, Any]]
    params: dict[str, Any]
    guard: Any


def jax_course(mesh: str = "") -> Course:
    """20 steps of jaxlm."""
    run = run_config(mesh)
    devices = make_mesh(run.mesh) if mesh else None
    params = {k: jnp.asarray(p) for k, p in random_params(MODEL, init="fan_in").items()}
    state = train.init_state(run)._replace(params=params)
    numbers = [optim.as_arrays(optim.scalars(run.optim, s), np.float64) for s in range(STEPS)]
    with jax.set_mesh(devices) if devices else float64():
        if devices:
            state = jax.device_put(state, train.state_shardings(run, devices))
        first = train.place_batch(batch_of(0), devices)
        step = train.make_train_step(run, devices, LOOP).lower(state, first, numbers[0]).compile(QUICK)
        found = []
        for s in range(STEPS):
            state, metrics = step(state, train.place_batch(batch_of(s), devices), numbers[s])
            found.append({k: np.asarray(v) for k, v in metrics.items()})
    return Course(found, jax.device_get(state.params), jax.device_get(state.guard))


@pytest.fixture(scope="module")
def reference() -> Course:
    """20 steps of torchref."""
    run = run_config()
    model = build_torch(MODEL, random_params(MODEL, init="fan_in"))
    optimizer = twin_optim.make_optimizer(run.optim, model)
    state = twin.TrainState(0, model, optimizer, 0, twin_guard.init_guard(run))
    step, found = twin.make_train_step(run), []
    for s in range(STEPS):
        state, metrics = step(state, twin.place_batch(batch_of(s)), twin_optim.scalars(run.optim, s))
        found.append({k: v.numpy() for k, v in metrics.items()})
    return Course(found, to_jax(MODEL, from_torch(model)), state.guard)


@pytest.mark.parametrize("mesh", ["", "data=2,fsdp=2,expert=2"])
def test_both_frameworks_skip_the_same_steps_and_say_the_same(
    mesh: str, reference: Course, x64: None
) -> None:
    """20 steps with batches that are not a number and spikes: every metric, the weights and the guard at the end."""
    ours = jax_course(mesh)
    limit = tolerance("f64_mesh")
    for s, (here, there) in enumerate(zip(ours.metrics, reference.metrics, strict=True)):
        assert here.keys() == there.keys()
        same = {k: np.array_equal(here[k], there[k], equal_nan=True) for k in here}
        errors = {k: 0.0 if same[k] else relative_error(here[k], there[k]) for k in here}
        assert_close(errors, limit, f"metrics of step {s}")
        assert s not in BAD or (math.isnan(here["loss"]) and here["skipped"] == 1)
    skipped = [int(m["skipped"]) for m in reference.metrics]
    assert 0 < sum(skipped) - len(BAD) < 8, f"spikes: {skipped}"
    assert any(skipped[s] and math.isfinite(reference.metrics[s]["loss"]) for s in range(STEPS))
    assert_close(tree_errors(ours.params, reference.params), tolerance("f64_state"), "parameters")
    end = guard_to_jax(reference.guard)
    for name, value in ours.guard._asdict().items():
        exact = np.issubdtype(np.asarray(value).dtype, np.integer)
        assert relative_error(value, getattr(end, name)) <= (0 if exact else limit), name


def test_the_guard_changes_frameworks_bit_for_bit(x64: None) -> None:
    """There and back, each count and window in its place, in arrays of its own."""
    filled = guard.Guard(
        skipped=jnp.int32(7),
        in_a_row=jnp.int32(2),
        loss_scale=jnp.asarray(2.0**-3, jnp.float32),
        good_steps=jnp.int32(11),
        losses=jnp.asarray([1.0, np.nan, 3.0]),
        norms=jnp.asarray([0.1, 1e-300, 0.3]),
        seen=jnp.int32(1234),
    )
    there = guard_to_torch(filled)
    assert (there.skipped, there.in_a_row, there.loss_scale, there.good_steps, there.seen) == (
        7,
        2,
        0.125,
        11,
        1234,
    )
    back = guard_to_jax(there)
    for name in guard.Guard._fields:
        a, b = np.asarray(getattr(filled, name)), np.asarray(getattr(back, name))
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()), name
    there.losses[0] = 5
    assert float(back.losses[0]) == float(filled.losses[0]) == 1


def test_the_loss_scale_is_that_of_grad_scaler() -> None:
    """60 steps of overflows and luck: torch.amp.GradScaler, jaxlm and torchref have the same scale after each."""
    run = tiny_run(MODEL, dtype="float16", param_dtype="float32", loss_scale=2.0**10, loss_scale_steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    ours, theirs = guard.init_guard(run), twin_guard.init_guard(run)
    advance = jax.jit(
        lambda g, loss, norm: guard.next_guard(
            run.train, g, guard.judge(run.train, g, loss, norm), loss, norm
        )
    )
    for bad in np.random.default_rng(1).random(60) < 0.3:
        norm = math.inf if bad else 1.0
        scaler.scale(torch.zeros(1))
        weight.grad = torch.tensor([norm])
        scaler.step(optimizer)
        scaler.update()
        ours = advance(ours, jnp.float32(1), jnp.float32(norm))
        there = (torch.tensor(1.0), torch.tensor(norm))
        verdict = twin_guard.judge(run.train, theirs, *there)
        theirs = twin_guard.next_guard(run.train, theirs, verdict, *there)
        assert float(ours.loss_scale) == theirs.loss_scale == scaler.get_scale()
        assert int(ours.good_steps) == theirs.good_steps
        assert (int(ours.skipped), int(ours.in_a_row), int(ours.seen)) == (
            theirs.skipped,
            theirs.in_a_row,
            theirs.seen,
        )


def test_the_reference_trains_in_float16_under_the_same_scales() -> None:
    """From a scale that overflows: both halve it in the same steps, keep every bit, then learn alike."""
    model = tiny(n_layers=1)
    run = tiny_run(model, dtype="float16", param_dtype="float32", loss_scale=2.0**36, loss_scale_steps=4)
    start = random_params(model, init="fan_in", dtype=np.float32)
    state = train.init_state(run)._replace(params={k: jnp.asarray(p) for k, p in start.items()})
    decoder = build_torch(model, start)
    other = twin.init_state(run)._replace(
        model=decoder, optimizer=twin_optim.make_optimizer(run.optim, decoder)
    )
    numbers = optim.as_arrays(optim.scalars(run.optim, 0), np.float32)
    step = train.make_train_step(run, backends=LOOP)
    step = step.lower(state, train.place_batch(hard_batch()), numbers).compile(QUICK)
    torch_step, skips = twin.make_train_step(run), 0
    for s in range(40):
        before = {k: p.detach().clone() for k, p in decoder.named_parameters()}
        batch = hard_batch(seed=s % 3)
        state, here = step(state, train.place_batch(batch), numbers)
        other, there = torch_step(other, twin.place_batch(batch), twin_optim.scalars(run.optim, 0))
        skips += int(there["skipped"])
        assert [int(here[k]) for k in ("skipped", "skips")] == [
            int(there[k]) for k in ("skipped", "skips")
        ], s
        assert float(here["loss_scale"]) == float(there["loss_scale"]), s
        moved = any(not torch.equal(p, before[k]) for k, p in decoder.named_parameters())
        assert moved == (not int(there["skipped"]))
        assert relative_error(here["loss"], there["loss"].numpy()) <= tolerance("f16_training"), s
    assert 5 < skips < 35
