"""The reference's log-probabilities of every answer, computed once before DPO and kept in reference.npz of the run."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.targets import Target
from experiments.cli import say
from experiments.tuning_data import TuneData
from jaxlm.config import InputError, to_dict
from jaxlm.data.examples import Pairs
from jaxlm.data.tune_batches import TuneSettings, eval_tune_batches
from jaxlm.disk import sync
from jaxlm.finetune.dpo import reference_log_probs
from jaxlm.metrics import Progress
from jaxlm.model import Params
from jaxlm.run_dir import RunDir
from jaxlm.tune_config import TuneRun

FILE = "reference.npz"


class References(NamedTuple):
    """Summed log-probabilities of the answers, float64 [pairs, 2], chosen first; None where none are stored."""

    train: np.ndarray | None
    val: np.ndarray | None


def stored_references(
    run: TuneRun,
    directory: RunDir,
    base: Target,
    data: TuneData,
    weights: Callable[[], Params],
    mesh: Any,
) -> References:
    """Those of the run directory if they are of this base and data; else computed from `weights()`, and written there.

    Raises InputError where the file is damaged.
    """
    path, wanted = directory.path / FILE, fingerprint(run, base, data)
    if path.is_file():
        found = _read(path)
        if str(found["fingerprint"]) == wanted:
            return References(found["train"], found["val"])
        say(f"{path} is of another base or other data; computing it anew")
    params, parts = weights(), {}
    for name, pairs in (("train", data.train), ("val", data.val)):
        assert isinstance(pairs, Pairs)
        say(f"reference: log-probabilities of {len(pairs):,} pairs ({name})")
        parts[name] = _computed(run, params, pairs, mesh)
    # Under another name first: what is there under its own is whole.
    staged = path.with_suffix(".part.npz")
    np.savez(staged, fingerprint=np.array(wanted), **parts)
    sync(staged)
    staged.replace(path)
    return References(parts["train"], parts["val"])


def fingerprint(run: TuneRun, base: Target, data: TuneData) -> str:
    """SHA-256 of what decides the values: base, some of its values and how it is computed, and the pairs."""
    known = to_dict(base.facts)
    facts = {
        "weights": [known["sketch"], known["merged"]],
        "base": [run.tune.base, run.tune.checkpoint, run.tune.quant, run.train.dtype],
        "model": to_dict(run.model),
        "pairs": [data.train.fingerprint, data.val.fingerprint],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _computed(run: TuneRun, params: Params, pairs: Pairs, mesh: Any) -> np.ndarray:
    """In batches as large as a micro-batch of training."""
    rows = run.train.batch_size // run.train.accumulation
    settings = TuneSettings(run.train.seq_len, rows, run.train.seed, packing=False)
    with Progress(len(pairs)) as bar:
        batches = eval_tune_batches(pairs, settings)
        values = reference_log_probs(run, params, batches, mesh=mesh, progress=lambda n: bar.update(n))
    return np.asarray(values, np.float64)


def _read(path: Path) -> dict[str, np.ndarray]:
    """What the file holds. Raises InputError where it cannot be read."""
    try:
        # Opened here: what is damaged np.load would leave open.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in ("fingerprint", "train", "val")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}); delete it, and it is computed anew") from None
