"""The error measures of the parity suite: what must fail fails, and guesses about a difference are facts."""

import math

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")

from tolerances import tolerance

from convert.parity.compare import compare, compare_all, compare_gradients, kl_divergence, relative_error
from convert.parity.explain import explain

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
A = RNG.standard_normal((24, 36))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.array([np.nan, 1.0]), np.array([1.0, 1.0])),
        (np.array([1.0, 1.0]), np.array([np.nan, 1.0])),
        (np.ones(2), np.ones(3)),
        (np.ones((1, 2)), np.ones(2)),
        (np.array([-np.inf, 1.0]), np.array([0.0, 1.0])),
        (np.array([np.inf]), np.array([-np.inf])),
        (np.ones(2), np.zeros(2)),
    ],
    ids=["nan", "nan in the reference", "length", "rank", "mask", "sign", "zero reference"],
)
def test_what_cannot_be_compared_is_infinitely_wrong(a: np.ndarray, b: np.ndarray) -> None:
    """NaN, another shape, a key seen by one side only: no limit passes it."""
    assert relative_error(a, b) == math.inf and not compare("x", a, b, 1e300).passed


def test_equal_infinities_are_equal() -> None:
    """Scores of keys that neither side may see."""
    assert relative_error([-np.inf, 2.0], [-np.inf, 2.0]) == 0
    assert relative_error([-np.inf, 2.0], [-np.inf, 1.0]) == 1


def test_a_tensor_of_one_side_only_is_a_failure() -> None:
    """In either direction."""
    ours, theirs = compare_all({"a": A}, {"b": A}, 1.0)
    assert (ours.detail, theirs.detail) == ({"missing": "torch"}, {"missing": "jax"})
    assert not ours.passed and not theirs.passed
    assert not any(f.passed for f in compare_gradients({"a": A}, {"b": A}, 1.0))


def test_small_gradients_are_measured_against_the_whole() -> None:
    """Rounding of a gradient that cancels is no error; half of a small gradient is one."""
    ours, theirs = {"large": A, "small": A * 1e-17}, {"large": A, "small": -A * 1e-17}
    assert all(f.passed for f in compare_gradients(ours, theirs, 1e-9))
    ours, theirs = {"large": A, "small": A * 1e-5}, {"large": A, "small": A * 2e-5}
    assert [f.passed for f in compare_gradients(ours, theirs, 1e-2)] == [True, False]


def test_zero_gradients_must_be_zero() -> None:
    """A gradient that mathematics calls zero fails when it is not, on either side."""
    small, wrong = A * 1e-17, A * 1e-3
    for a, b, passed in ((small, -small, True), (wrong, small, False), (small, wrong, False)):
        found = compare_gradients({"x": A, "z": a}, {"x": A, "z": b}, 1e-12, zero={"z"}, zero_limit=1e-12)
        assert found[1].passed == passed


def test_kl_divergence_is_that_of_the_definition() -> None:
    """Against the sum over explicit probabilities, and zero for shifted logits."""
    p, q = RNG.standard_normal((2, 5, 7))
    a, b = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p, q))
    expected = (a * np.log(a / b)).sum(-1)
    assert relative_error(kl_divergence(p, q), expected) <= tolerance("f64")
    assert kl_divergence(p, p + 3).max() <= tolerance("f64")


HALF = np.arange(6).reshape(2, 3).T.reshape(-1)
EVERY = (np.arange(0, 36, 6)[:, None] + HALF).reshape(-1)
E = RNG.standard_normal((4, 5, 6))
SQUARE = RNG.standard_normal((8, 8))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (A, A.astype(ml_dtypes.bfloat16).astype(float), "torch's is jax's rounded to bfloat16"),
        (A.astype(np.float16).astype(float), A, "jax's is torch's rounded to float16"),
        (A, 2.5 * A, "times 2.5"),
        (A, A + 0.5, "plus 0.5"),
        (A, np.zeros_like(A), "all zeros"),
        (A, A[:, EVERY], "(all heads, H=6)"),
        (A, np.concatenate([A[:, :12], A[:, 12:18][:, HALF], A[:, 18:]], 1), "(head 2, H=6)"),
        (A, A[::-1], "in reverse order"),
        (E, E[[1, 0, 2, 3]], "experts 0 and 1 exchanged"),
        (E, E[..., [3, 4, 5, 0, 1, 2]], "two halves of axis 2"),
        (SQUARE, SQUARE.T, "transposed"),
        (A, A[RNG.permutation(24)], "permuted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_difference_is_explained(a: np.ndarray, b: np.ndarray, words: str) -> None:
    """Rounding, factor, shift, layout, order: each recognised from the values alone."""
    assert words in explain(a, b)


def test_no_explanation_is_made_up() -> None:
    """Noise, one changed element and another shape have no simple story."""
    changed = A.copy()
    changed[3, 4] *= 1.001
    for b in (A + 1e-9 * RNG.standard_normal(A.shape), changed, A[:5]):
        assert explain(A, b) == ""
