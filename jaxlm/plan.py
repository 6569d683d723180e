"""Compiles training steps and decoding for GPUs that are not there: memory and collectives before anyone rents one.

Works on any machine with jax's CUDA compiler plugin of jax's own version, without a driver and without a GPU:

    pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION

No autotuning and no run times: the compiler's heuristics stand in for them. JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 and
JAX_PLATFORMS=cuda,cpu must be set before jax is imported; `experiments.plan` does.
"""

import importlib.metadata
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxlm.attention import init_cache
from jaxlm.cached import step
from jaxlm.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from jaxlm.layers import Backends
from jaxlm.model import abstract_model
from jaxlm.optim import Scalars
from jaxlm.quant import abstract_quantized
from jaxlm.sharding import batch_sharding, replicated
from jaxlm.train import make_train_step, state_shapes, state_shardings

# What the compiler asks of an H200: NVIDIA's data sheet, and the CUDA programming guide on compute capability 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 150000000000  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 19 }
device_description_str: "NVIDIA H200"
"""
H200_BYTES = 141e9
CUDNN_VERSION = 91900
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Compiled(NamedTuple):
    """What the compiler says of one device's share of a training step; bytes, and collectives by kind."""

    peak_bytes: int
    state_bytes: int
    temporary_bytes: int
    collectives: dict[str, int]
    text: str  # optimized HLO


class Decoding(NamedTuple):
    """What the compiler says of a loop that decodes on one device; bytes."""

    weight_bytes: int
    cache_bytes: int
    argument_bytes: int  # weights, cache and the little that says where each row is
    temporary_bytes: int
    peak_bytes: int
    text: str  # optimized HLO


def require_plugin() -> None:
    """Raises ConfigError that says what to install when jax's CUDA compiler is missing or of another version."""
    try:
        found = importlib.metadata.version("jax-cuda13-plugin")
    except importlib.metadata.PackageNotFoundError:
        found = "missing"
    if found != jax.__version__:
        raise ConfigError(
            f"jax-cuda13-plugin is {found}; pip install --no-deps jax-cuda13-plugin=={jax.__version__} "
            f"jax-cuda13-pjrt=={jax.__version__}"
        )


def h200_mesh(config: MeshConfig) -> Mesh:
    """A mesh of H200s of one host that exist only for the compiler."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x1x{config.size}"
    )
    shape = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor, "expert": config.expert}
    grid = np.array(topology.devices).reshape(tuple(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def compile_step(run: RunConfig) -> Compiled:
    """Compiles the run's training step for H200s. Raises ConfigError without the plugin."""
    require_plugin()
    _tell_cudnn_version()
    mesh = h200_mesh(run.mesh)
    half = run.train.dtype == "bfloat16" and not run.model.dropout and not run.model.attn_bias_table
    backends = Backends(attention="cudnn" if half else "xla", experts="batched")
    with jax.set_mesh(mesh):
        compiled = make_train_step(run, mesh, backends).lower(*_arguments(run, mesh)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    state = _bytes(state_shapes(run)) // run.mesh.size
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return Compiled(peak + memory.temp_size_in_bytes, state, memory.temp_size_in_bytes, counts, text)


def compile_decode(config: ModelConfig, quant: str | None, slots: int, batch: int) -> Decoding:
    """Compiles greedy decoding of many tokens in one dispatch for one H200, on bfloat16 weights or quantised ones.

    quant: int8, int4, nf4 (what jaxlm.quant leaves alone is bfloat16), or None. slots: tokens a row's cache holds.
    Raises ConfigError without the plugin, on an unknown kind, and on sizes that the model cannot have.
    """
    if batch < 1 or not 1 <= slots <= config.context:
        raise ConfigError(f"batch={batch} must be positive and slots={slots} between 1 and {config.context}")
    require_plugin()
    half, backends = jnp.bfloat16, Backends(attention="xla", experts="batched")
    model = (
        abstract_model(config, backends, half)
        if quant is None
        else abstract_quantized(config, quant, backends, half)
    )
    cache = jax.eval_shape(lambda: init_cache(config, batch, slots, half))
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)

    def run(params: Any, cache: Any, tokens: Any, positions: Any, count: Any) -> Any:
        def one(carry: Any) -> Any:
            made, cache, tokens, positions = carry
            logits, cache, positions = step(model.graphdef, params, cache, tokens, positions)
            return made + 1, cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), positions

        carry = (jnp.zeros((), jnp.int32), cache, tokens, positions)
        return jax.lax.while_loop(lambda carry: carry[0] < count, one, carry)

    place = replicated(h200_mesh(MeshConfig()))
    arguments = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        (model.shapes, cache, row, row, count),
    )
    compiled = jax.jit(run, donate_argnums=1).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Decoding(
        _bytes(model.shapes),
        _bytes(cache),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        kept + memory.temp_size_in_bytes,
        compiled.as_text() or "",
    )


def _bytes(shapes: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _arguments(run: RunConfig, mesh: Mesh) -> tuple[Any, Any, Scalars]:
    places = state_shardings(run, mesh, abstract_model(run.model))

    def struct(shape: jax.ShapeDtypeStruct, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    rows = (run.train.batch_size, run.train.seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(rows, dtype, sharding=batch_sharding(mesh))
        for name, dtype in (("inputs", jnp.int32), ("targets", jnp.int32), ("loss_mask", jnp.float32))
    }
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    return jax.tree.map(struct, state_shapes(run), places), batch, Scalars(*(scalar,) * len(Scalars._fields))


def _tell_cudnn_version() -> None:
    """jax asks the local cuDNN for its version before it emits the kernel; here the target's stands in for it."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_cudnn_version = lambda: CUDNN_VERSION
    fused.check_compute_capability = lambda capability: True
