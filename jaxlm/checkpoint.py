"""Checkpoints of a run: orbax writes the arrays, a manifest of our own says what is whole.

`checkpoints/<step>/` holds `state/` (orbax, one entry per leaf of the state, named by its path) and
`manifest.json` (step, validation loss, the caller's JSON, every tensor's shape and dtype, size and SHA-256 of
every file). The manifest is written into orbax's temporary directory before the rename that commits it, so a
directory has a manifest exactly when the save was completed. orbax itself neither hashes its files nor doubts
an empty directory with a number for a name, which is why `orbax.checkpoint.CheckpointManager`, whose list of
steps is a list of names, is not used.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from jaxlm.config import InputError

MANIFEST = "manifest.json"
FORMAT = 1
TEMPORARY = ".orbax-checkpoint-tmp"  # orbax's suffix of a save that has not been committed
SPACE_MARGIN = 1.02  # files against bytes of the state: metadata and index pages

PyTree = Any


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written; the message is one line that says which and why."""


class _NotFromOrbax(logging.Filter):
    """Drops what orbax logs: its errors reach us as exceptions, its warnings say nothing a user can act on."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


_NOT_FROM_ORBAX = _NotFromOrbax()


def _ignore_dead_loops() -> None:
    """Keeps tracebacks off the console that follow a failed save: writes under way report to a loop that is gone.

    The failure itself is raised by `save` or `wait`, as one line; these would repeat it once per tensor.
    """
    report = sys.unraisablehook
    if getattr(report, "ignores_dead_loops", False):
        return

    def hook(found: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            report(found)

    hook.ignores_dead_loops = True
    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run. Opening one only reads; stale temporary directories go at the first `save`.

    One instance may save at a time. All processes of a run call `save`, `wait` and `restore` together.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """`directory` is RUN/checkpoints, `keep` the number of newest checkpoints kept beside the best one."""
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._writer: ocp.AsyncCheckpointer | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._draft: dict[str, Any] = {}
        self._written: set[int] = set()
        absl_logging.get_absl_logger().addFilter(_NOT_FROM_ORBAX)  # adding it twice does nothing
        _ignore_dead_loops()

    @property
    def steps(self) -> list[int]:
        """Committed steps, ascending. Directories without a manifest are none of them."""
        if not self.directory.is_dir():
            return []
        found = (p for p in self.directory.iterdir() if p.name.isdigit() and (p / MANIFEST).is_file())
        return sorted(int(p.name) for p in found)

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The committed step of the lowest validation loss (the earliest of equals), or None if none has one."""
        return self._best(self.steps)

    @property
    def best_metric(self) -> float | None:
        """Metric of the best checkpoint, None where none has one."""
        return None if self.best_step is None else self._metric(self.best_step)

    def save(self, step: int, state: PyTree, extra: dict[str, Any], metric: float | None = None) -> None:
        """Starts saving and returns once the state may be donated.

        By then orbax has copied it to the host; on CPU it holds references, for which XLA leaves the buffers
        alone. `state` is a pytree of jax.Arrays, `extra` anything JSON can hold (the position of the data
        iterator among it), `metric` the validation loss in nats, if there is one. A step that this instance
        has saved already is left as it is; one of an earlier history is replaced, and steps beyond `step` go
        when it is committed. Raises CheckpointError, also for the previous save if that one failed in the
        background.
        """
        self.wait()
        if step in self._written:
            return
        leaves = _named_leaves(state)
        draft = {
            "format": FORMAT,
            "step": step,
            "metric": metric,
            "extra": extra,
            "tensors": {name: [str(x.dtype), list(x.shape)] for name, x in leaves.items()},
        }
        try:
            self._draft = json.loads(json.dumps(draft))  # a copy: the caller may go on changing `extra`
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint of step {step}: extra is not JSON: {error}") from None
        try:
            self._require_space(int(SPACE_MARGIN * sum(x.nbytes for x in leaves.values())))
            writer, pool = self._open()
            args = ocp.args.Composite(state=ocp.args.StandardSave(leaves))
            writer.save(self.directory / str(step), args=args, force=True)
        except (OSError, RuntimeError, ValueError) as error:
            self._shut()
            raise self._failure(step, error) from None
        self._pending = pool.submit(self._finish, step)

    def wait(self) -> None:
        """Returns when the save under way is committed and superseded ones are gone; CheckpointError if not."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except CheckpointError:
                self._shut()
                raise

    def close(self) -> None:
        """Waits, then frees orbax's threads. The instance can still restore, and save again."""
        try:
            self.wait()
        finally:
            self._shut()

    def restore(
        self, step: int | Literal["latest", "best"], template: PyTree
    ) -> tuple[PyTree, dict[str, Any]]:
        """The state of `step`, bit for bit, and what `save` was given as `extra`.

        `template` is a pytree of jax.ShapeDtypeStruct with shardings: those of the mesh to restore onto, not
        of the mesh that saved. Raises CheckpointError if there is no such checkpoint, if a file of it is
        damaged, or if names, shapes or dtypes of its tensors are not the template's.
        """
        self.wait()
        number = self._resolve(step)
        manifest = self.verify(number)
        wanted = _named_leaves(template)
        self._compare(number, manifest["tensors"], wanted)
        try:
            with ocp.StandardCheckpointer() as reader:
                leaves = reader.restore(self.directory / str(number) / "state", wanted)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            root = self.directory / str(number)
            raise CheckpointError(f"checkpoint {root} cannot be read: {_line(error)}") from None
        self._written.clear()  # what is trained from here on is another history
        state = jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in wanted])
        return state, manifest["extra"]

    def verify(self, step: int) -> dict[str, Any]:
        """The manifest of `step`, after every file of it was compared with its size and SHA-256.

        Raises CheckpointError that names the first damaged file.
        """
        root = self.directory / str(step)
        manifest = self._manifest(step)
        for name, (size, digest) in manifest["files"].items():
            path = root / name
            if not path.is_file():
                raise self._damaged(step, f"{path} is missing")
            if path.stat().st_size != size:
                raise self._damaged(step, f"{path} has {path.stat().st_size} bytes instead of {size}")
            if _sha256(path) != digest:
                raise self._damaged(step, f"{path} has changed since it was written (SHA-256 differs)")
        return manifest

    def _resolve(self, step: int | Literal["latest", "best"]) -> int:
        steps = self.steps
        there = f"in {self.directory}; there are steps {', '.join(map(str, steps))}"
        if not steps:
            raise CheckpointError(f"nothing to restore: no complete checkpoint in {self.directory}")
        if step == "latest":
            return steps[-1]
        if step == "best":
            best = self._best(steps)
            if best is None:
                raise CheckpointError(f"no checkpoint with a validation loss {there}")
            return best
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} {there}")
        return step

    def _manifest(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step) / MANIFEST
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            body, digest = stored["body"], stored["sha256"]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
            raise self._damaged(step, f"{path} cannot be read") from None
        if _digest_of(body) != digest:
            raise self._damaged(step, f"{path} has changed since it was written (SHA-256 differs)")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {body['format']}; this version reads format {FORMAT}")
        if body["step"] != step:
            raise self._damaged(step, f"{path} is of step {body['step']}")
        return body

    def _best(self, steps: list[int]) -> int | None:
        losses = {step: loss for step in steps if (loss := self._metric(step)) is not None}
        return min(losses, key=lambda step: (losses[step], step), default=None)

    def _metric(self, step: int) -> float | None:
        try:
            metric = self._manifest(step)["metric"]
        except CheckpointError:
            return None  # a damaged checkpoint is reported when it is asked for, not when others are compared
        return metric if metric is not None and math.isfinite(metric) else None

    def _damaged(self, step: int, what: str) -> CheckpointError:
        others = [s for s in self.steps if s != step]
        advice = "there is no other checkpoint"
        if others:
            advice = f"remove {self.directory / str(step)} to use step {others[-1]}"
        return CheckpointError(f"checkpoint of step {step} is damaged: {what}; {advice}")

    def _compare(self, step: int, stored: dict[str, list], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Refuses before reading what orbax would cast, or report as a dump of its metadata."""
        faults = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
        faults += [f"{name} is not in the model" for name in stored if name not in wanted]
        for name in (n for n in wanted if n in stored):
            dtype, shape = stored[name]
            was, now = (dtype, *shape), (str(wanted[name].dtype), *wanted[name].shape)
            if was != now:
                faults.append(f"{name} is {_array(was)} in the checkpoint, {_array(now)} in the model")
        if faults:
            listed = "; ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
            raise CheckpointError(f"checkpoint of step {step} is of another model: {listed}")

    def _open(self) -> tuple[ocp.AsyncCheckpointer, ThreadPoolExecutor]:
        """The writer, made at the first save; whatever a killed save left is removed then."""
        if self._writer is None or self._pool is None:
            self._clean()
            self.directory.mkdir(parents=True, exist_ok=True)
            handler = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler())
            options = ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest)
            self._writer = ocp.AsyncCheckpointer(handler, async_options=options)
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        return self._writer, self._pool

    def _shut(self) -> None:
        if self._writer is not None and self._pool is not None:
            self._pool.shutdown()
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # `wait` has told of them before
                self._writer.close()
        self._writer = self._pool = None

    def _clean(self) -> None:
        if jax.process_index() == 0 and self.directory.is_dir():
            for stale in [p for p in self.directory.iterdir() if TEMPORARY in p.name]:
                shutil.rmtree(stale, ignore_errors=True)

    def _write_manifest(self) -> None:
        """Called by orbax, in its thread on the primary process, when all is written and nothing committed."""
        root = next(self.directory.glob(f"{self._draft['step']}{TEMPORARY}*"))
        files = sorted(p for p in (root / "state").rglob("*") if p.is_file())
        sums = {p.relative_to(root).as_posix(): [p.stat().st_size, _sha256(p)] for p in files}
        body = self._draft | {"files": sums}
        with open(root / MANIFEST, "w", encoding="utf-8") as file:
            json.dump({"sha256": _digest_of(body), "body": body}, file)
            file.flush()
            os.fsync(file.fileno())

    def _finish(self, step: int) -> None:
        """Waits for the commit, then removes what it supersedes; runs in our thread."""
        assert self._writer is not None
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._failure(step, error) from None
        self._written.add(step)
        if jax.process_index() == 0:
            kept = [s for s in self.steps if s <= step]  # beyond lies a history that a restore has abandoned
            for old in set(self.steps) - {*kept[-self.keep :], self._best(kept)}:
                self._remove(old)

    def _remove(self, step: int) -> None:
        """Renames first: a deletion that is cut short leaves a temporary directory, not half a checkpoint."""
        doomed = self.directory / f"{step}{TEMPORARY}-deleted"
        os.rename(self.directory / str(step), doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _require_space(self, need: int) -> None:
        parent = next(p for p in (self.directory, *self.directory.parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if need > free:
            sizes = f"{need / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free"
            raise OSError(errno.ENOSPC, f"disk full: {sizes}")

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        """One line for a save that failed, after its remains are removed to give the space back."""
        # orbax leaves tasks behind that report the same error again, as tracebacks, when they are collected.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self._clean()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            why = error.strerror or "disk full"
        else:
            why = "disk full or file size limit reached" if _is_full(error) else _line(error)
        latest = self.latest_step
        intact = "there is no earlier one" if latest is None else f"the checkpoint of step {latest} is intact"
        where = f"checkpoint of step {step} was not written to {self.directory}"
        return CheckpointError(f"{where}: {why}; {intact}")


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """{dotted path: leaf}, in the order of the leaves."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise CheckpointError("two leaves of the state have the same dotted path; rename one of them")
    return leaves


def _array(dtype_and_shape: tuple[Any, ...]) -> str:
    return f"{dtype_and_shape[0]}[{','.join(map(str, dtype_and_shape[1:]))}]"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)
