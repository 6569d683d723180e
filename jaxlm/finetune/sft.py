"""Supervised fine-tuning: the pretraining loss on the tokens that carry loss, of all weights or of an adapter.

Twin: torchref/finetune/sft.py. What carries loss is said by the batch (jaxlm/data), so nothing else is new here.
"""

import functools

from jax import Array

from jaxlm.finetune.lora import adapted, adapted_decoder, init_factors
from jaxlm.layers import Backends
from jaxlm.loss import Counts
from jaxlm.model import Params
from jaxlm.train import Batch, Task, evaluation, loss_and_metrics, pretraining
from jaxlm.tune_config import TuneRun


def sft_task(run: TuneRun, backends: Backends = Backends()) -> Task:
    """All weights where the run has no adapter; else the factors, on a frozen base in train.dtype or quantised."""
    adapter = run.tune.adapter
    if adapter is None:
        return pretraining(run, backends)
    form = adapted(run, backends)

    def loss(
        params: Params, frozen: Params, batch: Batch, counts: Counts, train: bool, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        decoder = adapted_decoder(form.graphdef, frozen, params, key)
        return loss_and_metrics(run, decoder, batch, counts, train, key)

    def evaluate(params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
        return evaluation(adapted_decoder(form.graphdef, frozen, params), batch)

    return Task(
        form.shapes,
        form.axes,
        functools.partial(init_factors, run),
        loss,
        evaluate,
        bool(run.model.dropout or adapter.dropout),
        form.frozen_shapes,
        form.frozen_axes,
    )
