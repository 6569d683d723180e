"""What a run will need, by arithmetic: against the compiler's own figures, the state as it is made, and by hand."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm import causal_attention, estimate, grouped, head_loss, moments8
from jaxlm.config import ConfigError, MeshConfig, OptimConfig, RunConfig
from jaxlm.count import param_count
from jaxlm.dispatch import sort_by_expert
from jaxlm.hlo import COLLECTIVES
from jaxlm.presets import PRESETS, preset
from jaxlm.train import state_shapes

# Peaks of whole training steps that jax 0.11.2's compiler found for H200s (docs/planning.md): preset, changes, GB.
COMPILED: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("quickstart", {}, 0.313),
    ("quickstart-dense", {}, 0.229),
    ("smolgpt", {}, 6.061),
    ("llama-1.1b", {"accumulation": 1, "batch_size": 32, "n_layers": 4}, 23.081),
    ("llama-1.1b", {"accumulation": 1, "batch_size": 32, "n_layers": 4, "remat": "dots"}, 18.115),
    ("llama-1.1b", {"accumulation": 1, "batch_size": 32, "n_layers": 4, "remat": "block"}, 10.17),
    ("llama-1.1b", {"accumulation": 4, "batch_size": 64, "n_layers": 8}, 27.083),
    ("gptoss", {"accumulation": 1, "n_layers": 4}, 29.457),
    ("gptoss", {"accumulation": 1, "n_layers": 4, "remat": "dots"}, 28.326),
    ("gptoss", {"accumulation": 1, "n_layers": 4, "remat": "block"}, 25.073),
    ("gptoss", {"accumulation": 1, "n_layers": 4, "batch_size": 32, "packing": True}, 34.434),
    ("tfm-1.5", {}, 15.914),
    ("minigpt-124m", {}, 49.772),
    ("gptoss", {"accumulation": 1, "mesh": "fsdp=2,expert=4"}, 12.90),
    ("astragpt-7b", {"accumulation": 1, "mesh": "fsdp=8"}, 38.22),
    ("gptoss", {"accumulation": 1}, 61.645),
    ("gptoss", {"accumulation": 1, "batch_size": 32}, 75.78),
    ("llama-1.1b", {"accumulation": 1, "batch_size": 32, "remat": "dots"}, 76.61),
    ("llama-1.1b", {"accumulation": 1, "batch_size": 32}, 104.41),
)


def run_of(name: str, **changes: Any) -> RunConfig:
    """A preset with another mesh, depth or training settings."""
    run = preset(name)
    mesh = MeshConfig.parse(changes.pop("mesh", ""))
    packing = changes.pop("packing", False)
    depth = {"n_layers": changes.pop("n_layers", run.model.n_layers)}
    optim = {k: changes.pop(k) for k in ("optimizer", "moment_dtype") if k in changes}
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **depth),
        optim=dataclasses.replace(run.optim, **optim),
        train=dataclasses.replace(run.train, **changes),
        mesh=mesh,
        data=dataclasses.replace(run.data, packing=packing),
    )


@pytest.mark.parametrize("name, changes, found", COMPILED)
def test_the_peak_is_within_15_percent_of_the_compilers(
    name: str, changes: dict[str, Any], found: float
) -> None:
    """Dense and mixtures, one device and meshes, every remat policy, with and without micro-batches."""
    peak = estimate.memory(run_of(name, **changes)).peak / 1e9
    assert abs(peak / found - 1) <= 0.15, f"{peak:.2f} GB against {found} GB"


@pytest.mark.parametrize(
    "optim", [{}, {"moment_dtype": "bfloat16"}, {"optimizer": "adamw8bit"}, {"optimizer": "muon"}]
)
def test_the_state_is_that_of_the_train_state(optim: dict[str, Any]) -> None:
    """Weights and moments against the shapes that training makes, for every optimizer."""
    run = run_of("quickstart", **optim)
    state = state_shapes(run)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state)))
    assert estimate.memory(run).state == pytest.approx(size, rel=0.01)


def test_a_mesh_divides_the_state() -> None:
    """Every axis but data divides it."""
    one = estimate.memory(run_of("gptoss", accumulation=1))
    for mesh, ways in (("fsdp=2,expert=4", 8), ("fsdp=8", 8), ("data=8", 1), ("data=2,fsdp=2,tensor=2", 4)):
        assert estimate.memory(run_of("gptoss", accumulation=1, mesh=mesh)).state == one.state / ways


def test_remat_orders_the_peak() -> None:
    """none > dots > block in what is kept, and in the peak of a long batch."""
    found = [
        estimate.memory(run_of("llama-1.1b", accumulation=1, batch_size=32, remat=remat))
        for remat in ("none", "dots", "block")
    ]
    for smaller, larger in zip(found[1:], found):
        assert smaller.activations < larger.activations and smaller.peak < larger.peak


def test_constants_are_those_of_the_code() -> None:
    """Chunks of the loss and tiles of the experts stand twice, because arithmetic loads no framework: they agree."""
    chunk = (estimate.CHUNK_TOKENS, estimate.CHUNK_BYTES, estimate.LANES)
    assert chunk == (head_loss.GPU_TOKENS, head_loss.GPU_BYTES, head_loss.LANES)
    tiles = (estimate.KERNEL_TILES, estimate.GPU_TILES, estimate.GPU_CHUNK)
    assert tiles == (grouped.KERNEL_TILES, grouped.GPU_TILES, grouped.GPU_CHUNK)
    assert estimate._BLOCK8 == moments8.BLOCK
    for length in (64, 256, 1000, 4096):
        made = sum((b.stop - b.start) * (b.last_key - b.first_key) for b in causal_attention.spans(length, 0))
        assert estimate.causal_share(length) == pytest.approx(made / length**2)


def test_slots_are_those_of_the_layout() -> None:
    """Rows of the experts' buffers, against the layout that `grouped` makes."""
    run = run_of("gptoss", accumulation=1, batch_size=1)
    ids = jax.ShapeDtypeStruct((run.train.seq_len, run.model.moe.n_active), jnp.int32)
    layout = jax.eval_shape(lambda ids: sort_by_expert(ids, 32, grouped.KERNEL_TILES[0]), ids)
    assert estimate.slots(run) == pytest.approx(layout.filled.size, rel=0.02)


