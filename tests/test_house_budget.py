"""Small, documented, and free of one machine's paths: the budgets of the house."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxlm", "torchref", "convert", "experiments")
FILE_LINES, FUNCTION_LINES = 500, 80
TEXTS = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cfg", ".sh", ""}
# Spelt in parts so that this file does not hold what it forbids.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.~/])/(work|root|home/\w+)/"),
    "a package registry's host": re.compile(
        "py" + r"pi\.org|python" + r"hosted|registry\.npm" + r"js|deb\." + r"debian"
    ),
    "a note to oneself": re.compile("TO" + "DO|FIX" + r"ME|X" + r"XX\b"),
}


def python_files(*folders: str) -> list[Path]:
    """The Python files below some folders of the project."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def too_long(name: str, source: str) -> list[str]:
    """Files and functions over budget; a function's decorators and docstring count."""
    lines = len(source.splitlines())
    broken = [f"{name}: {lines} lines, at most {FILE_LINES}"] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                broken.append(f"{name}:{node.lineno} {node.name}: {length} lines, at most {FUNCTION_LINES}")
    return broken


def undocumented(name: str, source: str) -> list[str]:
    """Public modules, classes, functions and methods without a docstring.

    `forward` and `__call__` are documented by their class where that says what they compute; dunders need none.
    """
    tree = ast.parse(source)
    broken = [] if ast.get_docstring(tree) else [f"{name}: the file has no docstring"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node) and not (prefix and node.name == "forward"):
                broken.append(f"{name}:{node.lineno} {prefix}{node.name} has no docstring")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(tree.body, "")
    return broken


def unwelcome(name: str, text: str) -> list[str]:
    """Lines that hold what belongs to one machine or one day."""
    return [
        f"{name}:{number} holds {what}: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in FORBIDDEN.items()
        if pattern.search(line)
    ]


def project_texts() -> Iterator[Path]:
    """The project's own text files: no environment, no run, no build, nothing of git."""
    skipped = re.compile(
        r"^(\.git|\.venv.*|\.\w+_cache|\.hypothesis|runs|build|dist|__pycache__|shared|.*\.egg-info)$"
    )

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or skipped.match(path.name):
                continue
            if path.is_dir():
                yield from walk(path)
            elif path.suffix in TEXTS and path.stat().st_size < 1_000_000:
                yield path

    return walk(ROOT)


def test_files_and_functions_stay_within_budget() -> None:
    """No file of the packages over 500 lines, no function over 80."""
    files = python_files(*PACKAGES)
    assert files
    broken = [
        line
        for path in files
        for line in too_long(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


def test_public_names_are_documented() -> None:
    """Every public module, class, function and method says what it is."""
    broken = [
        line
        for path in python_files(*PACKAGES)
        for line in undocumented(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


def test_no_file_belongs_to_one_machine() -> None:
    """No machine's paths, no registry's host, no notes to oneself."""
    broken = []
    for path in project_texts():
        text = path.read_text(encoding="utf-8", errors="replace")
        broken += unwelcome(str(path.relative_to(ROOT)), text)
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("check", "source", "reason"),
    [
        pytest.param(too_long, "x = 1\n" * (FILE_LINES + 1), "501", id="long-file"),
        pytest.param(too_long, "def f():\n" + "    x = 1\n" * FUNCTION_LINES, "81 lines", id="long-function"),
        pytest.param(
            too_long, "class A:\n  def f(self):\n" + "    x = 1\n" * FUNCTION_LINES, "81", id="long-method"
        ),
        pytest.param(undocumented, "x = 1", "the file has no docstring", id="bare-file"),
        pytest.param(undocumented, '"""D."""\ndef f(): ...', "f has no docstring", id="bare-function"),
        pytest.param(
            undocumented,
            '"""D."""\nclass A:\n    """D."""\n    def f(self): ...',
            "A.f has no",
            id="bare-method",
        ),
        pytest.param(unwelcome, "open('/wo" + "rk/main/x')", "path of one machine", id="path"),
        pytest.param(
            unwelcome, "pip install -i https://py" + "pi.org/simple x", "registry's host", id="registry"
        ),
        pytest.param(unwelcome, "x = 1  # TO" + "DO", "note to oneself", id="note"),
    ],
)
def test_planted_fault_is_caught(check, source: str, reason: str) -> None:
    """Each budget goes red on a source that breaks it."""
    assert any(reason in line for line in check("planted.py", source)), check("planted.py", source)


def test_what_is_within_budget_passes() -> None:
    """The limits themselves are allowed, and paths that merely look alike are."""
    long_file = "x = 1\n" * FILE_LINES
    long_function = "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)
    assert too_long("edge.py", long_file) + too_long("edge.py", long_function) == []
    assert undocumented("fine.py", '"""D."""\ndef _f(): ...') == []
    assert unwelcome("fine.py", "runs/quickstart/work/x and a network/root/y") == []
