"""What a run saved comes back bit for bit, or the run is told in one line why not."""

import hashlib
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
from damage import flip
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.checkpoint import MANIFEST, CheckpointError, Checkpoints, NoSpaceError

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


def test_directories_without_a_manifest_are_no_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty directory and half a copy, both with a number for a name, are not listed, and said to be damaged."""
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "2").mkdir()
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "3" / "state")
    assert (checkpoints.steps, checkpoints.latest_step) == ([1], 1)
    with pytest.raises(CheckpointError, match="no checkpoint of step 4 in .*; there are steps 1$"):
        checkpoints.restore(4, like(state_of(0)))
    with pytest.raises(CheckpointError, match="step 2 is damaged: .* is missing$"):
        checkpoints.restore(2, like(state_of(0)))
    with jax.enable_x64(True):
        assert checkpoints.restore("latest", like(state_of(0)))[1] == {"at": 1}
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" is damaged: ")[0] for line in said] == [
        "warning: checkpoint of step 3",
        "warning: checkpoint of step 2",
    ]
    assert all(line.endswith(f"{MANIFEST} is missing; going on from step 1") for line in said)
    checkpoints.save(2, state_of(2), {})
    checkpoints.close()
    assert checkpoints.steps == [1, 2] and not (tmp_path / "3").exists()


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
    def _commit(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)  # the arrays are on disk, the commit is not
        super()._commit(step)

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
        with pytest.raises(NoSpaceError, match="step 2 was not written .* disk full.* step 1 is intact$"):
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


def test_the_newest_whole_checkpoint_is_restored_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 is cut short and a file of step 2 is gone: step 1 comes back, each damage is one line with its file."""
    checkpoints = saved(tmp_path, 1, 2, 3, keep=3)
    cut, gone = largest_file(tmp_path / "3"), tmp_path / "2" / "state" / "_METADATA"
    size = cut.stat().st_size
    os.truncate(cut, size // 2)
    gone.unlink()
    with jax.enable_x64(True):
        restored, extra = checkpoints.restore("latest", like(state_of(0)))
    assert (raw(restored), extra) == (raw(state_of(1)), {"at": 1})
    assert capsys.readouterr().err.splitlines() == [
        f"warning: checkpoint of step 3 is damaged: {cut} has {size // 2} bytes instead of {size}; "
        "going on from step 1",
        f"warning: checkpoint of step 2 is damaged: {gone} is missing; going on from step 1",
    ]


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    """By number or as the best: one line that names the file, never another checkpoint in its place."""
    checkpoints = saved(tmp_path, 1, 2, losses=(2.0, 1.0))
    extra = tmp_path / "2" / "state" / "d" / "stray"
    extra.write_text("")
    expected = f"checkpoint of step 2 is damaged: {extra} is no part of it"
    for which in (2, "best"):
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(which, like(state_of(0)))
        assert str(error.value) == expected


def test_nothing_whole_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every checkpoint is damaged the error names each with its file."""
    checkpoints = saved(tmp_path, 1, 2)
    for step in (1, 2):
        largest_file(tmp_path / str(step)).unlink()
    with pytest.raises(
        CheckpointError, match="^no whole checkpoint in .*: .*step 2 is .*step 1 is "
    ) as error:
        checkpoints.restore("latest", like(state_of(0)))
    assert "\n" not in str(error.value) and capsys.readouterr().err == ""


def test_the_newest_whole_checkpoint_is_never_removed(tmp_path: Path) -> None:
    """keep=1 counts whole checkpoints: while the newest before is damaged nothing but it goes."""
    checkpoints = saved(tmp_path, 1, 2, keep=2)
    largest_file(tmp_path / "2").unlink()
    checkpoints.save(3, state_of(3), {})
    checkpoints.close()
    assert checkpoints.steps == [1, 3]


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flip_and_truncation_is_found(tmp_path: Path, count: int) -> None:
    """Single bits and cuts anywhere in any file, metadata and manifest included: none is restored in silence."""
    checkpoints = saved(tmp_path, 1)
    every = sorted(p for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert {"_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST} <= {p.name for p in every}
    rng, found = np.random.default_rng(0), 0
    for trial in range(count):
        path = every[trial % len(every)]
        whole = path.read_bytes()
        place = int(rng.integers(len(whole)))
        if rng.random() < 0.25:
            os.truncate(path, place)
        else:
            flip(path, place, int(rng.integers(8)))
        with pytest.raises(CheckpointError, match="checkpoint of step 1 is damaged: .*" + path.name):
            checkpoints.verify(1)
        found += 1
        path.write_bytes(whole)
    checkpoints.verify(1)
    assert found == count


def test_no_bit_of_the_manifest_can_change(tmp_path: Path) -> None:
    """Every byte of the manifest, and every bit around its body, white space and the case of digits included."""
    checkpoints = saved(tmp_path, 1)
    path = tmp_path / "1" / MANIFEST
    whole = path.read_bytes()
    outside = {*range(100), *range(len(whole) - 10, len(whole))}  # what surrounds the body, and its ends
    for place in range(len(whole)):
        for bit in range(8) if place in outside else (place % 8,):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match="damaged"):
                checkpoints._manifest(1)
    for changed in (whole + b"\n", whole[:-1], b" " + whole, whole.replace(b": ", b":")):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints._manifest(1)


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path) -> None:
    """Its manifest knew the arrays' files only; a damaged one is found all the same."""
    checkpoints = saved(tmp_path, 1)
    path = tmp_path / "1" / MANIFEST
    body = json.loads(path.read_bytes())["body"]
    body |= {"format": 1, "files": {k: v for k, v in body["files"].items() if k.startswith("state/")}}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "body": body}))
    with jax.enable_x64(True):
        restored, extra = checkpoints.restore("latest", like(state_of(0)))
    assert (raw(restored), extra) == (raw(state_of(1)), {"at": 1})
    flip(largest_file(tmp_path / "1"), 30)
    with pytest.raises(CheckpointError, match="step 1 is damaged"):
        checkpoints.restore(1, like(state_of(0)))


