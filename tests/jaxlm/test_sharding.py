"""Meshes: the axis table, and loss, gradients and steps on 8 simulated devices against one, in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    QUICK,
    assert_close,
    float64,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from jax.sharding import PartitionSpec
from tolerances import tolerance

from jaxlm.config import ConfigError, MeshConfig, RunConfig
from jaxlm.distributed import place_votes
from jaxlm.guard import init_guard
from jaxlm.layers import Backends
from jaxlm.model import abstract_model
from jaxlm.optim import as_arrays, make_optimizer, moments, scalars
from jaxlm.sharding import constrain, make_mesh, sharding, spec
from jaxlm.train import TrainState, make_gradient_fn, make_train_step, place_batch, state_shardings

LOOP = Backends(experts="loop")
# One dense and one MoE layer, so that each compilation proves both; every term of the loss is on.
MODEL = tiny(
    {"pattern": (False, True), "router_z_coef": 1e-2, "shared_d_ff": 12, "expert_bias": True},
    n_heads=4,
    windows=(0, 7),
    qkv_bias=True,
    head_bias=True,
)
ROWS = 8
MESHES = {
    "data=8": 1,
    "fsdp=8": 1,
    "fsdp=4": 2,
    "tensor=2": 1,
    "expert=4": 2,
    "data=2,fsdp=2,expert=2": 1,
    "fsdp=2,tensor=2,expert=2": 2,
}  # mesh -> micro-batches
SLOW = {"fsdp=8"}  # says little that fsdp=4 and data=8 do not


class Answer(NamedTuple):
    """Gradients and metrics of the hard batch."""

    grads: dict[str, Any]
    metrics: dict[str, Any]


def run_config(mesh: str = "", accumulation: int = 1) -> RunConfig:
    return tiny_run(MODEL, mesh=MeshConfig.parse(mesh), batch_size=ROWS, accumulation=accumulation)


def start(run: RunConfig) -> TrainState:
    """A state with random parameters, on the host."""
    params = {k: jnp.asarray(p) for k, p in random_params(MODEL).items()}
    zero = jnp.zeros((), jnp.int32)
    opt_state = make_optimizer(run.optim).init(params)
    return TrainState(zero, params, opt_state, zero.astype(jnp.uint32), init_guard(run))


@pytest.fixture(scope="module")
def one_device() -> dict[int, Answer]:
    """accumulation -> the answer of a single device."""
    with float64():
        batch, params = hard_batch(ROWS), random_params(MODEL)
        return {
            m: Answer(*quick_jit(make_gradient_fn(run_config("", m), LOOP))(params, batch)) for m in (1, 2)
        }


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in MESHES]
)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(
    mesh: str, one_device: dict[int, Answer], x64: None
) -> None:
    """All terms of the loss and every gradient, each device with rows of its own kind and length."""
    check_mesh(mesh, MESHES[mesh], LOOP, one_device)


def test_the_blocks_backend_on_a_mesh_equals_one_device(one_device: dict[int, Answer], x64: None) -> None:
    """The experts that run by default, with their hand-written gradient, inside shard_map."""
    check_mesh("data=2,fsdp=2,expert=2", 1, Backends(experts="blocks"), one_device)


def check_mesh(mesh: str, accumulation: int, backends: Backends, one_device: dict[int, Answer]) -> None:
    """Gradients and metrics on a mesh against those of one device."""
    run = run_config(mesh, accumulation)
    devices = make_mesh(run.mesh)
    layout = state_shardings(run, devices).params
    with jax.set_mesh(devices):
        params = jax.device_put(random_params(MODEL), layout)
        batch = place_batch(hard_batch(ROWS), devices)
        gradients = quick_jit(make_gradient_fn(run, backends), out_shardings=(layout, None))
        grads, metrics = gradients(params, batch)
    assert len(batch["inputs"].sharding.device_set) == run.mesh.size
    wanted = one_device[accumulation]
    limit = tolerance("f64_mesh")
    assert_close({k: relative_error(metrics[k], wanted.metrics[k]) for k in wanted.metrics}, limit, "metrics")
    assert_close(tree_errors(grads, wanted.grads), limit, "gradients")


def test_a_step_on_a_mesh_equals_the_step_of_one_device(x64: None) -> None:
    """Two whole steps: parameters and moments agree, and both live sharded as the table says."""
    mesh = "fsdp=2,tensor=2,expert=2"
    states = []
    for run in (run_config(), run_config(mesh)):
        devices = make_mesh(run.mesh) if run.mesh.size > 1 else None
        state, batch = start(run), place_batch(hard_batch(ROWS), devices)
        numbers = [as_arrays(scalars(run.optim, s), np.float64) for s in range(2)]
        if devices is None:
            step = make_train_step(run, backends=LOOP).lower(state, batch, numbers[0]).compile(QUICK)
            states.append(step(step(state, batch, numbers[0])[0], batch, numbers[1])[0])
            continue
        layout = state_shardings(run, devices)
        with jax.set_mesh(devices):
            state = jax.device_put(state, layout)
            step = make_train_step(run, devices, LOOP).lower(state, batch, numbers[0]).compile(QUICK)
            states.append(step(step(state, batch, numbers[0])[0], batch, numbers[1])[0])
    single, meshed = states
    assert_close(tree_errors(meshed.params, single.params), tolerance("f64_mesh"), "parameters")
    found, wanted = moments(meshed.opt_state), moments(single.opt_state)
    assert_close(tree_errors(found.m, wanted.m), tolerance("f64_mesh"), "m")
    assert_close(tree_errors(found.v, wanted.v), tolerance("f64_mesh"), "v")
    expected = {
        "blocks.0.attn.q_proj.weight": PartitionSpec(("fsdp", "expert"), "tensor"),
        "blocks.0.mlp.down_proj.weight": PartitionSpec("tensor", ("fsdp", "expert")),
        "blocks.1.moe.experts.gate_up": PartitionSpec(("expert", "fsdp"), None, "tensor"),
        "blocks.1.moe.experts.down": PartitionSpec(("expert", "fsdp"), "tensor", None),
        "embed.weight": PartitionSpec(None, ("fsdp", "expert", "tensor")),  # 61 rows do not split in two
        "final_norm.weight": PartitionSpec(None),
    }
    for path, wanted_spec in expected.items():
        for array in (meshed.params[path], found.m[path], found.v[path]):
            assert array.sharding.is_equivalent_to(
                jax.NamedSharding(make_mesh(MeshConfig.parse(mesh)), wanted_spec), array.ndim
            )
    whole = sum(x.nbytes for x in jax.tree.leaves((meshed.params, meshed.opt_state)))
    local = sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((meshed.params, meshed.opt_state))
    )
    assert local < 0.5 * whole, "the state is not really split"


def test_two_dimensions_cannot_claim_one_mesh_axis() -> None:
    """The table refuses a layout that would split two dimensions over the same devices."""
    assert spec(("embed", "heads")) == PartitionSpec(("fsdp", "expert"), "tensor")
    for axes in (("heads", "ffn"), ("batch", None, "embed"), ("experts", "batch")):
        with pytest.raises(ValueError, match="collide"):
            spec(axes)


def test_an_axis_that_does_not_divide_its_dimension_splits_another() -> None:
    """A vocabulary of 61 is not split in two; the dimension beside it is, twice. Vectors stay whole."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert sharding(mesh, (61, 24), ("vocab", "embed")).shard_shape((61, 24)) == (61, 6)
    assert sharding(mesh, (62, 24), ("vocab", "embed")).shard_shape((62, 24)) == (31, 12)
    assert sharding(mesh, (24, 3), ("embed", None)).shard_shape((24, 3)) == (6, 3)
    assert sharding(mesh, (61,), ("vocab",)).is_fully_replicated
    assert sharding(make_mesh(MeshConfig(data=2)), (24, 3), ("embed", None)).is_fully_replicated
    with pytest.raises(ValueError, match="2 dimensions"):
        sharding(mesh, (62, 24), ("vocab",))


