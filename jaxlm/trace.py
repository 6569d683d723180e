"""A profiler's trace of a few steps, taken by the engine's own profiler. No framework here."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

FIRST, COUNT = 10, 4  # of the steps of a process, from 1; the first ones compile


class Trace:
    """Records steps 10 to 13 of a process, or earlier ones where it takes fewer."""

    def __init__(
        self,
        profile: Callable[[Path], AbstractContextManager[str]],
        folder: Path | None,
        done: int,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        """Plans the trace; nothing is recorded where `folder` is None.

        Args:
            profile: the engine's profiler: records into a folder until its context is left; yields how to open it.
            folder: RUN/profile.
            done: steps done before this process.
            steps: last step of the run.
            say: takes the line that says where the trace is.
        """
        self._profile, self._folder, self._say = profile, folder, say
        left = steps - done
        first = FIRST if left >= FIRST + COUNT - 1 else min(2, left)
        self.first, self.last = done + first, min(done + first + COUNT - 1, steps)
        self._open: ExitStack | None = None
        self._how = ""

    def starts(self, step: int) -> bool:
        """Whether recording begins with `step`; what was dispatched before should be waited for."""
        return self._folder is not None and step == self.first

    def start(self) -> None:
        """Begins to record."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open = ExitStack()
        self._how = self._open.enter_context(self._profile(self._folder))

    def ends(self, step: int) -> bool:
        """Whether `step` is the last one recorded; it should be waited for."""
        return self._open is not None and step >= self.last

    def stop(self, step: int) -> None:
        """Writes the trace, where one is being recorded; `step` is the last in it."""
        if self._open is not None:
            opened, self._open = self._open, None
            opened.close()
            self._say(f"profile of steps {self.first} to {step}: {self._how}")
