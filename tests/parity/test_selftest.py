"""The suite's test of itself: the table of faults is what it claims to be, and faults are planted, found and undone."""

import dataclasses
from collections import Counter

import pytest

import torchref.layers
from convert.parity.faults import ALL, EQUIVALENT, KINDS, Fault, Rewrite
from convert.parity.faults.plant import SelfTestError, planted, resolve
from convert.parity.results import ORDER
from convert.parity.selftest import (
    AT_LEAST,
    Outcome,
    SelfTest,
    _Worker,
    self_test,
    small_options,
    table,
    try_fault,
)
from convert.parity.tuning import RUNGS

# What the faults below need of the suite; the whole of it is climbed by the slow test.
QUICK = dataclasses.replace(small_options(), rungs=("config", "tree", "rope", "activations", "loss"))
CHEAP = dataclasses.replace(small_options(), rungs=("config", "tree"))


def fault_named(name: str) -> Fault:
    """A fault of the table."""
    fault = table()[name]
    assert isinstance(fault, Fault)
    return fault


def all_well() -> SelfTest:
    """A self-test as it should end."""
    faults = [Outcome(f.name, f.kind, True, f.rung, True, "here", "here") for f in ALL]
    return SelfTest(faults, [Outcome(r.name, "", False, "", False) for r in EQUIVALENT])


def test_table_is_as_large_as_promised() -> None:
    """Faults of all 17 kinds, four of each at least, and enough rewrites; every name stands once."""
    assert len(KINDS) == 17
    assert len(ALL) >= AT_LEAST["faults"] == 60
    assert len(EQUIVALENT) >= AT_LEAST["rewrites"] == 8
    counts = Counter(fault.kind for fault in ALL)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= AT_LEAST["of each kind"] == 4
    names = Counter(change.name for change in (*ALL, *EQUIVALENT))
    assert max(names.values()) == 1, [name for name, count in names.items() if count > 1]


def test_faults_lie_in_both_columns() -> None:
    """Neither framework is taken for the truth: each carries a third of the faults at least."""
    packages = Counter(fault.target.partition(".")[0] for fault in ALL)
    assert min(packages["jaxlm"], packages["torchref"]) >= len(ALL) / 3, packages


def test_targets_exist_outside_the_comparison() -> None:
    """What a fault replaces is there, in one of the three packages, and no part of the suite."""
    for target in sorted({change.target for change in (*ALL, *EQUIVALENT)}):
        owner, name = resolve(target)
        home = getattr(owner, "__module__", None) or owner.__name__
        origin = getattr(vars(owner)[name], "__module__", home) or home
        for module in (target, home, origin):
            assert not module.startswith("convert.parity"), f"{target} patches the comparison"
        assert home.partition(".")[0] in ("jaxlm", "torchref", "convert"), target


def test_expectations_name_a_rung_and_an_operation() -> None:
    """The expected place of every fault is a rung of the report, with an operation in it."""
    wrong = [fault.name for fault in ALL if fault.rung not in ORDER or not fault.operation]
    assert not wrong


def test_a_fault_that_climbs_few_rungs_is_of_nothing_else() -> None:
    """Faults are planted under the whole suite, but for those in packages that no other rung computes with."""
    homes = ("jaxlm.finetune.", "torchref.finetune.", "jaxlm.quant.", "torchref.quant.", "jaxlm.data.")
    few = [fault for fault in (*ALL, *EQUIVALENT) if fault.rungs]
    assert few and all(set(fault.rungs) <= set(RUNGS) for fault in few)
    assert not [fault.name for fault in few if not fault.target.startswith(homes)]


def test_unknown_target_is_refused() -> None:
    """A target that a renaming has left behind is said, not skipped."""
    with pytest.raises(SelfTestError, match="does not exist"):
        resolve("torchref.attention.no_such_function")
    with pytest.raises(SelfTestError, match="there is no fault"):
        self_test(names=["no such fault"])


