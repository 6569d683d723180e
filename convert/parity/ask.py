"""One rung climbed: what it found, how long it took, and an error as a finding instead of a traceback."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from convert.parity.compare import Finding
from convert.parity.inputs import perturbed
from convert.parity.limits import limit
from convert.parity.precision import UNITS
from convert.parity.results import Rung
from convert.parity.rungs import Pair

Question = Callable[[Pair], list[Finding]]


class Guard:
    """Turns an exception inside a rung into its finding: one line, not a traceback."""

    def __init__(self, name: str, case: str):
        self.name, self.case, self.findings = name, case, []
        self.started = time.perf_counter()

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        lines = str(error).splitlines() or [""]
        # A conversion error names its tensors on the lines after the first.
        named = (
            lines[1].split(":")[0].split(" -> ")[0]
            if len(lines) > 1 and kind.__name__ == "ConversionError"
            else ""
        )
        detail = {"error": f"{kind.__name__}: {' | '.join(lines[:3])}"}
        self.findings = [Finding(named or "error", float("inf"), limit("exact"), detail)]
        return True

    def rung(self) -> Rung:
        """What came of it."""
        return Rung(self.name, self.case, self.findings, time.perf_counter() - self.started)


def ask(
    name: str, case: str, question: Question, pair: Pair, limits: Literal["fixed", "adaptive"] = "fixed"
) -> Rung:
    """Climbs one rung: its findings, or the error that it ended with.

    adaptive: a float64 limit becomes 16 times what one rounding unit of noise on every weight does, where that is
    more: for models that nobody chose, whose gradients may cancel to almost nothing.
    """
    guard = Guard(name, case)
    with guard:
        guard.findings = question(pair)
    rung = guard.rung()
    rung.notes = pair.notes.pop(name, {})
    if limits == "adaptive" and not rung.passed:
        rung.findings = _rejudged(rung.findings, question, pair)
    return rung


def _rejudged(findings: list[Finding], question: Question, pair: Pair) -> list[Finding]:
    """The same question about PyTorch with perturbed weights against PyTorch: what rounding may do to each answer."""
    noisy = pair.torch.replaced(perturbed(pair.torch.weights(), UNITS["float64"], pair.seed))
    twin = replace(pair, jax=noisy, cache={}, notes={})
    guard = Guard("", "")
    with guard:
        guard.findings = question(twin)
    change = {finding.name: finding.value for finding in guard.findings}

    def judged(finding: Finding) -> Finding:
        allowed = limit("perturbation") * change.get(finding.name, 0.0)
        if finding.passed or finding.limit == 0 or not math.isfinite(allowed):
            return finding
        return replace(finding, limit=max(finding.limit, allowed))

    return [judged(finding) for finding in findings]
