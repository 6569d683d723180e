"""Every limit of the parity suite, each with its reason. A check names a limit instead of writing a number.

Errors are ||a - b|| / ||b|| per tensor unless the reason says otherwise; "measured" is on two CPU cores with the
models of the test suite and quickstart.
"""

from typing import NamedTuple


class Limit(NamedTuple):
    """A largest allowed value and why it is this large and no larger."""

    value: float
    reason: str


LIMITS: dict[str, Limit] = {
    "exact": Limit(0.0, "names, shapes, integers, and tensors that are only moved: no rounding is involved"),
    "float64": Limit(
        1e-12,
        "activations, losses, gradients in float64: rounding is 1e-15 to 5e-14, the smallest planted fault 1e-7",
    ),
    "float64_state": Limit(1e-12, "parameters, m and v after AdamW steps in float64: measured 2e-15"),
    "float64_delta": Limit(
        1e-10, "change of a parameter in float64: a step is g/(|g|+eps), which magnifies rounding of small g"
    ),
    "float64_scalar": Limit(1e-14, "doubles computed on the host in another order: a few roundings of 1e-16"),
    "float64_zero": Limit(
        1e-12, "norm of a gradient that is zero by mathematics, over the norm of the whole gradient"
    ),
    "perturbation": Limit(
        16.0,
        "error over the change that one rounding unit of noise on every weight makes in float64: measured 3 to 10",
    ),
    "float32_ratio": Limit(
        2.0,
        "error of JAX against float64 over PyTorch's, per tensor: measured up to 1.7 (CPU matmuls differ)",
    ),
    "bfloat16_ratio": Limit(2.0, "the same in bfloat16, every tensor: measured up to 1.4"),
    "small_tensor": Limit(
        4.0,
        "c in the factor 1 + c / sqrt(n) on a ratio of tensors under 64 elements: the errors of a few numbers vary by "
        "chance, measured 2.4 for one of 6",
    ),
    "bfloat16_whole": Limit(1.5, "whole logits and whole gradient in bfloat16: measured 0.9 to 1.1"),
    "float32_loss": Limit(5e-7, "loss in float32 against float64: one or two units of float32"),
    "float32_onnx": Limit(
        2e-6, "float32 logits in onnxruntime against float64: measured 1.7e-7, 9.7e-7 at fan-in weights"
    ),
    "bfloat16_loss": Limit(1e-2, "loss in bfloat16 against float64: one unit of bfloat16 is 4e-3"),
    "float32_kl": Limit(1e-9, "largest KL divergence of a token in nats, float32: measured 1e-12"),
    "bfloat16_kl": Limit(
        5e-4, "largest KL divergence of a token in nats, bfloat16, routing replayed: measured 1.3e-4"
    ),
    "float32_decode": Limit(5e-6, "decoding with a cache against the full forward in float32: measured 7e-7"),
    "float32_trajectory": Limit(
        3.0,
        "drift of the float32 losses between the frameworks over the largest drift that noise of one unit in the "
        "last place of every weight makes: measured 1.2 to 2.1",
    ),
    "float32_trajectory_parameters": Limit(
        5.0,
        "the same for the parameters: the ensemble is disturbed once, rounding at every step; measured 2.3 to 2.4",
    ),
    "init_sigmas": Limit(
        6.0, "deviation of the mean and the spread of initial weights in standard errors: 2e-9 by chance"
    ),
}


def limit(name: str) -> float:
    """The value of a limit."""
    return LIMITS[name].value