def test_fault_is_undone_after_an_error() -> None:
    """Whatever happens under a fault, the original is back afterwards."""
    before = vars(torchref.layers.RMSNorm)["forward"]
    with pytest.raises(ZeroDivisionError), planted("torchref.layers.RMSNorm.forward", lambda original: None):
        assert torchref.layers.RMSNorm.forward is None
        raise ZeroDivisionError
    assert vars(torchref.layers.RMSNorm)["forward"] is before


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("weights rounded to bfloat16 on the way", id="tree"),
        pytest.param("angles in float32", id="rope"),
        pytest.param("eps lost, 1e-6", id="activations"),
        pytest.param("padding counted", id="loss"),
    ],
)
def test_fault_is_caught_and_located(name: str) -> None:
    """The ordinary report names the rung and the operation that stand in the table."""
    outcome = try_fault(fault_named(name), QUICK)
    assert outcome.caught
    assert outcome.located, f"expected {outcome.expected}, found {outcome.found}"
    assert outcome.caught_by == fault_named(name).rung


def test_equivalent_rewrite_is_quiet() -> None:
    """A norm that divides instead of multiplying by the inverse root is no fault."""
    outcome = try_fault(next(r for r in EQUIVALENT if r.name == "norm by division"), QUICK)
    assert not outcome.caught, outcome.found


def test_wrong_place_is_not_located() -> None:
    """A fault that is caught elsewhere than the table says counts as caught, not as located."""
    fault = dataclasses.replace(fault_named("biases start at zero in the twin"), operation="attn.q_proj.bias")
    outcome = try_fault(fault, CHEAP)
    assert outcome.caught
    assert not outcome.located
    assert (outcome.expected, outcome.found) == ("tree attn.q_proj.bias", "tree attn.k_proj.bias")


def test_fault_without_effect_is_missed() -> None:
    """A change that changes nothing is not caught: catching is no matter of course."""
    idle = dataclasses.replace(fault_named("biases start at zero in the twin"), change=lambda rules: rules)
    outcome = try_fault(idle, CHEAP)
    assert not outcome.caught
    assert not outcome.located
    alarm = Rewrite("an alarm", idle.target, fault_named(idle.name).change)
    assert try_fault(alarm, CHEAP).caught


def test_result_passes_only_as_a_whole() -> None:
    """A missed fault, many in wrong places, a false alarm, a dead worker, a thin table: each fails it."""
    assert all_well().passed
    assert all_well().to_json()["false_alarms"] == []
    missed, astray, alarmed, dead, thin = (all_well() for _ in range(5))
    missed.faults[3] = dataclasses.replace(missed.faults[3], caught=False, located=False)
    astray.faults = [dataclasses.replace(f, located=i > len(ALL) * 0.06) for i, f in enumerate(astray.faults)]
    alarmed.rewrites[0] = dataclasses.replace(alarmed.rewrites[0], caught=True)
    dead.faults[5] = dataclasses.replace(dead.faults[5], caught=False, located=False, error="the worker died")
    thin.faults = [f for f in thin.faults if f.kind != "sharding"]
    for result, reason in (
        (missed, "not caught: "),
        (astray, "must be 95%"),
        (alarmed, "false alarm: "),
        (dead, "no answer for "),
        (thin, "fewer than 4 faults of kind sharding"),
    ):
        assert not result.passed
        assert any(reason in line for line in result.problems), result.problems
        assert any(reason in line for line in result.lines())


def test_dead_worker_is_an_error_not_a_catch(tmp_path) -> None:
    """A fault whose process dies has no outcome, and the table says why."""
    worker = _Worker(str(tmp_path))
    try:
        worker.process.kill()
        outcome = worker.ask("theta lost")
    finally:
        worker.close()
    assert outcome.error
    assert (outcome.caught, outcome.located, outcome.kind) == (False, False, "RoPE")


@pytest.mark.slow
def test_every_fault_is_caught_and_no_rewrite_alarms() -> None:
    """The whole table on two workers."""
    result = self_test()
    assert result.passed, "\n".join(result.lines())
    assert len(result.faults) == len(ALL)
    assert len(result.rewrites) == len(EQUIVALENT)
