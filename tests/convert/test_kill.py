"""A conversion that is killed, interrupted or out of space leaves nothing that looks finished.

A process is forked for every trial, and kills itself at one of the points where it touches a file: before and after
each open, write, flush, rename and removal, and at every step of the directory's own code.
"""

import json
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers import random_params, tiny

from jaxlm import model_dir
from jaxlm.config import save
from jaxlm.model_dir import CONFIG, write_manifest, write_shards
from jaxlm.tensor_file import Lazy, Planned

ROOT = Path(__file__).resolve().parents[2]
# Runs all trials of one command: forks, kills the child at a point, looks at what is left, tries again.
TRIALS = """
    import contextlib, io, json, os, shutil, signal, sys, threading
    from pathlib import Path
    import tyro, rich.progress, convert.hf, convert.key_report
    from convert.__main__ import main
    from jaxlm import model_dir

    CALLS = {"open", "write", "flush", "fsync", "rename", "mkdir", "unlink", "rmdir", "flock", "close"}
    argv, saved, fallback = json.loads(sys.argv[1])
    destination = Path(argv[-1])
    parent = destination.parent

    def run(words, kill_at):
        count = placed = 0
        def watch(frame, event, argument):
            nonlocal count, placed
            ours = frame.f_code.co_filename.endswith("model_dir.py") and event in ("call", "return")
            if ours or (event in ("c_call", "c_return") and argument.__name__ in CALLS):
                count += 1
                if frame.f_code.co_name == "_put_in_place" and event == "call":
                    placed = count
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        staged = model_dir.staged
        def from_here(*arguments):
            sys.setprofile(watch)
            threading.setprofile(watch)
            return staged(*arguments)
        model_dir.staged = from_here
        if fallback:
            model_dir._exchange = lambda one, other: False
        with contextlib.redirect_stderr(io.StringIO()):
            code = main(words)
        sys.setprofile(None)
        return code, count, placed

    def forked(words, kill_at=0):
        back, front = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(front, json.dumps(run(words, kill_at)).encode())
                os._exit(0)
            except BaseException as error:
                os.write(front, json.dumps(repr(error)).encode())
                os._exit(1)
        os.close(front)
        _, status = os.waitpid(child, 0)
        said = os.read(back, 4096)
        os.close(back)
        return os.WIFSIGNALED(status), json.loads(said) if said else None

    def state():
        if not destination.exists():
            return "absent"
        problems, _ = model_dir.verify(destination)
        name = model_dir.read_manifest(destination)["source"]["path"]
        return "DAMAGED " + "; ".join(problems) if problems else name

    def clear():
        for path in parent.iterdir():
            shutil.rmtree(path)

    def old():
        clear()
        if "--overwrite" in argv:
            shutil.copytree(saved, destination)

    old()
    killed, (code, points, placed) = forked(argv)
    assert (killed, code) == (False, 0), (killed, code)
    new, trials = state(), []
    every = [*range(1, placed, placed // 7), *range(placed, min(placed + 16, points)), *range(placed + 16, points, 12)]
    for trial, point in enumerate(every):
        old()
        killed, said = forked(argv, point)
        left = sorted(path.name for path in parent.iterdir() if path != destination)
        found, whole_old, again, after = state(), [], None, None
        if found == "absent":
            whole_old = [name for name in left if ".old-" in name and not model_dir.verify(parent / name)[0]]
        if found == "absent" and "--overwrite" in argv or trial % 4 == 0:
            again = forked(argv if "--overwrite" in argv or found == "absent" else [*argv, "--overwrite"])
            again = [again[0], again[1][0], state() == new]
            after = sorted(path.name for path in parent.iterdir())
        trials.append([killed, found, whole_old, left, again, after, f"point {point} of {placed}/{points}"])
    print(json.dumps([new, trials]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two small models in our layout, and the first as a Hugging Face directory of several shards."""
    root = tmp_path_factory.mktemp("kill")
    found = {}
    for seed, name in enumerate(("new", "old")):
        config = tiny(n_layers=1, n_kv_heads=1)
        params = random_params(config, seed, dtype=np.float32)
        (root / name).mkdir()
        plans = {path: Planned.of(Lazy.of(value)) for path, value in params.items()}
        stored = write_shards(root / name, plans, "jaxlm")
        save(config, root / name / CONFIG)
        write_manifest(root / name, "jaxlm", stored)
        found[name] = root / name
        found[f"{name}-hf"] = root / f"{name}-hf"
        assert convert("export", root / name, "--to", "hf", root / f"{name}-hf").returncode == 0
    return found


