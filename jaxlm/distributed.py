"""Several processes that train as one: joining, agreeing, waiting for each other, and whose rows are whose.

Every process runs the same program; `jax.distributed` connects them. Process 0 writes what there is one of (the
configuration, the log, figures); a folder that all of them see is assumed. With one process everything here is
trivial, and costs nothing.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import ConfigError
from jaxlm.sharding import batch_sharding
from jaxlm.supervise import HEARTBEAT, Worker, worker

JOIN, LEAVE = 300, 60  # seconds to wait for all processes at the start, and at the end
WAIT = 24 * 3600  # seconds that others wait while process 0 prepares data


def join() -> None:
    """Connects this process with the others that its parent has named; nothing without such a parent.

    Must run before anything is computed. A process that loses the others is ended by jax after 20 seconds.
    Raises ConfigError where they do not come together.
    """
    me = worker()
    if me is None:
        return
    if me.cpu_devices:
        jax.config.update("jax_num_cpu_devices", me.cpu_devices)
    try:
        jax.distributed.initialize(
            **_who(me),
            initialization_timeout=JOIN,
            heartbeat_timeout_seconds=int(HEARTBEAT),
            shutdown_timeout_seconds=LEAVE,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the processes did not come together: {reason}") from None


def _who(me: Worker) -> dict[str, Any]:
    if me.cluster:
        return {}
    return {
        "coordinator_address": me.coordinator,
        "num_processes": me.count,
        "process_id": me.index,
        "local_device_ids": me.devices,
    }


def leave() -> None:
    """Waits for the others and disconnects."""
    if several():
        jax.distributed.shutdown()


def several() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this is process 0, which writes what there is one of."""
    return jax.process_index() == 0


def _client() -> Any:
    from jax._src.distributed import global_state  # the only door to the service that connects the processes

    return global_state.client


def agree(name: str, value: Any) -> Any:
    """What process 0 says, JSON-able, in every process; the others' values do not count. Each name serves once."""
    if not several():
        return value
    if is_main():
        _client().key_value_set(f"jaxlm/{name}", json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(f"jaxlm/{name}", WAIT * 1000))


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """The body runs in process 0, and in the others when that is through, which then find what it has made.

    A body that raises in process 0 ends that process, and its parent the others. Each name serves once.
    """
    if several() and not is_main():
        _client().wait_at_barrier(f"jaxlm/{name}", WAIT * 1000)
    yield
    if several() and is_main():
        _client().wait_at_barrier(f"jaxlm/{name}", WAIT * 1000)


def own_rows(mesh: Mesh | None, batch_size: int) -> list[int] | None:
    """Rows of every global batch that this process's devices hold, ascending; None = all."""
    if mesh is None or not several():
        return None
    places: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = {row for (part,) in places.values() for row in range(*part.indices(batch_size))}
    return sorted(rows)


def place_rows(
    batch: dict[str, np.ndarray], mesh: Mesh, rows: list[int], batch_size: int
) -> dict[str, jax.Array]:
    """A global batch on the mesh, of which this process has the rows `rows` of each array [rows, ...]."""
    places, at = batch_sharding(mesh), {row: i for i, row in enumerate(rows)}

    def part(array: np.ndarray, index: Any) -> np.ndarray:
        return array[[at[row] for row in range(*index[0].indices(batch_size))]]

    return {
        name: jax.make_array_from_callback(
            (batch_size, *array.shape[1:]), places, lambda index, array=array: part(array, index)
        )
        for name, array in batch.items()
    }


def place_votes(mesh: Mesh, vote: int) -> jax.Array:
    """int32 [devices of the mesh], this process's vote on each of its own.

    Not a value per row: along `tensor`, processes that hold the same rows may differ in what they say.
    """
    places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), places, lambda _: np.full(1, vote, np.int32))


def require_all_devices(mesh: Mesh) -> None:
    """Raises ConfigError unless the mesh spans the devices of all processes: each must have a share."""
    if several() and mesh.size != jax.device_count():
        raise ConfigError(
            f"the mesh has {mesh.size} devices but the {jax.process_count()} processes have {jax.device_count()}; "
            "name all of them in --mesh"
        )
