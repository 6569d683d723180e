"""Optimizer state across frameworks: a run changes sides and float64 shows no seam; what does not fit is refused."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
from helpers import (  # noqa: E402
    QUICK,
    assert_close,
    hard_batch,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from tolerances import tolerance  # noqa: E402

from convert import native  # noqa: E402
from convert.optstate import (  # noqa: E402
    AdamMoments,
    jax_moments,
    moments_to_jax,
    moments_to_torch,
    torch_moments,
    train_state_to_jax,
    train_state_to_torch,
)
from convert.rules import ConversionError  # noqa: E402
from convert.tree import from_jax, from_torch  # noqa: E402
from jaxlm import optim, train  # noqa: E402
from jaxlm.config import MeshConfig, RunConfig  # noqa: E402
from jaxlm.guard import init_guard  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from jaxlm.sharding import make_mesh  # noqa: E402
from torchref import optim as twin_optim  # noqa: E402
from torchref import train as twin  # noqa: E402

pytestmark = pytest.mark.torch

RUNS = {
    "dense": tiny_run(tiny(n_layers=1, qkv_bias=True), accumulation=2),
    "moe": tiny_run(tiny({"expert_bias": True, "shared_d_ff": 12}, n_layers=1, tied=True)),
}
BATCHES = [hard_batch(seed=s) for s in range(10)]
OPTIMIZERS = {
    "clip": {},
    "no clip": {"clip_norm": 0.0},  # the chain is shorter then
    "muon": {"optimizer": "muon"},
    "bfloat16": {"optimizer": "muon", "moment_dtype": "bfloat16"},
    "8 bits": {"optimizer": "adamw8bit"},
}


def start(run: RunConfig) -> train.TrainState:
    """A state of random weights before the first step, with a seed that no default has."""
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=7))
    params = {path: jax.numpy.asarray(p) for path, p in random_params(run.model).items()}
    state = train.init_state(run)
    return state._replace(params=params)


def compiled(run: RunConfig) -> Callable[..., Any]:
    """jaxlm's step, compiled quickly."""
    numbers = optim.as_arrays(optim.scalars(run.optim, 0), np.float64)
    step = train.make_train_step(run, backends=Backends(experts="loop"))
    return step.lower(start(run), BATCHES[0], numbers).compile(QUICK)


def jax_steps(run: RunConfig, step: Callable[..., Any], state: Any, n: int, losses: list) -> Any:
    """n steps in JAX from wherever the state is."""
    for s in range(int(state.step), int(state.step) + n):
        numbers = optim.as_arrays(optim.scalars(run.optim, s), np.float64)
        state, metrics = step(state, train.place_batch(BATCHES[s]), numbers)
        losses.append(float(metrics["loss"]))
    return state


def torch_steps(run: RunConfig, state: Any, n: int, losses: list) -> Any:
    """n steps in torch from wherever the state is."""
    step = twin.make_train_step(run)
    for s in range(state.step, state.step + n):
        state, metrics = step(state, twin.place_batch(BATCHES[s]), twin_optim.scalars(run.optim, s))
        losses.append(float(metrics["loss"]))
    return state


def assert_equal_states(
    run: RunConfig, ours: train.TrainState, state: Any, losses: list, wanted: list
) -> None:
    """Losses, weights, m and v within the gates, step and seed exactly; `state` is of either framework."""
    if isinstance(state, twin.TrainState):
        state = train_state_to_jax(run, state)
    assert_close(
        {f"step {s}": relative_error(*pair) for s, pair in enumerate(zip(losses, wanted, strict=True))},
        tolerance("f64"),
        "losses",
    )
    assert (int(state.step), int(state.seed)) == (int(ours.step), int(ours.seed)) == (10, 7)
    here, there = jax_moments(ours), jax_moments(state)
    for what, a, b in (
        ("weights", state.params, ours.params),
        ("m", there.m, here.m),
        ("v", there.v, here.v),
    ):
        assert_close(tree_errors(from_jax(a), from_jax(b)), tolerance("f64_state"), what)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_changes_frameworks_shows_no_seam(name: str, x64: None) -> None:
    """Ten steps in JAX = five in torch and five in JAX = five in JAX and five in torch."""
    run = RUNS[name]
    step, wanted = compiled(run), []
    whole = jax_steps(run, step, start(run), 10, wanted)

    losses: list[float] = []
    there = torch_steps(run, train_state_to_torch(run, start(run)), 5, losses)
    assert_equal_states(
        run, whole, jax_steps(run, step, train_state_to_jax(run, there), 5, losses), losses, wanted
    )

    losses = []
    here = jax_steps(run, step, start(run), 5, losses)
    assert_equal_states(
        run, whole, torch_steps(run, train_state_to_torch(run, here), 5, losses), losses, wanted
    )


