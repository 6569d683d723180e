"""What a run of jaxlm holds: the weights of a checkpoint, or the factors of an adapter and the base they belong to."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import fingerprint
from convert.adapter_files import AdapterFacts, OpenedAdapter, require_finite, with_adapter
from convert.contents import Contents, Moments, TargetError
from convert.fingerprint import Sample
from convert.kept import SOURCE, kept
from convert.peft_adapter import Adapter
from jaxlm.config import ModelConfig, RunConfig, load
from jaxlm.run_dir import RunDir
from jaxlm.tensor_file import Lazy
from jaxlm.tune_config import TuneRun

BASE = "base.json"  # of a LoRA run


@dataclass(frozen=True)
class BaseFacts:
    """base.json: what the base of a LoRA run was known by when the run began."""

    family: str  # of the Hugging Face class that computes it; '' = there is none
    sketch: tuple[Sample, ...]
    base: str = ""  # where it was
    merged: tuple[str, ...] = ()  # adapters that were merged into it


def is_lora(run: RunConfig | None) -> bool:
    """Whether a run trains an adapter, and so keeps no weights of its own."""
    return isinstance(run, TuneRun) and run.tune.adapter is not None


def of_run(run: RunConfig, path: Path, which: Any) -> Contents:
    """An orbax checkpoint on one device, whatever mesh saved it."""
    import jax

    from jaxlm import optim

    state, directory = _restored(run, path, which), str(RunDir(path).checkpoints)
    adam = optim.moments(state.opt_state)
    params = {name: Lazy.of(np.asarray(x), directory) for name, x in state.params.items()}
    raw, carried = kept(path)
    wide = {name for name, x in adam.v.items() if isinstance(x, jax.Array)}
    if wide != params.keys():
        others = len(params) - len(wide)
        note = f"{others} parameters have Muon's momentum or moments in 8 bits; no other format takes the optimizer"
        return Contents(params, raw=raw, carried=carried, notes=(note,))
    m, v = ({name: Lazy.of(np.asarray(x), directory) for name, x in slot.items()} for slot in adam)
    moments = Moments(m, v, int(state.step - state.guard.skipped))
    return Contents(params, moments, raw, carried)


def bare_adapter(run: TuneRun, path: Path, which: Any, base: BaseFacts) -> OpenedAdapter:
    """The adapter of a LoRA run's checkpoint by itself. Raises ConversionError where it holds NaN or infinity."""
    return require_finite(OpenedAdapter(facts_of(run, base), _factors(run, path, which), path))


def facts_of(run: TuneRun, base: BaseFacts) -> AdapterFacts:
    """What stands beside the factors of a LoRA run in an adapter directory."""
    assert run.tune.adapter is not None
    where = base.base or str(Path(run.tune.base).resolve())
    known = (base.family, where, run.tune.checkpoint, base.merged, base.sketch)
    return AdapterFacts(run.tune.adapter, run.model, *known)


def of_lora_run(run: TuneRun, path: Path, which: Any, model: ModelConfig, base: Contents) -> Contents:
    """The base with the adapter of a checkpoint merged, weight by weight as they are read.

    model: of the base. Raises TargetError where it is no longer the one that the run was trained on.
    """
    assert run.tune.adapter is not None
    require_unchanged(run, path, model, base.tensors)
    tensors = with_adapter(base.tensors, _factors(run, path, which), run.tune.adapter)
    notes = [*base.notes, f"merged with the adapter of {path}"]
    if run.tune.quant != "none":
        notes.append(f"the base was rounded to {run.tune.quant} in training; here it is as it was before")
    if (path / SOURCE).is_dir():
        raw, carried = kept(path)
        base = dataclasses.replace(base, raw=raw, carried=carried, specials=None, tokenizer=None)
    return dataclasses.replace(base, tensors=tensors, moments=None, notes=tuple(notes))


def base_facts(path: Path) -> BaseFacts | None:
    """base.json of a run, None where it has none. Raises ConfigError where it is damaged."""
    return load(BaseFacts, path / BASE) if (path / BASE).is_file() else None


def require_unchanged(run: TuneRun, path: Path, model: ModelConfig, tensors: Mapping[str, Lazy]) -> None:
    """Raises TargetError, in one line, where a base is not the one that a LoRA run began with."""
    facts = base_facts(path)
    adapters = f" with the adapter {' and '.join(facts.merged)}" if facts is not None and facts.merged else ""
    where = f"{path} was tuned on {run.tune.base}{adapters}; that is another model now"
    if found := fingerprint.differences(model, run.model):
        raise TargetError(f"{where}: {'; '.join(found)}")
    if facts is not None and (line := fingerprint.mismatch(facts.sketch, tensors)):
        raise TargetError(f"{where}: {line}")


def _factors(run: TuneRun, path: Path, which: Any) -> Adapter:
    return {name: np.asarray(x) for name, x in _restored(run, path, which).params.items()}


def _restored(run: RunConfig, path: Path, which: Any) -> Any:
    from jaxlm.checkpoint import Checkpoints
    from jaxlm.engine import restore_state

    return restore_state(run, Checkpoints(RunDir(path).checkpoints), which)[0]
