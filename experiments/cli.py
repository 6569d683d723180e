"""What the entry points that train share: a run from a preset and its options, and the exit codes of jaxlm.cli."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from jaxlm import cli
from jaxlm.cli import fail, need, parse, say
from jaxlm.config import ConfigError, RunConfig
from jaxlm.loop import StoppedError
from jaxlm.presets import PRESETS, preset
from jaxlm.supervise import LaunchConfig

__all__ = ["RunOptions", "fail", "main_guard", "need", "parse", "parse_run", "say"]


def main_guard(main: Callable[[list[str]], int | None]) -> None:
    """`jaxlm.cli.main_guard`, where a run that had to stop early exits with 1."""
    cli.main_guard(main, failures=(StoppedError,))


@dataclass(frozen=True)
class RunOptions:
    """Options of the entry points that train."""

    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # the run
    run_dir: str = ""  # where everything is written; '' = runs/PRESET
    resume: bool = (
        False  # continue from the newest checkpoint of the run directory, or start fresh if there is none
    )
    profile: bool = False  # write a profiler's trace of steps 10 to 13 to profile/ of the run directory
    framework: Literal["jax", "torch"] = "jax"  # torch trains the twin on the same batches
    launch: LaunchConfig = field(default_factory=LaunchConfig)  # several processes that train together
    preset: Annotated[str, tyro.conf.Suppress] = field(default="")


def parse_run(argv: list[str], prog: str, description: str, default: str | None = None) -> RunOptions:
    """`PRESET --model.n-layers 2 …` -> options. A preset is required unless there is a default."""
    names = ", ".join(PRESETS)
    wants_help = bool({"-h", "--help"} & set(argv))
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    elif default or wants_help:
        name = default or "quickstart"
    else:
        raise ConfigError(f"name a preset first: {prog} PRESET …; presets are {names}")
    run = preset(name)
    about = f"{description}\n\nPRESET is one of {names}.\nDefaults shown below are those of {name}."
    usage = f"{prog} {'[PRESET]' if default else 'PRESET'}"
    return parse(RunOptions, argv, usage, about, RunOptions(run, preset=name))