def bits(flat: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Shape, dtype and every bit of each tensor."""
    return {k: repr((x.shape, x.dtype)).encode() + np.ascontiguousarray(x).tobytes() for k, x in flat.items()}


def snapshot(weights: dict[str, np.ndarray], moments: AdamMoments, seed: Any, guard: Any) -> tuple:
    """Everything a state holds, comparable by ==."""
    counts = {name: np.asarray(value).tolist() for name, value in guard._asdict().items()}
    return bits(weights), bits(moments.m), bits(moments.v), moments.step, int(seed), counts


def of_jax(state: train.TrainState) -> tuple:
    """`snapshot` of a state of jaxlm."""
    return snapshot(from_jax(state.params), jax_moments(state), state.seed, state.guard)


def of_torch(state: twin.TrainState) -> tuple:
    """`snapshot` of a state of torchref."""
    return snapshot(from_torch(state.model), torch_moments(state), state.seed, state.guard)


def filled(run: RunConfig, dtype: Any, step: int = 3) -> train.TrainState:
    """A state whose weights and moments are random, special values among them."""
    trees = [random_params(run.model, seed=s, dtype=dtype) for s in range(3)]
    for tree in trees:
        tree["final_norm.weight"][:4] = np.array([np.nan, -0.0, np.inf, 1e-40]).astype(dtype)
    params, *given = ({k: jax.numpy.array(x) for k, x in tree.items()} for tree in trees)
    rng = np.random.default_rng(0)

    def values(path: tuple, shape: Any) -> Any:
        """A moment of the parameter's dtype is drawn as the parameter is; anything narrower is of random bits."""
        name = path[-1].key if hasattr(path[-1], "key") else ""
        if name in params and shape.dtype == dtype:
            return given[path[-2].name == "v"][name]
        return jax.numpy.array(rng.integers(0, 200, shape.shape).astype(shape.dtype))

    links = jax.eval_shape(optim.make_optimizer(run.optim).init, params)
    chain = jax.tree_util.tree_map_with_path(values, links)
    seed = jax.numpy.uint32(2**32 - 1)
    guard = init_guard(run)
    guard = guard._replace(
        skipped=jax.numpy.int32(1),
        in_a_row=jax.numpy.int32(1),
        loss_scale=jax.numpy.float32(8),
        losses=jax.numpy.arange(len(guard.losses), dtype=guard.losses.dtype),
        seen=jax.numpy.int32(step - 1),
    )
    return train.TrainState(jax.numpy.int32(step), params, chain, seed, guard)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("optim_changes", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_round_trips_are_bitwise(dtype: str, optim_changes: dict, x64: None) -> None:
    """jax -> torch -> jax and torch -> jax -> torch, in the dtype that is stored, whatever the optimizer."""
    # Of the experts, 256 divides the inputs of down alone; the other moments in 8 bits have a row of absmax.
    wide = tiny({"d_ff": 256}, n_layers=1, d_model=32, d_ff=64)
    run = tiny_run(wide if optim_changes.get("optimizer") else RUNS["moe"].model, optim_changes)
    state = filled(run, jax.numpy.dtype(dtype))
    there = train_state_to_torch(run, state)
    back = train_state_to_jax(run, there)
    assert of_jax(back) == of_jax(state)
    assert jax.tree.structure(back) == jax.tree.structure(train.state_shapes(run))
    assert of_torch(train_state_to_torch(run, back)) == of_torch(there)


def test_a_torch_state_before_its_first_step_has_zero_moments(x64: None) -> None:
    """torch makes its moments at the first step; before it they are zeros here."""
    run = RUNS["dense"]
    state = train_state_to_jax(run, twin.init_state(run))
    assert of_jax(state)[1:4] == of_jax(train.init_state(run))[1:4]


def test_converted_states_share_no_memory(x64: None) -> None:
    """Training on in one framework leaves the state that it came from as it was."""
    run = RUNS["dense"]
    first = train_state_to_torch(run, filled(run, np.float64))
    here = train_state_to_jax(run, first)
    before = of_jax(here)
    with torch.no_grad():
        for p in first.model.parameters():
            p.fill_(5)
            for slot in first.optimizer.state[p].values():
                slot.fill_(5)
    assert of_jax(here) == before
    second = train_state_to_torch(run, here)
    before = of_torch(second)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(here)
    assert of_torch(second) == before


def test_a_state_lands_on_the_mesh(x64: None) -> None:
    """Sharded as jaxlm's own state on that mesh, with the same bits."""
    run = RUNS["dense"]
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    state = filled(run, np.float64)
    placed = train_state_to_jax(run, train_state_to_torch(run, state), mesh)
    assert of_jax(placed) == of_jax(state)
    own = train.init_state(run, mesh)
    assert jax.tree.map(lambda x: x.sharding, placed) == jax.tree.map(lambda x: x.sharding, own)
    assert any(not x.sharding.is_fully_replicated for x in placed.params.values())


def test_every_missing_moment_and_uneven_step_is_named(x64: None) -> None:
    """torch state that has no counterpart: one error with each parameter and what is wrong with it."""
    run = RUNS["dense"]
    state = train_state_to_torch(run, filled(run, np.float64))
    entries = {path: state.optimizer.state[p] for path, p in state.model.named_parameters()}
    del entries["embed.weight"]["exp_avg"]
    del entries["final_norm.weight"]["exp_avg_sq"]
    entries["blocks.0.mlp.down_proj.weight"]["step"] += 1
    del state.optimizer.state[state.model.lm_head.weight]
    with pytest.raises(ConversionError) as caught:
        train_state_to_jax(run, state)
    assert str(caught.value).splitlines()[1:] == [
        "embed.weight: no exp_avg",
        "blocks.0.mlp.down_proj.weight: step 3, the run's is 2",
        "final_norm.weight: no exp_avg_sq",
        "lm_head.weight: no step",
        "lm_head.weight: no exp_avg",
        "lm_head.weight: no exp_avg_sq",
    ]


@pytest.mark.parametrize("convert", [moments_to_torch, moments_to_jax])
def test_missing_and_misshapen_moments_of_both_kinds_are_reported_together(convert: Callable) -> None:
    """m and v are checked before either is refused."""
    config = RUNS["dense"].model
    flat = random_params(config)
    if convert is moments_to_jax:
        flat = native.to_torch(config, flat)
    q = "blocks.0.attn.q_proj.weight"
    m, v = dict(flat), flat | {q: flat[q].T, "surprise": np.zeros(2)}
    del m["embed.weight"]
    with pytest.raises(ConversionError) as caught:
        convert(config, AdamMoments(m, v, 1))
    for part in (
        "m: 1 of",
        "embed.weight -> embed.weight: missing",
        "v: 2 of",
        f"{q} -> {q}: got",
        "surprise: unused",
    ):
        assert part in str(caught.value)


def test_float64_is_refused_where_jax_would_narrow_it() -> None:
    """One line that says what to set."""
    run = RUNS["dense"]
    with pytest.raises(ConversionError, match="JAX_ENABLE_X64=1"):
        train_state_to_jax(run, twin.init_state(run))
