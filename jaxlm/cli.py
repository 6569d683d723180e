"""What the entry points of all packages share: options from dataclasses (tyro), one-line errors, exit codes.

Exit codes: 0 done and right; 1 a check failed; 2 bad input (one line on standard error); 130 interrupted.
"""

import contextlib
import errno
import faulthandler
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from jaxlm import compilation
from jaxlm.config import ConfigError, InputError, MeshConfig, nearest
from jaxlm.disk import FULL

A = TypeVar("A")
WORKER = "JAXLM_WORKER"  # variable in which a supervising parent tells a process what it is
CRASHED = 70  # exit code of a supervised process that ended with an exception nobody expected
_ORDINARY = (
    FULL
    | {errno.EACCES, errno.EROFS}
    | {
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.EPERM,
        errno.EISDIR,
        errno.ENOTDIR,
    }
)  # what a person can bring about: a full disk, a place that may not be written to, a name that cannot be


def say(text: str) -> None:
    """A line for the person at the terminal; standard output belongs to results."""
    print(text, file=sys.stderr, flush=True)


def main_guard(main: Callable[[list[str]], int | None], failures: tuple[type[Exception], ...] = ()) -> None:
    """Runs an entry point and exits: bad input is one line and 2, one of `failures` 1, an interrupt 130."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for line in compilation.set_up():
        say(f"warning: {line}")
    if WORKER in os.environ:
        _supervised(main, failures)
    try:
        code = _run(main, failures)
    except KeyboardInterrupt:
        leave(130)
    sys.exit(code)


def _run(main: Callable[[list[str]], int | None], failures: tuple[type[Exception], ...]) -> int:
    """The exit code of an entry point; what a person can do something about is said in a line."""
    try:
        return main(sys.argv[1:]) or 0
    except InputError as error:
        fail(str(error))
    except failures as error:
        print(f"error: {readable(str(error))}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        # Whoever read the output has enough; the interpreter must not try to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.errno not in _ORDINARY:
            raise
        fail(f"{error.filename or 'output'}: {error.strerror}")


def _supervised(main: Callable[[list[str]], int | None], failures: tuple[type[Exception], ...]) -> None:
    """A process among several: it ends at once, never waiting at exit for peers that may wait for it."""
    code = CRASHED
    try:
        code = _run(main, failures)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        # Its parent names the process; what happened, and where its other threads were, stands in its log.
        with os.fdopen(os.dup(2), "w") as log:
            traceback.print_exc(file=log)
            log.flush()
            faulthandler.dump_traceback(log, all_threads=True)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def leave(code: int) -> None:
    """Exits; at once where jax computes, whose threads crash an interpreter that is being taken down."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if "jax" in sys.modules:
        os._exit(code)
    sys.exit(code)


def fail(message: str) -> NoReturn:
    """Prints what was wrong, a line each, and exits with 2."""
    print(f"error: {readable(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


def readable(message: str, lines: int = 40, width: int = 400) -> str:
    """A message that fits a screen and cannot steer a terminal, whatever names and values from files stand in it."""
    found = [line if len(line) <= width else f"{line[:width]} …" for line in message.split("\n")]
    if len(found) > lines:
        found = [*found[:lines], f"and {len(found) - lines} more lines"]
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in found)


def need(module: str, extra: str = "") -> None:
    """Ends with one line, exit code 2, where an optional library is missing; extra: the one that brings it."""
    if importlib.util.find_spec(module) is None:
        fail(f"this needs {module}, which is not installed: pip install 'jaxlm[{extra or module}]'")


def parse(kind: type[A], argv: list[str], prog: str, description: str, default: A | None = None) -> A:
    """tyro on a dataclass; --help prints and exits 0, everything wrong is one line. Raises ConfigError."""
    import tyro

    captured = io.StringIO()
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    wants_help = bool({"-h", "--help"} & set(argv))
    try:
        with contextlib.ExitStack() as stack:
            if not wants_help:
                stack.enter_context(contextlib.redirect_stderr(captured))
                stack.enter_context(contextlib.redirect_stdout(captured))
            return tyro.cli(
                kind,
                args=argv,
                prog=prog,
                description=description,
                registry=_registry(),
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
                **keywords,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_line(captured.getvalue())) from None


def _registry() -> Any:
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def mesh(info: Any) -> Any:
        if info.type is not MeshConfig:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="AXIS=N,…",
            instance_from_str=lambda words: MeshConfig.parse(words[0]),
            is_instance=lambda value: isinstance(value, MeshConfig),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _one_line(text: str) -> str:
    """tyro's box as one line: the message, and the nearest option where it knows one."""
    lines = [re.sub(r"^[│|╭╰+][─ -]?|[│|╮╯+]$", "", line).strip() for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and set(line) <= {"─", "-"}]
    first = 2 if rules[:1] == [1] else 1  # the title stands in the border, or on a ruled line of its own
    ends = [i for i in rules if i > first]
    body = [line for line in lines[first : ends[0] if ends else None] if line]
    message = " ".join(body) or "the command line could not be read"
    message = re.sub(
        r"^Error parsing ([\w.-]+): ", lambda m: "" if m[1].startswith("run") else f"{m[1]}: ", message
    )
    suggestions = [m[0] for line in lines if (m := re.match(r"--[\w.-]+", line))]
    unknown = re.findall(r"--[\w.-]+", message) if message.startswith("Unrecognized") else []
    if unknown:
        message = f"unknown option {unknown[0]}{nearest(unknown[0], suggestions)}; see --help"
    return message
