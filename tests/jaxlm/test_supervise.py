"""A parent that watches processes: who died is said, nobody is left, and stacks stand in the logs. Real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.config import ConfigError
from jaxlm.supervise import LaunchConfig

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import sys
from pathlib import Path
import jaxlm.supervise as s
s.HEARTBEAT, s.BEAT = 3.0, 0.2
sys.exit(s.supervise([sys.executable, "-c", {child!r}], s.LaunchConfig(processes=3), Path({logs!r})))
"""
CHILD = """
import os, signal, sys, time
import jaxlm.supervise as s
s.BEAT = 0.2
me = s.worker()
s.begin(me)
open(os.path.join({logs!r}, f"pid{{me.index}}"), "w").write(str(os.getpid()))
print("hello from", me.index, file=sys.stderr)
os.write(2, f"native {{me.index}}\\n".encode())
{body}
"""


def start(logs: Path, body: str) -> "subprocess.Popen[str]":
    """A parent over three processes that run `body`."""
    logs.mkdir()
    program = PARENT.format(child=CHILD.format(body=body, logs=str(logs)), logs=str(logs))
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(parent: "subprocess.Popen[str]", logs: Path) -> tuple[int, str]:
    """Exit code and what was said; checks that no process is left."""
    _, said = parent.communicate(timeout=40)
    for index in range(3):
        with pytest.raises(ProcessLookupError):
            os.kill(pid(logs, index), 0)
    return parent.returncode, said


def pid(logs: Path, index: int) -> int:
    """Number of process `index`, once it has begun."""
    path = logs / f"pid{index}"
    for _ in range(400):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"process {index} did not begin")


def test_all_ending_well_is_zero_and_only_process_0_is_heard(tmp_path: Path) -> None:
    """What the others say, and what native code says, stands in their logs."""
    logs = tmp_path / "logs"
    code, said = finish(start(logs, "time.sleep(0.3)"), logs)
    assert (code, said) == (0, "hello from 0\n")
    assert (logs / "process_000.log").read_text() == "native 0\n"
    assert sorted((logs / "process_002.log").read_text().split("\n")) == ["", "hello from 2", "native 2"]


def test_a_killed_process_is_named_and_the_others_leave_their_stacks(tmp_path: Path) -> None:
    """SIGKILL on one of three: one line with its number and host, exit 1, the rest ended with stacks in their logs."""
    logs = tmp_path / "logs"
    parent = start(logs, "def waiting_for_the_others():\n    time.sleep(60)\nwaiting_for_the_others()")
    pids = [pid(logs, index) for index in range(3)]
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    code, said = finish(parent, logs)
    assert code == 1 and time.monotonic() - began < 15
    lines = [line for line in said.splitlines() if not line.startswith("hello")]
    assert len(lines) == 1 and lines[0].startswith(f"process 1 of 3 on {os.uname().nodename} died of SIGKILL")
    for index in (0, 2):
        assert "waiting_for_the_others" in (logs / f"process_{index:03d}.log").read_text()


def test_the_first_to_die_is_named_not_those_that_it_pulls_along(tmp_path: Path) -> None:
    """The others abort a moment later, as jax does when a peer is gone."""
    logs = tmp_path / "logs"
    body = """
if me.index == 2:
    time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)
while True:
    try: os.kill(int(open(os.path.join({logs!r}, "pid2")).read()), 0)
    except FileNotFoundError: pass
    except ProcessLookupError: os.abort()
    time.sleep(0.01)
""".replace("{logs!r}", repr(str(logs)))
    code, said = finish(start(logs, body), logs)
    assert code == 1 and "process 2 of 3" in said and "SIGKILL" in said


def test_a_kill_is_the_cause_of_what_the_others_refuse(tmp_path: Path) -> None:
    """Process 0 cannot read what the killed one was to write, and exits with 2: still 1, and the killed one named."""
    logs = tmp_path / "logs"
    body = """
if me.index == 2:
    time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.6)
sys.exit(2)
"""
    code, said = finish(start(logs, body), logs)
    assert code == 1 and "process 2 of 3" in said and "SIGKILL" in said


