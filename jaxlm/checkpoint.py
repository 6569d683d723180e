"""Checkpoints of a run: orbax writes the arrays, a manifest of our own says what is whole.

`checkpoints/<step>/` holds what orbax writes (`state/`, one entry per leaf, named by its path) and `manifest.json`:
step, validation loss, the caller's JSON, every tensor's shape and dtype, size and SHA-256 of every file
(`jaxlm.checkpoint_files`). All of it is made in `checkpoints/writing/`, flushed to the disk, and renamed into place in
one piece. orbax itself neither hashes its files nor doubts an empty directory with a number for a name, which is why
`orbax.checkpoint.CheckpointManager`, whose list of steps is a list of names, is not used.
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
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from jaxlm import checkpoint_files as files
from jaxlm import cli
from jaxlm.checkpoint_files import DamagedError, DiskFullError
from jaxlm.config import InputError
from jaxlm.disk import free_bytes, is_full, sync
from jaxlm.distributed import agree

MANIFEST = "manifest.json"
FORMAT = 2
WRITING = "writing"  # folder of what is not committed, or not yet gone
TEMPORARY = ".orbax-checkpoint-tmp"  # suffix of what a save of format 1 left when it was killed
SPACE_MARGIN = 1.02  # files against bytes of the state: metadata and index pages

PyTree = Any
Which = int | Literal["latest", "best"]


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written; the message is one line that says which and why."""


class NoSpaceError(CheckpointError, DiskFullError):
    """A checkpoint for which there was no room; earlier ones are as they were."""


