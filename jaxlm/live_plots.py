"""Draws a run's figures beside the training: in a process of its own, of the lowest priority, one at a time."""

import os
import subprocess
import sys
from pathlib import Path

from jaxlm.cli import say

_DRAW = (
    "import os, sys; os.nice(int(sys.argv[2])); from jaxlm.plots_run import plot_run; plot_run(sys.argv[1])"
)
_ROOT = Path(__file__).resolve().parents[1]


class LivePlots:
    """Call it at each checkpoint, `close` it at the end: then the figures show the whole run.

    Nothing here ends or stops a run: where drawing fails, one warning says why.
    """

    PATIENCE = 120.0  # seconds that `close` waits for the last figures

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._process: subprocess.Popen[str] | None = None
        self._behind = False  # lines were logged since the process began to draw
        self._warned = False

    def __call__(self) -> None:
        """Starts to draw what is logged by now, and returns at once. While figures are being drawn, it does nothing."""
        if self._process is not None and self._process.poll() is None:
            self._behind = True
            return
        self._collect()
        self._start()

    def close(self) -> None:
        """Waits until the figures show all that is logged."""
        if self._behind and self._process is not None:
            self._process.kill()  # what it draws is out of date
            self._process.communicate()
            self._start(nice=0)
        self._collect()

    def _start(self, nice: int = 19) -> None:
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._behind = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DRAW, str(self._run_dir), str(nice)],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # an interrupt from the terminal is the run's to handle
            )
        except OSError as error:
            self._warn(str(error))

    def _collect(self) -> None:
        if self._process is None:
            return
        try:
            _, errors = self._process.communicate(timeout=self.PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            errors = f"it took more than {self.PATIENCE:.0f} s"
        if self._process.returncode:
            self._warn((errors.strip().splitlines() or [f"exit code {self._process.returncode}"])[-1])
        self._process = None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            say(f"warning: the figures were not drawn: {reason}")
        self._warned = True
