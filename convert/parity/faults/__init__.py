"""The faults of the self-test, one table per part of the model, and rewrites that are no faults.

Each fault patches one function or rule of jaxlm, torchref or convert, never the comparison itself. Where the report
must find it is written by hand beside it; the suite knows none of this.
"""

from convert.parity.faults import (
    adapters,
    attention,
    conversion,
    equivalent,
    expert_kernels,
    forward,
    head,
    preferences,
    routing,
    serving,
    training,
)
from convert.parity.faults.fault import KINDS, Fault, Rewrite

__all__ = ["ALL", "EQUIVALENT", "KINDS", "Fault", "Rewrite"]

ALL: tuple[Fault, ...] = (
    *conversion.FAULTS,
    *attention.FAULTS,
    *forward.FAULTS,
    *head.FAULTS,
    *routing.FAULTS,
    *expert_kernels.FAULTS,
    *training.FAULTS,
    *serving.FAULTS,
    *preferences.FAULTS,
    *adapters.FAULTS,
)
EQUIVALENT: tuple[Rewrite, ...] = (
    *equivalent.REWRITES,
    expert_kernels.BY_KERNELS,
    *preferences.REWRITES,
    *adapters.REWRITES,
)