def test_a_process_that_is_not_heard_and_stops_is_named(tmp_path: Path) -> None:
    """Exit codes 1 and 2 of process 0 come with its own line, those of the others with their parent's."""
    for code, said in ((1, "had to stop"), (2, "refused its input")):
        logs = tmp_path / f"logs{code}"
        found = finish(start(logs, f"sys.exit({code}) if me.index == 1 else time.sleep(60)"), logs)
        assert found[0] == code and f"process 1 of 3 on {os.uname().nodename} {said}; see " in found[1]


@pytest.mark.parametrize(
    ("call", "code", "heard"),
    [
        ("cli.need('no_such_module')", 2, "error: this needs no_such_module"),
        ("open('/tmp/' + 'x' * 300)", 2, "File name too long"),
        ("signal.raise_signal(signal.SIGINT)", 130, ""),
        ("sys.exit()", 0, ""),
    ],
)
def test_a_supervised_process_ends_as_it_would_alone(
    tmp_path: Path, call: str, code: int, heard: str
) -> None:
    """Missing libraries, what the disk refuses and Ctrl-C are no crashes: one line at most, and their exit codes."""
    logs = tmp_path / "logs"
    body = f"from jaxlm import cli\nif me.index: time.sleep(0.2); os._exit(0)\ncli.main_guard(lambda argv: {call})"
    found, said = finish(start(logs, body), logs)
    lines = [line for line in said.splitlines() if line != "hello from 0"]
    assert found == code and len(lines) == bool(heard) and heard in said
    assert "Traceback" not in (logs / "process_000.log").read_text()


def test_a_silent_process_counts_as_dead(tmp_path: Path) -> None:
    """A stopped process gives no sign of life: it is named after the heartbeat's time, and ended."""
    logs = tmp_path / "logs"
    parent = start(logs, "time.sleep(60)")
    stopped = pid(logs, 1)
    for index in (0, 2):
        pid(logs, index)
    os.kill(stopped, signal.SIGSTOP)
    code, said = finish(parent, logs)
    assert code == 1 and "process 1 of 3" in said and "silent for 3 s" in said


def test_a_signal_to_the_parent_is_passed_on_once(tmp_path: Path) -> None:
    """Each process sees one SIGTERM and ends as it likes; the parent then reports what they did."""
    logs = tmp_path / "logs"
    body = """
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
open(os.path.join({logs!r}, f"ready{me.index}"), "w").close()
while not seen: time.sleep(0.02)
time.sleep(0.3)
os.write(2, f"seen {len(seen)}\\n".encode())
""".replace("{logs!r}", repr(str(logs)))
    parent = start(logs, body)
    for index in range(3):
        pid(logs, index)
        while not (logs / f"ready{index}").exists():
            time.sleep(0.02)
    parent.terminate()
    code, _ = finish(parent, logs)
    assert code == 0
    assert all("seen 1\n" in (logs / f"process_{i:03d}.log").read_text() for i in range(3))


def test_processes_end_in_order_when_their_parent_is_gone(tmp_path: Path) -> None:
    """A parent that was killed leaves nobody behind: they get the signal on which a run saves and ends."""
    logs = tmp_path / "logs"
    parent = start(logs, "time.sleep(60)")
    pids = [pid(logs, index) for index in range(3)]
    parent.kill()
    parent.communicate(timeout=20)
    until = time.monotonic() + 10
    while time.monotonic() < until and any(Path(f"/proc/{number}").exists() for number in pids):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{number}").exists() for number in pids)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(processes=0), "launch.processes=0"),
        (dict(machines=2), "launch.coordinator"),
        (dict(machines=2, machine=2, coordinator="a:1"), "launch.machine=2"),
        (dict(coordinator="nohost"), "HOST:PORT"),
        (dict(cluster="auto", processes=2), "leave the others out"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(settings: dict, reason: str) -> None:
    """In one line that names the option."""
    with pytest.raises(ConfigError, match=reason):
        LaunchConfig(**settings)