def test_leaves_that_an_older_version_did_not_have_start_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They come from the caller, and one line says so; without the caller's word they are missing."""
    state = {"a": jnp.arange(3.0), "guard": {"skipped": jnp.int32(4)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": state["a"]}, {})
    checkpoints.close()
    with pytest.raises(CheckpointError, match="guard.skipped is not in the checkpoint"):
        checkpoints.restore(1, like(state))
    restored, _ = checkpoints.restore(1, like(state), {"guard.skipped": jnp.int32(0)})
    assert (int(restored["guard"]["skipped"]), list(restored["a"])) == (0, [0, 1, 2])
    assert (
        capsys.readouterr().err == "the checkpoint of step 1 is older than guard.skipped; they start anew\n"
    )


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


def test_process_0_says_for_all_whether_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process must not start a save that another does not: its own disk usage does not count."""
    checkpoints, asked = saved(tmp_path, 1), []
    monkeypatch.setattr("jaxlm.checkpoint.agree", lambda name, own: asked.append((name, own)) or 0)
    for step in (2, 3):
        with pytest.raises(NoSpaceError, match="0 GB are free; the checkpoint of step 1 is intact"):
            checkpoints.save(step, state_of(step), {})
    assert len({name for name, _ in asked}) == 2 and all(own > 0 for _, own in asked)


def test_what_process_0_could_not_commit_failed_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for its word, and raise what it raises, though their own part was written."""
    checkpoints = saved(tmp_path, 1)
    words = {"free": None, "saved": ["checkpoint of step 2 was not written", True]}
    monkeypatch.setattr("jaxlm.checkpoint.agree", lambda name, own: words[name.split()[0]] or own)
    checkpoints.save(2, state_of(2), {})
    with pytest.raises(NoSpaceError, match="^checkpoint of step 2 was not written$"):
        checkpoints.wait()
    words["saved"] = None
    checkpoints.save(3, state_of(3), {})
    checkpoints.close()
    checkpoints.verify(3)


def test_what_cannot_be_removed_does_not_end_a_run(tmp_path: Path) -> None:
    """The new checkpoint is committed, and the old one that stays is said in a line."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=1, say=said.append)
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()

    def refused(step: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(step))

    checkpoints._remove = refused
    checkpoints.save(2, state_of(2), {})
    checkpoints.close()
    assert checkpoints.steps == [1, 2] and len(said) == 1 and "Operation not permitted" in said[0]
    checkpoints.verify(2)


def test_nothing_has_a_steps_name_before_it_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that ends before its manifest is written, by a kill or an error, leaves no directory to be warned of."""
    checkpoints = saved(tmp_path, 1)

    def failing(root: Path, name: str, facts: dict[str, Any]) -> None:
        assert checkpoints.numbers == [1], "in its place, and not whole"
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("jaxlm.checkpoint_files.seal", failing)
    checkpoints.save(2, state_of(2), {})
    with pytest.raises(
        CheckpointError, match="step 2 was not written .*Input/output error; .*step 1 is intact"
    ):
        checkpoints.wait()
    assert checkpoints.numbers == [1]


def test_all_of_it_has_reached_the_disk_before_it_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder is flushed, the manifest too, and after the rename the folder that holds the name."""
    flushed: list[Path] = []
    fsync, rename = os.fsync, os.rename

    def counted(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "1":
            assert {source, *source.rglob("*")} <= set(flushed)
            flushed.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", counted)
    monkeypatch.setattr(os, "rename", renamed)
    saved(tmp_path, 1).verify(1)
    assert tmp_path in flushed
