"""Are two decoders the same model? JAX against PyTorch against float64, from the configuration to decoded tokens.

    python -m experiments.parity quickstart --steps 50          # a preset, drawn at two initialisations
    python -m experiments.parity runs/mine                      # trained weights against the twin built from them
    python -m experiments.parity runs/mine --against exported   # against what an export really holds
    python -m experiments.parity --self-test                    # plant every known fault and see it caught

TARGET runs in JAX, OTHER in PyTorch; each is a preset, a run, a model directory or file. Without OTHER it is the twin
built from TARGET's own weights. OUT gets report.json, report.md and report.html with figures. Exit code 0 only
if every rung passed, 1 if one failed, 2 on bad input.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.cli import main_guard, need, parse, say
from jaxlm.config import ConfigError, RunConfig, nearest
from jaxlm.count import require_memory
from jaxlm.presets import PRESETS, preset

if TYPE_CHECKING:
    from convert.parity.results import Report
    from torchref.model import Decoder

DEVICES = 4  # fake CPU devices, for the rung that runs on a mesh
BYTES = {"float64": 8, "float32": 4, "bfloat16": 4}  # of a master weight
COPIES = 14  # of the weights that a comparison holds at its height: both sides with gradients and moments


@dataclass(frozen=True)
class ParityOptions:
    """Options of the comparison."""

    target: Annotated[str, tyro.conf.Positional] = ""  # preset, run, model directory or file; runs in JAX
    against: str = ""  # preset, run, model directory or file; runs in PyTorch; '' = TARGET's own twin
    dtype: Literal["float64", "float32", "bfloat16"] = "float64"  # of the computation
    rungs: str = ""  # those to climb, comma-separated; '' = all
    steps: int = 50  # optimizer steps of the trajectory
    seed: int = 0  # of weights, batches and prompts
    out: str = ""  # directory of the report; '' = parity/ in a run, else parity-NAME/
    shrink: bool = False  # a preset at small sizes: all of its options, few layers, narrow
    checkpoint: Literal["latest", "best"] = "latest"  # of a run
    self_test: bool = False  # plant the known faults one by one instead, and say which rung caught each
    random: int = 0  # compare this many random valid configurations instead
    jobs: int = 2  # processes of --self-test and --random


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(ParityOptions, argv, "python -m experiments.parity", __doc__ or "")
    need("torch")
    prepare_jax()
    if options.self_test or options.random:
        if options.target or options.against:
            raise ConfigError(
                "--self-test and --random bring their own models; leave TARGET and --against out"
            )
        return plant(options) if options.self_test else roam(options)
    if not options.target:
        raise ConfigError(f"name a target: a preset ({', '.join(PRESETS)}), a run directory or a checkpoint")
    from convert.parity.report import write_report

    out = Path(options.out) if options.out else default_out(options.target)
    check_out(out)
    report = compare(options)
    write_report(report, out)
    print("\n".join(report.lines()))
    say(f"{report.seconds:.0f} s; report.json, report.md, report.html in {out}")
    return 0 if report.passed else 1


def prepare_jax() -> None:
    """CPU with a few fake devices; must come before jax is imported."""
    if "jax" in sys.modules:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()


def default_out(target: str) -> Path:
    """`parity/` inside a run directory, else a directory named after the target."""
    path = Path(target)
    return path / "parity" if path.is_dir() else Path("runs") / f"parity-{path.name}"


def check_out(out: Path) -> None:
    """Refuses a file in the place of the report's directory, before minutes are spent."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a directory for the report")


def compare(options: ParityOptions) -> "Report":
    """Opens both targets and climbs the rungs."""
    from convert.parity.suite import Options, compare_decoders

    names = tuple(name.strip() for name in options.rungs.split(",") if name.strip())
    settings = Options(dtype=options.dtype, rungs=names, steps=options.steps, seed=options.seed)
    run, params = open_jax(options.target, options)
    size = COPIES * BYTES[options.dtype]
    require_memory(run.model, size, "--shrink compares the same architecture at small sizes")
    module = open_torch(options.against, options) if options.against else None
    if options.against and params is None:
        params = drawn(run, options.seed)
    return compare_decoders(
        run,
        params,
        module,
        settings,
        target=options.target,
        against=options.against or "its twin",
        progress=narrator(),
    )


def open_jax(name: str, options: ParityOptions) -> tuple[RunConfig, dict[str, Any] | None]:
    """A target's run and, unless it is a preset, its weights."""
    if name in PRESETS and not Path(name).is_dir():
        return chosen_preset(name, options), None
    if options.shrink:
        raise ConfigError(f"--shrink is for presets; the weights of {name} have the sizes that they have")
    target = opened(name, options)
    from convert.parity.suite import decoder_run
    from convert.tree import from_jax

    return target.run or decoder_run(target.config), from_jax(target.params)


def open_torch(name: str, options: ParityOptions) -> "Decoder":
    """The torch decoder of a target; a preset's has freshly drawn weights, the same as on the JAX side."""
    from convert.native import build_torch

    if name in PRESETS and not Path(name).is_dir():
        run = chosen_preset(name, options)
        return build_torch(run.model, drawn(run, options.seed))
    return opened(name, options).decoder.cpu()


def chosen_preset(name: str, options: ParityOptions) -> RunConfig:
    """A preset, shrunk if so wished."""
    from convert.parity.inputs import shrunk

    return shrunk(preset(name)) if options.shrink else preset(name)


def opened(name: str, options: ParityOptions) -> Any:
    """A run directory or checkpoint; a misspelt preset gets its neighbours named."""
    from convert.targets import open_target

    if not Path(name).exists() and os.sep not in name:
        raise ConfigError(
            f"{name!r} is neither a preset{nearest(name, PRESETS)} nor a directory; presets are {', '.join(PRESETS)}"
        )
    return open_target(name, options.checkpoint)


def drawn(run: RunConfig, seed: int) -> dict[str, Any]:
    """Weights of a preset that is compared with something else."""
    import numpy as np

    from convert.parity.inputs import random_params
    from jaxlm.model import abstract_model

    shapes = {path: tuple(s.shape) for path, s in abstract_model(run.model).shapes.items()}
    return random_params(run.model, shapes, seed, dtype=np.float32)


def narrator() -> Callable[[str], None]:
    """Says on standard error what is being done."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda text: None
    status = console.status("starting")
    status.start()
    return lambda text: status.update(text)


def plant(options: ParityOptions) -> int:
    """The self-test."""
    from convert.parity.report import write_report
    from convert.parity.selftest import self_test

    out = Path(options.out or "runs/parity-self-test")
    check_out(out)
    found = self_test(progress=told, workers=options.jobs)
    write_report(found.report(), out)
    print("\n".join(found.lines()))
    say(f"report.json, report.md, report.html in {out}")
    return 0 if found.passed else 1


def told(name: str, done: int, total: int) -> None:
    """A line per planted fault."""
    say(f"[{done}/{total}] {name}")


def roam(options: ParityOptions) -> int:
    """Random configurations."""
    need("hypothesis", extra="test")
    from convert.parity.randoms import run_random
    from convert.parity.report import write_report

    out = Path(options.out or "runs/parity-random")
    check_out(out)
    found = run_random(options.random, seed=options.seed, jobs=options.jobs, progress=say)
    write_report(found.report(), out)
    print("\n".join(found.lines()))
    say(f"report.json, report.md, report.html in {out}")
    return 0 if found.passed else 1


if __name__ == "__main__":
    main_guard(main)
