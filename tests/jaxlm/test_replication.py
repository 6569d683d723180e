"""No activation and no parameter is whole where a share was meant: read from the compiled step on eight devices."""

from typing import Any

import hlo
import jax
import jax.numpy as jnp
import pytest
from helpers import QUICK
from jax.sharding import PartitionSpec

from jaxlm.config import MeshConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from jaxlm.hlo import COLLECTIVES, collectives, instructions
from jaxlm.layers import Backends
from jaxlm.loss import chunked_token_loss
from jaxlm.model import abstract_model
from jaxlm.optim import moments
from jaxlm.sharding import batch_sharding, make_mesh
from jaxlm.train import make_gradient_fn, state_shapes, state_shardings

# Every size has a prime of its own, so that a shape says what it is: 5, 7, 11, 13, 17, 19, 29.
ROWS, LENGTH = 40, 56
MOE = {"n_experts": 8, "n_active": 3, "d_ff": 232, "router_z_coef": 0.01, "capacity_factor": 1.25}
DENSE_MESHES = ("data=8", "fsdp=8", "tensor=4", "data=2,fsdp=2,tensor=2")
MOE_MESHES = ("expert=8", "data=2,expert=4", "fsdp=2,expert=4", "fsdp=2,tensor=2,expert=2")
QUICK_ONES = {"data=2,fsdp=2,tensor=2", "fsdp=2,tensor=2,expert=2"}  # have all axes between them


def model(moe: dict[str, Any] | None, vocabulary: int = 152) -> ModelConfig:
    """One layer of recognisable sizes."""
    sizes = {"d_model": 88, "n_layers": 1, "n_heads": 12, "n_kv_heads": 4, "head_dim": 26, "d_ff": 136}
    experts = MoEConfig() if moe is None else MoEConfig(**moe)
    return ModelConfig(vocab_size=vocabulary, context=64, rope_theta=1e4, norm_eps=1e-5, moe=experts, **sizes)


def run_of(config: ModelConfig, mesh: str) -> RunConfig:
    return RunConfig(config, train=TrainConfig(batch_size=ROWS, seq_len=LENGTH), mesh=MeshConfig.parse(mesh))


def gradient_program(run: RunConfig) -> str:
    """The optimised HLO of loss and gradients on the run's mesh."""
    mesh, abstract = make_mesh(run.mesh), abstract_model(run.model)
    places = state_shardings(run, mesh).params
    params = {
        k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=places[k]) for k, s in abstract.shapes.items()
    }
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=batch_sharding(mesh))
        for name, dtype in (("inputs", jnp.int32), ("targets", jnp.int32), ("loss_mask", jnp.float32))
    }
    gradients = jax.jit(make_gradient_fn(run, Backends(experts="batched")), out_shardings=(places, None))
    with jax.set_mesh(mesh):
        return gradients.lower(params, batch).compile(QUICK).as_text() or ""


def meshes(names: tuple[str, ...]) -> list[Any]:
    """The quick ones, and the others marked slow."""
    return [m if m in QUICK_ONES else pytest.param(m, marks=pytest.mark.slow) for m in names]


@pytest.mark.parametrize("mesh", meshes(DENSE_MESHES))
def test_no_activation_of_a_dense_model_is_whole(mesh: str) -> None:
    """Rows over data and fsdp, heads, hidden layer and logits over tensor, though 151 words do not split."""
    run = run_of(model(None, vocabulary=151), mesh)
    assert hlo.whole_shares(gradient_program(run), run.model, run.mesh, ROWS, LENGTH) == []


@pytest.mark.parametrize("mesh", meshes(MOE_MESHES))
def test_no_activation_of_a_mixture_is_whole(mesh: str) -> None:
    """Router, choice of experts, capacity, dispatch and balance loss keep to their share of the tokens."""
    run = run_of(model(MOE, vocabulary=151), mesh)
    assert hlo.whole_shares(gradient_program(run), run.model, run.mesh, ROWS, LENGTH) == []


def test_a_whole_activation_is_named() -> None:
    """What the check is for: tokens that every device gathers are found, with their shape; a share is not."""
    mesh, rows = make_mesh(MeshConfig(data=8)), PartitionSpec("data")

    def program(place: PartitionSpec) -> str:
        def body(x: jax.Array) -> jax.Array:
            return jnp.sin(jax.lax.with_sharding_constraint(jnp.sin(x), jax.NamedSharding(mesh, place))).sum()

        x = jax.ShapeDtypeStruct((ROWS, LENGTH, 88), jnp.float32, sharding=jax.NamedSharding(mesh, rows))
        return jax.jit(body).lower(x).compile(QUICK).as_text() or ""

    assert hlo.whole_activations(program(rows), ROWS, LENGTH, [88]) == []
    found = hlo.whole_activations(program(PartitionSpec()), ROWS, LENGTH, [88])
    assert any(line.startswith("all-gather") and line.endswith("f32[40,56,88]") for line in found), found
    assert hlo.whole_activations(program(PartitionSpec()), ROWS, LENGTH, [17]) == []
    assert collectives(program(PartitionSpec()))["all-gather"] == (1, ROWS * LENGTH * 88 * 4)


def test_the_head_is_summed_over_devices_once() -> None:
    """However many chunks the loss has, no collective stands in their loop: only gathers before, one sum after."""
    mesh = make_mesh(MeshConfig(fsdp=4))
    hidden = jax.ShapeDtypeStruct((ROWS, LENGTH, 88), jnp.float32, sharding=batch_sharding(mesh))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=batch_sharding(mesh))
    place = jax.NamedSharding(mesh, PartitionSpec("fsdp"))
    weight = jax.ShapeDtypeStruct((88, 152), jnp.float32, sharding=place)

    def loss(weight: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        mask = jnp.ones(targets.shape)
        return chunked_token_loss(hidden, weight, None, targets, mask, chunk_logits=10 * 152 * 8).loss

    with jax.set_mesh(mesh):
        text = (
            jax.jit(jax.grad(loss), out_shardings=place)
            .lower(weight, hidden, tokens)
            .compile(QUICK)
            .as_text()
        )
    assert text is not None and " while(" in text
    bodies = set(hlo.loop_bodies(text))
    inside = [one.operation for one in instructions(text) if one.computation in bodies]
    assert inside and not any(kind in op for op in inside for kind in COLLECTIVES), inside


@pytest.mark.parametrize(
    "name", ["fsdp=8", "fsdp=2,expert=4", "fsdp=2,tensor=2,expert=2", "tensor=2,expert=4"]
)
def test_every_matrix_and_its_moments_are_stored_split(name: str) -> None:
    """Also a vocabulary of 151 and the router; only vectors may be whole, so the state is the share of a device."""
    config = model(MOE, vocabulary=151)
    run = run_of(config, name)
    mesh, abstract = make_mesh(run.mesh), abstract_model(config)
    places = state_shardings(run, mesh)
    for part in (places.params, moments(places.opt_state).m, moments(places.opt_state).v):
        assert hlo.whole_parameters(abstract.shapes, part, run.mesh.size) == []
    shapes = jax.tree.leaves(state_shapes(run))
    local = sum(
        jax.ShapeDtypeStruct(place.shard_shape(shape.shape), shape.dtype).size * shape.dtype.itemsize
        for shape, place in zip(shapes, jax.tree.leaves(places), strict=True)
    )
    whole = sum(shape.size * shape.dtype.itemsize for shape in shapes)
    assert local <= 1.1 * whole / run.mesh.size
