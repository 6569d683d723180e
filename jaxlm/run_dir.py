"""A run's directory: which files it has, who may start in it, and what may differ when a run goes on. No jax
here.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm import config as configs
from jaxlm.config import ConfigError, InputError, RunConfig
from jaxlm.disk import replace_text
from jaxlm.tune_config import TuneRun, load_run

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch")
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.keep",
    "train.plots",
    "train.disk_full",
    "train.max_skips",
    "data.verify",
    "tune.epochs",
    "mesh",
    "log",
)


class RunDirError(InputError):
    """A run directory that cannot be used; the message is one line that says why and what to do."""


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Names of the files of a run."""

    path: Path  # runs/<name>

    @property
    def config(self) -> Path:
        """Everything that the run was told (`jaxlm.config.RunConfig`)."""
        return self.path / "config.json"

    @property
    def env(self) -> Path:
        """Versions, devices, git commit, command line, date, seed."""
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def baselines(self) -> Path:
        """Losses to compare with, in nats per token: {"bigram": 5.1}."""
        return self.path / "baselines.json"

    @property
    def plots(self) -> Path:
        """Directory of PNG files."""
        return self.path / "plots"

    @property
    def checkpoints(self) -> Path:
        """Directory of orbax checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Generated text."""
        return self.path / "samples.txt"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer the run was trained with."""
        return self.path / "tokenizer.json"

    @property
    def report(self) -> Path:
        """Report of the parity suite."""
        return self.path / "parity" / "report.json"

    def holds_run(self) -> bool:
        """Whether a run was ever started here."""
        return any(p.exists() for p in (self.config, self.metrics, self.checkpoints))

    def write_env(self, devices: Sequence[str], seed: int) -> None:
        """Writes env.json: what runs now, and under `previous` what ran before each resume, oldest first."""
        previous: list[dict[str, Any]] = []
        if self.env.is_file():
            try:
                before = json.loads(self.env.read_text(encoding="utf-8"))
                previous = [*before.pop("previous", []), before]
            except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError):
                previous = []  # provenance that cannot be read must not stop a run
        _write_json(self.env, environment(devices, seed) | {"previous": previous})

    def add_to_env(self, **values: Any) -> None:
        """Adds to env.json what is known of the present start only later."""
        _write_json(self.env, json.loads(self.env.read_text(encoding="utf-8")) | values)


def environment(devices: Sequence[str], seed: int) -> dict[str, Any]:
    """Where and by what a run is made. Versions come from the installed packages' metadata; nothing is
    imported.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "seed": seed,
        "git_commit": _git_commit(),
        "devices": list(devices),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def open_run(path: Path, config: RunConfig, resume: bool) -> tuple[RunDir, RunConfig, bool]:
    """A run directory to write to, the configuration to run with, and whether it continues a run.

    A fresh start writes config.json with `optim.decay_steps` resolved, so that later steps follow the same
    schedule however many of them there will be; resuming updates it with what may change (`MAY_CHANGE`).
    Raises RunDirError if the directory holds a run and `resume` is off, ConfigError if anything else differs;
    nothing is written then.
    """
    directory = RunDir(Path(path))
    try:
        if directory.path.exists() and not directory.path.is_dir():
            raise RunDirError(f"{path} is a file; choose another --run-dir")
        started = directory.holds_run()
        if started and not resume:
            raise RunDirError(f"{path} holds a run; continue it with --resume or choose another --run-dir")
        config = _continued(directory, config) if started else _resolved(config)
        directory.path.mkdir(parents=True, exist_ok=True)
        _write_json(directory.config, configs.to_dict(config))
    except OSError as error:
        raise RunDirError(f"{path} cannot be written: {error.strerror}; choose another --run-dir") from None
    return directory, config, started


def _resolved(config: RunConfig) -> RunConfig:
    if config.optim.decay_steps:
        return config
    optim = dataclasses.replace(config.optim, decay_steps=max(config.train.steps, config.optim.warmup_steps))
    return dataclasses.replace(config, optim=optim)


def _continued(directory: RunDir, config: RunConfig) -> RunConfig:
    """`config` if it may continue the stored run. Raises ConfigError that names every field which forbids it."""
    if not directory.config.is_file():
        raise RunDirError(f"{directory.path} cannot be resumed: {directory.config.name} is missing")
    stored = load_run(directory.config)
    if config.optim.decay_steps == 0:
        optim = dataclasses.replace(config.optim, decay_steps=stored.optim.decay_steps)
        config = dataclasses.replace(config, optim=optim)
    if type(stored) is not type(config):
        kinds = ("fine-tuning" if isinstance(one, TuneRun) else "pretraining" for one in (stored, config))
        raise ConfigError(
            f"{directory.path} cannot be resumed: it holds a run of {next(kinds)}, this is {next(kinds)}"
        )
    different = [difference for difference in diff_configs(stored, config) if not _may_change(difference[0])]
    if different:
        listed = "; ".join(f"{name} was {json.dumps(a)}, is {json.dumps(b)}" for name, a, b in different)
        raise ConfigError(
            f"{directory.path} cannot be resumed with another configuration: {listed}; "
            f"only {', '.join(MAY_CHANGE)} may change"
        )
    return config


def _may_change(name: str) -> bool:
    return any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_CHANGE)


def diff_configs(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """(dotted path, value in a, value in b) of every field in which two configs of one class differ."""
    flat_a, flat_b = _flat(configs.to_dict(a)), _flat(configs.to_dict(b))
    return [(name, flat_a[name], flat_b[name]) for name in flat_a if flat_a[name] != flat_b[name]]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def move_aside(path: Path) -> Path:
    """Renames a directory to path-1, or the first free number after it, and returns the new name."""
    path = Path(path)
    number = 1
    while (free := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return path.rename(free)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of this checkout, with -dirty where files differ from it; None where the package is not in its
    own.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
