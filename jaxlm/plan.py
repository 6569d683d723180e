"""Compiles training steps and decoding for GPUs that are not there: memory and collectives before anyone rents one.

Works on any machine with jax's CUDA compiler plugin of jax's own version, without a driver and without a GPU:

    pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION

No autotuning and no run times: the compiler's heuristics stand in for them. JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 and
JAX_PLATFORMS=cuda,cpu must be set before jax is imported; `experiments.plan` does.
"""

import importlib.metadata
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxlm.attention import init_cache
from jaxlm.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from jaxlm.decode_form import abstract_for_decoding
from jaxlm.estimate import DEVICES, fuses_attention
from jaxlm.finetune.tasks import task_of
from jaxlm.generate import lower_greedy
from jaxlm.grouped import SLICES
from jaxlm.hlo import collectives
from jaxlm.layers import Backends
from jaxlm.model import abstract_model
from jaxlm.optim import Scalars
from jaxlm.quant import abstract_quantized
from jaxlm.sharding import batch_sharding, replicated
from jaxlm.train import Task, frozen_shardings, make_train_step, state_shapes, state_shardings
from jaxlm.tune_config import TuneRun


class Target(NamedTuple):
    """What the compiler asks of a GPU: NVIDIA's data sheets, and the CUDA programming guide on compute capabilities."""

    capability: tuple[int, int]
    cores: int
    shared_per_core: int  # bytes of shared memory; of a block at most 1 KiB less
    bandwidth: float  # bytes per second
    l2: int
    clock: float  # GHz


TARGETS: dict[str, Target] = {
    "h200": Target((9, 0), 132, 233_472, 4.8e12, 52_428_800, 1.98),
    "h100": Target((9, 0), 132, 233_472, 3.35e12, 52_428_800, 1.98),
    "a100-80": Target((8, 0), 108, 167_936, 2.039e12, 41_943_040, 1.41),
    "a100-40": Target((8, 0), 108, 167_936, 1.555e12, 41_943_040, 1.41),
    "rtx4090": Target((8, 9), 128, 102_400, 1.008e12, 75_497_472, 2.52),
    "l4": Target((8, 9), 58, 102_400, 3.0e11, 50_331_648, 2.04),
}
H200_BYTES = DEVICES["h200"].memory
CUDNN_VERSION = 91900


class Compiled(NamedTuple):
    """What the compiler says of one device's share of a training step; bytes, and collectives by kind."""

    peak_bytes: int
    state_bytes: int  # one device's part of state and frozen weights
    temporary_bytes: int
    argument_bytes: int  # the state as it lies, and the batch
    aliased_bytes: int  # of the arguments, what the results take over in place
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


def target_text(name: str) -> str:
    """The compiler's description of a device. Raises ConfigError for one that it has none of."""
    if name not in TARGETS:
        raise ConfigError(f"there is no compiler target for {name!r}; targets are {', '.join(TARGETS)}")
    one, (major, minor) = TARGETS[name], TARGETS[name].capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  core_count: {one.cores}  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_core: {one.shared_per_core}
  shared_memory_per_block_optin: {one.shared_per_core - 1024}
  threads_per_core_limit: 2048  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(one.bandwidth)}  l2_cache_size: {one.l2}  clock_rate_ghz: {one.clock}
  device_memory_size: {int(DEVICES[name].memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 19 }}
device_description_str: "NVIDIA {name.upper()}"
"""


def absent_mesh(config: MeshConfig, device: str = "h200") -> Mesh:
    """A mesh of GPUs of one host that exist only for the compiler."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target_text(device), topology=f"1x1x{config.size}"
    )
    shape = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor, "expert": config.expert}
    grid = np.array(topology.devices).reshape(tuple(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def compile_step(run: RunConfig, device: str = "h200") -> Compiled:
    """Compiles the run's training step for a device of TARGETS. Raises ConfigError without the plugin."""
    require_plugin()
    _tell_cudnn_version()
    mesh = absent_mesh(run.mesh, device)
    task = task_of(run, gpu_backends(run))
    with jax.set_mesh(mesh):
        step = make_train_step(run, mesh, task=task)
        arguments = step_arguments(run, mesh, task)
        compiled = step.lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    state = sum(map(_share, jax.tree.leaves((arguments[0], arguments[3]))))
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        peak + memory.temp_size_in_bytes,
        state,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.alias_size_in_bytes,
        {kind: traffic.count for kind, traffic in collectives(text).items()},
        text,
    )


def gpu_backends(run: RunConfig) -> Backends:
    """What `auto` takes in a training step on a GPU; here the default device is another one."""
    half = run.train.dtype in ("bfloat16", "float16")
    return Backends("cudnn" if fuses_attention(run) else "xla", "pallas" if half else "batched")


def compile_decode(config: ModelConfig, quant: str | None, slots: int, batch: int) -> Decoding:
    """Compiles greedy decoding of many tokens in one dispatch for one H200, on bfloat16 weights or quantised ones.

    quant: int8, int4, nf4 (what jaxlm.quant leaves alone is bfloat16), or None. slots: tokens a row's cache holds.
    Raises ConfigError without the plugin, on an unknown kind, and on sizes that the model cannot have.
    """
    if batch < 1 or not 1 <= slots <= config.context:
        raise ConfigError(f"batch={batch} must be positive and slots={slots} between 1 and {config.context}")
    require_plugin()
    few = batch * config.moe.n_active <= min(SLICES, config.moe.n_experts // 2)
    half, backends = jnp.bfloat16, Backends(attention="xla", experts="sliced" if few else "pallas")
    if quant is None:
        model = abstract_model(config, backends, half)
        model = abstract_for_decoding(model.graphdef, model.shapes)
    else:
        model = abstract_quantized(config, quant, backends, half)
    cache = jax.eval_shape(lambda: init_cache(config, batch, slots, half))
    place = replicated(absent_mesh(MeshConfig()))
    compiled = lower_greedy(model.graphdef, model.shapes, cache, place).compile()
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


def _share(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's part of an array."""
    assert x.sharding is not None
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def step_arguments(run: RunConfig, mesh: Mesh, task: Task | None = None) -> tuple[Any, Any, Scalars, Any]:
    """State, batch, scalars and frozen parameters of a step as shapes with their places, to lower it with."""
    task = task_of(run) if task is None else task

    def struct(shape: jax.ShapeDtypeStruct, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    pairs = isinstance(run, TuneRun) and run.tune.method == "dpo"
    rows = (run.train.batch_size, *((2,) if pairs else ()), run.train.seq_len)
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.float32}
    if run.data.packing or (isinstance(run, TuneRun) and (pairs or run.tune.chat.packing)):
        dtypes |= {"segments": jnp.int32, "positions": jnp.int32}
    split = batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(rows, dtype, sharding=split) for name, dtype in dtypes.items()}
    if pairs and run.tune.reference == "stored":
        batch["reference"] = jax.ShapeDtypeStruct(rows[:2], jnp.float32, sharding=split)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    state = jax.tree.map(struct, state_shapes(run, task), state_shardings(run, mesh, task))
    frozen = jax.tree.map(struct, dict(task.frozen_shapes), frozen_shardings(mesh, task))
    return state, batch, Scalars(*(scalar,) * len(Scalars._fields)), frozen


def _tell_cudnn_version() -> None:
    """jax asks the local cuDNN for its version before it emits the kernel; here the target's stands in for it."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_cudnn_version = lambda: CUDNN_VERSION
    fused.check_compute_capability = lambda capability: True
