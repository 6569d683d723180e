"""What is measured of fine-tuning: steps of an adapter on a frozen base. No framework is loaded here."""

import dataclasses

from convert.bench.case import Case
from jaxlm.adapter_config import AdapterConfig
from jaxlm.estimate_lora import factor_count, tuning_flops_per_token
from jaxlm.tune_config import TuneConfig, TuneRun

RANK = 16


def tuned(case: Case) -> Case:
    """A case of training with an adapter in the place of all weights."""
    assert case.run is not None
    name = "/".join(case.name.split("/")[2:])
    adapter = AdapterConfig(RANK, 2.0 * RANK)
    run = TuneRun.of(case.run, TuneConfig("sft", name, adapter=adapter))
    trained, facts = factor_count(run.model, adapter), case.facts
    facts = dataclasses.replace(
        facts,
        name=f"tune/lora/{name}",
        flops=facts.work * tuning_flops_per_token(run),
        bytes=28.0 * trained,
        about=f"{facts.about}, of which {trained:,} more in an adapter of rank {RANK} are trained",
    )
    return dataclasses.replace(case, facts=facts, run=run)
