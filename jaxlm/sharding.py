"""Mesh, and the one table from logical axes to mesh axes.

Parameters and activations name their axes logically; only this table knows the mesh. All mesh axes are Auto: the
compiler places collectives, models pin activations with `constrain` at block boundaries, and `shard_map` islands
(attention kernels, experts, the loss) use the mesh that `jax.set_mesh` made current.

`data` alone keeps copies. Along every other axis each parameter of two or more dimensions is stored split, whatever
its sizes: an axis that does not divide its dimension moves to another one, and the parameter is gathered for use.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.config import ConfigError, MeshConfig

LOGICAL_TO_MESH: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # experts see tokens of all, the rest treats `expert` as data
    "embed": ("fsdp", "expert"),  # outside the experts, `expert` is a second fsdp
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert", "fsdp"),  # on the first dimension a gather moves whole experts and turns no layout
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
    return _partition(physical)


def sharding(mesh: Mesh, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
    """How a parameter is stored, and what goes with it (gradient, moments).

    A mesh axis that does not divide its dimension (a vocabulary of 200,019) splits another one, the largest that it
    divides. Vectors stay whole then. Raises ValueError where shape and axes differ in length, or axes collide.
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"shape {shape} has {len(shape)} dimensions but logical axes {axes} name {len(axes)}"
        )
    spec(axes)
    entries, homeless = _fit(mesh.shape, shape, axes)
    if len(shape) > 1:
        named = {name for axis in axes if axis is not None for name in LOGICAL_TO_MESH[axis]}
        homeless += [name for name in mesh.shape if name not in named and name != "data"]
        by_size = sorted(range(len(shape)), key=lambda i: -shape[i])
        for name in homeless:
            for i in by_size:
                if shape[i] % (_ways(mesh.shape, entries[i]) * mesh.shape[name]) == 0:
                    entries[i].append(name)
                    break
    return NamedSharding(mesh, _partition(entries))


def _fit(sizes: Mapping[str, int], shape: tuple[int, ...], axes: Axes) -> tuple[list[list[str]], list[str]]:
    """Mesh axes of each dimension, as far as they divide it, and those that do not."""
    entries: list[list[str]] = []
    homeless: list[str] = []
    for size, axis in zip(shape, axes, strict=True):
        entries.append([])
        for name in () if axis is None else LOGICAL_TO_MESH[axis]:
            if name not in sizes:
                continue
            fits = size % (_ways(sizes, entries[-1]) * sizes[name]) == 0
            (entries[-1] if fits else homeless).append(name)
    return entries, homeless


def _ways(sizes: Mapping[str, int], names: Sequence[str]) -> int:
    return math.prod(sizes[name] for name in names)


def _partition(entries: Sequence[Sequence[str]]) -> PartitionSpec:
    return PartitionSpec(
        *(None if not names else names[0] if len(names) == 1 else tuple(names) for names in entries)
    )


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
    """Pins the layout of an activation under the current mesh; does nothing without one.

    A mesh axis that does not divide its dimension is left out, and so is one that a `shard_map` around us has taken.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    free = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types)
        if kind == AxisType.Auto
    }
    entries, _ = _fit(free, x.shape, axes)
    return jax.lax.with_sharding_constraint(x, _partition(entries))


def by_rows(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function` of each device's rows of the batch; it must treat rows alike. All at once without a mesh."""
    ways = math.prod(current_mesh_shape().get(name, 1) for name in BATCH_AXES)
    if ways == 1 or x.shape[0] % ways:
        return function(x)
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(x)
