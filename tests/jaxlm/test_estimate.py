"""What a run will need, by arithmetic: against the compiler's own figures, the state as it is made, and by hand."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm import estimate, grouped, loss, moments8
from jaxlm.config import ConfigError, MeshConfig, OptimConfig, RunConfig
from jaxlm.count import param_count
from jaxlm.hlo import COLLECTIVES
from jaxlm.presets import PRESETS, preset
from jaxlm.train import state_shapes

# Peaks of whole training steps that jax 0.11.2's compiler found for H200s (docs/planning.md): preset, changes, GB.
COMPILED: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("quickstart", {}, 0.351),
    ("quickstart-dense", {}, 0.260),
    ("smolgpt", {}, 5.088),
    ("minigpt-124m", {}, 47.212),
    ("llama-1.1b", {"accumulation": 1, "batch_size": 32}, 102.723),
    ("llama-1.1b", {"accumulation": 1, "batch_size": 32, "n_layers": 4, "remat": "dots"}, 17.288),
    ("llama-1.1b", {"accumulation": 1, "batch_size": 32, "n_layers": 4, "remat": "block"}, 10.039),
    ("llama-1.1b", {"accumulation": 4, "batch_size": 64, "n_layers": 8}, 25.172),
    ("gptoss", {"accumulation": 1, "n_layers": 4}, 25.173),
    ("gptoss", {"accumulation": 1, "n_layers": 4, "remat": "dots"}, 24.654),
    ("gptoss", {"accumulation": 1, "n_layers": 4, "remat": "block"}, 22.178),
    ("gptoss", {"accumulation": 1}, 54.199),
    ("gptoss", {"accumulation": 1, "mesh": "fsdp=2,expert=4"}, 11.974),
    ("tfm-1.5", {}, 15.141),
    ("astragpt-7b", {"accumulation": 1, "mesh": "fsdp=8"}, 38.601),
)


def run_of(name: str, **changes: Any) -> RunConfig:
    """A preset with another mesh, depth or training settings."""
    run = preset(name)
    mesh = MeshConfig.parse(changes.pop("mesh", ""))
    depth = {"n_layers": changes.pop("n_layers", run.model.n_layers)}
    optim = {k: changes.pop(k) for k in ("optimizer", "moment_dtype") if k in changes}
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **depth),
        optim=dataclasses.replace(run.optim, **optim),
        train=dataclasses.replace(run.train, **changes),
        mesh=mesh,
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
    """The loss's chunk and the experts' tiles stand twice, because arithmetic loads no framework: they agree."""
    assert estimate.CHUNK_LOGITS == loss.CHUNK_LOGITS and estimate._BLOCK8 == moments8.BLOCK
    assert (max(grouped.GPU_TILES), grouped.GPU_CHUNK) == (estimate.GPU_TILE, estimate.GPU_CHUNK)


def test_slots_are_those_of_the_layout() -> None:
    """Rows of the experts' buffers, against the layout that `grouped` makes."""
    run = run_of("gptoss", accumulation=1, batch_size=1)
    ids = jax.ShapeDtypeStruct((run.train.seq_len, run.model.moe.n_active), jnp.int32)
    layout = jax.eval_shape(lambda ids: grouped.sort_by_expert(ids, 32, 256, grouped.GPU_CHUNK), ids)
    assert estimate.slots(run) == pytest.approx(
        layout.filled.size, rel=0.25
    )  # whole chunks of 16 tiles of 256


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
