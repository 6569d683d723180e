"""The float64 comparison that exports end with: it passes for twins and for nothing else."""

import pytest

torch = pytest.importorskip("torch")

from helpers import random_params, tiny  # noqa: E402

from convert.native import build_torch  # noqa: E402
from convert.parity.agreement import Agreement, float64_agreement  # noqa: E402
from convert.parity.compare import gradient_errors  # noqa: E402
from experiments.export import comparison_batch  # noqa: E402
from jaxlm.config import RunConfig, TrainConfig  # noqa: E402

MODEL = tiny({"router_z_coef": 1e-3}, windows=(0, 7))
RUN = RunConfig(model=MODEL, train=TrainConfig(batch_size=3, seq_len=21))


def agreement(change: str = "") -> Agreement:
    """jaxlm against its twin, after one fault has been planted in the twin."""
    params = random_params(MODEL, init="fan_in")
    twin = build_torch(MODEL, params)
    with torch.no_grad():
        if change == "expert swap":
            down = twin.blocks[1].moe.experts.down
            down.copy_(down[[1, 0, 2, 3]])
        if change == "one weight by a part in ten million":
            twin.lm_head.weight[3, 4] *= 1 + 1e-7
        if change == "eps":
            twin.blocks[1].mlp_norm.eps = 1e-6
    return float64_agreement(RUN, params, twin, comparison_batch(MODEL, 21, seed=0))


def test_twins_agree() -> None:
    """Logits, loss and every gradient within 1e-12, and the report says so."""
    found = agreement()
    assert found.passed and found.report("x")["passed"], found


@pytest.mark.parametrize("change", ["expert swap", "one weight by a part in ten million", "eps"])
def test_any_difference_is_seen(change: str) -> None:
    """One planted fault, however small, and the comparison fails."""
    found = agreement(change)
    assert not found.passed and not found.report("x")["passed"], found


def test_gradients_of_different_models_are_not_compared() -> None:
    """A tensor that only one side has is an error, not a zero."""
    import numpy as np

    with pytest.raises(KeyError, match="only one side"):
        gradient_errors({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)})
