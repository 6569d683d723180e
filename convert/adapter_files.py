"""Adapter directories, ours (adapter.json, adapter.safetensors) and peft's, and what an adapter makes of weights.

Ours holds the factors under our paths beside the configuration of the model that they belong to, so that an export to
peft needs nothing else, and a few values of that model's weights, so that it is never joined to another.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert import fingerprint, peft_adapter
from convert.fingerprint import Sample
from convert.peft_adapter import Adapter, require
from convert.rules import ConversionError, Pair
from jaxlm import model_dir
from jaxlm.adapter_config import FACTORS, AdapterConfig
from jaxlm.config import ModelConfig, load, to_dict
from jaxlm.json_file import read_object
from jaxlm.model_dir import Progress, Stored
from jaxlm.tensor_file import Lazy, Planned, open_file

if TYPE_CHECKING:
    from convert.hf.families import Layout

FACTS, TENSORS = "adapter.json", "adapter.safetensors"


@dataclass(frozen=True)
class AdapterFacts:
    """adapter.json: what the factors are, and of which model."""

    adapter: AdapterConfig
    model: ModelConfig
    family: str  # of the Hugging Face class that peft opens it on; '' = there is none
    base: str = ""  # where the model was when the adapter was made; '' = not known
    checkpoint: str = "latest"  # of a base that is a run
    merged: tuple[str, ...] = ()  # adapters that had been merged into it
    sketch: tuple[Sample, ...] = ()  # values of its weights; () = not known


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter directory of either kind, read."""

    facts: AdapterFacts
    factors: Adapter
    path: Path


def is_peft(path: Path) -> bool:
    """Whether a directory holds an adapter as peft saves it."""
    return (Path(path) / peft_adapter.CONFIG).is_file()


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter of ours."""
    return (Path(path) / FACTS).is_file()


def is_run(path: Path) -> bool:
    """Whether a directory holds a run that fine-tuned."""
    try:
        return "tune" in read_object(Path(path) / model_dir.CONFIG)
    except (OSError, ValueError):
        return False


def base_of(path: Path) -> tuple[str, str, tuple[str, ...]]:
    """Where an adapter's model is, as its files say, which checkpoint of it, and what was merged into it before.

    '' where they do not say. Raises ConversionError or ConfigError where they are damaged.
    """
    if is_adapter(path):
        facts = load(AdapterFacts, path / FACTS)
        return facts.base, facts.checkpoint, facts.merged
    try:
        name = read_object(path / peft_adapter.CONFIG).get("base_model_name_or_path")
    except ValueError as error:
        raise ConversionError(f"{path / peft_adapter.CONFIG}: {error}") from None
    return (name if isinstance(name, str) else ""), "latest", ()


def read_ours(path: Path) -> OpenedAdapter:
    """An adapter of ours. Raises ConversionError or ConfigError where it does not fit the model that it names."""
    facts = load(AdapterFacts, path / FACTS)
    factors = {name: np.asarray(tensor.read()) for name, tensor in open_file(path / TENSORS).items()}
    require(factors, facts.adapter, _shapes(facts.model))
    return require_finite(OpenedAdapter(facts, factors, path))


def read_peft(path: Path, model: ModelConfig, family: str) -> OpenedAdapter:
    """An adapter by peft, of a model of ours and the family that names its tensors. Raises ConversionError."""
    facts = AdapterFacts(AdapterConfig(1, 1.0), model, family)
    adapter, factors = peft_adapter.read_adapter(path, table(facts, _layout(path)))
    return require_finite(OpenedAdapter(dataclasses.replace(facts, adapter=adapter), factors, path))


def table(facts: AdapterFacts, layout: "Layout") -> list[Pair]:
    """The pairs of the base model that the factors' names are derived from.

    Raises ConversionError where no class of transformers computes the model.
    """
    from convert.hf.express import require_family
    from convert.hf.families import pairs

    return pairs(facts.model, facts.family or require_family(facts.model).name, layout)


def write_ours(opened: OpenedAdapter, out: Path, progress: Progress) -> dict[str, Stored]:
    """adapter.json and adapter.safetensors."""
    model_dir.write_json(out / FACTS, to_dict(opened.facts))
    plans = {name: Planned.of(Lazy.of(np.asarray(x))) for name, x in opened.factors.items()}
    return model_dir.write_tensors(out, TENSORS, plans, "jaxlm-adapter", progress)


def write_peft(opened: OpenedAdapter, out: Path, layout: "Layout", progress: Progress) -> dict[str, Stored]:
    """adapter_config.json and adapter_model.safetensors, which peft opens on the model's transformers class."""
    facts = opened.facts
    config = Path(facts.base) / model_dir.CONFIG
    known = bool(facts.base) and not facts.merged and config.is_file() and "model_type" in read_object(config)
    name = facts.base if known else ""  # a Hugging Face directory, which peft's Auto classes load
    return peft_adapter.write_adapter(
        out, opened.factors, facts.adapter, table(facts, layout), name, progress
    )


def require_base(
    facts: AdapterFacts, what: str, model: ModelConfig, tensors: Mapping[str, Lazy], coarse: bool = False
) -> None:
    """Raises ConversionError, in one line, where the model is not the one that the adapter was made for.

    what: begins that line, `ADAPTER is an adapter for another model than TARGET`. coarse: as `fingerprint.mismatch`.
    """
    if found := fingerprint.differences(model, facts.model):
        raise ConversionError(f"{what}: {'; '.join(found)}")
    if line := fingerprint.mismatch(facts.sketch, tensors, coarse):
        raise ConversionError(f"{what}, whose weights are other ones: {line}")


def with_adapter(
    tensors: Mapping[str, Lazy], factors: Mapping[str, np.ndarray], config: AdapterConfig
) -> dict[str, Lazy]:
    """Weights with W + scale * a @ b in the place of W, computed when a weight is read; the others as they are.

    Raises ConversionError where the factors do not fit.
    """
    merged = dict(tensors)
    for path in require(factors, config, {path: tensor.shape for path, tensor in tensors.items()}):
        own = {f"{path}.{slot}": factors[f"{path}.{slot}"] for slot in FACTORS}

        def read(path: str = path, base: Lazy = tensors[path], own: Adapter = own) -> np.ndarray:
            return peft_adapter.merge({path: base.read()}, own, config)[path]

        merged[path] = Lazy(tensors[path].shape, tensors[path].dtype, read, tensors[path].origin)
    return merged


def require_finite(opened: OpenedAdapter) -> OpenedAdapter:
    """The same. Raises ConversionError with every factor that holds NaN or infinity."""
    faults = [
        f"{opened.path}: {name} is not finite"
        for name, x in opened.factors.items()
        if not np.isfinite(x).all()
    ]
    if faults:
        raise ConversionError("\n".join(faults))
    return opened


def _layout(path: Path) -> "Layout":
    """Per-expert names carry the expert's number; anything else, models without experts too, is read as fused."""
    names = open_file(path / peft_adapter.TENSORS) if (path / peft_adapter.TENSORS).is_file() else {}
    return "per_expert" if any(part.isdigit() for n in names for part in _after_experts(n)) else "fused"


def _after_experts(name: str) -> list[str]:
    return name.split(".experts.")[1].split(".")[:1] if ".experts." in name else []


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    from jaxlm.model import abstract_model

    return {path: tuple(s.shape) for path, s in abstract_model(model).shapes.items()}