def convert(*words: object, **options: object) -> "subprocess.CompletedProcess[str]":
    """python -m convert, in a process of its own."""
    command = [sys.executable, "-m", "convert", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)  # type: ignore[call-overload]


SHARDS = ["--max-shard-gb", "0.00002"]


@pytest.mark.parametrize(
    ("command", "overwrite", "fallback"),
    [
        pytest.param("import", False, False, id="import"),
        pytest.param("export", True, False, id="overwriting export"),
        pytest.param(
            "import", True, True, id="overwriting import without an exchange of names", marks=pytest.mark.slow
        ),
    ],
)
def test_killed_at_any_point_nothing_looks_finished(
    command: str, overwrite: bool, fallback: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    """The name is absent or whole; what is left is hidden; the next run succeeds and removes it.

    What is overwritten is there until the new one is; where the system cannot exchange names it may for a moment have
    its hidden one only.
    """
    suffix = "-hf" if command == "import" else ""
    rest = [*(["--to", "hf"] if command == "export" else []), *SHARDS, *(["--overwrite"] * overwrite)]
    old, saved = f"old{suffix}", tmp_path / "saved"
    assert convert(command, models[old], *rest, saved).returncode == 0
    (tmp_path / "out").mkdir()
    argv = [command, str(models[f"new{suffix}"]), *rest, str(tmp_path / "out" / "model")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRIALS), json.dumps([argv, str(saved), fallback])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    new, trials = json.loads(done.stdout.splitlines()[-1])
    states = {new} | ({old} if overwrite else {"absent"}) | ({"absent"} if fallback else set())
    assert len(trials) >= 20 and sum(trial[0] for trial in trials) >= len(trials) - 2
    assert {found for _, found, *_ in trials} == states
    for _, found, whole_old, left, again, after, point in trials:
        where = f"killed at {point}: {found}, beside it {left}, then {again}, {after}"
        assert found != "absent" or not overwrite or len(whole_old) == 1, where
        assert all(name.startswith(".model.") for name in left), where
        assert again in (None, [False, 0, True]) and after in (None, ["model"]), where


def test_an_interrupt_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """SIGINT in the middle of the weights: exit code 130, no line of a traceback, no directory."""
    code = """
        import os, signal, sys
        import jaxlm.model_dir as model_dir
        from convert.__main__ import main
        from jaxlm.cli import main_guard

        wait = model_dir.write_shards

        def interrupted(*arguments):
            wait(*arguments)
            os.kill(os.getpid(), signal.SIGINT)

        model_dir.write_shards = interrupted
        main_guard(main)
    """
    argv = ["import", str(models["new-hf"]), str(tmp_path / "model")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_is_one_line(command: str, models: dict[str, Path], tmp_path: Path) -> None:
    """A file that cannot grow: exit code 2, one line, nothing left."""

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))

    source = models["new-hf" if command == "import" else "new"]
    to = ["--to", "hf"] if command == "export" else []
    done = convert(command, source, *to, tmp_path / "model", preexec_fn=small_files)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_converters_into_one_place_do_not_mix(models: dict[str, Path], tmp_path: Path) -> None:
    """Both write at once; what stands at the end is the whole of one of them."""
    command = [sys.executable, "-m", "convert", "import"]
    running = [
        subprocess.Popen(
            [*command, str(models[name]), str(tmp_path / "model"), "--overwrite", *SHARDS],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        for name in ("new-hf", "old-hf") * 2
    ]
    codes = [process.wait() for process in running]
    assert codes == [0, 0, 0, 0]
    problems, count = model_dir.verify(tmp_path / "model")
    assert problems == [] and count > 5
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
