"""A run that is killed again and again ends as one that nobody touched: weights, optimizer, data order and log."""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from entry import SMALL, sentences
from killable import Server, server

from jaxlm.checkpoint import Checkpoints
from jaxlm.config import RunConfig, load
from jaxlm.engine import restore_state
from jaxlm.metrics import VOLATILE, read_metrics

STEPS = 90  # of the runs that are killed a few times
TINY = ["--model.n-layers", 1, "--model.moe.n-experts", 0, "--train.accumulation", 1, "--train.keep", 2]
OFTEN = ["--train.save-every", 3, "--train.eval-every", 25, "--log.details", "False"]


class End(NamedTuple):
    """What a run has come to."""

    state: dict[str, bytes]  # every leaf of the newest checkpoint
    extra: dict[str, Any]  # data position and best validation loss
    rows: list[dict[str, Any]]  # of metrics.jsonl, without what was measured by the clock


class Runs:
    """Runs of one small model on one text, forked from one process."""

    def __init__(self, forks: Server, folder: Path) -> None:
        self.forks, self.folder = forks, folder
        self.errors = folder / "errors.txt"
        (folder / "text.txt").write_text(sentences(900), encoding="utf-8")

    def words(self, run: Path, steps: int) -> list[str]:
        """The command line; --resume starts what is not there."""
        place = ["--data.path", self.folder / "text.txt", "--run-dir", run, "--resume"]
        fixed = ["--train.steps", steps, "--optim.decay-steps", 90]
        return [str(word) for word in ("quickstart", *SMALL, *TINY, *OFTEN, *place, *fixed)]

    def finish(self, run: Path, steps: int) -> str:
        """Runs to the end; what it said."""
        code = self.forks.run(self.words(run, steps), self.errors)
        assert code == 0, self.said()
        return self.said()

    def said(self) -> str:
        """What the newest run has said so far."""
        return self.errors.read_text(encoding="utf-8") if self.errors.exists() else ""

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Looks every two milliseconds."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"the run does not get on: {self.said()}"
            time.sleep(0.002)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The process that runs are forked from."""
    folder = tmp_path_factory.mktemp("killed")
    with server(folder) as forks:
        yield Runs(forks, folder)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> End:
    """The end of a run of STEPS steps that nobody touched."""
    runs.finish(runs.folder / "whole", STEPS)
    return end(runs.folder / "whole")


def end(run: Path) -> End:
    """The newest checkpoint and the log."""
    config = load(RunConfig, run / "config.json")
    state, extra = restore_state(config, Checkpoints(run / "checkpoints"), "latest")
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    bits = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    rows = [
        {k: v for k, v in row.items() if k not in VOLATILE} for row in read_metrics(run / "metrics.jsonl")
    ]
    return End(bits, extra, rows)


def assert_same(run: Path, wanted: End, steps: int = STEPS) -> None:
    """Bit for bit, and every step once in the log."""
    found = end(run)
    assert [row["step"] for row in found.rows] == list(range(1, steps + 1))
    assert found.rows == wanted.rows
    assert found.extra == wanted.extra
    assert found.state == wanted.state


def newest(run: Path) -> int:
    """Step of the newest checkpoint that is in its place; 0 without one."""
    return Checkpoints(run / "checkpoints").latest_step or 0


def logged(run: Path) -> int:
    """Lines of the log."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def interrupt(runs: Runs, run: Path, steps: int, number: int, chance: random.Random) -> int:
    """Continues a run and signals it at a random moment; how it ended.

    A fifth of the kills comes anywhere from its start on, all else some steps after it has begun to train.
    """
    saved = newest(run)
    pid = runs.forks.start(runs.words(run, steps), runs.errors)
    if number == signal.SIGKILL and chance.random() < 0.2:
        time.sleep(chance.uniform(0, 3))
    else:
        runs.wait_until(lambda: re.search(r"^step \d+/", runs.said(), re.MULTILINE))
        goal = logged(run) + chance.randint(0, 12)
        runs.wait_until(lambda: logged(run) >= min(goal, steps - 20))
        time.sleep(chance.uniform(0, 0.02))
    os.kill(pid, number)
    code, said = runs.forks.wait(), runs.said()
    assert "Traceback" not in said and "warning" not in said, said
    if resumed := re.search(r"resumed at step (\d+)", said):
        assert int(resumed[1]) == saved > 0, said
    assert not (saved and "starting" in said), said
    return code


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_the_same(runs: Runs, whole: End, kills: int) -> None:
    """SIGKILL, and every restart continues from a step beyond zero once one was saved."""
    steps, chance = max(STEPS, 24 * kills), random.Random(kills)
    run, seen = runs.folder / f"killed-{kills}", []
    for _ in range(kills):
        assert interrupt(runs, run, steps, signal.SIGKILL, chance) == -signal.SIGKILL
        seen.append(newest(run))
    assert seen == sorted(seen) and seen[-1] > 0, seen
    runs.finish(run, steps)
    if steps != STEPS:
        runs.finish(runs.folder / "long", steps)
        whole = end(runs.folder / "long")
    assert_same(run, whole, steps)


def test_sigterm_loses_no_step(runs: Runs, whole: End) -> None:
    """Each SIGTERM ends in order with a checkpoint of the last step that was logged."""
    run, chance = runs.folder / "terminated", random.Random(0)
    for _ in range(2):
        assert interrupt(runs, run, STEPS, signal.SIGTERM, chance) == 0
        said = runs.said()
        assert f"SIGTERM: saved at step {newest(run)}; continue with --resume" in said
        assert newest(run) == logged(run)
    runs.finish(run, STEPS)
    assert_same(run, whole)


def _points(count: int, trials: int) -> list[int]:
    """`trials` of the calls 1 to `count`, spread over them."""
    return sorted({1 + i * (count - 1) // max(1, trials - 1) for i in range(trials)})


@pytest.mark.slow
@pytest.mark.parametrize("trials", [60])
def test_killed_at_its_renames_and_flushes_it_ends_the_same(runs: Runs, whole: End, trials: int) -> None:
    """Before one of its calls of rename, replace, fsync, rmdir: preparing data, saving, cutting the log, removing."""
    run = runs.folder / f"points-{trials}"
    runs.finish(runs.folder / f"counted-{trials}", STEPS)
    count = int((runs.folder / "errors.txt.calls").read_text())
    assert count > 200, "nothing is flushed and renamed"
    for trial, point in enumerate(_points(count // 2, trials)):
        saved = newest(run)
        code = runs.forks.run(runs.words(run, STEPS), runs.errors, die_at=point)
        said = runs.said()
        assert code == -signal.SIGKILL or (trial and code == 0), (point, said)
        assert "Traceback" not in said and not (saved and "starting" in said), said
        assert newest(run) >= saved
    runs.finish(run, STEPS)
    assert_same(run, whole)


@pytest.mark.parametrize(
    "there",
    [
        "data/train",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("config.json", "tokenizer.json", "data/val")),
    ],
)
def test_killed_while_its_data_is_prepared_it_starts_again(runs: Runs, whole: End, there: str) -> None:
    """As soon as the named file is there; the next start prepares what is missing and trains on the same tokens."""
    run = runs.folder / f"prepared-{there.replace('/', '-')}"
    pid = runs.forks.start(runs.words(run, STEPS), runs.errors)
    deadline = time.monotonic() + 60
    while not (run / there).exists() and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    assert runs.forks.wait() == -signal.SIGKILL
    runs.finish(run, STEPS)
    assert_same(run, whole)
