"""Compiled programs that outlive their process: kept safely, read back to the bit, mended, and never in the way."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlm import compilation
from jaxlm.compilation import ENABLED, FOLDER, GPU, KEEP, default_folder, mend, set_up

PROGRAM = """
import sys
from jaxlm.cli import main_guard
def main(argv):
    import json, resource
    import jax, numpy as np
    from jaxlm.compile_meter import CompileMeter
    if argv:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(argv[0]), int(argv[0])))
    meter, rng = CompileMeter(), np.random.default_rng(0)
    loss = lambda w, x: jax.numpy.tanh(x @ w["a"] @ w["b"]).sum()
    step = jax.jit(lambda w, x: jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(loss)(w, x)), donate_argnums=0)
    norm = jax.jit(lambda w: sum((p * p).sum() for p in jax.tree.leaves(w)))
    w, x = ({"a": rng.normal(size=(64, 32)), "b": rng.normal(size=(32, 16))}, rng.normal(size=(8, 64)))
    w, x = jax.tree.map(lambda p: jax.device_put(p.astype("float32")), (w, x))
    for _ in range(3):
        old, w = w, step(w, x)
    gone = [p.is_deleted() for p in jax.tree.leaves(old)]
    found = {"bytes": np.asarray(w["a"]).tobytes().hex(), "norm": float(norm(w)), "gone": gone}
    print(json.dumps(found | meter.record()))
main_guard(main)
"""


def surroundings(home: Path, **more: str) -> dict[str, str]:
    """A user's environment whose caches lie in `home`; of the tests' own cache nothing."""
    ours = {FOLDER, ENABLED, *KEEP, "JAX_COMPILATION_CACHE_MAX_SIZE"}
    return {k: v for k, v in os.environ.items() if k not in ours} | {"XDG_CACHE_HOME": str(home)} | more


def start(home: Path, *words: str, **more: str) -> "subprocess.Popen[str]":
    """A process that computes, with its caches in `home`."""
    command = [sys.executable, "-W", "always", "-c", PROGRAM, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=surroundings(home, **more), stdout=pipe, stderr=pipe, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[dict[str, Any], str]:
    """What it computed and counted, and what it said."""
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return json.loads(out), said


def folder_of(home: Path) -> Path:
    """The folder of compiled programs."""
    return next((home / "jaxlm").iterdir())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three processes that start at once on nothing; their caches' home, and what the first of them says."""
    home = tmp_path_factory.mktemp("home")
    ended = [finish(process) for process in [start(home) for _ in range(3)]]
    assert all(said == "" for _, said in ended), ended
    assert len({result["bytes"] for result, _ in ended}) == 1
    return home, ended[0][0]


