"""The page about other people's models: its program runs as printed and says what the page quotes."""

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "convert.parity.pytest_plugin"
PAGE = ROOT / "docs" / "parity-of-your-own-model.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def claim(line: str) -> str:
    """What a quoted line claims: of a rung its verdict and name, since errors of rounding differ by machine."""
    return (
        " ".join(line.split()[:2]) if line.startswith(("  ok ", "  FAIL ")) else line.partition(", limit")[0]
    )


@pytest.mark.torch
def test_the_page_prints_what_it_quotes(tmp_path: Path) -> None:
    """All Python blocks in order are one program, and one test file; every quoted line is printed, in order."""
    script = tmp_path / "test_port.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    installed = entry_points(group="pytest11", name="jaxlm_parity")
    plugin = [] if installed else ["-p", PLUGIN]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *plugin]
    run = subprocess.run(
        [*command, "--rootdir", tmp_path, script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    printed = [claim(line) for line in run.stdout.splitlines()]
    quoted = [claim(line) for block in blocks("text") for line in block.splitlines() if line.strip() != "..."]
    assert sum(line.startswith("float64:") for line in quoted) == 2
    for line in quoted:
        assert line in printed, f"quoted but not printed from here on: {line}"
        printed = printed[printed.index(line) + 1 :]
