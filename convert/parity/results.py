"""What a comparison leaves behind: rungs with a verdict each, the first divergence, and what a reader has to know."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from convert.parity.causes import likely_causes
from convert.parity.compare import Finding

SCHEMA = 1  # of report.json
SHOWN = 400  # findings of one rung that a report lists; the worst are never left out

# The order of the rungs is the order of blame: what fails first explains what fails after it.
ORDER = (
    "config",
    "tree",
    "conversion",
    "init",
    "rope",
    "activations",
    "activations_cap",
    "ties",
    "loss",
    "kl",
    "gradients",
    "gradients_cap",
    "accumulation",
    "clip",
    "schedule",
    "update",
    "updates",
    "trajectory",
    "handover",
    "decoding",
    "greedy",
    "sampling",
    "mesh",
    "sft",
    "lora_init",
    "lora",
    "lora_updates",
    "lora_nf4",
    "dpo",
)


@dataclass
class Rung:
    """One question and its answer: the compared tensors in the order in which they came to be."""

    name: str
    case: str  # which weights; '' where it does not matter
    findings: list[Finding]
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)  # shown, never judged

    @property
    def passed(self) -> bool:
        """All findings within their limits; a rung that compared nothing proves nothing and says so by failing."""
        return bool(self.findings) and all(finding.passed for finding in self.findings)

    @property
    def worst(self) -> Finding:
        """The finding farthest from (or over) its limit."""
        nothing = Finding("nothing was compared", math.inf, 0.0)
        return max(self.findings, key=lambda f: (f.severity, f.value), default=nothing)

    @property
    def first(self) -> Finding | None:
        """The first finding that fails."""
        return next((finding for finding in self.findings if not finding.passed), None)

    def to_json(self) -> dict[str, Any]:
        """The rung for programs."""
        worst = self.worst
        shown = self.findings
        if len(shown) > SHOWN:
            keep = {id(f) for f in sorted(shown, key=lambda f: -f.severity)[:SHOWN]}
            shown = [f for f in shown if id(f) in keep]
        return {
            "name": self.name,
            "case": self.case,
            "passed": self.passed,
            "value": _number(worst.value),
            "limit": worst.limit,
            "worst": worst.name,
            "compared": len(self.findings),
            "seconds": round(self.seconds, 2),
            "notes": self.notes,
            "findings": [
                {"name": f.name, "value": _number(f.value), "limit": f.limit, "passed": f.passed}
                | ({"detail": dict(f.detail)} if f.detail else {})
                for f in shown
            ],
        }


@dataclass(frozen=True)
class Divergence:
    """Where two models part: the first rung that fails, and in it the first tensor."""

    rung: str
    case: str
    layer: int | None
    operation: str  # path inside the layer, or what was compared
    name: str
    value: float
    limit: float
    detail: dict[str, Any]
    causes: list[str]

    def line(self) -> str:
        """One line for a person."""
        layer = "" if self.layer is None else f", layer {self.layer}"
        case = f", {self.case} weights" if self.case else ""
        return (
            f"rung {self.rung}{case}{layer}, {self.operation}: error {self.value:.2e}, limit {self.limit:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        """The divergence for programs."""
        return {
            "rung": self.rung,
            "case": self.case,
            "layer": self.layer,
            "operation": self.operation,
            "name": self.name,
            "value": _number(self.value),
            "limit": self.limit,
            "detail": self.detail,
            "causes": self.causes,
        }


@dataclass
class Report:
    """Everything a run of the suite found."""

    target: str
    against: str
    dtype: str
    ledger: dict[str, Any]
    rungs: list[Rung] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    blind_spots: list[str] = field(default_factory=list)
    zero_gradients: list[str] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)  # losses by step, for the figure
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)  # of the self-test and of random configurations

    @property
    def passed(self) -> bool:
        """Every rung passed, and there was one."""
        return bool(self.rungs) and all(rung.passed for rung in self.rungs)

    def __getitem__(self, name: str) -> Rung:
        """The worst rung of this name."""
        return max((r for r in self.rungs if r.name == name), key=lambda r: r.worst.severity)

    @property
    def divergence(self) -> Divergence | None:
        """The first divergence of all; None where everything passed."""
        failed = [rung for rung in self.rungs if not rung.passed]
        return locate(min(failed, key=lambda rung: _rank(rung.name))) if failed else None

    def divergences(self) -> dict[str, Divergence]:
        """The first divergence forward (up to the loss) and backward (gradients), where there are any."""
        found = {}
        for direction, names in (("forward", ("rope", "activations", "loss")), ("backward", ("gradients",))):
            failed = [rung for rung in self.rungs if rung.name in names and not rung.passed]
            if failed:
                found[direction] = locate(min(failed, key=lambda rung: _rank(rung.name)))
        return found

    def to_json(self) -> dict[str, Any]:
        """The report for programs; the schema is that of the project's contract."""
        first = self.divergence
        return {
            "schema": SCHEMA,
            "target": self.target,
            "against": self.against,
            "dtype": self.dtype,
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "first_divergence": None if first is None else first.to_json(),
            "divergences": {k: d.to_json() for k, d in self.divergences().items()},
            "ledger": self.ledger,
            "inputs": self.inputs,
            "blind_spots": self.blind_spots,
            "zero_gradients": self.zero_gradients,
            "rungs": [rung.to_json() for rung in self.rungs],
            "curves": self.curves,
        } | self.extra

    def lines(self) -> list[str]:
        """The report for a terminal."""
        verdict = "agree" if self.passed else "DISAGREE"
        rows = [f"{self.dtype}: {self.target} (JAX) and {self.against} (PyTorch) {verdict}"]
        for rung in self.rungs:
            worst = rung.worst
            name = f"{rung.name} [{rung.case}]" if rung.case else rung.name
            mark = "ok  " if rung.passed else "FAIL"
            rows.append(
                f"  {mark} {name:<24} {worst.value:9.1e}  limit {worst.limit:7.1e}  "
                f"{len(rung.findings):4d} compared, worst {worst.name}"
            )
        if (first := self.divergence) is not None:
            rows.append(f"first divergence: {first.line()}")
            told = ("looks_like", "error")  # the first of the causes
            rows += [f"  {key}: {value}" for key, value in first.detail.items() if key not in told]
            rows += [f"  likely: {cause}" for cause in first.causes]
            rows += [f"  {way}: {d.line()}" for way, d in self.divergences().items() if d != first]
        return rows


def locate(rung: Rung) -> Divergence:
    """The first failing tensor of a rung, taken apart into layer and operation."""
    first = rung.first or rung.worst
    what, colon, path = first.name.partition(":")
    match = re.search(r"blocks\.(\d+)(?:\.(.+))?$", first.name)
    inside = (match[2] or "block") if match else first.name
    # "m:blocks.0.…": the slot is what parted, the path says where.
    operation = what if colon else inside
    detail = dict(first.detail)
    causes = likely_causes(rung.name, f"{what}:{inside}" if colon and match else operation, detail)
    layer = int(match[1]) if match else None
    return Divergence(
        rung.name, rung.case, layer, operation, first.name, first.value, first.limit, detail, causes
    )


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _number(value: float) -> float | str:
    """JSON has no infinity; it is spelled."""
    return value if math.isfinite(value) else str(value)
