"""What a run saved comes back bit for bit, or the run is told in one line why not."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.checkpoint import MANIFEST, CheckpointError, Checkpoints

ROOT = Path(__file__).resolve().parents[2]


def state_of(seed: int, sharding: jax.sharding.Sharding | None = None) -> dict[str, Any]:
    """A small tree of the dtypes a run has; NaN payloads, infinities and negative zero among the values."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (16, 8), dtype=np.uint32)
    tree = {
        "params": {"w": bits.view(np.float32), "h": (bits >> 16).astype(np.uint16).view(jnp.bfloat16)},
        "moments": [rng.standard_normal((8,)), {"b": np.array([-0.0, np.inf, np.nan, 1e-45], np.float32)}],
        "step": np.int32(seed),
        "key": np.array([seed, 2**32 - 1], np.uint32),
    }
    with jax.enable_x64(True):
        return jax.tree.map(
            lambda x: jax.device_put(x, sharding if sharding and np.ndim(x) == 2 else None), tree
        )


def like(tree: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """The template that restores `tree`, its matrices onto `sharding`."""

    def leaf(x: jax.Array) -> jax.ShapeDtypeStruct:
        place = sharding if sharding and x.ndim == 2 else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(leaf, tree)


def raw(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {str(p): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for p, x in leaves}


def saved(directory: Path, *steps: int, keep: int = 2, losses: tuple[float | None, ...] = ()) -> Checkpoints:
    """Checkpoints of those steps, all committed."""
    checkpoints = Checkpoints(directory, keep=keep)
    for i, step in enumerate(steps):
        checkpoints.save(step, state_of(step), {"at": step}, losses[i] if losses else None)
    checkpoints.close()
    return checkpoints


def largest_file(root: Path) -> Path:
    """The file that holds most of a checkpoint's bytes."""
    return max((p for p in (root / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    """Every dtype of a run, float64 and NaN payloads included, and the JSON beside it."""
    state, extra = state_of(3), {"loader": {"next": 7}, "best": 0.1 + 0.2, "never": float("inf")}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, state, extra, 1.5)
    with jax.enable_x64(True):
        restored, got = checkpoints.restore("latest", like(state))
    assert raw(restored) == raw(state)
    assert got == extra
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_save_survives_donation(tmp_path: Path) -> None:
    """The state may be donated as soon as `save` returns; what is written is the state at the call."""
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    state = {
        "a": jnp.arange(2_000_000.0),
        "b": jax.device_put(jnp.arange(800_000.0), NamedSharding(mesh, PartitionSpec("x"))),
    }
    before, template = (
        raw(state),
        {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in state.items()},
    )
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    assert raw(checkpoints.restore(1, template)[0]) == before
    checkpoints.close()


def test_restore_onto_another_mesh_is_bitwise(tmp_path: Path) -> None:
    """Saved from 4x2 devices split by rows and columns, restored onto 2 split by columns and onto one."""
    devices = np.array(jax.devices())
    assert len(devices) == 8
    wide = NamedSharding(Mesh(devices.reshape(4, 2), ("a", "b")), PartitionSpec("a", "b"))
    narrow = NamedSharding(Mesh(devices[:2], ("a",)), PartitionSpec(None, "a"))
    state = state_of(5, wide)
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(5, state, {})
    with jax.enable_x64(True):
        for sharding in (narrow, None):
            restored, _ = checkpoints.restore(5, like(state, sharding))
            assert raw(restored) == raw(state)
            assert restored["params"]["w"].sharding == like(state, sharding)["params"]["w"].sharding
    checkpoints.close()


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    """keep=2 leaves the two newest and the one of lowest validation loss; NaN is never best."""
    checkpoints = saved(tmp_path, 10, 20, 30, 40, 50, losses=(float("nan"), 1.0, 3.0, 2.0, None))
    assert checkpoints.steps == [20, 40, 50]
    assert (checkpoints.best_step, checkpoints.latest_step) == (20, 50)
    with jax.enable_x64(True):
        assert raw(checkpoints.restore("best", like(state_of(0)))[0]) == raw(state_of(20))


def test_going_on_from_an_earlier_step_replaces_the_later_ones(tmp_path: Path) -> None:
    """After a restore of step 10, saving 20 again overwrites it, and step 30 of the old history goes."""
    checkpoints = saved(tmp_path, 10, 20, 30, keep=3)
    with jax.enable_x64(True):
        checkpoints.restore(10, like(state_of(0)))
        checkpoints.save(20, state_of(99), {"at": "again"})
        restored, extra = checkpoints.restore("latest", like(state_of(0)))
    assert (raw(restored), extra) == (raw(state_of(99)), {"at": "again"})
    assert checkpoints.steps == [10, 20]
    checkpoints.close()


def test_directories_without_a_manifest_are_no_checkpoints(tmp_path: Path) -> None:
    """An empty directory and half a copy, both with a number for a name, are neither listed nor restored."""
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "2").mkdir()
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "3" / "state")
    assert (checkpoints.steps, checkpoints.latest_step) == ([1], 1)
    with pytest.raises(CheckpointError, match="no checkpoint of step 2 in .*; there are steps 1$"):
        checkpoints.restore(2, like(state_of(0)))
    checkpoints.save(2, state_of(2), {})
    checkpoints.close()
    assert checkpoints.steps == [1, 2]


def test_nothing_to_restore_is_one_line(tmp_path: Path) -> None:
    """A run that never saved, and one without a validation loss, say so."""
    with pytest.raises(CheckpointError, match="^nothing to restore: no complete checkpoint in "):
        Checkpoints(tmp_path / "none").restore("latest", {})
    with pytest.raises(
        CheckpointError, match="^no checkpoint with a validation loss in .* there are steps 4$"
    ):
        saved(tmp_path, 4).restore("best", like(state_of(0)))


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from jaxlm.checkpoint import Checkpoints

class Killed(Checkpoints):
    def _write_manifest(self):
        if self._draft["step"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)  # the arrays are on disk, the commit is not
        super()._write_manifest()

checkpoints = Killed(sys.argv[1])
checkpoints.save(1, {"a": jnp.arange(1000.0)}, {"at": 1})
checkpoints.save(2, {"a": jnp.arange(1000.0) + 1}, {"at": 2})
checkpoints.wait()
"""


def test_kill_during_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """SIGKILL just before the commit: step 1 is restored, and the next save removes the remains."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    remains = [p for p in tmp_path.iterdir() if p.name != "1"]
    assert remains, "the save was not interrupted"
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1]
    state, extra = checkpoints.restore("latest", like({"a": jnp.zeros(1000)}))
    assert extra == {"at": 1}
    np.testing.assert_array_equal(state["a"], np.arange(1000.0))
    checkpoints.save(3, state, {})
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


def test_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A file size limit fails the write in the background; one line says what is intact, and the remains are gone."""
    checkpoints = saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"a": jax.random.normal(jax.random.key(0), (300_000,))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="step 2 was not written .* disk full.* step 1 is intact$"):
            checkpoints.save(2, large, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert (capfd.readouterr(), caplog.messages) == (("", ""), []), "orbax's own report of it is noise"
    checkpoints.verify(1)
    checkpoints.save(3, large, {})
    checkpoints.close()
    assert checkpoints.steps == [1, 3]


def test_state_larger_than_the_disk_is_refused_before_writing(tmp_path: Path) -> None:
    """The free space is asked for first; an abstract petabyte stands in for a state."""
    petabyte = SimpleNamespace(dtype=jnp.dtype("float32"), shape=(2**48,), nbytes=2**50)
    with pytest.raises(
        CheckpointError, match="disk full: 1.15e.06 GB are needed, .* GB are free; there is no"
    ):
        Checkpoints(tmp_path / "c").save(1, {"a": petabyte}, {})
    assert not (tmp_path / "c").exists()


def test_truncated_file_is_named(tmp_path: Path) -> None:
    """One line names the file, both sizes and the step to use instead."""
    checkpoints = saved(tmp_path, 1, 2)
    victim = largest_file(tmp_path / "2")
    size = victim.stat().st_size
    os.truncate(victim, size // 2)
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore("latest", like(state_of(0)))
    expected = f"{victim} has {size // 2} bytes instead of {size}; remove {tmp_path / '2'} to use step 1"
    assert str(error.value) == f"checkpoint of step 2 is damaged: {expected}"
    victim.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoints.restore("latest", like(state_of(0)))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Twenty single bits of each file of a checkpoint, the manifest among them: never restored in silence."""
    checkpoints = saved(tmp_path, 1)
    files = [p for p in (tmp_path / "1" / "state").rglob("*") if p.is_file()] + [tmp_path / "1" / MANIFEST]
    assert len(files) > 5
    rng = np.random.default_rng(0)
    for path in (p for p in files if p.stat().st_size):
        whole = path.read_bytes()
        for _ in range(20):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="checkpoint of step 1 is damaged"):
                checkpoints.verify(1)
        path.write_bytes(whole)
    checkpoints.verify(1)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    """Shapes, dtypes and names that differ are listed with both values; orbax would cast a dtype in silence."""
    checkpoints = saved(tmp_path, 1)
    with jax.enable_x64(True):
        template = like(state_of(0))
        template["params"]["w"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
        template["moments"][0] = jax.ShapeDtypeStruct((8,), jnp.float32)
        template["new"] = template.pop("key")
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(1, template)
    assert str(error.value) == (
        "checkpoint of step 1 is of another model: new is not in the checkpoint; key is not in the model; "
        "moments.0 is float64[8] in the checkpoint, float32[8] in the model; "
        "params.w is float32[16,8] in the checkpoint, float32[16,9] in the model"
    )


def test_extra_must_be_json(tmp_path: Path) -> None:
    """What JSON cannot hold is refused at the save, not found missing at the restore; later changes do not count."""
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(CheckpointError, match="step 1: extra is not JSON: .*ndarray"):
        checkpoints.save(1, state_of(1), {"loader": np.arange(3)})
    extra = {"next": [1]}
    checkpoints.save(1, state_of(1), extra)
    extra["next"].append(2)
    checkpoints.close()
    stored = json.loads((tmp_path / "c" / "1" / MANIFEST).read_text())
    assert stored["body"]["extra"] == {"next": [1]}


def test_saving_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither saving nor restoring prints anything."""
    checkpoints = saved(tmp_path, 1, 2, 3, 4)
    with jax.enable_x64(True):
        checkpoints.restore(4, like(state_of(0)))
    assert capfd.readouterr() == ("", "")
