"""Where the lines of a run go: metrics.jsonl always, TensorBoard and Weights & Biases where asked for.

metrics.jsonl is the record; the other two are mirrors of it. What goes wrong in a mirror (a full disk, no network) is
one warning and the end of that mirror, never of the run.
"""

import importlib.util
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.cli import say
from jaxlm.config import InputError, LogConfig, RunConfig
from jaxlm.metric_names import LOAD, named
from jaxlm.metrics import JsonlSink, read_metrics
from jaxlm.reporter import Sink
from jaxlm.run_dir import RunDir
from jaxlm.wandb_sink import WandbSink

Row = Mapping[str, Any]


class TensorBoardSink:
    """Writes tensorboard/events.out.tfevents.…, a file per process, each line at once and on the disk's side."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        """Steps beyond `resume_step` that are in older files count as purged: TensorBoard shows them once.

        Raises OSError where the folder cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)  # TensorBoard reads a folder's files in order of name
        path = folder / f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(open(path, "xb"))  # noqa: SIM115 (closed by `close`)
        self._event = Event
        self._put(file_version="brain.Event:2")
        if resume_step is not None:
            self._put(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Row) -> None:
        """The line's numbers as scalars; with a validation, also each MoE layer's load as a histogram over experts."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in named(row).items()]
        if "val_loss" in row and row.get(LOAD) is not None:
            values += [
                Summary.Value(tag=f"experts/load_{i:02d}", histo=_histogram([float(share) for share in load]))
                for i, load in enumerate(row[LOAD])
            ]
        self._put(step=int(row["step"]), summary=Summary(value=values))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _put(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


def _histogram(load: list[float]) -> Any:
    """Expert e is the bucket from e to e+1, its height the share of tokens."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    middles = [e + 0.5 for e in range(len(load))]
    return HistogramProto(
        min=0.0,
        max=float(len(load)),
        num=sum(load),
        sum=sum(share * middle for share, middle in zip(load, middles)),
        sum_squares=sum(share * middle**2 for share, middle in zip(load, middles)),
        bucket_limit=[float(e + 1) for e in range(len(load))],
        bucket=load,
    )


class _Mirror:
    """A sink whose failure is one warning; nothing more is written to it then."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name = name
        self._sink: Any = None
        self._sink = self._guarded("cannot start", make)

    def write(self, row: Row) -> None:
        if self._sink is not None:
            self._guarded("stopped", lambda: self._sink.write(row))

    def close(self) -> None:
        if self._sink is not None:
            self._guarded("did not finish", self._sink.close)

    def _guarded(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # a library's, of any kind
            self._sink = None
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"warning: {self._name} {what} ({reason}); the run goes on, all of it is in metrics.jsonl")
            return None


class Sinks:
    """Passes each line on to several sinks; usable as a context manager. Of none, it drops every line."""

    def __init__(self, sinks: Sequence[Any] = ()) -> None:
        self._sinks = list(sinks)

    def write(self, row: Row) -> None:
        """Writes the line to each, the record first."""
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        """Closes each, the record first."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_sinks(log: LogConfig) -> None:
    """Raises InputError, which names the extra to install, where a library that the settings ask for is missing."""
    for wanted, package in ((log.tensorboard, "tensorboard"), (log.wandb != "off", "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(
                f"--log.{package} needs the package {package}, which is not installed: "
                f"pip install 'jaxlm[{package}]'"
            )


def open_sinks(run: RunConfig, directory: RunDir, resume_step: int | None) -> Sinks:
    """All sinks that the run asks for.

    Args:
        run: its `log` says which.
        directory: metrics.jsonl, tensorboard/, wandb/ and wandb_id.json are written there.
        resume_step: step of the restored state: what was logged of later ones gives way. None = a new run.

    Raises:
        InputError: a library is missing (`check_sinks`).
        MetricsError: metrics.jsonl is damaged, or there is one already and the run is new.
    """
    check_sinks(run.log)
    sinks: list[Sink] = [JsonlSink(directory.metrics, resume_step)]
    if run.log.tensorboard:
        folder = directory.path / "tensorboard"
        sinks.append(_Mirror("TensorBoard", lambda: TensorBoardSink(folder, resume_step)))
    if run.log.wandb != "off":
        sinks.append(
            _Mirror("W&B", lambda: WandbSink(run, directory, partial(read_metrics, directory.metrics)))
        )
    return Sinks(sinks)
