"""Adapters and the models they belong to: opened beside them, merged into them, written at the end of a LoRA run."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert import carry
from convert.adapter_files import (
    AdapterFacts,
    OpenedAdapter,
    is_adapter,
    is_peft,
    require_base,
    require_finite,
    table,
    write_ours,
    write_peft,
)
from convert.kept import SOURCE
from convert.peft_adapter import Adapter, require
from convert.run_contents import BASE, facts_of
from convert.specials import TEMPLATE
from convert.targets import Target, read_adapter
from convert.targets import with_adapter as merged
from jaxlm import model_dir
from jaxlm.config import to_dict
from jaxlm.tokenizer import template_file
from jaxlm.tune_config import TuneRun

__all__ = [
    "Adapter",
    "AdapterFacts",
    "OpenedAdapter",
    "adapter_of",
    "is_adapter",
    "is_peft",
    "keep_base",
    "merged",
    "open_adapter",
    "require_base",
    "table",
    "write_ours",
    "write_peft",
    "write_run_adapter",
]


def open_adapter(path: Path, base: Target | None = None) -> OpenedAdapter:
    """Reads an adapter of ours, that of a LoRA run, or one that peft saved; the last needs the base model, whose table
    names its tensors, and gets it for its own.

    Whether the others belong to `base` is for `merged` or `require_base` to say. Raises ConversionError where it is no
    adapter, not of this model, or holds NaN or infinity.
    """
    opened = read_adapter(Path(path), base)
    if base is None or opened.facts.sketch or not is_peft(opened.path):
        return opened
    known = base.facts
    facts = dataclasses.replace(
        opened.facts,
        base=known.base,
        checkpoint=base.checkpoint,
        merged=known.merged,
        sketch=known.sketch,
    )
    return dataclasses.replace(opened, facts=facts)


def adapter_of(target: Target) -> OpenedAdapter:
    """The bare adapter of a LoRA run's chosen checkpoint; needs the base only where the run has no base.json.

    Raises ConversionError where the target is no such run, or its factors hold NaN or infinity.
    """
    return target.adapter


def write_run_adapter(run: TuneRun, factors: Mapping[str, np.ndarray], base: Target, out: Path) -> None:
    """A LoRA run's factors as an adapter directory of ours, in the place of an earlier one, whole or not at all.

    base: the model that they were trained on. Raises ConversionError where they do not fit it, or are not finite.
    """
    assert run.tune.adapter is not None
    arrays = {name: np.asarray(x) for name, x in factors.items()}
    require(arrays, run.tune.adapter, {path: t.shape for path, t in base.contents.tensors.items()})
    opened = require_finite(OpenedAdapter(facts_of(run, base.facts), arrays, Path(out)))
    with model_dir.staged(Path(out), overwrite=True) as staging:
        stored = write_ours(opened, staging, lambda n: None)
        model_dir.write_manifest(staging, "jaxlm-adapter", stored)


def keep_base(base: Target, directory: Path, template: str | None = None, lora: bool = True) -> None:
    """Leaves in a new run directory what it needs of its base to be opened and exported.

    These are tokenizer.json and source/, as in a model directory, and for LoRA base.json, by which another base is
    told. template: the chat template that takes the place of the base's. Files of an earlier call are replaced.
    """
    directory = Path(directory)
    shutil.rmtree(directory / SOURCE, ignore_errors=True)
    carry.keep(base, directory, "", True)
    if template is not None:
        template_file(directory / "tokenizer.json").write_text(template, encoding="utf-8")
        if (directory / SOURCE).is_dir():
            (directory / SOURCE / TEMPLATE).write_text(template, encoding="utf-8")
    if lora:
        model_dir.write_json(directory / BASE, to_dict(base.facts))
