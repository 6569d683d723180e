"""How an entry point ends: an interrupt, and a reader that has enough."""

import subprocess
import sys

PROGRAM = """
import atexit, sys
{imports}
from jaxlm.cli import main_guard
atexit.register(lambda: print("taken down", flush=True))
def main(argv):
    print("text", flush=True)
    {ending}
main_guard(main)
"""


def ended(ending: str, imports: str = "") -> subprocess.CompletedProcess:
    """A program whose main ends in this way."""
    program = PROGRAM.format(ending=ending, imports=imports)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_an_interrupt_leaves_at_once_where_jax_computes() -> None:
    """Exit code 130, no traceback; with jax the interpreter is not taken down: XLA's threads would crash it."""
    for imports, out in (("import jax", "text\n"), ("", "text\ntaken down\n")):
        done = ended("raise KeyboardInterrupt", imports)
        assert (done.returncode, done.stdout, done.stderr) == (130, out, "")


def test_a_reader_that_has_enough_is_no_error() -> None:
    """A closed pipe ends the program in silence."""
    program = PROGRAM.format(ending="while True: print('more' * 10_000)", imports="")
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 0
