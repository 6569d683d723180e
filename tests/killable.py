"""Runs of `python -m experiments.pretrain` that can be killed: forked from a process that has imported everything.

A restart then costs what the run itself does, not two seconds of imports. Run as a program this file is that process:
it reads one JSON line per run and answers with the process id, and with how the run ended.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CALLS = ("rename", "replace", "fsync", "rmdir")  # of the os module, at which a run can be told to die


class Server:
    """Starts runs, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._running = 0

    def start(self, words: list[str], errors: Path, die_at: int = 0) -> int:
        """The id of a new run's process; `errors` gets what it says.

        die_at: SIGKILL before its n-th call of CALLS; 0 = never, but their number is written at the end.
        """
        assert self._process.stdin is not None
        if self._running:  # a test that failed has left it
            os.kill(self._running, signal.SIGKILL)
            self.wait()
        errors.unlink(missing_ok=True)
        order = {"words": [str(w) for w in words], "errors": str(errors), "die_at": die_at}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._running = int(self._answer())
        return self._running

    def wait(self) -> int:
        """How the run ended: its exit code, or the negative number of a signal."""
        code, self._running = int(self._answer()), 0
        return code

    def run(self, words: list[str], errors: Path, die_at: int = 0) -> int:
        """Start and wait."""
        self.start(words, errors, die_at)
        return self.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks runs has ended"
        return line


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A process that runs can be forked from; its compilation cache lies in `folder`."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    one_device = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | cache | one_device | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Server(process)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)


def _child(order: dict[str, Any]) -> None:
    from experiments import pretrain
    from experiments.cli import main_guard

    errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    sys.argv = ["pretrain", *order["words"]]
    counted = _counted(order["die_at"])
    code = 1
    try:
        main_guard(pretrain.main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    if not order["die_at"]:
        Path(order["errors"] + ".calls").write_text(str(counted()))
    os._exit(code)


def _counted(die_at: int) -> Any:
    count = 0

    def wrapped(call: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    return lambda: count


def _serve() -> None:
    import grain  # noqa: F401  (imported by the loader when it is first used)
    import orbax.checkpoint  # noqa: F401

    import jaxlm.engine  # noqa: F401

    tasks = len(os.listdir("/proc/self/task"))
    assert tasks == 1, f"{tasks} threads: a fork would lose all but one"
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _child(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
