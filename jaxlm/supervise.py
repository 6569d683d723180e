"""Processes that train together, each watched by a parent on its machine that imports no framework.

The parent starts its share of the processes, passes the first SIGINT or SIGTERM on to them, and ends them all when one
dies or falls silent: a job in which one process is gone would wait for it for ever. What a native library says before
it aborts, and the stacks of all threads of those that are still there, stand in the run's logs/; the person at the
terminal reads one line that names the process and its host.
"""

import dataclasses
import faulthandler
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxlm.cli import WORKER, say
from jaxlm.config import ConfigError, require

HEARTBEAT = 20.0  # seconds of silence after which a process counts as dead
BEAT = 2.0  # seconds between signs of life
GRACE = 2.0  # seconds in which the first to die is told from those that it pulls along
RANKS = (
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "JOB_COMPLETION_INDEX",
)  # a cluster's name for a process's number


@dataclass(frozen=True)
class LaunchConfig:
    """Several processes that train together; a matter of the command, not of the run."""

    processes: int = 1  # processes that this command starts and watches on this machine
    cluster: Literal["none", "auto"] = (
        "none"  # auto: SLURM, Open MPI or Kubernetes says who is who (found by jax)
    )
    coordinator: str = (
        ""  # HOST:PORT on which process 0 listens; needed for several machines without a cluster
    )
    machines: int = 1  # machines that run this command, each with as many processes
    machine: int = 0  # which of them this is, from 0
    cpu_devices: int = 0  # devices that each process makes of its CPU; 0 = jax's own choice

    def __post_init__(self) -> None:
        require(self.processes >= 1, f"launch.processes={self.processes} must be at least 1")
        require(self.machines >= 1, f"launch.machines={self.machines} must be at least 1")
        require(self.cpu_devices >= 0, f"launch.cpu_devices={self.cpu_devices} must not be negative")
        require(
            0 <= self.machine < self.machines,
            f"launch.machine={self.machine} must be from 0 to launch.machines-1={self.machines - 1}",
        )
        host, _, port = self.coordinator.rpartition(":")
        require(
            not self.coordinator or (bool(host) and port.isdigit() and 0 < int(port) < 65536),
            f"launch.coordinator={self.coordinator!r} is not of the form HOST:PORT",
        )
        if self.cluster == "auto":
            require(
                self.processes == self.machines == 1 and not self.coordinator,
                "launch.cluster=auto finds processes and addresses by itself; leave the others out",
            )
        elif self.machines > 1:
            require(
                bool(self.coordinator), f"launch.machines={self.machines} needs launch.coordinator=HOST:PORT"
            )

    @property
    def several(self) -> bool:
        """Whether more than this process is meant."""
        return self.cluster == "auto" or self.processes * self.machines > 1


@dataclass(frozen=True)
class Worker:
    """What a process is told by its parent."""

    log: str  # file for native messages and stacks
    beat: int  # pipe for signs of life
    cluster: bool = False  # jax finds out the rest
    index: int = 0  # its number, from 0
    count: int = 1  # of how many
    coordinator: str = ""  # HOST:PORT of process 0
    devices: tuple[int, ...] | None = None  # its share of the machine's devices; None = all
    cpu_devices: int = 0  # see LaunchConfig


def worker() -> Worker | None:
    """What the parent has said of this process, None where it has no such parent."""
    text = os.environ.get(WORKER)
    if text is None:
        return None
    values = json.loads(text)
    devices = values.pop("devices")
    return Worker(**values, devices=None if devices is None else tuple(devices))


def begin(me: Worker) -> None:
    """Signs of life for the parent, native messages to the log; what process 0 says in Python still shows.

    SIGUSR1 writes the stacks of all threads to the log. When the parent is gone, this process ends as on SIGTERM.
    """
    log = os.open(me.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    out, terminal = os.dup(1), os.dup(2)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)  # native code writes there whatever Python does
    first = _is_first(me)
    sys.stdout = os.fdopen(out if first else os.dup(log), "w", buffering=1)
    sys.stderr = os.fdopen(terminal if first else os.dup(log), "w", buffering=1)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    threading.Thread(target=_beat, args=(me.beat,), name="signs of life", daemon=True).start()


def _is_first(me: Worker) -> bool:
    """Whether this is process 0 of all, which alone is heard."""
    return os.environ.get(_rank_name(), "0") == "0" if me.cluster else me.index == 0


def _beat(pipe: int) -> None:
    while True:
        try:
            os.write(pipe, b".")
        except OSError:  # nobody listens any more
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(BEAT)


@dataclass
class _Child:
    """A process under watch."""

    name: str
    process: "subprocess.Popen[bytes]"
    pipe: int
    log: Path
    is_heard: bool  # what it says shows at the terminal
    heard: float = field(default_factory=time.monotonic)

    def end(self) -> str:
        """How it ended, in words; '' while it runs or where all is well."""
        code = self.process.poll()
        if code is None or code == 0:
            return ""
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def supervise(command: Sequence[str], launch: LaunchConfig, logs: Path) -> int:
    """Runs a command in `launch`'s processes of this machine until all are done; returns the exit code.

    command: what each process executes. logs: folder for what native code says. 0 when all ended well, 2 when the input
    was bad (process 0 has said why), 1 when a process died or was silent for 20 seconds, which one line says.
    Raises ConfigError where the machine's devices cannot be shared.
    """
    logs.mkdir(parents=True, exist_ok=True)
    children = [_start(command, me, logs) for me in _workers(launch, logs)]
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = _watch(children)
    finally:
        _kill(children)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + received[1] if len(received) > 1 and code else code


