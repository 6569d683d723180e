"""A pytest fixture for other projects: `assert_parity(mine, theirs, RULES, [x])`. Installed with the package.

pytest imports this file at its start, before a project's conftest has set up jax, and where torch may be missing: it
imports nothing but pytest, and the frameworks when a test asks for the fixture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def assert_parity(tmp_path: Path) -> Callable[..., Any]:
    """Compares two modules (or decoders) and fails the test with the report's lines where they differ.

    Arguments and result are those of `convert.parity.assert_parity`; each report is left in the test's tmp_path as
    parity.json, parity-2.json, and so on.
    """
    pytest.importorskip("torch")
    from convert.parity import modules

    reports: list[Path] = []

    def check(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        suffix = f"-{len(reports) + 1}" if reports else ""
        reports.append(tmp_path / f"parity{suffix}.json")
        return modules.assert_parity(*args, **({"report_to": reports[-1]} | kwargs))

    return check
