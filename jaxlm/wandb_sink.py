"""A run's lines in Weights & Biases, online or in files that `wandb sync` uploads later."""

import json
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.cli import say
from jaxlm.config import RunConfig, to_dict
from jaxlm.disk import replace_text
from jaxlm.json_file import read_object
from jaxlm.metric_names import named
from jaxlm.run_dir import RunDir

Row = Mapping[str, Any]
BLOCK, HEADER = 32768, 7  # bytes of a .wandb file's blocks; of the file's header, and of each piece's


class WandbSink:
    """A W&B run; its id stays in wandb_id.json, so that a resumed run goes on in the same one.

    W&B cannot take steps back, and a process that is killed takes the last lines that W&B held in memory with it. So a
    resumed run first looks up how far W&B's record goes: lines that it lacks are sent again, lines that it has are left
    out. The steps after a checkpoint that are repeated have the same values.
    """

    START, FINISH = 60.0, 120.0  # seconds given to the server at the start, and to the upload at the end

    def __init__(self, run: RunConfig, directory: RunDir, earlier: Callable[[], Sequence[Row]]) -> None:
        """`earlier`: the lines up to the step that the run goes on from. Raises whatever wandb raises."""
        import wandb

        identity, known = wandb_id(directory.path / "wandb_id.json")
        recorded = recorded_step(directory.path / "wandb", identity)
        self._run = wandb.init(
            project=run.log.wandb_project,
            id=identity,
            name=directory.path.resolve().name,
            dir=str(directory.path),
            config=to_dict(run),
            mode="online" if run.log.wandb == "online" else "offline",
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=self.START, finish_timeout=self.FINISH
            ),
        )
        if run.log.wandb == "online":
            say(f"wandb: {self._run.url}")
            recorded = self._run.step - 1  # what the server has
        self._recorded = recorded
        if known:
            for row in earlier():
                self.write(row)

    def write(self, row: Row) -> None:
        """The line's numbers as one entry of the history, unless it is there."""
        if row["step"] > self._recorded:
            self._run.log(named(row), step=int(row["step"]), commit=True)

    def close(self) -> None:
        """Waits until all is uploaded, or on the disk in offline mode; FINISH seconds at most."""
        self._run.finish()


def wandb_id(path: Path) -> tuple[str, bool]:
    """The id in a file, made where there is none, and whether it was there. A damaged file counts as none."""
    try:
        identity = read_object(path)["id"]
        if isinstance(identity, str) and identity.isalnum():
            return identity, True
        say(f"warning: {path} holds no id of a W&B run; a new one is started")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError):
        say(f"warning: {path} cannot be read; a new W&B run is started")
    identity = secrets.token_hex(4)
    replace_text(path, json.dumps({"id": identity}) + "\n")
    return identity, False


def recorded_step(folder: Path, identity: str) -> int:
    """The last step of a run's history in RUN/wandb; -1 without one."""
    last = -1
    for path in sorted(folder.glob(f"*run-*-{identity}/*.wandb")):
        for record in read_wandb(path):
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
    return last


def read_wandb(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, as wandb's own messages; one that a kill cut short ends it.

    The file is a log in LevelDB's format: a header, then blocks of BLOCK bytes in which each piece of a record has a
    checksum (4 bytes), a length (2) and a kind (1): complete, first, middle or last.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:  # too few bytes for a piece: padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + HEADER : at + HEADER + length]
        if len(piece) < length or kind not in (1, 2, 3, 4):
            return
        whole = piece if kind in (1, 2) else whole + piece
        at += HEADER + length
        if kind in (1, 4):
            yield Record.FromString(whole)
