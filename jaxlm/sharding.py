"""Mesh, and the one table from logical axes to mesh axes.

Parameters and activations name their axes logically; only this table knows the mesh. All mesh axes are Auto: the
compiler places collectives, models pin activations with `constrain` at block boundaries, and `shard_map` islands
(attention kernels, experts) use the mesh that `jax.set_mesh` made current.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.config import ConfigError, MeshConfig

LOGICAL_TO_MESH: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # experts see tokens of all, the rest treats `expert` as data
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
}
BATCH_AXES = LOGICAL_TO_MESH["batch"]

Axes = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run. Raises ConfigError when it needs more devices than there are."""
    devices = list(jax.devices() if devices is None else devices)
    if config.size > len(devices):
        raise ConfigError(
            f"mesh {config} needs {config.size} devices but there are {len(devices)} ({devices[0].device_kind}); "
            "choose a smaller --mesh"
        )
    shape = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor, "expert": config.expert}
    grid = np.array(devices[: config.size]).reshape(tuple(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def spec(axes: Axes, table: dict[str, tuple[str, ...]] = LOGICAL_TO_MESH) -> PartitionSpec:
    """Logical axes -> PartitionSpec. Raises ValueError when two dimensions would claim one mesh axis."""
    physical = [() if axis is None else table[axis] for axis in axes]
    flat = [name for names in physical for name in names]
    if len(set(flat)) != len(flat):
        raise ValueError(f"logical axes {axes} collide on the mesh: {physical}")
    return PartitionSpec(
        *(None if not names else names[0] if len(names) == 1 else names for names in physical)
    )


def sharding(mesh: Mesh, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
    """How an array is laid out. A dimension that its mesh axes do not divide stays whole (a vocabulary of 200,019)."""
    if len(shape) != len(axes):
        raise ValueError(
            f"shape {shape} has {len(shape)} dimensions but logical axes {axes} name {len(axes)}"
        )
    entries = [
        entry if size % _ways(mesh, entry) == 0 else None
        for size, entry in zip(shape, spec(axes), strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*entries))


def _ways(mesh: Mesh, entry: str | tuple[str, ...] | None) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over every axis that carries data."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def current_mesh_shape() -> dict[str, int]:
    """Axis sizes of the mesh that `jax.set_mesh` made current; {} without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pins the layout of an activation under the current mesh; does nothing without one."""
    if math.prod(current_mesh_shape().values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))