def test_every_parameter_of_every_option_has_a_layout() -> None:
    """No parameter's logical axes collide, whatever the options."""
    everything = tiny({"shared_d_ff": 12, "shared_gate": True, "expert_bias": True, "pattern": (True, False)},
                      qkv_bias=True, attn_out_bias=True, mlp_bias=True, head_bias=True, qk_norm=True,
                      attn_bias_table=True, tied=True, position="learned")  # fmt: skip
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    for config in (everything, MODEL):
        abstract = abstract_model(config)
        for path, shape in abstract.shapes.items():
            layout = sharding(mesh, shape.shape, abstract.axes[path])
            if len(shape.shape) > 1 and "bias_table" not in path:
                assert not layout.is_fully_replicated, f"{path} is on every device"


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    """One line with both numbers."""
    with pytest.raises(ConfigError, match="needs 16 devices but there are"):
        make_mesh(MeshConfig(data=16))


def test_constrain_does_nothing_without_a_mesh() -> None:
    """Outside `jax.set_mesh` activations pass untouched."""
    x = jnp.ones((4, 2))
    assert constrain(x, ("batch", None)) is x


def test_the_vote_of_every_device_counts() -> None:
    """Each device has one of its own, also where tensor makes several hold the same rows: none speaks for another."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    votes = place_votes(mesh, 1)
    assert votes.shape == (8,) and len({str(s.index) for s in votes.addressable_shards}) == 8
    for device in range(8):
        one = jax.device_put(np.eye(8, dtype=np.int32)[device], votes.sharding)
        assert int(jnp.max(one)) == 1
