"""One comparison of the benchmark. No framework is loaded here."""

import dataclasses
from typing import Any

from convert.bench.results import Facts
from jaxlm.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison."""

    facts: Facts
    kind: str  # the module of this package that makes its sides
    sides: tuple[str, ...]  # jaxlm first, then torchref:HOW; or the latter alone
    group: str  # cases of one group share a process
    dtype: str
    run: RunConfig | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    alone: bool = False  # each side in a process of its own: together they do not fit into memory
    seconds: float = 40.0  # that are worth beginning it for

    @property
    def name(self) -> str:
        """As it stands in results.json."""
        return self.facts.name
