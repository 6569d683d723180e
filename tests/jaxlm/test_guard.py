"""The guard: spikes by a formula, skipped batches that leave no trace, float16 under a dynamic loss scale."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, assert_close, float64, hard_batch, random_params, tiny, tiny_run, tree_errors
from tolerances import tolerance

from jaxlm.config import OptimConfig, RunConfig
from jaxlm.guard import Verdict, corrected, init_guard, judge, next_guard
from jaxlm.layers import Backends
from jaxlm.optim import Scalars, as_arrays, moments, scalars
from jaxlm.train import TrainState, init_state, make_gradient_fn, make_train_step, place_batch

MODEL = tiny(n_layers=1)
WINDOW, LIMIT = 8, 2.5


def run_of(dtype: str, **train: Any) -> RunConfig:
    """A run in one dtype; float16 keeps its weights in float32."""
    wide = "float64" if dtype == "float64" else "float32"
    return tiny_run(MODEL, dtype=dtype, param_dtype=wide, **train)


def start(run: RunConfig) -> TrainState:
    """A fresh state with weights that hide nothing."""
    params = random_params(run.model, init="fan_in", dtype=np.dtype(run.train.param_dtype))
    return init_state(run)._replace(params={k: jnp.asarray(p) for k, p in params.items()})


def arrays(run: RunConfig, step: int) -> Scalars:
    """The scalars of a step, as the engine gives them."""
    return as_arrays(scalars(run.optim, step), np.dtype(run.train.param_dtype))


def compiled(run: RunConfig) -> Any:
    """The step, compiled quickly."""
    step = make_train_step(run, backends=Backends(experts="loop"))
    return step.lower(start(run), place_batch(hard_batch()), arrays(run, 0)).compile(QUICK)


@pytest.fixture(scope="module")
def wide() -> Any:
    """The step of a float64 run."""
    with float64():
        return compiled(run_of("float64"))


def spoiled(seed: int) -> dict[str, np.ndarray]:
    """A batch whose loss is not a number."""
    batch = hard_batch(seed=seed)
    batch["loss_mask"][1, 5] = np.nan
    return batch


def bits(tree: Any) -> list[tuple[str, bytes]]:
    """Every bit of every leaf."""
    return [(jax.tree_util.keystr(k), np.asarray(x).tobytes()) for k, x in jax.tree.leaves_with_path(tree)]


def test_spikes_are_what_the_formula_says(x64: None) -> None:
    """Each step against lists and sums written out: half a window first, n - 1, only accepted steps, floor, NaN."""
    config = run_of("float64", spike_window=WINDOW, spike_z=LIMIT).train
    rng, guard = np.random.default_rng(0), init_guard(run_of("float64", spike_window=WINDOW))
    losses, norms, spikes, kept = [], [], 0, 0

    def limits(values: list[float]) -> tuple[float, float]:
        last = values[-WINDOW:]
        mean = sum(last) / len(last)
        squares = sum((x - mean) ** 2 for x in last)
        std, narrow = math.sqrt(squares / (len(last) - 1)), math.sqrt(squares / len(last))
        floor = 1e-6 * abs(mean)
        return mean + LIMIT * max(std, floor), mean + LIMIT * max(narrow, floor)

    @jax.jit
    def both(guard: Any, loss: Any, norm: Any) -> Any:
        verdict = judge(config, guard, loss, norm)
        return verdict, next_guard(config, guard, verdict, loss, norm)

    for step in range(60):
        loss, norm = 3 + rng.normal(), 1 + 0.1 * rng.random()
        if step == 2:
            loss = 12.0  # high, but two steps are no measure
        elif 20 <= step < 28:
            loss = 3.0  # all the same: the floor alone keeps the next from being a spike
        elif step == 28:
            loss = 3.0 * (1 + 1e-7)
        elif step % 5 == 0 and len(losses) >= WINDOW:
            wide, narrow = limits(losses)
            loss = (wide + narrow) / 2  # a spike to who divides by n
        elif step % 7 == 0:
            norm = 5.0
        elif step % 11 == 0:
            loss = math.nan if step % 2 else math.inf
        known = len(losses) >= WINDOW // 2
        finite = math.isfinite(loss)
        spike = finite and known and (loss > limits(losses)[0] or norm > limits(norms)[0])
        verdict, guard = both(guard, jnp.float64(loss), jnp.float64(norm))
        assert (bool(verdict.finite), bool(verdict.accepted)) == (finite, finite and not spike), (
            f"step {step}"
        )
        spikes += spike
        if verdict.accepted:
            losses.append(loss)
            norms.append(norm)
            kept += step % 5 == 0 and step >= 10
        held = min(len(losses), WINDOW)
        assert sorted(np.asarray(guard.losses)[:held]) == sorted(losses[-WINDOW:]), f"step {step}"
        assert sorted(np.asarray(guard.norms)[:held]) == sorted(norms[-WINDOW:]), f"step {step}"
    assert spikes >= 4 and kept >= 4
    assert (int(guard.seen), int(guard.skipped)) == (len(losses), 60 - len(losses))


def test_nothing_is_a_spike_unless_asked_for(x64: None) -> None:
    """spike_z = 0 judges by finiteness alone; the window is filled all the same."""
    config, guard = run_of("float64", spike_window=4).train, init_guard(run_of("float64", spike_window=4))
    for loss in (1.0, 1.1, 0.9, 1.0, 1e9):
        verdict = judge(config, guard, jnp.float64(loss), jnp.float64(1))
        guard = next_guard(config, guard, verdict, jnp.float64(loss), jnp.float64(1))
        assert bool(verdict.accepted)
    assert sorted(np.asarray(guard.losses)) == [0.9, 1.0, 1.1, 1e9]


def test_a_bad_batch_changes_nothing_but_step_and_guard(wide: Any, x64: None) -> None:
    """Weights and moments keep every bit, the guard counts, the metrics say so; the next good batch resets the row."""
    run = run_of("float64")
    state, _ = wide(start(run), place_batch(hard_batch()), arrays(run, 0))
    for n in (1, 2):
        before, seen = bits((state.params, state.opt_state, state.seed)), bits(state.guard[2:])
        state, metrics = wide(state, place_batch(spoiled(n)), arrays(run, n))
        assert bits((state.params, state.opt_state, state.seed)) == before
        assert bits(state.guard[2:]) == seen
        assert (int(state.step), int(state.guard.skipped), int(state.guard.in_a_row)) == (n + 1, n, n)
        assert [int(metrics[k]) for k in ("skipped", "skips", "skips_in_a_row")] == [1, n, n]
        assert math.isnan(metrics["loss"]) and metrics["update_norm"] == 0 == metrics["update_ratio/mlp"]
    before = bits(state.params)
    state, metrics = wide(state, place_batch(hard_batch(seed=3)), arrays(run, 3))
    assert [int(metrics[k]) for k in ("skipped", "skips", "skips_in_a_row")] == [0, 2, 0]
    assert bits(state.params) != before and metrics["update_norm"] > 0


def test_a_run_with_bad_batches_is_the_run_without_them(wide: Any, x64: None) -> None:
    """20 steps: learning rates go by steps, bias corrections by updates, and weights and moments agree."""
    run, bad = run_of("float64"), {0, 7, 8, 13}
    with_bad, without = start(run), start(run)
    for step in range(20):
        batch = spoiled(step) if step in bad else hard_batch(seed=step)
        with_bad, _ = wide(with_bad, place_batch(batch), arrays(run, step))
        if step in bad:
            continue
        t, lr = step + 1 - sum(s < step for s in bad), scalars(run.optim, step).lr
        first, second = 1 - run.optim.b1**t, 1 - run.optim.b2**t
        own = Scalars(lr, lr / first, math.sqrt(second), lr * run.optim.weight_decay)
        without, _ = wide(without, place_batch(batch), as_arrays(own, np.float64))
    assert (int(with_bad.step), int(without.step)) == (20, 16)
    limit = tolerance("f64_state")
    assert_close(tree_errors(with_bad.params, without.params), limit, "parameters")
    ours, theirs = moments(with_bad.opt_state), moments(without.opt_state)
    assert_close(tree_errors(ours.m, theirs.m), limit, "m")
    assert_close(tree_errors(ours.v, theirs.v), limit, "v")


@pytest.mark.parametrize("skipped", [0, 1, 5])
def test_bias_corrections_count_updates(skipped: int, x64: None) -> None:
    """Untouched bits without skips; else those of the update's number, b1 = 0 included; lr and decay are the step's."""
    for b1, b2 in ((0.9, 0.999), (0.0, 0.95)):
        config = OptimConfig(lr=1e-3, b1=b1, b2=b2, warmup_steps=3, decay_steps=50)
        given = as_arrays(scalars(config, 9), np.float64)
        got = corrected(config, given, jnp.int32(9), jnp.int32(skipped))
        if not skipped:
            assert bits(got) == bits(given)
        t = 10 - skipped
        assert float(got.lr) == float(given.lr) and float(got.decay) == float(given.decay)
        assert float(got.step_size) == pytest.approx(float(given.lr) / (1 - b1**t), rel=1e-14)
        assert float(got.bias2_root) == pytest.approx(math.sqrt(1 - b2**t), rel=1e-14)


def test_skipping_costs_no_host_and_no_buffer(wide: Any) -> None:
    """The whole donated state is overwritten in place, and nothing in the program talks to the host."""
    text = wide.as_text()
    with float64():
        leaves = len(jax.tree.leaves(start(run_of("float64"))))
    alias = next(line for line in text.splitlines() if "input_output_alias" in line)
    assert alias.count("-alias)") == leaves
    assert not [word for word in ("infeed", "outfeed", " send(", " recv(", "callback") if word in text]
    assert not [line for line in text.splitlines() if " conditional(" in line], (
        "the device would have to ask the host"
    )


@pytest.fixture(scope="module")
def half() -> Callable[..., Any]:
    """The step of a float16 run."""
    return compiled(run_of("float16", loss_scale_steps=10))


def test_an_overflow_halves_the_scale_and_changes_nothing_else(half: Any) -> None:
    """A scale that float16 cannot hold: weights and moments keep every bit until the scale has come down to fit."""
    run = run_of("float16", loss_scale_steps=10)
    state, _ = half(start(run), place_batch(hard_batch()), arrays(run, 0))
    state = state._replace(guard=state.guard._replace(loss_scale=jnp.float32(2.0**40)))
    before, scale = bits((state.params, state.opt_state)), 2.0**40
    for step in range(1, 40):
        state, metrics = half(state, place_batch(hard_batch()), arrays(run, 1))
        if not int(metrics["skipped"]):
            break
        scale /= 2
        assert bits((state.params, state.opt_state)) == before
        assert float(state.guard.loss_scale) == scale == float(metrics["loss_scale"])
        assert int(state.guard.skipped) == step and math.isfinite(metrics["loss"])
        assert int(state.guard.in_a_row) == 0, "finding a scale is no reason to stop a run"
    assert 5 < step < 39 and bits(state.params) != before[: len(state.params)]
    assert float(state.guard.loss_scale) == scale and int(state.guard.good_steps) == 1
    state, metrics = half(state, place_batch(spoiled(0)), arrays(run, 2))
    assert int(metrics["skips_in_a_row"]) == 1, "a loss that is not a number has another cause"


def test_a_spike_leaves_the_scale_alone() -> None:
    """A finite step is a good one for the scale, whether its update is taken or not: GradScaler knows no spikes."""
    run = run_of("float16", loss_scale_steps=2, loss_scale=8.0)
    guard, one = init_guard(run), jnp.float32(1)
    for scale, good in ((8.0, 1), (16.0, 0)):
        guard = next_guard(run.train, guard, Verdict(jnp.array(True), jnp.array(False)), one, one)
        assert (float(guard.loss_scale), int(guard.good_steps)) == (scale, good)
    assert (int(guard.skipped), int(guard.in_a_row), int(guard.seen)) == (2, 2, 0)


def test_float16_follows_float32(half: Any) -> None:
    """30 steps under a scale that doubles every 10 steps, with the losses of float32 to its rounding."""
    runs = run_of("float16", loss_scale_steps=10), run_of("float32")
    steps = half, compiled(runs[1])
    losses: list[list[float]] = [[], []]
    norms = []
    for run, step, found in zip(runs, steps, losses, strict=True):
        state = start(run)
        state = state._replace(guard=state.guard._replace(loss_scale=jnp.float32(1024)))
        for s in range(30):
            state, metrics = step(state, place_batch(hard_batch(seed=s % 4)), arrays(run, s))
            found.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if run.train.dtype == "float16":
            assert int(state.guard.skipped) == 0 and float(state.guard.loss_scale) == 8192
    assert losses[1][-4] < losses[1][0] - 0.01, "nothing was learnt"
    assert norms[0] == pytest.approx(norms[1], rel=1e-2), "the scale is in the gradients"
    worst = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    assert 0 < worst <= tolerance("f16_training"), worst


@pytest.mark.slow
def test_small_gradients_need_the_scale() -> None:
    """Under a small one part of the gradient is lost; under a large one float16's gradient is that of float32."""
    fine, coarse = run_of("float32"), run_of("float16")
    params = {k: jnp.asarray(p) for k, p in start(fine).params.items()}
    batch = hard_batch()
    want = jax.jit(make_gradient_fn(fine), compiler_options=QUICK)(params, batch)[0]
    gradients = jax.jit(make_gradient_fn(coarse), compiler_options=QUICK)
    scaled, plain = (gradients(params, batch, None, jnp.float32(s))[0] for s in (4096.0, 2.0**-12))
    worst = {name: max(tree_errors(g, want).values()) for name, g in (("scaled", scaled), ("plain", plain))}
    assert worst["plain"] > 20 * worst["scaled"], worst


def test_the_guard_of_a_state_says_its_types() -> None:
    """int32 counts, a float32 scale, windows of the run's length; buffers of their own, since a step donates them."""
    run = dataclasses.replace(run_of("float32", spike_window=5, loss_scale=8.0))
    guard = init_guard(run)
    assert {k: (str(x.dtype), x.shape) for k, x in guard._asdict().items()} == {
        **{k: ("int32", ()) for k in ("skipped", "in_a_row", "good_steps", "seen")},
        **{k: ("float32", (5,)) for k in ("losses", "norms")},
        "loss_scale": ("float32", ()),
    }
    assert float(guard.loss_scale) == 8
    assert len({x.unsafe_buffer_pointer() for x in guard}) == len(guard)
