"""A run in several processes: the command watches them, and each of them is this command again."""

import shutil
import sys
from pathlib import Path
from typing import Any

from jaxlm.config import ConfigError, RunConfig
from jaxlm.run_dir import RunDir, open_run
from jaxlm.supervise import LaunchConfig, begin, supervise, worker
from jaxlm.tune_config import load_run


def launch(module: str, argv: list[str], settings: LaunchConfig, framework: str, path: Path) -> int:
    """Starts and watches this machine's processes of a run; the exit code. Raises ConfigError where they cannot be."""
    if framework != "jax":
        raise ConfigError(f"--framework {framework} runs in one process; leave --launch out")
    existed = path.exists()
    code = supervise([sys.executable, "-m", module, *argv], settings, path / "logs")
    if code == 2 and not existed and not RunDir(path).holds_run():
        shutil.rmtree(path, ignore_errors=True)
    return code


def join() -> Any | None:
    """`jaxlm.distributed`, connected, in a process among several; None in one that is alone."""
    me = worker()
    if me is None:
        return None
    begin(me)
    from jaxlm import distributed

    distributed.join()
    return distributed


def open_together(
    path: Path, run: RunConfig, resume: bool, others: Any | None
) -> tuple[RunDir, RunConfig, bool]:
    """`open_run` by process 0; the others read what it wrote. others: what `join` gave."""
    if others is None:
        return open_run(path, run, resume)
    opened = open_run(path, run, resume) if others.is_main() else None
    resumed = others.agree("resumed", opened is not None and opened[2])
    return opened or (RunDir(path), load_run(RunDir(path).config), resumed)
