"""How long a process has compiled, and how much of it was kept from processes before it (jaxlm.compilation)."""

from typing import Any

import jax

COMPILED = (
    "/jax/core/compile/backend_compile_duration"  # jax's names; reading a kept program counts as compiling it
)
KEPT = "/jax/compilation_cache/cache_hits"


class CompileMeter:
    """Counts the programs that jax compiles or reads from now on, in all of the process.

    Attributes:
        seconds: compiling and reading took, tracing in Python not counted.
        programs: compiled or read.
        kept: programs among them that were read.
    """

    def __init__(self) -> None:
        self.seconds, self.programs, self.kept = 0.0, 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def record(self) -> dict[str, Any]:
        """What is counted so far, JSON-able, and the folder where programs are kept (None: nowhere)."""
        folder = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
        counts = {"seconds": round(self.seconds, 3), "programs": self.programs, "kept": self.kept}
        return counts | {"folder": folder or None}

    def __str__(self) -> str:
        """The same in one line."""
        folder = self.record()["folder"]
        where = f"kept in {folder}" if folder else "nothing is kept for the next start"
        return f"compiled {self.programs} programs in {self.seconds:.1f} s, {self.kept} of them from before; {where}"

    def _on_duration(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == COMPILED:
            self.seconds += duration_secs
            self.programs += 1

    def _on_event(self, event: str, **kwargs: Any) -> None:
        self.kept += event == KEPT