def test_the_folder_is_the_users_alone(first: tuple[Path, dict[str, Any]]) -> None:
    """Mode 0700 from the home of caches on; three at once have kept each program once."""
    home, _ = first
    for folder in (home / "jaxlm", folder_of(home)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept = sorted(path.name.partition("-")[0] for path in folder_of(home).glob("*-cache"))
    assert len(kept) == 2 and len(set(folder_of(home).glob("*-atime"))) == 2, kept


def test_what_was_kept_computes_the_same_bits(first: tuple[Path, dict[str, Any]]) -> None:
    """A later process compiles nothing, gets the same weights to the bit, and its donated buffers are gone."""
    home, fresh = first
    again, said = finish(start(home))
    assert (again["programs"], again["kept"], said) == (2, 2, "")
    assert again["folder"] == str(folder_of(home))
    assert {k: again[k] for k in ("bytes", "norm", "gone")} == {
        k: fresh[k] for k in ("bytes", "norm", "gone")
    }
    assert all(again["gone"])


def test_what_a_killed_writer_left_is_mended(tmp_path: Path, first: tuple[Path, dict[str, Any]]) -> None:
    """jax writes a program, then when it was used: one that is cut goes, a whole one stays, a lone time goes."""
    names = [path.name.removesuffix("-cache") for path in folder_of(first[0]).glob("*-cache")]
    for name in names:
        (tmp_path / f"{name}-cache").write_bytes((folder_of(first[0]) / f"{name}-cache").read_bytes())
    cut = tmp_path / f"{names[0]}-cache"
    cut.write_bytes(cut.read_bytes()[:-9])
    (tmp_path / "lone-atime").write_bytes(bytes(8))
    mend(tmp_path)
    left = {path.name for path in tmp_path.iterdir()} - {".lockfile"}
    assert left == {f"{names[1]}-cache", f"{names[1]}-atime"}


def test_a_full_disk_ends_nothing_and_is_mended(tmp_path: Path, first: tuple[Path, dict[str, Any]]) -> None:
    """Programs that cannot be written whole are warned of, the result is right; the next process keeps them."""
    result, said = finish(start(tmp_path, "1000"))
    assert result["bytes"] == first[1]["bytes"] and "Error writing persistent compilation cache" in said
    assert any(folder_of(tmp_path).glob("*-cache"))  # cut after 1,000 bytes
    result, said = finish(start(tmp_path))
    assert (result["kept"], said) == (0, "")
    result, said = finish(start(tmp_path))
    assert (result["kept"], said) == (2, "") and result["bytes"] == first[1]["bytes"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """One line says so; the program runs without, whoever chose the folder."""
    home = tmp_path / "home"
    open_to_all = default_folder({"XDG_CACHE_HOME": str(home)})
    assert open_to_all is not None
    open_to_all.chmod(0o777)
    environment = {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu"}
    (line,) = set_up(environment)
    assert f"others may write to {open_to_all}" in line and "\n" not in line and FOLDER not in environment
    named = {FOLDER: str(open_to_all), "JAX_PLATFORMS": "cpu"}
    (line,) = set_up(named)
    assert f"chmod 700 {open_to_all}" in line and named[ENABLED] == "false"
    result, said = finish(start(home, **{FOLDER: str(open_to_all)}))
    assert said.count("\n") == 1 and said.startswith("warning: compiled programs are not kept: ")
    assert result["folder"] is None and not list(open_to_all.iterdir())


def test_a_folder_that_others_may_exchange_is_refused(tmp_path: Path) -> None:
    """Below a folder that anyone may rename things in, mode 0700 protects nothing; a sticky one, as /tmp, does."""
    folder = tmp_path / "open" / "mine"
    environment = {FOLDER: str(folder), "JAX_PLATFORMS": "cpu"}
    assert set_up(dict(environment)) == [] and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.parent.chmod(0o777)
    (line,) = set_up(dict(environment))
    assert f"by way of {folder.parent}" in line
    folder.parent.chmod(0o1777)
    assert set_up(environment) == [] and environment[FOLDER] == str(folder.resolve())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Whoever made it may change it at any time."""
    os.chown(tmp_path, 12345, 12345)
    (line,) = set_up({FOLDER: str(tmp_path), "JAX_PLATFORMS": "cpu"})
    assert "belongs to another user" in line


def test_the_users_settings_stand(tmp_path: Path) -> None:
    """What is set stays; off is off, and makes no folder; a store elsewhere is not looked at."""
    mine = {name: "mine" for name in KEEP} | {FOLDER: str(tmp_path), "JAX_PLATFORMS": "cpu"}
    set_up(environment := dict(mine))
    assert environment == mine
    environment = {ENABLED: "False", "XDG_CACHE_HOME": str(tmp_path / "none"), "JAX_PLATFORMS": "cpu"}
    assert set_up(environment) == [] and FOLDER not in environment and not (tmp_path / "none").exists()
    for elsewhere in ("", "gs://bucket/folder"):
        environment = {FOLDER: elsewhere, "JAX_PLATFORMS": "cpu"}
        assert set_up(environment) == [] and environment[FOLDER] == elsewhere


def test_a_home_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    """Then nothing is kept."""
    (tmp_path / "file").touch()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file" / "caches"), "JAX_PLATFORMS": "cpu"}
    assert set_up(environment) == [] and FOLDER not in environment


def test_a_named_file_is_refused_in_one_line(tmp_path: Path) -> None:
    """jax would warn of it for every program."""
    (tmp_path / "file").touch()
    environment = {FOLDER: str(tmp_path / "file"), "JAX_PLATFORMS": "cpu"}
    (line,) = set_up(environment)
    assert "is no folder that can be written to" in line and environment[ENABLED] == "false"


def test_programs_of_other_machines_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of cores has another folder; jax's own names tell processors with other features apart."""
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    folders = []
    for cores in (1, 2):
        monkeypatch.setattr(compilation, "_cores", lambda cores=cores: cores)
        folders.append(default_folder(environment))
    assert folders[0] != folders[1]
    program = """if True:
        import jax
        from jax._src.lib import xla_client
        print(xla_client.get_topology_for_devices(jax.devices()[:1]).fingerprint())"""
    names = set()
    for flags in ("", "--xla_cpu_max_isa=SSE4_2"):
        flags = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        names.add(subprocess.check_output([sys.executable, "-c", program], env=flags, timeout=60))
    assert len(names) == 2


def test_settings_for_gpus_are_made_where_there_may_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With jax's plugin and unless another platform was asked for; what the user has set stays."""
    off = {ENABLED: "0"}
    for installed, platforms, wanted in ((True, "", True), (True, "cuda,cpu", True), (True, "cpu", False)) + (
        (False, "", False),
    ):
        monkeypatch.setattr(
            compilation.importlib.util, "find_spec", lambda name, there=installed: there or None
        )
        set_up(environment := off | {"JAX_PLATFORMS": platforms})
        assert all((one.name in environment) == wanted for one in GPU)
    set_up(environment := off | {GPU[0].name: "0.5"} | {"JAX_PLATFORMS": "cuda"})
    assert environment[GPU[0].name] == "0.5"
