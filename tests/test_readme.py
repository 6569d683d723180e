"""README.md says what is true: its commands exist, its flags are in their help, its tested blocks run.

A fenced block ```sh is checked for targets, modules and flags; a block ```sh test is also executed, in a copy.
"""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MODULE = re.compile(r"(experiments\.\w+|convert)$")
HELP_SECONDS = 60  # of an import on a loaded machine; a help that trains a model takes longer


class Block(NamedTuple):
    """A fenced sh block: its commands, continuation lines joined, and whether it is to be executed."""

    commands: list[str]
    executed: bool


def blocks(text: str) -> list[Block]:
    """The sh blocks of a Markdown text."""
    found = []
    for info, body in re.findall(r"^```sh([^\n]*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        lines = body.replace("\\\n", " ").splitlines()
        commands = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        found.append(Block(commands, "test" in info.split()))
    return found


def words(command: str) -> list[str]:
    """A command's words, comments dropped, up to the first pipe or redirection."""
    every = shlex.split(command, comments=True)
    end = next(
        (i for i, word in enumerate(every) if word in ("|", "||", "&&", ";", "&", ">", ">>", "2>&1")),
        len(every),
    )
    return every[:end]


def make_targets(command: str) -> list[str]:
    """`make test PYTEST_ARGS=-x` -> ['test']."""
    split = words(command)
    return [w for w in split[1:] if "=" not in w and not w.startswith("-")] if split[:1] == ["make"] else []


def module_call(command: str) -> tuple[str, list[str]] | None:
    """`VAR=1 python -m experiments.pretrain tiny --x 1` -> ('experiments.pretrain', ['tiny', '--x', '1'])."""
    split = words(command)
    if "-m" not in split[:-1]:
        return None
    at = split.index("-m")
    return (split[at + 1], split[at + 2 :]) if MODULE.match(split[at + 1]) else None


def unknown_flags(arguments: list[str], help_text: str) -> list[str]:
    """Flags of a command line that a help text does not list."""
    flags = [word.partition("=")[0] for word in arguments if re.match(r"--[A-Za-z]", word)]
    return [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w.-])", help_text)]


@functools.cache
def help_of(module: str, leading: tuple[str, ...]) -> str:
    """What `python -m module leading... --help` prints; it must exit with 0."""
    result = subprocess.run(
        [sys.executable, "-m", module, *leading, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=HELP_SECONDS,
    )
    assert result.returncode == 0, f"python -m {module} {' '.join(leading)} --help:\n{result.stderr[-2000:]}"
    return result.stdout


def readme() -> str:
    """The README's text."""
    return README.read_text(encoding="utf-8")


def test_make_targets_exist() -> None:
    """Every `make X` of the README is a target of the Makefile."""
    targets = set(
        re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    used = {
        target for block in blocks(readme()) for command in block.commands for target in make_targets(command)
    }
    assert used - targets == set()


def test_modules_answer_help_and_know_their_flags() -> None:
    """Every `python -m experiments.X` of the README has a help, and every flag used stands in it."""
    text = readme()
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("tyro")):
        pytest.skip("the entry points need PyTorch and tyro")
    broken = []
    for command in [command for block in blocks(text) for command in block.commands]:
        if (call := module_call(command)) is None:
            continue
        module, arguments = call
        first_flag = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
        help_text = help_of(module, ()) + (
            help_of(module, tuple(arguments[:first_flag])) if first_flag else ""
        )
        broken += [f"{flag} is not in the help: {command}" for flag in unknown_flags(arguments, help_text)]
    assert not broken, "\n".join(broken)


def test_linked_files_exist() -> None:
    """Every relative link of the README leads to a file."""
    links = re.findall(r"\]\((?!https?://|mailto:|#)([^)#\s]+)", readme())
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.timeout(900)  # a minute or two alone, and every command compiles
def test_tested_blocks_run(tmp_path: Path) -> None:
    """The blocks marked `sh test` run as they stand, in order, in a copy of the project."""
    tested = [block for block in blocks(readme()) if block.executed]
    assert tested, "README.md marks no block as tested"
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("tyro")):
        pytest.skip("the commands train in both frameworks")
    copy = tmp_path / "jaxlm"
    left = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build"
    )
    shutil.copytree(ROOT, copy, ignore=left)
    strict = ("XLA_FLAGS", "OMP_NUM_THREADS")  # a user sets neither
    environment = {name: value for name, value in os.environ.items() if name not in strict}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for block in tested:
        assert not any(make_targets(command) for command in block.commands), (
            "make would build an environment of its own"
        )
        script = "set -eu\n" + "\n".join(block.commands)
        result = subprocess.run(
            ["bash", "-c", script], cwd=copy, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, f"{script}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    for program in re.findall(r"^```python\n(.*?)^```", readme(), flags=re.MULTILINE | re.DOTALL):
        command = [sys.executable, "-c", program]
        result = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, f"{program}\n{result.stderr[-2000:]}"


def test_preset_table_is_the_presets() -> None:
    """Every preset stands in the table with its exact parameter count, and nothing else does."""
    from jaxlm.presets import PRESETS

    rows = dict(re.findall(r"^\| `([\w.-]+)` \| ([\d,]+) \|", readme(), flags=re.MULTILINE))
    assert rows == {name: f"{preset.params:,}" for name, preset in PRESETS.items()}


SAMPLE = """
```sh
make test PYTEST_ARGS="-k rope"  # a comment with --no-flag
# python -m experiments.none
python -m experiments.pretrain tiny --model.n-layers 4 \\
    --mesh fsdp=4,expert=2 | tee log
```
```python
make nothing
```
```sh test
JAX_PLATFORMS=cpu python -m convert verify runs/quickstart --out=x
```
"""


def test_commands_are_read_from_markdown() -> None:
    """Continuations are joined, comments and pipes dropped, other languages left alone."""
    shown, tested = blocks(SAMPLE)
    assert (shown.executed, tested.executed) == (False, True)
    assert make_targets(shown.commands[0]) == ["test"]
    arguments = ["tiny", "--model.n-layers", "4", "--mesh", "fsdp=4,expert=2"]
    assert module_call(shown.commands[1]) == ("experiments.pretrain", arguments)
    assert module_call(tested.commands[0]) == ("convert", ["verify", "runs/quickstart", "--out=x"])
    assert module_call(shown.commands[0]) is None


def test_planted_flag_is_caught() -> None:
    """A flag counts as known only when the whole of it stands in the help."""
    help_text = "--model.n-layers INT   --out DIR   --shuffle, --no-shuffle"
    assert unknown_flags(["tiny", "--model.n-layers", "4", "--out=x", "--no-shuffle"], help_text) == []
    assert unknown_flags(["--model.n", "--layers", "--output", "--lr", "1"], help_text) == [
        "--model.n",
        "--layers",
        "--output",
        "--lr",
    ]
