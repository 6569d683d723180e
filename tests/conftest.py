"""What every test runs under: eight fake CPU devices, executed shape annotations, no network.

    JAXLM_TEST_GPU=1 pytest -m gpu    on the real devices instead
    pytest -m h200                    compiling for GPUs that are not there
    pytest -m bench                   as a user's program would run: real devices, all threads, unchecked shapes

The environment is set before jax is first imported, and subprocesses of a test inherit it. Where an optional library
is missing (PyTorch on a machine for jaxlm alone), files that import it are left out, and said so.
"""

import ast
import functools
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEVICES = 8
# Half a minute or more each.
LONG = {"test_readme.py", "test_suite.py", "test_pretrain.py"} | {
    "test_command_line.py",
    "test_round_trips.py",
    "test_hf_models.py",
    "test_kill.py",
    "test_peft.py",
    "test_optimizers.py",
    "test_guard.py",
    "test_prepare.py",
    "test_processes.py",
    "test_sharding.py",
    "test_plots.py",
    "test_replication.py",
    "test_sft.py",
}
# Imports that may be missing -> the distribution's module that decides whether they work.
OPTIONAL = {
    "torch": "torch",
    "torchref": "torch",
    "convert": "torch",
    "experiments": "tyro",
    "transformers": "transformers",
    "tyro": "tyro",
    "grain": "grain",
    "hypothesis": "hypothesis",
    "mpmath": "mpmath",
    "matplotlib": "matplotlib",
    "pyarrow": "pyarrow",
    "jinja2": "jinja2",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "datasets": "datasets",
}


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment of jax, PyTorch and the quiet libraries; must run before any of them is imported."""
    assert "jax" not in sys.modules, "jax was imported before the tests could ask for fake devices"
    os.environ.update(
        HF_HUB_OFFLINE="1", WANDB_MODE="disabled", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false"
    )
    _refuse_network()
    if config.option.markexpr == "bench":
        return
    if "h200" in config.option.markexpr and "not h200" not in config.option.markexpr:
        os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", JAX_PLATFORMS="cuda,cpu")
        return
    if os.environ.get("JAXLM_TEST_GPU") != "1":
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()
    # Programs that several tests and their subprocesses compile are compiled once. Removed at the end of the session.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jaxlm-tests-"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch's threads: test processes run side by side on few cores
    if importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype"):
        import jaxtyping

        # Not ours alone to close: the hook has to stay for as long as test files are imported.
        jaxtyping.install_import_hook(["jaxlm", "torchref"], "beartype.beartype")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the compilation cache; workers of xdist share their parent's."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if "jaxlm-tests-" in folder and not hasattr(config, "workerinput"):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: processes that take whole files then end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out test files whose imports cannot be had here."""
    return True if _missing(collection_path) else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says which files were left out, so that a thin run is not taken for a whole one."""
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        if missing := _missing(path):
            terminalreporter.write_line(f"left out {path.name}: {', '.join(missing)} not installed")


def _missing(path: Path) -> list[str]:
    if path.suffix != ".py" or not path.name.startswith("test_"):
        return []
    return sorted({OPTIONAL[root] for root in _imported_roots(path) if not _importable(OPTIONAL[root])})


def _imported_roots(path: Path) -> set[str]:
    roots: set[str] = set()
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except SyntaxError:  # pytest's own import of the file will say where
        return roots
    for node in body:
        if isinstance(node, ast.Import):
            roots.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.partition(".")[0])
    return roots & OPTIONAL.keys()


@functools.cache
def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _refuse_network() -> None:
    """Makes every connection to another machine, and every look-up of its name, raise.

    Subprocesses are out of reach of this; the offline variables above are what keeps them at home.
    """

    def guarded(call):
        def connect(sock: socket.socket, address: Any) -> Any:
            if sock.family != getattr(socket, "AF_UNIX", None) and not _is_loopback(str(address[0])):
                raise PermissionError(f"a test tried to reach {address}; tests use no network")
            return call(sock, address)

        return connect

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name and not _is_loopback(name) and name not in ("0.0.0.0", "::", socket.gethostname()):
            raise PermissionError(f"a test tried to look up {name!r}; tests use no network")
        return look_up(host, *args, **kwargs)

    look_up = socket.getaddrinfo
    socket.getaddrinfo = getaddrinfo
    socket.socket.connect = guarded(socket.socket.connect)
    socket.socket.connect_ex = guarded(socket.socket.connect_ex)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 inside jax for one test, so that all-float64 runs can be compared to rounding."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def narrow_again() -> Iterator[None]:
    """A float64 run widens jax for its whole process, which has other files to run."""
    yield
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_enable_x64", False)


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """Any implicit dtype promotion raises; for our layers only, since stock optax promotes its step count."""
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def strict_ranks() -> Iterator[None]:
    """[T] + [B, T] raises, scalars still broadcast; not everywhere, since norms and biases are [D] by design."""
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a run may write; not made yet."""
    return tmp_path / "runs" / "test"