def _workers(launch: LaunchConfig, logs: Path) -> list[Worker]:
    if launch.cluster == "auto":
        name = os.environ.get(_rank_name(), f"{socket.gethostname()}-{os.getpid()}")
        return [Worker(str(logs / f"process_{name:0>3}.log"), -1, True, cpu_devices=launch.cpu_devices)]
    coordinator = launch.coordinator or f"127.0.0.1:{_free_port()}"
    count, first = launch.processes * launch.machines, launch.processes * launch.machine
    shares = _shares(launch.processes)
    return [
        Worker(
            log=str(logs / f"process_{first + i:03d}.log"),
            beat=-1,
            index=first + i,
            count=count,
            coordinator=coordinator,
            devices=share,
            cpu_devices=launch.cpu_devices,
        )
        for i, share in enumerate(shares)
    ]


def _rank_name() -> str:
    return next((name for name in RANKS if name in os.environ), "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _shares(processes: int) -> list[tuple[int, ...] | None]:
    """Which of the machine's GPUs each process gets; None where one process has all, or there are none."""
    if processes == 1 or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return [None] * processes
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
        gpus = len(lines) if visible is None else len([name for name in visible.split(",") if name])
    except (OSError, subprocess.SubprocessError):
        return [None] * processes
    if gpus % processes:
        raise ConfigError(f"launch.processes={processes} cannot share {gpus} GPUs evenly")
    each = gpus // processes
    return [tuple(range(i * each, (i + 1) * each)) or None for i in range(processes)]


def _start(command: Sequence[str], me: Worker, logs: Path) -> _Child:
    listen, speak = os.pipe()
    me = dataclasses.replace(me, beat=speak)
    environment = os.environ | {WORKER: json.dumps(dataclasses.asdict(me))}
    process = subprocess.Popen(
        list(command),
        env=environment,
        pass_fds=(speak,),
        start_new_session=True,  # a Ctrl-C reaches the parent alone, which passes it on once
        stdin=subprocess.DEVNULL,
    )
    os.close(speak)
    os.set_blocking(listen, False)
    return _Child(_title(me), process, listen, Path(me.log), _is_first(me))


def _title(me: Worker) -> str:
    number = os.environ.get(_rank_name(), "?") if me.cluster else f"{me.index} of {me.count}"
    return f"process {number} on {socket.gethostname()}"


def _watch(children: list[_Child]) -> int:
    """Waits until all have ended; the exit code. Says who died, or who is silent."""
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pipe, selectors.EVENT_READ, child)
        while any(child.process.poll() is None for child in children):
            for key, _ in selector.select(timeout=0.2):
                try:
                    heard = os.read(key.fd, 4096)
                except BlockingIOError:
                    continue
                key.data.heard = time.monotonic()
                if not heard:  # it has closed its end: it is about to be gone
                    selector.unregister(key.fd)
            if any(child.end() for child in children):
                return _verdict(children)
            silent = [c for c in children if c.process.poll() is None and _silence(c) > HEARTBEAT]
            if silent:
                say(
                    f"{silent[0].name} has been silent for {HEARTBEAT:.0f} s and was ended; see {silent[0].log}"
                )
                return 1
    return _verdict(children)


def _silence(child: _Child) -> float:
    return time.monotonic() - child.heard


def _verdict(children: list[_Child]) -> int:
    """After the first has ended badly: waits for those that it pulls along, and names the likely first cause."""
    until = time.monotonic() + GRACE
    while time.monotonic() < until and any(child.process.poll() is None for child in children):
        time.sleep(0.05)
    ended = [child for child in children if child.end()]
    if not ended:
        return 0
    # A process that loses a peer aborts, raises or refuses what it reads; one that was killed from outside did not.
    by_hand = [c for c in ended if c.process.returncode in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)]
    told = [c for c in ended if c.process.returncode in (1, 2)]
    first = (by_hand or told or ended)[0]
    code = first.process.returncode
    if code in (1, 2):
        if not first.is_heard:  # else it has said why itself
            say(f"{first.name} {'refused its input' if code == 2 else 'had to stop'}; see {first.log}")
    elif code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        say(
            f"{first.name} {first.end()}; the others were ended; see {first.log.parent}, then go on with --resume"
        )
    return code if code > 0 else 1


def _kill(children: list[_Child]) -> None:
    """Ends whoever is left, after it has written the stacks of its threads to its log."""
    left = [child for child in children if child.process.poll() is None]
    for child in left:
        child.process.send_signal(signal.SIGUSR1)
    if left:
        time.sleep(0.5)
    for child in left:
        child.process.kill()
    for child in children:
        child.process.wait()
        os.close(child.pipe)
