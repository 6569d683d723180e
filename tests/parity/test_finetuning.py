"""The rungs of fine-tuning: twins pass them, dense and with experts; faults of data, adapters and losses go red."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import random_params, tiny  # noqa: E402

from convert.parity import tuning, tuning_inputs  # noqa: E402
from convert.parity.compare import Finding  # noqa: E402
from convert.parity.faults import ALL  # noqa: E402
from convert.parity.faults.plant import planted  # noqa: E402
from convert.parity.inputs import hard_batch, shrunk  # noqa: E402
from convert.parity.limits import limit  # noqa: E402
from convert.parity.rungs import Pair  # noqa: E402
from convert.parity.sides import TorchSide  # noqa: E402
from convert.parity.suite import Options, compare_decoders, hardened  # noqa: E402
from jaxlm.config import RunConfig, TrainConfig  # noqa: E402
from jaxlm.presets import preset  # noqa: E402

pytestmark = pytest.mark.torch

LENGTH = 15
RUN = RunConfig(
    model=tiny({"pattern": (True,)}, n_layers=1, qkv_bias=True), train=TrainConfig(seq_len=LENGTH)
)
OPTIONS = Options(rungs=tuple(tuning.RUNGS), length=LENGTH, steps=3, inits=("fan_in",))


def twins() -> Pair:
    """Two copies of the torch decoder, under the names of both sides: nothing has to be compiled."""
    run = hardened(RUN, OPTIONS)
    params = {k: v.astype(np.float64) for k, v in random_params(RUN.model, init="fan_in").items()}
    batch = hard_batch(4, LENGTH, RUN.model.vocab_size)
    return Pair(TorchSide.twin(run, params), TorchSide.twin(run, params), batch, "given", steps=3)  # type: ignore[arg-type]


def test_twins_agree_on_adapters_of_every_weight() -> None:
    """Which weights have factors and how these begin; activations, merged weights and gradients, experts and all."""
    report = compare_decoders(RUN, options=dataclasses.replace(OPTIONS, rungs=("lora_init", "lora")))
    assert report.passed, "\n".join(report.lines())
    assert 0 < report["lora"].worst.value <= limit("float64")
    factors = [f.name for f in report["lora"].findings if ".lora_" in f.name]
    for part in ("attn.q_proj", "experts.gate_up", "experts.down", "router", "lm_head"):
        assert any(part in name for name in factors), part


@pytest.mark.slow
def test_twins_agree_on_every_rung_of_fine_tuning() -> None:
    """Supervised, by adapters, on a quantised base, by preferences: all within the limits that the suite promises."""
    report = compare_decoders(RUN, options=OPTIONS)
    assert report.passed, "\n".join(report.lines())
    assert {rung.name for rung in report.rungs} == set(tuning.RUNGS)
    for name in ("sft", "lora", "lora_nf4", "dpo"):
        assert 0 < report[name].worst.value <= limit("float64"), name
    deltas = [f for f in report["lora_updates"].findings if f.name.startswith("delta:")]
    assert deltas and max(f.value for f in deltas) <= limit("float64_delta")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "quickstart-dense"])
def test_shrunk_presets_agree_over_fifty_steps(name: str) -> None:
    """A preset with experts and one without, over the whole trajectory."""
    report = compare_decoders(shrunk(preset(name)), options=dataclasses.replace(OPTIONS, steps=50))
    assert report.passed, "\n".join(report.lines())


@pytest.mark.parametrize(
    "name",
    [
        "loss mask shifted by one",
        "loss where examples meet",
        "positions not restarted",
        "one segment for a whole row",
    ],
)
def test_a_batch_that_is_wrong_for_both_is_seen(name: str) -> None:
    """What the loader gets wrong, both frameworks are given alike: examples written out one by one show it."""
    fault = next(fault for fault in ALL if fault.name == name)
    with planted(fault.target, fault.change):
        first = next(f for f in tuning.sft(twins()) if not f.passed)
    assert (fault.rung, fault.operation) == ("sft", first.name)


@pytest.mark.parametrize(
    ("name", "rung"),
    [
        ("norms not frozen", tuning.lora_init),
        ("merged without scale", tuning.lora),
        ("base decays", tuning.lora_updates),
    ],
)
def test_a_fault_of_both_sides_breaks_a_law(name: str, rung: Callable[[Pair], list[Finding]]) -> None:
    """Names of factors, merged = adapted and an untouched base hold on each side alone: no twin is needed to see it."""
    fault = next(fault for fault in ALL if fault.name == name)
    with planted(fault.target, fault.change):
        found = [f for f in rung(twins()) if not f.passed]
    assert found


def test_rows_are_found_again_by_their_inputs_alone() -> None:
    """An example that begins another, rows that packing leaves empty, an example that is missing."""
    data = tuning_inputs.conversations(8, LENGTH, 11)
    batch = tuning_inputs.rows_of(data, LENGTH, True)
    assert all(f.passed for f in tuning_inputs.same_rows("", batch, tuning_inputs.packed_rows(data, batch)))
    lost = {k: np.where(np.arange(len(v))[:, None] == 0, 0, v) for k, v in batch.items()}
    findings = tuning_inputs.same_rows("packed", lost, tuning_inputs.packed_rows(data, lost))
    assert next(f.name for f in findings if not f.passed) == "packed inputs"


def test_conversations_and_preferences_are_hard() -> None:
    """A full row, an answer of one token, prompts and answers of unequal lengths, some to the row's end."""
    data = tuning_inputs.conversations(8, LENGTH, 61)
    assert LENGTH + 1 in data.lengths and 2 in data.lengths and len(set(data.lengths)) > 4
    pairs = tuning_inputs.preferences(4, LENGTH, 61)
    for chosen, rejected in zip(*(map(side.example, range(4)) for side in (pairs.chosen, pairs.rejected))):
        prompt = int((~chosen[1]).sum())
        assert prompt and np.array_equal(chosen[0][:prompt], rejected[0][:prompt])
        assert max(len(chosen[0]), len(rejected[0])) == LENGTH + 1
