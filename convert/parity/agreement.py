"""Float64 agreement of a jaxlm model and a torchref model on one batch: logits, loss, every gradient."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.native import to_jax
from convert.parity.compare import gradient_errors, relative_error
from convert.tree import Flat, to_numpy
from jaxlm.config import RunConfig
from jaxlm.layers import Backends
from jaxlm.model import abstract_model, merge_model
from jaxlm.train import make_gradient_fn
from torchref.model import Decoder
from torchref.train import make_gradient_fn as make_torch_gradient_fn
from torchref.train import place_batch

SCHEMA = 1  # of the report
LIMIT = 1e-12  # rounding is 1e-15 to 5e-14; the smallest planted fault is 1e-6


@dataclass(frozen=True)
class Agreement:
    """Relative errors in float64; the gradient's is that of the worst tensor, by name."""

    logits: float
    loss: float
    gradient: float
    worst: str
    n_gradients: int

    @property
    def passed(self) -> bool:
        """All three within the limit."""
        return max(self.logits, self.loss, self.gradient) <= LIMIT

    def report(self, target: str) -> dict[str, Any]:
        """The result for programs: what was compared, on what, and each rung with its error and its limit."""
        device = jax.devices()[0]
        rungs = [
            {"name": name, "passed": value <= LIMIT, "value": value, "limit": LIMIT, "worst": worst}
            for name, value, worst in (
                ("logits", self.logits, "logits"),
                ("loss", self.loss, "loss"),
                ("gradients", self.gradient, self.worst),
            )
        ]
        ledger = {
            "computation": "float64",
            "jax": {"version": jax.__version__, "device": device.device_kind},
            "torch": {"version": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()},
        }
        return {
            "schema": SCHEMA,
            "target": target,
            "dtype": "float64",
            "passed": self.passed,
            "ledger": ledger,
            "rungs": rungs,
        }

    def lines(self) -> list[str]:
        """The result for a person."""
        return [
            f"float64, jaxlm against torchref (limit {LIMIT:.0e}): {'agree' if self.passed else 'DISAGREE'}",
            f"  logits          {self.logits:.1e}",
            f"  loss            {self.loss:.1e}",
            f"  {self.n_gradients} gradients   {self.gradient:.1e}   (worst: {self.worst})",
        ]


def float64_run(run: RunConfig) -> RunConfig:
    """The same run computed in float64 in one micro-batch, without dropout (its noise differs by framework)."""
    train = dataclasses.replace(run.train, dtype="float64", param_dtype="float64", accumulation=1)
    return dataclasses.replace(run, train=train, model=dataclasses.replace(run.model, dropout=0.0))


def float64_agreement(run: RunConfig, params: Flat, twin: Decoder, batch: dict[str, np.ndarray]) -> Agreement:
    """Compares jaxlm under `params` with the torch model `twin`, both in float64, on one host batch.

    The loss is the training loss with all its terms. Weights are widened on each side from what each side holds, so a
    difference made by an export shows.
    """
    run = float64_run(run)
    with jax.enable_x64(True):
        wide = {path: jnp.asarray(value, jnp.float64) for path, value in params.items()}
        graphdef = abstract_model(run.model, dtype=jnp.float64).graphdef
        apply = jax.jit(
            lambda p, b: merge_model(graphdef, p)(
                b["inputs"], b.get("positions"), b.get("segments"), train=True
            )[0]
        )
        logits = np.asarray(apply(wide, batch))
        jax_grads, jax_metrics = jax.jit(make_gradient_fn(run, Backends()))(wide, batch)
        jax_grads = {path: np.asarray(g) for path, g in jax_grads.items()}
        jax_loss = float(jax_metrics["total_loss"])
    twin = twin.double()
    torch_batch = place_batch(batch)
    arguments = (torch_batch["inputs"], torch_batch.get("positions"), torch_batch.get("segments"))
    torch_logits = to_numpy(twin(*arguments, train=True)[0])
    torch_grads, torch_metrics = make_torch_gradient_fn(run)(twin, torch_batch)
    with jax.enable_x64(True):
        torch_flat = to_jax(run.model, {path: to_numpy(g) for path, g in torch_grads.items()})
    errors = gradient_errors(jax_grads, torch_flat)
    worst = max(errors, key=lambda path: errors[path])
    torch_loss = float(torch_metrics["total_loss"])
    return Agreement(
        relative_error(logits, torch_logits),
        abs(jax_loss - torch_loss) / abs(torch_loss),
        errors[worst],
        worst,
        len(errors),
    )
