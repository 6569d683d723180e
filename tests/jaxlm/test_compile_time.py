"""What compiling costs as models grow deeper."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import dataclasses, sys, time
import jax, jax.numpy as jnp
from jaxlm.presets import preset
from jaxlm.plan import step_arguments
from jaxlm.config import MeshConfig
from jaxlm.sharding import make_mesh
from jaxlm.train import make_train_step

def seconds(n_layers):
    run = preset("quickstart-dense")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, n_layers=n_layers))
    mesh = make_mesh(MeshConfig())
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        make_train_step(run, mesh).lower(*step_arguments(run, mesh)).compile()
    return time.perf_counter() - start

seconds(1)  # what the first program of a process pays
print(*(min(seconds(n), seconds(n)) for n in (4, 32)))
"""


@pytest.mark.slow
def test_a_deep_model_compiles_in_four_times_the_time_of_a_shallow_one() -> None:
    """The whole training step of 32 layers against 4: traced, lowered and compiled, nothing from a cache."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    shallow, deep = map(float, done.stdout.split())
    assert deep <= 4 * shallow, f"{deep:.1f} s against {shallow:.1f} s"
