"""Random configurations: valid, of every option, without a false alarm, and a real fault among them is found."""

import dataclasses
import typing
from unittest import mock

import pytest

pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")

from convert.parity import randoms  # noqa: E402
from jaxlm.config import ModelConfig, MoEConfig, RopeScaling  # noqa: E402

pytestmark = pytest.mark.torch

PARTS = {ModelConfig: lambda c: c, MoEConfig: lambda c: c.moe, RopeScaling: lambda c: c.rope_scaling}
UNUSED = {"dropout"}  # noise differs between the frameworks


def drawn(count: int) -> list[ModelConfig]:
    """Models of the strategy; drawing an invalid one raises."""
    models: list[ModelConfig] = []

    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=tuple(hypothesis.HealthCheck)
    )
    @hypothesis.seed(0)
    @hypothesis.given(randoms.models())
    def collect(model: ModelConfig) -> None:
        models.append(model)

    collect()
    return models


def test_random_models_take_every_option_both_ways() -> None:
    """Of 150 draws, each field takes several values, each named choice among them; nearly all models differ."""
    models = drawn(150)
    assert len(set(models)) > 130
    for kind, part in PARTS.items():
        used, hints = [part(model) for model in models], typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in UNUSED or dataclasses.is_dataclass(hints[field.name]):
                continue
            values = {getattr(one, field.name) for one in used}
            choices = typing.get_args(hints[field.name])
            if typing.get_origin(hints[field.name]) is typing.Literal:
                assert values == set(choices), field.name
            assert len(values) > 1, field.name


@pytest.mark.slow
def test_random_configurations_raise_no_alarm() -> None:
    """A dozen of them through every rung that depends on the configuration."""
    found = randoms.compare_random(12, seed=7, progress=print)
    assert found.passed, "\n".join(found.lines())


@pytest.mark.slow
def test_a_fault_in_one_option_is_found_and_shrunk() -> None:
    """Renormalisation lost in torchref: a random mixture finds it, and the report names the weights."""
    import torchref.moe

    route = torchref.moe.route

    def raw(logits, n_active, renormalize, ids=None):
        return route(logits, n_active, False, ids)

    with (
        mock.patch("torchref.moe.route", raw),
        mock.patch.object(randoms, "RUNGS", ("tree", "activations")),
    ):
        found = randoms.compare_random(30, seed=1, progress=print)
    assert not found.passed
    first = found.failures[0]
    assert first["divergence"]["operation"] == "moe.weights" and first["config"]["moe"]["renormalize"]