def test_the_budget_by_hand() -> None:
    """llama-1.1b on 8 H200s at 40 %: time, tokens at the optimum, disk."""
    run = run_of("llama-1.1b", mesh="data=8")
    found = estimate.budget(run, estimate.device("h200"), 0.4, 10**10)
    flops = found.flops_per_token
    assert flops == pytest.approx(6.76e9, rel=1e-3)
    assert found.tokens_per_second == pytest.approx(0.4 * 8 * 989.4e12 / flops)
    assert found.hours == pytest.approx(1e10 * flops / (0.4 * 8 * 989.4e12) / 3600)
    assert found.optimal_tokens == 20 * 1_100_048_384
    assert found.checkpoint == 12 * 1_100_048_384 and found.disk == found.checkpoint * (run.train.keep + 1)
    assert estimate.budget(run_of("quickstart"), estimate.device("h200"), 0.4, 1).hours is None  # float32


def test_a_sparse_model_is_optimal_by_its_active_parameters() -> None:
    """Chinchilla's rule on what a token costs."""
    found = estimate.budget(run_of("gptoss"), estimate.device("H100"), 1.0, 1)
    assert found.optimal_tokens == 20 * 592_509_952


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_an_estimate(name: str) -> None:
    """Finite, positive, and more than its state."""
    found = estimate.memory(preset(name))
    assert all(math.isfinite(x) and x >= 0 for x in found) and found.peak > found.state
    assert found.weights == 4 * param_count(preset(name).model)


def test_bad_questions_are_one_line() -> None:
    """An unknown device, a utilisation that cannot be, no tokens."""
    run, h200 = preset("gptoss"), estimate.device("h200")
    with pytest.raises(ConfigError, match="unknown device 'h20' .did you mean 'h200'"):
        estimate.device("h20")
    for mfu in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="mfu="):
            estimate.budget(run, h200, mfu, 1)
    with pytest.raises(ConfigError, match="tokens=0"):
        estimate.budget(run, h200, 0.4, 0)


def test_expected_collectives_have_known_kinds() -> None:
    """None on one device; a mesh's are kinds that the compiler has."""
    assert estimate.expected_collectives(run_of("gptoss")) == {}
    for mesh in ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=2,expert=4"):
        found = estimate.expected_collectives(run_of("gptoss", accumulation=1, mesh=mesh))
        assert found and set(found) <= set(COLLECTIVES)
    assert set(estimate.expected_collectives(run_of("gptoss", accumulation=1, mesh="data=8"))) == {
        "all-reduce"
    }


def test_no_framework_is_loaded() -> None:
    """Arithmetic must not wait for jax."""
    code = "import sys, jaxlm.estimate; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_moments_of_the_defaults_are_those_of_adamw() -> None:
    """Two moments as wide as the weights."""
    assert OptimConfig().optimizer == "adamw"
    found = estimate.memory(preset("gptoss"))
    assert found.moments == 2 * found.weights
