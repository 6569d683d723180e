"""Adapter directories: ours (adapter.json, adapter.safetensors), peft's, and models that an adapter is merged into.

Ours holds the factors under our paths beside the configuration of the model that they belong to, so that an export to
peft needs nothing else.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert import peft_adapter
from convert.hf.express import require_family
from convert.hf.families import Layout, pairs
from convert.peft_adapter import Adapter, AdapterConfig, require
from convert.rules import ConversionError, Pair
from convert.targets import Target
from jaxlm import model_dir
from jaxlm.config import ModelConfig, load, to_dict
from jaxlm.model_dir import Progress, Stored
from jaxlm.tensor_file import Lazy, Planned, open_file

FACTS, TENSORS = "adapter.json", "adapter.safetensors"


@dataclass(frozen=True)
class AdapterFacts:
    """adapter.json: what the factors are, and of which model."""

    adapter: AdapterConfig
    model: ModelConfig
    family: str  # of the Hugging Face class that peft opens it on


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


def open_adapter(path: Path, base: Target | None = None) -> OpenedAdapter:
    """Reads an adapter; one that peft saved needs the base model, whose table names its tensors.

    Raises ConversionError where it is not an adapter, not of this model, or holds NaN or infinity.
    """
    opened = _opened(Path(path), base)
    faults = [
        f"{opened.path}: {name} is not finite"
        for name, x in opened.factors.items()
        if not np.isfinite(x).all()
    ]
    if faults:
        raise ConversionError("\n".join(faults))
    return opened


def _opened(path: Path, base: Target | None) -> OpenedAdapter:
    if is_adapter(path):
        facts = load(AdapterFacts, path / FACTS)
        factors = {name: tensor.read() for name, tensor in open_file(path / TENSORS).items()}
        require(factors, facts.adapter, _shapes(table(facts, "fused")))
        return OpenedAdapter(facts, factors, path)
    if not is_peft(path):
        raise ConversionError(f"{path} holds neither {FACTS} nor {peft_adapter.CONFIG}: it is no adapter")
    if base is None:
        raise ConversionError(
            f"{path} is an adapter by peft; name the model it belongs to with --base TARGET"
        )
    family = base.contents.family or require_family(base.config).name
    facts = AdapterFacts(AdapterConfig(1, 1.0), base.config, family)
    adapter, factors = peft_adapter.read_adapter(path, table(facts, _layout(path)))
    return OpenedAdapter(dataclasses.replace(facts, adapter=adapter), factors, path)


def table(facts: AdapterFacts, layout: Layout) -> list[Pair]:
    """The pairs of the base model that the factors' names are derived from."""
    return pairs(facts.model, facts.family, layout)


def write_ours(opened: OpenedAdapter, out: Path, progress: Progress) -> dict[str, Stored]:
    """adapter.json and adapter.safetensors."""
    model_dir.write_json(out / FACTS, to_dict(opened.facts))
    plans = {name: Planned.of(Lazy.of(np.asarray(x))) for name, x in opened.factors.items()}
    return model_dir.write_tensors(out, TENSORS, plans, "jaxlm-adapter", progress)


def write_peft(opened: OpenedAdapter, out: Path, layout: Layout, progress: Progress) -> dict[str, Stored]:
    """adapter_config.json and adapter_model.safetensors, which peft opens on the model's transformers class."""
    facts = opened.facts
    return peft_adapter.write_adapter(
        out, opened.factors, facts.adapter, table(facts, layout), progress=progress
    )


def merged(target: Target, opened: OpenedAdapter) -> Target:
    """The target with W + scale * a @ b in the place of W, computed when a weight is read."""
    config, tensors = opened.facts.adapter, dict(target.contents.tensors)
    for path in require(opened.factors, config, {path: t.shape for path, t in tensors.items()}):
        own = {f"{path}.{slot}": opened.factors[f"{path}.{slot}"] for slot in ("lora_a", "lora_b")}

        def read(path: str = path, base: Lazy = tensors[path], own: Adapter = own) -> np.ndarray:
            return peft_adapter.merge({path: base.read()}, own, config)[path]

        tensors[path] = Lazy(tensors[path].shape, tensors[path].dtype, read, tensors[path].origin)
    notes = (*target.contents.notes, f"merged with the adapter in {opened.path}")
    contents = dataclasses.replace(target.contents, tensors=tensors, moments=None, notes=notes)
    return dataclasses.replace(target, foreign=contents)


def _layout(path: Path) -> Layout:
    """Per-expert names carry the expert's number; anything else, models without experts too, is read as fused."""
    names = open_file(path / peft_adapter.TENSORS) if (path / peft_adapter.TENSORS).is_file() else {}
    return "per_expert" if any(part.isdigit() for n in names for part in _after_experts(n)) else "fused"


def _after_experts(name: str) -> list[str]:
    return name.split(".experts.")[1].split(".")[:1] if ".experts." in name else []


def _shapes(table: list[Pair]) -> dict[str, tuple[int, ...]]:
    return {pair.path: pair.shape for pair in table}