class DamagedCheckpointError(CheckpointError, DamagedError):
    """A checkpoint that is not as it was written; the message names step, file and what is wrong."""


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

    def __init__(self, directory: Path, keep: int = 2, say: Callable[[str], None] = cli.say) -> None:
        """`directory` is RUN/checkpoints, `keep` the number of newest checkpoints kept beside the best one.

        say: takes the lines that a person should read about checkpoints which are passed over.
        """
        self.directory = Path(directory).absolute()
        self.keep, self._say = keep, say
        self._writer: ocp.AsyncCheckpointer | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._draft: dict[str, Any] = {}
        self._written: set[int] = set()
        self._asked = 0  # how often space was asked for
        absl_logging.get_absl_logger().addFilter(_NOT_FROM_ORBAX)  # adding it twice does nothing
        _ignore_dead_loops()

    @property
    def numbers(self) -> list[int]:
        """Steps that have a directory, ascending, complete or not."""
        if not self.directory.is_dir():
            return []
        names = [p.name for p in self.directory.iterdir() if p.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    @property
    def steps(self) -> list[int]:
        """Committed steps, ascending. Directories without a manifest are none of them."""
        return [step for step in self.numbers if (self._root(step) / MANIFEST).is_file()]

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, damaged or not, or None."""
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
        when it is committed. Raises CheckpointError (NoSpaceError for want of space), also for the previous save
        if that one failed in the background.
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
            writer.save(self.directory / WRITING / str(step), args=args, force=True)
        except (OSError, RuntimeError, ValueError) as error:
            self._shut()
            raise self._failure(step, error) from None
        self._pending = pool.submit(self._finish, step, f"saved {self._asked}")

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the save under way is committed and superseded ones are gone, or after `timeout` seconds.

        Raises CheckpointError (NoSpaceError for want of space) where it failed.
        """
        if self._pending is None:
            return
        try:
            self._pending.result(timeout)
        except TimeoutError:
            return
        except CheckpointError:
            self._pending = None
            self._shut()
            raise
        self._pending = None

    def close(self) -> None:
        """Waits, then frees orbax's threads. The instance can still restore, and save again."""
        try:
            self.wait()
        finally:
            self._shut()

    def restore(
        self, step: Which, template: PyTree, fresh: Mapping[str, jax.Array] | None = None
    ) -> tuple[PyTree, dict[str, Any]]:
        """The state of `step`, bit for bit, and what `save` was given as `extra`.

        "latest" is the newest step whose files are all as they were written; newer ones are named in a line each,
        with what is wrong. Any other step must be whole itself. `template` is a pytree of jax.ShapeDtypeStruct with
        shardings: those of the mesh to restore onto, not of the mesh that saved. `fresh` has leaves, by dotted path,
        for checkpoints of versions that did not have them yet. Raises CheckpointError if there is no such checkpoint,
        if a file of it is damaged, or if names, shapes or dtypes of its tensors are not the template's.
        """
        self.wait()
        number = self._resolve(step)
        manifest = self._newest() if step == "latest" else self.verify(number)
        number = manifest["step"]
        wanted, fresh = _named_leaves(template), dict(fresh or {})
        added = [name for name in fresh if name in wanted and name not in manifest["tensors"]]
        read = {name: leaf for name, leaf in wanted.items() if name not in added}
        self._compare(number, manifest["tensors"], read)
        try:
            with ocp.StandardCheckpointer() as reader:
                leaves = reader.restore(self._root(number) / "state", read)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint {self._root(number)} cannot be read: {_line(error)}") from None
        if added:
            self._say(f"the checkpoint of step {number} is older than {', '.join(added)}; they start anew")
        self._written.clear()  # what is trained from here on is another history
        leaves |= {name: jax.device_put(fresh[name], wanted[name].sharding) for name in added}
        return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in wanted]), manifest[
            "extra"
        ]

    def verify(self, step: int) -> dict[str, Any]:
        """The manifest of `step`, after every file of it was compared with its size and SHA-256.

        Raises DamagedCheckpointError that names the first damaged file.
        """
        return self._checked(step, hashes=True)

    def _newest(self) -> dict[str, Any]:
        """The manifest of the newest whole checkpoint; damaged ones beyond it are told of."""
        damages = []
        for step in reversed(self.numbers):
            try:
                manifest = self._checked(step, hashes=True)
            except DamagedError as damage:
                damages.append(str(damage))
                continue
            for damage in damages:
                self._say(f"warning: {damage}; going on from step {step}")
            return manifest
        raise CheckpointError(f"no whole checkpoint in {self.directory}: {'; '.join(damages)}")

    def _checked(self, step: int, hashes: bool) -> dict[str, Any]:
        manifest = self._manifest(step)
        try:
            if manifest["format"] == 1:
                files.check_files(self._root(step), manifest["files"], hashes)
            else:
                files.check(self._root(step), MANIFEST, hashes)
        except DamagedError as error:
            raise _damaged(step, error) from None
        return manifest

    def _root(self, step: int) -> Path:
        return self.directory / str(step)

    def _resolve(self, step: Which) -> int:
        steps = self.steps
        there = f"in {self.directory}; there are steps {', '.join(map(str, steps))}"
        if not steps and step not in self.numbers:
            raise CheckpointError(f"nothing to restore: no complete checkpoint in {self.directory}")
        if step == "latest":
            return steps[-1]
        if step == "best":
            best = self._best(steps)
            if best is None:
                raise CheckpointError(f"no checkpoint with a validation loss {there}")
            return best
        if step not in self.numbers:
            raise CheckpointError(f"no checkpoint of step {step} {there}")
        return step

    def _manifest(self, step: int) -> dict[str, Any]:
        path = self._root(step) / MANIFEST
        try:
            body = files.read_manifest(self._root(step), MANIFEST)
        except DamagedError as error:
            body = _read_format_1(path)
            if body is None:
                raise _damaged(step, error) from None
        if body["format"] not in (1, FORMAT):
            raise CheckpointError(f"{path} has format {body['format']}; this version reads format {FORMAT}")
        if body["step"] != step:
            raise _damaged(step, f"{path} is of step {body['step']}")
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
            self._writer = ocp.AsyncCheckpointer(handler)
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
            for stale in [p for p in self.directory.iterdir() if p.name == WRITING or TEMPORARY in p.name]:
                shutil.rmtree(stale, ignore_errors=True)

    def _finish(self, step: int, name: str) -> None:
        """Waits for orbax, commits, then removes what the new checkpoint supersedes; runs in our thread.

        Of several processes none is through before process 0 has committed, or all have failed with it: one that ends
        earlier would take process 0 along in the middle of its work.
        """
        assert self._writer is not None
        failure: CheckpointError | None = None
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                self._commit(step)
        except Exception as error:
            failure = self._failure(step, error)
        mine = None if failure is None else [str(failure), isinstance(failure, NoSpaceError)]
        if (theirs := agree(name, mine)) is not None and failure is None:
            failure = (NoSpaceError if theirs[1] else CheckpointError)(theirs[0])
        if failure is not None:
            raise failure
        self._written.add(step)
        if jax.process_index() == 0:
            try:
                self._tidy(step)
            except OSError as error:  # the new checkpoint is whole, and that is what matters
                self._say(
                    f"warning: superseded checkpoints were not removed from {self.directory}: {_line(error)}"
                )

    def _tidy(self, step: int) -> None:
        """Removes what the checkpoint of `step` supersedes."""
        past = [s for s in self.steps if s <= step]  # beyond lies a history that a restore has abandoned
        whole = [s for s in past if self._is_whole(s)]
        for old in set(self.numbers) - {*whole[-self.keep :], self._best(past)}:
            self._remove(old)
        shutil.rmtree(self.directory / WRITING, ignore_errors=True)

    def _commit(self, step: int) -> None:
        """Seals what orbax has written and puts it in its place; before, there is no checkpoint of this name."""
        ready = self.directory / WRITING / str(step)
        files.seal(ready, MANIFEST, self._draft)
        if self._root(step).exists():
            self._put_away(step)
        os.rename(ready, self._root(step))
        sync(self.directory)

    def _is_whole(self, step: int) -> bool:
        try:
            self._checked(step, hashes=False)
        except CheckpointError:
            return False
        return True

    def _put_away(self, step: int) -> Path:
        return self._root(step).rename(self.directory / WRITING / f"{step}.old")

    def _remove(self, step: int) -> None:
        """Renames first: a deletion that is cut short must not leave half a checkpoint under a step's name."""
        shutil.rmtree(self._put_away(step), ignore_errors=True)

    def _require_space(self, need: int) -> None:
        self._asked += 1  # process 0 looks for all: some must not start what others do not
        free = agree(f"free space {self._asked}", free_bytes(self.directory))
        if need > free:
            sizes = f"{need / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free"
            raise OSError(errno.ENOSPC, f"disk full: {sizes}")

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        """One line for a save that failed, after its remains are removed to give the space back."""
        # orbax leaves tasks behind that report the same error again, as tracebacks, when they are collected.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        self._clean()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            why = error.strerror or "disk full"
        else:
            why = "disk full or file size limit reached" if is_full(error) else _line(error)
        latest = self.latest_step
        intact = "there is no earlier one" if latest is None else f"the checkpoint of step {latest} is intact"
        where = f"checkpoint of step {step} was not written to {self.directory}"
        kind = NoSpaceError if is_full(error) else CheckpointError
        return kind(f"{where}: {why}; {intact}")


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """{dotted path: leaf}, in the order of the leaves."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise CheckpointError("two leaves of the state have the same dotted path; rename one of them")
    return leaves


def _array(dtype_and_shape: tuple[Any, ...]) -> str:
    return f"{dtype_and_shape[0]}[{','.join(map(str, dtype_and_shape[1:]))}]"


def _damaged(step: int, what: object) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint of step {step} is damaged: {what}")


def _read_format_1(path: Path) -> dict[str, Any] | None:
    """A manifest of the first format, which knew no files but orbax's arrays and hashed its own values only."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        body = stored["body"]
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return body if body["format"] == 1 and stored["sha256"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
